// Few rows of X with the dot products of ARMv8.2.

#include "cpu/few_rows_neon.inl"

namespace eoracc {
const FewRows few_rows_neon_dotprod = kFewRowsTable;
}
