// The functions that a kernel for an instruction set provides.
//
// A new kernel consists of a file few_rows_<name>.cc that defines a FewRows table (rows.inl has the
// functions for which plain loops suffice), optionally a file many_rows_<name>.cc with a ManyRows,
// and its lines in dispatch.cc and many_rows.cc. The suffix of a file's name selects its compiler
// flags, see CMakeLists.txt. These files must not use templates of the standard library: the linker
// keeps one copy of an instance for all instruction sets, possibly one that this processor cannot
// run.
//
// A FewRows function gets one row of X or one tile of the weight and does not deal with threads:
// the driver (driver.cc) lays out scratch, distributes work to threads and orders the steps. A
// ManyRows computes the whole product by itself.

#ifndef EORACC_CPU_KERNELS_H_
#define EORACC_CPU_KERNELS_H_

#include "cpu/chunk.h"
#include "cpu/matmul_nbits_lowrank.h"

namespace eoracc {

constexpr int64_t kTile = EORACC_TILE;
constexpr int64_t kUnit = 32;  // columns that rows of X are padded to: a whole chunk at any width
constexpr int64_t kFewRows = 16;     // most rows that a FewRows function is handed
constexpr int64_t kTilesAtOnce = 4;  // tiles that are read side by side

// Rows of X, or of the down-projected X, ready to be multiplied. Rows are `stride` columns apart,
// a multiple of kUnit; columns in [columns, stride) are 0. Arrays are 64-byte aligned.
struct Activations {
  int64_t rows;          // 1 to kFewRows
  int64_t columns;       // K
  int64_t stride;        // K rounded up to kUnit, or more
  int64_t block;         // columns that share an int8 scale: 8, 16 or 32
  const float* values;   // [rows, stride]
  const int8_t* codes;   // [rows, stride] in [-127, 127]; null at accuracy level 0, as the next two
  const float* scales;   // [rows, stride / block], NaN where the block holds a NaN or an infinity
  const int32_t* minus;  // [rows, stride / block], the negated sum of the block's codes
};

// An n-bit weight in the tiled layout: the backbone, or an integer factor (8 or 4 bits, one group).
struct Tiles {
  int64_t columns;     // K
  int64_t groups;      // G
  int64_t group_size;  // a multiple of Activations::block; at least K for a factor
  int64_t tile_bytes;  // codes of a tile
  int32_t bits;        // 2, 3, 4, 6 or 8
  int32_t scales_type;
  const uint8_t* codes;        // [tiles, tile_bytes]
  const void* scales;          // [tiles, G, 16] float32 or float16
  const uint8_t* zero_points;  // [tiles, G, 16], or null for 2^(bits - 1)
};

// A factor of a float type: [tiles, columns, 16].
struct DenseTiles {
  int64_t columns;
  int32_t type;  // float32 or float16
  const void* values;
};

// The destination of finished sums.
struct Output {
  int32_t type;        // of y, bias and residual
  int32_t activation;  // eoracc_activation
  int64_t width;       // elements in a row of y
  int64_t gate_width;  // out features of part 0 with an activation, else 0
  const void* bias;
  const void* residual;
  void* y;
};

struct FewRows {
  // Widens elements [0, columns) of x to floats, then zeros up to `stride`.
  void (*read_row)(int32_t type, const void* x, int64_t columns, int64_t stride, float* values);

  // values[i] = values[i] / sqrt(mean(values^2) + epsilon) * weight[i], in place.
  void (*normalize_row)(const float* weight, int64_t columns, float epsilon, float* values);

  // Rounds a row to int8, see Activations. `stride` is a multiple of kUnit.
  void (*quantize_row)(const float* values, int64_t stride, int64_t block, int8_t* codes,
                       float* scales, int32_t* minus);

  // Each adds X times one tile to sums [rows, 16]: int8 activations, float activations, and float
  // activations with a factor of a float type.
  void (*int8_tile)(const Activations& x, const Tiles& w, int64_t tile, float* sums);
  void (*float_tile)(const Activations& x, const Tiles& w, int64_t tile, float* sums);
  void (*dense_tile)(const Activations& x, const DenseTiles& w, int64_t tile, float* sums);

  // Writes `count` (at most 16) columns of y from `column` on, for rows [first, first + rows):
  // act(gate + its bias) * (sum + its bias) + residual, or sum + bias + residual where `gates` is
  // null. sums and gates are [rows, 16].
  void (*finish_tile)(const Output& output, int64_t first, int64_t rows, int64_t column,
                      int64_t count, const float* gates, const float* sums);

  // int8_tile for one row of X and the kTilesAtOnce tiles tile, tile + stride, and so on, to sums
  // [kTilesAtOnce, 16]: memory is read fastest in several streams. Null if reading one tile after
  // another is as fast.
  void (*int8_tiles)(const Activations& x, const Tiles& w, int64_t tile, int64_t stride,
                     float* sums);

  // int8_tile for one row of X and a tile of an integer factor, which has one group and no zero
  // points, also in several streams. Null if int8_tile is as fast.
  void (*int8_factor_tile)(const Activations& x, const Tiles& w, int64_t tile, float* sums);
};

// The whole product. Operands are checked, and there is at least one row.
typedef eoracc_result (*ManyRows)(const eoracc_matmul& m, const eoracc_threads& threads);

// The ManyRows of an instruction set for this product; null if there is none, or if the FewRows,
// kFewRows rows at a time, are faster. Defined in many_rows.cc.
ManyRows find_many_rows(eoracc_isa isa, const eoracc_matmul& m);

extern const FewRows few_rows_scalar;
#if defined(__x86_64__)
extern const FewRows few_rows_avx2;
extern const FewRows few_rows_avx512;
extern const FewRows few_rows_avx512_vnni;
#elif defined(__aarch64__)
extern const FewRows few_rows_neon_dotprod;
extern const FewRows few_rows_neon_i8mm;
#endif

// The product by FewRows functions, in blocks of kFewRows rows. Defined in driver.cc.
eoracc_result multiply_few_rows(const FewRows& kernels, const eoracc_matmul& m,
                                const eoracc_threads& threads);

}  // namespace eoracc

#endif  // EORACC_CPU_KERNELS_H_
