// What every instruction set's build of kernel.inl provides to dispatch.cc.

#ifndef EORACC_CPU_ISA_H_
#define EORACC_CPU_ISA_H_

#include "cpu/matmul_nbits_lowrank.h"

namespace eoracc {

// The operands have been checked and there is at least one row.
using Matmul = eoracc_result (*)(const eoracc_matmul&, const eoracc_threads&);

namespace baseline {
eoracc_result matmul(const eoracc_matmul&, const eoracc_threads&);
}
namespace avx2 {
eoracc_result matmul(const eoracc_matmul&, const eoracc_threads&);
}
namespace avx512 {
eoracc_result matmul(const eoracc_matmul&, const eoracc_threads&);
}

}  // namespace eoracc

#endif  // EORACC_CPU_ISA_H_
