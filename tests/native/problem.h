// A random product of plain matrices of doubles, the reference for the kernels.
//
// It shares no code with the kernels: packing, rounding and the product are written anew.

#ifndef EORACC_TESTS_NATIVE_PROBLEM_H_
#define EORACC_TESTS_NATIVE_PROBLEM_H_

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace eoracc::testing {

enum class Type { kFloat32, kFloat16, kBfloat16, kInt8, kInt4 };
enum class Activation { kNone, kSilu, kGeluTanh };

// Sizes and options of a product. The rank is that of each part, or the largest of `ranks`.
struct Shape {
  int64_t rows = 1;
  int64_t in_features = 1;
  int64_t out_features = 1;
  int64_t rank = 0;
  std::vector<int64_t> parts;  // rows of W of each merged linear; empty for one
  std::vector<int64_t> ranks;  // of the parts, or of the one linear; empty where all have `rank`
  int bits = 4;
  int64_t group_size = 32;
  int level = 0;
  Type x_type = Type::kFloat32;
  Type scales_type = Type::kFloat16;
  Type lora_a_type = Type::kFloat16;
  Type lora_b_type = Type::kFloat16;
  Activation activation = Activation::kNone;
  bool zero_points = false;
  bool bias = false;
  bool norm = false;
  bool residual = false;
  bool special = false;      // a NaN or an infinity stands in one row of x
  int64_t adapters = 0;      // in the bank; 0 for no bank
  int64_t adapter_rank = 0;  // of each part
  Type adapter_type = Type::kInt8;
  int64_t index_rows = 0;  // rows of x for each entry of the index; divides them

  int64_t part_count() const { return parts.empty() ? 1 : static_cast<int64_t>(parts.size()); }
  int64_t part_rows(int64_t part) const {
    return parts.empty() ? out_features : parts[static_cast<size_t>(part)];
  }
  int64_t groups() const { return (in_features + group_size - 1) / group_size; }
  // Columns of Y.
  int64_t outputs() const {
    return activation == Activation::kNone ? out_features : out_features / 2;
  }
  std::string describe() const;
};

using Bytes = std::vector<uint8_t>;

// Memory of an operand: it ends with its block, so that a sanitizer sees the first byte read too
// far, and starts at an odd address, since kernels ask for no alignment.
class Operand {
 public:
  Operand() = default;
  explicit Operand(const Bytes& bytes);

  // Null when empty.
  void* data() const { return size_ == 0 ? nullptr : memory_.get() + 1; }
  Bytes bytes() const;

 private:
  size_t size_ = 0;
  std::shared_ptr<uint8_t[]> memory_;
};

// The operands in kernel order, as matmul_nbits_lowrank.h documents it; absent ones are empty.
struct Operands {
  Operand x, codes, scales, zero_points, bias, lora_a, lora_b, lora_a_scale, lora_b_scale,
      norm_weight, residual, adapter_a, adapter_b, adapter_a_scale, adapter_b_scale, adapter_index;
};

// Y and how far a kernel may be from it, [rows, outputs].
struct Expected {
  std::vector<double> y, bound;
};

constexpr float kNormEpsilon = 1e-5F;

// A shape that every kernel must take; sizes lean to the edges of tiles, blocks and chunks.
Shape draw_shape(std::mt19937_64& random);

// Draws operands of `shape` and computes their product.
void draw_operands(const Shape& shape, std::mt19937_64& random, Operands* operands,
                   Expected* expected);

// An element, widened.
double read(Type type, const Bytes& bytes, size_t index);

size_t size_of(Type type);

}  // namespace eoracc::testing

#endif  // EORACC_TESTS_NATIVE_PROBLEM_H_
