// Rows of an n-bit table as floats, read in place in either layout.

#ifndef EORACC_CPU_GATHER_NBITS_H_
#define EORACC_CPU_GATHER_NBITS_H_

#include "cpu/matmul_nbits_lowrank.h"

namespace eoracc {

// A weight as matmul_nbits_lowrank.h (tiled) or layout.h (plain) describes it.
struct Table {
  int64_t columns;     // K
  int64_t group_size;  // a positive multiple of 8
  int32_t bits;
  int32_t scales_type;  // float32 or float16
  bool tiled;
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zero_points;  // null for 2^(bits - 1)
};

// Writes (code - zero point) * scale of each row to `values` [count, columns]. Rows are those that
// the table has; in tiles, the padding of the last tile included.
void gather_rows(const Table& table, const int64_t* rows, int64_t count, float* values);

}  // namespace eoracc

#endif  // EORACC_CPU_GATHER_NBITS_H_
