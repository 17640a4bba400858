// Passes invalid operands to the C interface: each must be refused, and nothing may be written.
// Meant to be built with sanitizers.
//
//   fuzz_operands [CASES [SEED]]

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <iterator>

#include "tests/native/call.h"

namespace {

using namespace eoracc::testing;

constexpr int64_t kParts[][EORACC_MAX_PARTS] = {
    {15, 17},               // no whole tiles
    {16, 32},               // more than the weight
    {16, 0},                // an empty one, and less than the weight
    {48, -16},              // adds up, but cannot be
    {INT64_MIN, INT64_MAX}  // overflows when added up
};

constexpr int64_t kHalves[] = {16, 16};

// Ranks that the parts of a term of rank 16 cannot have.
constexpr int64_t kRanks[][2] = {{8, 0}, {24, 0}, {16, -16}, {INT64_MAX, 0}};

// Everything that makes the product of [2, 40] and [32, 40] with rank 16 one that cannot be.
struct Defect {
  const char* name;
  void (*put)(eoracc_matmul& m);
};

// Likewise of its bank of two adapters, the second of which row 1 uses.
struct BankDefect {
  const char* name;
  void (*put)(eoracc_bank& bank);
};

constexpr Defect kDefects[] = {
    {"rows = -1", [](auto& m) { m.rows = -1; }},
    {"rows = min", [](auto& m) { m.rows = INT64_MIN; }},
    {"in_features = 0", [](auto& m) { m.in_features = 0; }},
    {"in_features = -40", [](auto& m) { m.in_features = -40; }},
    {"in_features = 2^31", [](auto& m) { m.in_features = int64_t{1} << 31; }},
    {"in_features = max", [](auto& m) { m.in_features = INT64_MAX; }},
    {"out_features = 0", [](auto& m) { m.out_features = 0; }},
    {"out_features = min", [](auto& m) { m.out_features = INT64_MIN; }},
    {"out_features = max", [](auto& m) { m.out_features = INT64_MAX; }},
    {"rank = -1", [](auto& m) { m.rank = -1; }},
    {"rank = max", [](auto& m) { m.rank = INT64_MAX; }},
    {"bits = 0", [](auto& m) { m.bits = 0; }},
    {"bits = 5", [](auto& m) { m.bits = 5; }},
    {"bits = -4", [](auto& m) { m.bits = -4; }},
    {"bits = max", [](auto& m) { m.bits = INT_MAX; }},
    {"group_size = 0", [](auto& m) { m.group_size = 0; }},
    {"group_size = 12", [](auto& m) { m.group_size = 12; }},
    {"group_size = -8", [](auto& m) { m.group_size = -8; }},
    {"accuracy_level = 1", [](auto& m) { m.accuracy_level = 1; }},
    {"accuracy_level = -4", [](auto& m) { m.accuracy_level = -4; }},
    {"ranks below the rank", [](auto& m) { m.ranks = kRanks[0]; }},
    {"ranks above the rank", [](auto& m) { m.ranks = kRanks[1]; }},
    {"a negative rank", [](auto& m) { m.part_count = 2, m.parts = kHalves, m.ranks = kRanks[2]; }},
    {"a rank of max", [](auto& m) { m.rank = INT64_MAX, m.ranks = kRanks[3]; }},
    {"activation without parts", [](auto& m) { m.activation = EORACC_SILU; }},
    {"activation = 3", [](auto& m) { m.activation = 3; }},
    {"activation = -1", [](auto& m) { m.activation = -1; }},
    {"part_count = -1", [](auto& m) { m.part_count = -1; }},
    {"part_count = 2 without parts", [](auto& m) { m.part_count = 2; }},
    {"part_count = max", [](auto& m) { m.part_count = INT_MAX, m.parts = kParts[0]; }},
    {"parts of no whole tiles", [](auto& m) { m.part_count = 2, m.parts = kParts[0]; }},
    {"parts that exceed the weight", [](auto& m) { m.part_count = 2, m.parts = kParts[1]; }},
    {"an empty part", [](auto& m) { m.part_count = 2, m.parts = kParts[2]; }},
    {"a negative part", [](auto& m) { m.part_count = 2, m.parts = kParts[3]; }},
    {"parts that overflow", [](auto& m) { m.part_count = 2, m.parts = kParts[4]; }},
    {"x_type = none", [](auto& m) { m.x_type = EORACC_NONE; }},
    {"x_type = int8", [](auto& m) { m.x_type = EORACC_INT8; }},
    {"x_type = 99", [](auto& m) { m.x_type = 99; }},
    {"scales_type = none", [](auto& m) { m.scales_type = EORACC_NONE; }},
    {"scales_type = bfloat16", [](auto& m) { m.scales_type = EORACC_BFLOAT16; }},
    {"lora_a_type = none", [](auto& m) { m.lora_a_type = EORACC_NONE; }},
    {"lora_b_type = bfloat16", [](auto& m) { m.lora_b_type = EORACC_BFLOAT16; }},
    {"lora_a_type = -1", [](auto& m) { m.lora_a_type = -1; }},
    {"x = null", [](auto& m) { m.x = nullptr; }},
    {"y = null", [](auto& m) { m.y = nullptr; }},
    {"codes = null", [](auto& m) { m.codes = nullptr; }},
    {"scales = null", [](auto& m) { m.scales = nullptr; }},
    {"lora_a = null", [](auto& m) { m.lora_a = nullptr; }},
    {"lora_b = null", [](auto& m) { m.lora_b = nullptr; }},
    {"lora_a_scale = null", [](auto& m) { m.lora_a_scale = nullptr; }},
    {"lora_b_scale = null", [](auto& m) { m.lora_b_scale = nullptr; }},
};
constexpr size_t kDefectCount = std::size(kDefects);

constexpr int32_t kIndices[][2] = {{0, 2}, {INT_MAX, 0}};

constexpr BankDefect kBankDefects[] = {
    {"count = 0", [](auto& bank) { bank.count = 0; }},
    {"count = -1", [](auto& bank) { bank.count = -1; }},
    {"count = max", [](auto& bank) { bank.count = INT64_MAX; }},
    {"rank = -16", [](auto& bank) { bank.rank = -16; }},
    {"rank = 20", [](auto& bank) { bank.rank = 20; }},
    {"rank = max", [](auto& bank) { bank.rank = INT64_MAX - 15; }},
    {"index_count = 1", [](auto& bank) { bank.index_count = 1; }},
    {"index_count = min", [](auto& bank) { bank.index_count = INT64_MIN; }},
    {"index_count = max", [](auto& bank) { bank.index_count = INT64_MAX; }},
    {"index_rows = 2", [](auto& bank) { bank.index_rows = 2; }},
    {"index_rows = -1", [](auto& bank) { bank.index_rows = -1; }},
    {"sizes that overflow",
     [](auto& bank) { bank.index_count = int64_t{1} << 62, bank.index_rows = 4; }},
    {"type = none", [](auto& bank) { bank.type = EORACC_NONE; }},
    {"type = bfloat16", [](auto& bank) { bank.type = EORACC_BFLOAT16; }},
    {"type = 99", [](auto& bank) { bank.type = 99; }},
    {"a = null", [](auto& bank) { bank.a = nullptr; }},
    {"b = null", [](auto& bank) { bank.b = nullptr; }},
    {"a_scale = null", [](auto& bank) { bank.a_scale = nullptr; }},
    {"b_scale = null", [](auto& bank) { bank.b_scale = nullptr; }},
    {"index = null", [](auto& bank) { bank.index = nullptr; }},
    {"the adapter behind the last", [](auto& bank) { bank.index = kIndices[0]; }},
    {"adapter max", [](auto& bank) { bank.index = kIndices[1]; }},
};

Shape fitting(std::mt19937_64& random) {
  Shape shape;
  shape.rows = 2;
  shape.in_features = 40;
  shape.out_features = 32;
  shape.rank = 16;
  constexpr int kBits[] = {2, 3, 4, 6, 8};
  shape.bits = kBits[random() % 5];
  shape.level = random() % 2 == 0 ? 0 : 4;
  shape.lora_a_type = shape.lora_b_type = random() % 2 == 0 ? Type::kInt8 : Type::kInt4;
  shape.adapters = 2;
  shape.adapter_rank = 16;
  shape.adapter_type = shape.lora_a_type;
  shape.index_rows = 1;
  shape.zero_points = random() % 2 == 0;
  shape.bias = random() % 2 == 0;
  shape.norm = random() % 2 == 0;
  shape.residual = random() % 2 == 0;
  return shape;
}

}  // namespace

