// Selects the kernel for many rows of X, and tests whether this process may use AMX.

#include "cpu/many_rows.h"

#include "cpu/found_once.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace eoracc {

#if defined(__x86_64__)

// Linux saves tile registers, 8 KiB per thread, only for processes that request it.
bool has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  constexpr int64_t kRefused = 1, kGranted = 2;
  static FoundOnce answer;
  return answer.get([] {
    const bool granted = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                         __builtin_cpu_supports("avx512bf16") &&
                         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted ? kGranted : kRefused;
  }) == kGranted;
#else
  return false;
#endif
}

// Measured on 4096 x 4096 and 1536 x 576, 2 and 4 bits, one thread: from this many rows on
// unpacking a panel first is faster than the FewRows, which unpack for every 16 rows. int8 sums of
// AVX-512 and AVX2 are so much faster than float ones that the former never gain.
ManyRows find_many_rows(eoracc_isa isa, const eoracc_matmul& m) {
  const bool int8 = m.accuracy_level == 4;
  switch (isa) {
    case EORACC_ISA_AVX2:
      return m.rows >= (int8 ? 48 : 8) ? many_rows_avx2 : nullptr;
    case EORACC_ISA_AVX512:
      return m.rows >= 12 && !int8 ? many_rows_avx512 : nullptr;
    case EORACC_ISA_AVX512_VNNI:
      if (!int8) return m.rows >= 12 ? many_rows_avx512 : nullptr;
      return m.rows >= 17 ? many_rows_avx512_vnni : nullptr;
    case EORACC_ISA_AMX:
      if (!int8) return m.rows >= 12 ? many_rows_avx512 : nullptr;
      // In short sums bfloat16 can be off by more than int8, which is exact for the largest of a
      // block.
      return m.rows >= 9 && m.in_features >= 64 ? many_rows_amx : nullptr;
    default:
      return nullptr;
  }
}

#elif defined(__aarch64__)

// The FewRows unpack for every 16 rows. Not measured: there was no such processor at hand.
ManyRows find_many_rows(eoracc_isa isa, const eoracc_matmul& m) {
  if (m.accuracy_level != 4 || m.rows <= kFewRows) return nullptr;
  switch (isa) {
    case EORACC_ISA_NEON_DOTPROD:
      return many_rows_neon_dotprod;
    case EORACC_ISA_NEON_I8MM:
      return many_rows_neon_i8mm;
    default:
      return nullptr;
  }
}

#else

ManyRows find_many_rows(eoracc_isa, const eoracc_matmul&) { return nullptr; }

#endif

}  // namespace eoracc
