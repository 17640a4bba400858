// Kernels for many rows of X (prefill), one for each arithmetic. kernels.h declares the type.

#ifndef EORACC_CPU_MANY_ROWS_H_
#define EORACC_CPU_MANY_ROWS_H_

#include "cpu/kernels.h"

namespace eoracc {

#if defined(__x86_64__)
// Whether the processor has AMX with bfloat16, and the operating system lets this process use it.
bool has_amx();

// float32 throughout: exact enough for either accuracy level.
eoracc_result many_rows_avx2(const eoracc_matmul& m, const eoracc_threads& threads);
eoracc_result many_rows_avx512(const eoracc_matmul& m, const eoracc_threads& threads);

// Accuracy level 4: int8 activations.
eoracc_result many_rows_avx512_vnni(const eoracc_matmul& m, const eoracc_threads& threads);

// Accuracy level 4: bfloat16 activations and weights, float32 sums.
eoracc_result many_rows_amx(const eoracc_matmul& m, const eoracc_threads& threads);
#elif defined(__aarch64__)
// Accuracy level 4: int8 activations.
eoracc_result many_rows_neon_dotprod(const eoracc_matmul& m, const eoracc_threads& threads);
eoracc_result many_rows_neon_i8mm(const eoracc_matmul& m, const eoracc_threads& threads);
#endif

}  // namespace eoracc

#endif  // EORACC_CPU_MANY_ROWS_H_