int main(int count, char** arguments) {
  const long cases = count > 1 ? std::strtol(arguments[1], nullptr, 10) : 2000;
  std::mt19937_64 random(count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 0);
  int failures = 0;
  const auto expect = [&](bool holds, const char* what, const char* defect) {
    if (holds) return;
    std::fprintf(stderr, "%s: %s\n", defect, what);
    ++failures;
  };

  expect(eoracc_matmul_nbits_lowrank(nullptr, nullptr, EORACC_ISA_BEST) == EORACC_BAD_OPERAND,
         "was accepted", "no operands");
  for (long i = 0; i < cases && failures < 10; ++i) {
    const Shape shape = fitting(random);
    Operands operands;
    Expected expected;
    draw_operands(shape, random, &operands, &expected);
    const Operand y(Bytes(static_cast<size_t>(shape.rows * shape.outputs()) * 4, 0xff));
    const Bytes untouched = y.bytes();
    const eoracc_isa isa = kInstructionSets[random() % std::size(kInstructionSets)].isa;

    // Each defect in turn, every other time together with a second one.
    const Defect& defect = kDefects[static_cast<size_t>(i) % kDefectCount];
    const eoracc_bank bank = bank_of(shape, operands);
    eoracc_matmul m = matmul_of(shape, operands, y, bank);
    if (random() % 2 == 0) kDefects[random() % kDefectCount].put(m);
    defect.put(m);
    expect(eoracc_matmul_nbits_lowrank(&m, nullptr, isa) == EORACC_BAD_OPERAND, "was accepted",
           defect.name);
    expect(y.bytes() == untouched, "wrote to y", defect.name);

    const BankDefect& bank_defect = kBankDefects[static_cast<size_t>(i) % std::size(kBankDefects)];
    eoracc_bank bad = bank;
    bank_defect.put(bad);
    m = matmul_of(shape, operands, y, bad);
    expect(eoracc_matmul_nbits_lowrank(&m, nullptr, isa) == EORACC_BAD_OPERAND, "was accepted",
           bank_defect.name);
    expect(y.bytes() == untouched, "wrote to y", bank_defect.name);

    // What may be absent.
    m = matmul_of(shape, operands, y, bank);
    expect(
        eoracc_matmul_nbits_lowrank(&m, nullptr, static_cast<eoracc_isa>(99)) == EORACC_NO_SUCH_ISA,
        "was accepted", "instruction set 99");
    m.rows = 0;
    m.x = nullptr;
    m.y = nullptr;
    bad = bank;
    bad.index_rows = 0;
    m.bank = &bad;
    expect(eoracc_matmul_nbits_lowrank(&m, nullptr, EORACC_ISA_BEST) == EORACC_OK, "was refused",
           "no rows");
    m = matmul_of(shape, operands, y, bank);
    m.rank = 0;
    m.lora_a = m.lora_b = nullptr;
    m.lora_a_scale = m.lora_b_scale = nullptr;
    m.lora_a_type = m.lora_b_type = EORACC_NONE;
    m.zero_points = nullptr;
    m.bias = m.residual = nullptr;
    m.norm_weight = nullptr;
    m.bank = nullptr;
    expect(eoracc_matmul_nbits_lowrank(&m, nullptr, EORACC_ISA_BEST) == EORACC_OK, "was refused",
           "nothing optional");
  }
  std::printf("%ld malformed products: %s\n", cases, failures > 0 ? "FAILED" : "all refused");
  return failures > 0 ? 1 : 0;
}
