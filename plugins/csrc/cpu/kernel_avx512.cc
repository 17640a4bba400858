// AVX-512 F, BW, DQ and VL: thirty-two registers of sixteen floats.
#define EORACC_ISA avx512
#define EORACC_LANES 16
#define EORACC_ROW_TILE 12
#include "cpu/kernel.inl"
