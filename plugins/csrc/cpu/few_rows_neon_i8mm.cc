// Few rows of X with the int8 matrix products of ARMv8.6.

#include "cpu/few_rows_neon.inl"

namespace eoracc {
const FewRows few_rows_neon_i8mm = kFewRowsTable;
}
