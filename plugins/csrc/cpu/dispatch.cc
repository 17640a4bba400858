// Checks the operands and picks the instruction set.

#include "cpu/isa.h"

namespace eoracc {
namespace {

bool is_float(int32_t type) { return type == EORACC_FLOAT32 || type == EORACC_FLOAT16; }

bool is_factor(int32_t type, const void* data, const float* scale) {
  return data != nullptr && (is_float(type) || (type == EORACC_INT8 && scale != nullptr));
}

bool is_valid(const eoracc_matmul& m) {
  if (m.rows < 0 || m.in_features <= 0 || m.out_features <= 0 || m.rank < 0) return false;
  if (m.bits != 2 && m.bits != 3 && m.bits != 4 && m.bits != 8) return false;
  if (m.group_size <= 0 || m.group_size % 8 != 0) return false;
  if (!is_float(m.x_type) || !is_float(m.scales_type)) return false;
  if (m.codes == nullptr || m.scales == nullptr) return false;
  if (m.rows > 0 && (m.x == nullptr || m.y == nullptr)) return false;
  return m.rank == 0 || (is_factor(m.lora_a_type, m.lora_a, m.lora_a_scale) &&
                         is_factor(m.lora_b_type, m.lora_b, m.lora_b_scale));
}

Matmul find(eoracc_isa isa) {
  switch (isa) {
    case EORACC_ISA_BASELINE:
      return baseline::matmul;
#if defined(__x86_64__)
    case EORACC_ISA_AVX2:
      if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
          __builtin_cpu_supports("f16c")) {
        return avx2::matmul;
      }
      return nullptr;
    case EORACC_ISA_AVX512:
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return avx512::matmul;
      }
      return nullptr;
#endif
    default:
      return nullptr;
  }
}

void run_here(void*, size_t count, void (*task)(void*, size_t), void* data) {
  for (size_t i = 0; i < count; ++i) task(data, i);
}

}  // namespace
}  // namespace eoracc

eoracc_isa eoracc_best_isa(void) {
  static const eoracc_isa best = eoracc::find(EORACC_ISA_AVX512) ? EORACC_ISA_AVX512
                                 : eoracc::find(EORACC_ISA_AVX2) ? EORACC_ISA_AVX2
                                                                 : EORACC_ISA_BASELINE;
  return best;
}

eoracc_result eoracc_matmul_nbits_lowrank(const eoracc_matmul* matmul,
                                          const eoracc_threads* threads, eoracc_isa isa) {
  if (matmul == nullptr || !eoracc::is_valid(*matmul)) return EORACC_BAD_OPERAND;
  const eoracc::Matmul kernel = eoracc::find(isa == EORACC_ISA_BEST ? eoracc_best_isa() : isa);
  if (kernel == nullptr) return EORACC_NO_SUCH_ISA;
  if (matmul->rows == 0) return EORACC_OK;
  const bool lent = threads != nullptr && threads->run != nullptr;
  return kernel(*matmul, lent ? *threads : eoracc_threads{eoracc::run_here, nullptr});
}

int32_t eoracc_abi_version(void) { return EORACC_ABI_VERSION; }

const char* eoracc_version(void) { return EORACC_VERSION; }
