// AVX2, FMA and F16C: sixteen registers of eight floats.
#define EORACC_ISA avx2
#define EORACC_LANES 8
#define EORACC_ROW_TILE 6
#include "cpu/kernel.inl"
