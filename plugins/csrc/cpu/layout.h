// Between the plain layout, row by row, and the tiled one that the kernels read.
//
// The plain layout of a weight [rows, columns] is codes [rows, G, group_size * bits / 8] with
// G = ceil(columns / group_size), each group one little-endian bit stream: code i of a group takes
// the bits [i * bits, (i + 1) * bits). matmul_nbits_lowrank.h describes the tiled one.

#ifndef EORACC_CPU_LAYOUT_H_
#define EORACC_CPU_LAYOUT_H_

#include "cpu/matmul_nbits_lowrank.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of the codes of one tile; 0 for bits other than 2, 3, 4, 6 and 8.
EORACC_API size_t eoracc_tile_bytes(int64_t columns, int32_t bits);

// Plain codes to tiled ones, ceil(rows / 16) * eoracc_tile_bytes() bytes, padded with code 0.
EORACC_API void eoracc_tile_codes(const uint8_t* plain, int64_t rows, int64_t columns, int32_t bits,
                                  int64_t group_size, uint8_t* tiled);

// The inverse; codes of the last group beyond `columns` become 0.
EORACC_API void eoracc_untile_codes(const uint8_t* tiled, int64_t rows, int64_t columns,
                                    int32_t bits, int64_t group_size, uint8_t* plain);

// [rows, columns] to [ceil(rows / 16), columns, 16], padded with zeros: scales, zero points and
// factors of a float type. Elements have 1, 2 or 4 bytes.
EORACC_API void eoracc_tile_elements(const void* plain, int64_t rows, int64_t columns,
                                     size_t element_bytes, void* tiled);

// The inverse.
EORACC_API void eoracc_untile_elements(const void* tiled, int64_t rows, int64_t columns,
                                       size_t element_bytes, void* plain);

// An int8 factor [rows, columns] to [ceil(rows / 16), ceil(columns / 4), 64] bytes, each
// value + 128, padded with value 0.
EORACC_API void eoracc_tile_int8(const int8_t* plain, int64_t rows, int64_t columns,
                                 uint8_t* tiled);

// The inverse.
EORACC_API void eoracc_untile_int8(const uint8_t* tiled, int64_t rows, int64_t columns,
                                   int8_t* plain);

#ifdef __cplusplus
}
#endif

#endif  // EORACC_CPU_LAYOUT_H_
