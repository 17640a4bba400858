// Many rows of X with the dot products of ARMv8.2.

#include "cpu/many_rows_neon.inl"

namespace eoracc {

eoracc_result many_rows_neon_dotprod(const eoracc_matmul& m, const eoracc_threads& threads) {
  return many_rows(m, threads);
}

}  // namespace eoracc
