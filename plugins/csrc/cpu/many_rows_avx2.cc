// Many rows in float32, 6 rows of X by one tile: 12 of the 16 registers hold sums.

#define EORACC_LANES 8
#define EORACC_ROW_BLOCK 6
#include "cpu/many_rows_float.inl"

namespace eoracc {

eoracc_result many_rows_avx2(const eoracc_matmul& m, const eoracc_threads& threads) {
  return many_rows(m, threads);
}

}  // namespace eoracc
