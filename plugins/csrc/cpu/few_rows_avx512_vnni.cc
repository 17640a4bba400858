// AVX-512 with VNNI, VBMI and GFNI: one instruction sums four products of bytes in each lane, one
// cuts any bits out of every byte.
#include "cpu/few_rows_avx512.inl"

namespace eoracc {

const FewRows few_rows_avx512_vnni = {read_row,    normalize_row, quantize_row,
                                      int8_tile,   float_tile,    dense_tile,
                                      finish_tile, int8_tiles,    int8_factor_tile};

}  // namespace eoracc
