// Many rows of X with the int8 matrix products of ARMv8.6.

#include "cpu/many_rows_neon.inl"

namespace eoracc {

eoracc_result many_rows_neon_i8mm(const eoracc_matmul& m, const eoracc_threads& threads) {
  return many_rows(m, threads);
}

}  // namespace eoracc
