// A problem as the C interface takes it.

#ifndef EORACC_TESTS_NATIVE_CALL_H_
#define EORACC_TESTS_NATIVE_CALL_H_

#include "cpu/matmul_nbits_lowrank.h"
#include "tests/native/problem.h"

namespace eoracc::testing {

struct InstructionSet {
  const char* name;
  eoracc_isa isa;
};

constexpr InstructionSet kInstructionSets[] = {
    {"scalar", EORACC_ISA_SCALAR},
    {"avx2", EORACC_ISA_AVX2},
    {"avx512", EORACC_ISA_AVX512},
    {"avx512_vnni", EORACC_ISA_AVX512_VNNI},
    {"amx", EORACC_ISA_AMX},
    {"neon_dotprod", EORACC_ISA_NEON_DOTPROD},
    {"neon_i8mm", EORACC_ISA_NEON_I8MM},
};

inline int32_t type_of(Type type) {
  constexpr int32_t kTypes[] = {EORACC_FLOAT32, EORACC_FLOAT16, EORACC_BFLOAT16, EORACC_INT8,
                                EORACC_INT4};
  return kTypes[static_cast<int>(type)];
}

inline eoracc_bank bank_of(const Shape& shape, const Operands& operands) {
  eoracc_bank bank{};
  bank.count = shape.adapters;
  bank.rank = shape.adapter_rank;
  bank.index_rows = shape.index_rows;
  bank.index_count = shape.index_rows == 0 ? 0 : shape.rows / shape.index_rows;
  bank.type = type_of(shape.adapter_type);
  bank.a = operands.adapter_a.data();
  bank.b = operands.adapter_b.data();
  bank.a_scale = static_cast<const float*>(operands.adapter_a_scale.data());
  bank.b_scale = static_cast<const float*>(operands.adapter_b_scale.data());
  bank.index = static_cast<const int32_t*>(operands.adapter_index.data());
  return bank;
}

// `bank` is a result of bank_of. It and `shape` must outlive the result.
inline eoracc_matmul matmul_of(const Shape& shape, const Operands& operands, const Operand& y,
                               const eoracc_bank& bank) {
  eoracc_matmul m{};
  m.rows = shape.rows;
  m.in_features = shape.in_features;
  m.out_features = shape.out_features;
  m.rank = shape.rank;
  m.bits = shape.bits;
  m.group_size = static_cast<int32_t>(shape.group_size);
  m.accuracy_level = shape.level;
  m.activation = static_cast<int32_t>(shape.activation);
  m.part_count = static_cast<int32_t>(shape.part_count());
  m.x_type = type_of(shape.x_type);
  m.scales_type = type_of(shape.scales_type);
  m.lora_a_type = shape.rank > 0 ? type_of(shape.lora_a_type) : EORACC_NONE;
  m.lora_b_type = shape.rank > 0 ? type_of(shape.lora_b_type) : EORACC_NONE;
  m.norm_epsilon = kNormEpsilon;
  m.parts = shape.parts.empty() ? nullptr : shape.parts.data();
  m.ranks = shape.ranks.empty() ? nullptr : shape.ranks.data();
  m.x = operands.x.data();
  m.y = y.data();
  m.codes = static_cast<const uint8_t*>(operands.codes.data());
  m.scales = operands.scales.data();
  m.zero_points = static_cast<const uint8_t*>(operands.zero_points.data());
  m.bias = operands.bias.data();
  m.lora_a = operands.lora_a.data();
  m.lora_b = operands.lora_b.data();
  m.lora_a_scale = static_cast<const float*>(operands.lora_a_scale.data());
  m.lora_b_scale = static_cast<const float*>(operands.lora_b_scale.data());
  m.norm_weight = static_cast<const float*>(operands.norm_weight.data());
  m.residual = operands.residual.data();
  m.bank = shape.adapters > 0 ? &bank : nullptr;
  return m;
}

}  // namespace eoracc::testing

#endif  // EORACC_TESTS_NATIVE_CALL_H_
