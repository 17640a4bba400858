// What every processor of the architecture has: SSE2 on x86-64, NEON on AArch64.
#define EORACC_ISA baseline
#define EORACC_LANES 4
#if defined(__aarch64__)
#define EORACC_ROW_TILE 12
#else
#define EORACC_ROW_TILE 6
#endif
#include "cpu/kernel.inl"
