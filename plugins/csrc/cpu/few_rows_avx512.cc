// AVX-512 F, BW, DQ and VL.
#include "cpu/few_rows_avx512.inl"

namespace eoracc {

const FewRows few_rows_avx512 = {read_row,    normalize_row, quantize_row,
                                 int8_tile,   float_tile,    dense_tile,
                                 finish_tile, int8_tiles,    int8_factor_tile};

}  // namespace eoracc
