// Many rows in float32, 12 rows of X by two tiles: 24 of the 32 registers hold sums.

#define EORACC_LANES 16
#define EORACC_ROW_BLOCK 12
#include "cpu/many_rows_float.inl"

namespace eoracc {

eoracc_result many_rows_avx512(const eoracc_matmul& m, const eoracc_threads& threads) {
  return many_rows(m, threads);
}

}  // namespace eoracc
