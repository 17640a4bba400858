// Checks the operands and picks the kernel for this processor.

#include <string.h>

#include "cpu/found_once.h"
#include "cpu/kernels.h"
#include "cpu/many_rows.h"
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace eoracc {
namespace {

struct InstructionSet {
  eoracc_isa isa;
  bool (*is_supported)();
  const FewRows* few_rows;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
}
#elif defined(__aarch64__) && defined(__linux__)
bool has_neon_dotprod() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

bool has_neon_i8mm() { return has_neon_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#endif

// The best one first.
constexpr InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {EORACC_ISA_AMX, [] { return has_avx512_vnni() && has_amx(); }, &few_rows_avx512_vnni},
    {EORACC_ISA_AVX512_VNNI, has_avx512_vnni, &few_rows_avx512_vnni},
    {EORACC_ISA_AVX512, has_avx512, &few_rows_avx512},
    {EORACC_ISA_AVX2, has_avx2, &few_rows_avx2},
#elif defined(__aarch64__) && defined(__linux__)
    {EORACC_ISA_NEON_I8MM, has_neon_i8mm, &few_rows_neon_i8mm},
    {EORACC_ISA_NEON_DOTPROD, has_neon_dotprod, &few_rows_neon_dotprod},
#endif
    {EORACC_ISA_SCALAR, [] { return true; }, &few_rows_scalar},
};

// The entry of `isa`, null where this processor or this build lacks it.
const InstructionSet* find(eoracc_isa isa) {
  for (const InstructionSet& set : kInstructionSets) {
    if ((isa == EORACC_ISA_BEST || isa == set.isa) && set.is_supported()) return &set;
  }
  return nullptr;
}

bool is_float(int32_t type) { return type == EORACC_FLOAT32 || type == EORACC_FLOAT16; }

bool is_factor(int32_t type, const void* data, const float* scale) {
  if (data == nullptr) return false;
  return is_float(type) || ((type == EORACC_INT8 || type == EORACC_INT4) && scale != nullptr);
}

constexpr int64_t kLimit = int64_t{1} << 31;

// The largest of the parts' ranks is that of the term.
bool are_ranks(const eoracc_matmul& m) {
  int64_t largest = 0;
  for (int32_t part = 0; part < (m.part_count > 1 ? m.part_count : 1); ++part) {
    if (m.ranks[part] < 0 || m.ranks[part] >= kLimit) return false;
    if (m.ranks[part] > largest) largest = m.ranks[part];
  }
  return largest == m.rank;
}

// Several parts are whole tiles, in their rows of lora_a as well unless each has its own rank, and
// make up the weight.
bool are_parts(const eoracc_matmul& m) {
  if (m.part_count < 0 || m.part_count > EORACC_MAX_PARTS) return false;
  const bool gated = m.activation != EORACC_IDENTITY;
  if (m.ranks != nullptr && !are_ranks(m)) return false;
  if (m.part_count < 2) return !gated;
  if (m.parts == nullptr || (m.ranks == nullptr && m.rank % kTile != 0)) return false;
  int64_t features = 0;
  for (int32_t part = 0; part < m.part_count; ++part) {
    if (m.parts[part] <= 0 || m.parts[part] % kTile != 0) return false;
    if (m.parts[part] > m.out_features - features) return false;
    features += m.parts[part];
  }
  if (features != m.out_features) return false;
  return !gated || (m.part_count == 2 && m.parts[0] == m.parts[1]);
}

// Every row uses an adapter that there is, or none.
bool is_bank(const eoracc_bank& bank, int64_t rows) {
  if (bank.count <= 0 || bank.count >= kLimit || bank.rank < 0 || bank.rank >= kLimit) return false;
  if (bank.rank % kTile != 0 || bank.index_count < 0 || bank.index_rows < 0) return false;
  int64_t indexed = 0;
  if (__builtin_mul_overflow(bank.index_count, bank.index_rows, &indexed) || indexed != rows) {
    return false;
  }
  if (bank.index_count > 0 && bank.index == nullptr) return false;
  for (int64_t i = 0; i < bank.index_count; ++i) {
    int32_t adapter;
    memcpy(&adapter, bank.index + i, sizeof adapter);
    if (adapter >= bank.count) return false;
  }
  return bank.rank == 0 || (bank.a_scale != nullptr && is_factor(bank.type, bank.a, bank.a_scale) &&
                            is_factor(bank.type, bank.b, bank.b_scale));
}

bool is_valid(const eoracc_matmul& m) {
  if (m.rows < 0 || m.in_features <= 0 || m.out_features <= 0 || m.rank < 0) return false;
  if (m.in_features >= kLimit || m.out_features >= kLimit || m.rank >= kLimit) return false;
  if (!is_code_width(m.bits)) return false;
  if (m.group_size <= 0 || m.group_size % 8 != 0) return false;
  if (m.accuracy_level != 0 && m.accuracy_level != 4) return false;
  if (m.activation < EORACC_IDENTITY || m.activation > EORACC_GELU_TANH) return false;
  if (!are_parts(m)) return false;
  if (!is_float(m.x_type) && m.x_type != EORACC_BFLOAT16) return false;
  if (!is_float(m.scales_type)) return false;
  if (m.codes == nullptr || m.scales == nullptr) return false;
  if (m.rows > 0 && (m.x == nullptr || m.y == nullptr)) return false;
  if (m.bank != nullptr && !is_bank(*m.bank, m.rows)) return false;
  return m.rank == 0 || (is_factor(m.lora_a_type, m.lora_a, m.lora_a_scale) &&
                         is_factor(m.lora_b_type, m.lora_b, m.lora_b_scale));
}

void run_here(void*, size_t count, void (*task)(void*, size_t), void* data) {
  for (size_t i = 0; i < count; ++i) task(data, i);
}

}  // namespace
}  // namespace eoracc

eoracc_isa eoracc_best_isa(void) {
  static eoracc::FoundOnce best;
  return (eoracc_isa)best.get([] { return eoracc::find(EORACC_ISA_BEST)->isa; });
}

eoracc_result eoracc_matmul_nbits_lowrank(const eoracc_matmul* matmul,
                                          const eoracc_threads* threads, eoracc_isa isa) {
  if (matmul == nullptr || !eoracc::is_valid(*matmul)) return EORACC_BAD_OPERAND;
  const eoracc::InstructionSet* set =
      eoracc::find(isa == EORACC_ISA_BEST ? eoracc_best_isa() : isa);
  if (set == nullptr) return EORACC_NO_SUCH_ISA;
  if (matmul->rows == 0) return EORACC_OK;
  const bool lent = threads != nullptr && threads->run != nullptr;
  const eoracc_threads pool = lent ? *threads : eoracc_threads{eoracc::run_here, nullptr};
  const eoracc::ManyRows many_rows = eoracc::find_many_rows(set->isa, *matmul);
  if (many_rows != nullptr) return many_rows(*matmul, pool);
  return eoracc::multiply_few_rows(*set->few_rows, *matmul, pool);
}

int32_t eoracc_abi_version(void) { return EORACC_ABI_VERSION; }

const char* eoracc_version(void) { return EORACC_VERSION; }
