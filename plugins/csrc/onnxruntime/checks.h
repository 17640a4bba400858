// The tensors of a run against the attributes and one another.

#ifndef EORACC_ONNXRUNTIME_CHECKS_H_
#define EORACC_ONNXRUNTIME_CHECKS_H_

#include <stdio.h>
#include <string.h>

#include "cpu/layout.h"
#include "cpu/matmul_nbits_lowrank.h"
#include "onnxruntime/attributes.h"
#include "onnxruntime/c_api.h"
#include "onnxruntime/tensor.h"

namespace eoracc::ort {

// The types and the rank of lora_a and lora_b, as the tensors of a run show them.
struct Factors {
  int64_t rank = 0;
  int32_t a_type = EORACC_NONE, b_type = EORACC_NONE;
};

// The checks of one node, whose attributes must outlive them. Each takes all inputs of a run, by
// position, and returns an error that names the first input that does not fit.
class Checks {
 public:
  Checks(const Api& api, const Attributes& attributes) : api_(api), a_(attributes) {}

  // All but the adapter operands; describes the factors.
  Status* operands(const Tensor* inputs, Factors* factors) const {
    const Tensor& x = inputs[kX];
    if (!x.present || x.rank == 0 || x.shape[x.rank - 1] != a_.k) {
      return error(api_, "the last dimension of X is not K = %lld", (long long)a_.k);
    }
    const int64_t groups = a_.groups();
    if (a_.tiled) {
      const int64_t chunk = chunk_bytes(a_.bits);
      const int64_t bytes = (int64_t)eoracc_tile_bytes(a_.k, (int32_t)a_.bits);
      RETURN_IF_FAILED(require(inputs, kB, {a_.tiles(), bytes / chunk, chunk}, 3));
    } else {
      RETURN_IF_FAILED(require(inputs, kB, {a_.n, groups, a_.block_size * a_.bits / 8}, 3));
    }
    RETURN_IF_FAILED(require_type(inputs, kB, kUint8));
    RETURN_IF_FAILED(require_per_group(inputs, kScales));
    if (!is_float(inputs[kScales].type)) return error(api_, "scales must be float or float16");
    if (inputs[kZeroPoints].present) {
      RETURN_IF_FAILED(require_per_group(inputs, kZeroPoints));
      RETURN_IF_FAILED(require_type(inputs, kZeroPoints, kUint8));
    }
    if (inputs[kBias].present) {
      RETURN_IF_FAILED(require(inputs, kBias, {a_.n}, 1));
      RETURN_IF_FAILED(require_type(inputs, kBias, x.type));
    }
    if (inputs[kNormWeight].present) {
      RETURN_IF_FAILED(require(inputs, kNormWeight, {a_.k}, 1));
      RETURN_IF_FAILED(require_type(inputs, kNormWeight, kFloat32));
    }
    if (inputs[kResidual].present) RETURN_IF_FAILED(require_type(inputs, kResidual, x.type));
    return check_factors(inputs, factors);
  }

  // Describes the bank: adapter_a shows how many adapters it has, of which rank and type.
  Status* adapter_a(const Tensor& a, eoracc_bank* bank) const {
    if (!is_float(a.type) && a.type != kUint8) {
      return error(api_, "adapter_a must be float, float16 or, for int8 and int4, uint8");
    }
    if (a.rank != 4) return error(api_, "adapter_a must have four dimensions");
    const int64_t parts = (int64_t)a_.part_count;
    bank->count = a.shape[0];
    bank->rank = a.shape[1] / parts * kTile;
    bank->type = a.type == kUint8 ? tiled_type(a.shape[2]) : kernel_type(a.type);
    const int64_t columns = columns_of(bank->type, a_.k), lanes = lanes_of(bank->type);
    if (bank->count <= 0 || a.shape[1] % parts != 0 || a.shape[2] != columns ||
        a.shape[3] != lanes) {
      return error(api_, "adapter_a must have the shape [adapters, a multiple of %lld, %lld, %lld]",
                   (long long)parts, (long long)columns, (long long)lanes);
    }
    return nullptr;
  }

  // One adapter for all rows, or one for each of the sequences that X is a batch of.
  Status* adapter_index(const Tensor* inputs, eoracc_bank* bank) const {
    const Tensor &x = inputs[kX], &index = inputs[kAdapterIndex];
    RETURN_IF_FAILED(require_type(inputs, kAdapterIndex, kInt32));
    int64_t batch = 1;
    const size_t batch_rank = x.rank > 2 ? x.rank - 2 : x.rank - 1;
    for (size_t i = 0; i < batch_rank; ++i) batch *= x.shape[i];
    const int64_t length = x.rank > 2 ? x.shape[x.rank - 2] : 1;
    if (index.rank != 1 || (index.shape[0] != 1 && index.shape[0] != batch)) {
      return error(api_, "adapter_index must have the shape [1] or [%lld]", (long long)batch);
    }
    bank->index_count = index.shape[0];
    bank->index_rows = index.shape[0] == batch ? length : batch * length;
    bank->index = static_cast<const int32_t*>(index.data);
    for (int64_t i = 0; i < bank->index_count; ++i) {
      int32_t adapter;
      memcpy(&adapter, bank->index + i, sizeof adapter);
      if (adapter < bank->count) continue;
      return error(api_, "adapter_index must be below the number of adapters, %lld, and not %d",
                   (long long)bank->count, adapter);
    }
    return nullptr;
  }

  // The operands of a bank whose adapter_a has been checked.
  Status* adapter_rest(const Tensor* inputs, const eoracc_bank& bank) const {
    const int64_t ranks = (int64_t)a_.part_count * bank.rank;
    const int64_t b_shape[] = {bank.count, a_.tiles(), columns_of(bank.type, bank.rank),
                               lanes_of(bank.type)};
    RETURN_IF_FAILED(require(inputs, kAdapterB, b_shape, 4));
    RETURN_IF_FAILED(require_type(inputs, kAdapterB, inputs[kAdapterA].type));
    RETURN_IF_FAILED(require(inputs, kAdapterAScale, {bank.count, ranks}, 2));
    RETURN_IF_FAILED(require_type(inputs, kAdapterAScale, kFloat32));
    if (is_float(inputs[kAdapterA].type)) return nullptr;
    RETURN_IF_FAILED(require(inputs, kAdapterBScale, {bank.count, a_.tiles() * kTile}, 2));
    return require_type(inputs, kAdapterBScale, kFloat32);
  }

  // `inputs[index]` is there and has the shape `expected`.
  Status* require(const Tensor* inputs, Input index, const int64_t* expected, size_t rank) const {
    const Tensor& tensor = inputs[index];
    if (!tensor.present) return error(api_, "%s is missing", kInputNames[index]);
    bool fits = tensor.rank == rank;
    for (size_t i = 0; fits && i < rank; ++i) fits = tensor.shape[i] == expected[i];
    if (fits) return nullptr;
    char text[24 * kMaxRank] = "";
    int used = 0;
    for (size_t i = 0; i < rank; ++i) {
      used += snprintf(text + used, sizeof text - (size_t)used, "%s%lld", i ? ", " : "",
                       (long long)expected[i]);
    }
    return error(api_, "%s must have the shape [%s]", kInputNames[index], text);
  }

 private:
  struct Shape {
    int64_t sizes[3];
  };

  Status* require(const Tensor* inputs, Input index, Shape expected, size_t rank) const {
    return require(inputs, index, expected.sizes, rank);
  }

  Status* require_type(const Tensor* inputs, Input index, ElementType type) const {
    if (inputs[index].type == type) return nullptr;
    return error(api_, "%s must be %s", kInputNames[index], type_name(type));
  }

  Status* require_per_group(const Tensor* inputs, Input index) const {
    if (!a_.tiled) return require(inputs, index, {a_.n, a_.groups()}, 2);
    return require(inputs, index, {a_.tiles(), a_.groups(), kTile}, 3);
  }

  Status* check_factors(const Tensor* inputs, Factors* factors) const {
    const Tensor &lora_a = inputs[kLoraA], &lora_b = inputs[kLoraB];
    if (!lora_a.present && !lora_b.present) return nullptr;
    if (!lora_a.present || !lora_b.present) {
      return error(api_, "lora_a and lora_b come together or not at all");
    }
    factors->a_type = kernel_type(lora_a.type);
    factors->b_type = kernel_type(lora_b.type);
    if (!a_.tiled) {
      const int64_t rank = factors->rank = lora_a.rank == 2 ? lora_a.shape[0] : 0;
      RETURN_IF_FAILED(check_plain_factor(inputs, kLoraA, kLoraAScale, rank, a_.k));
      return check_plain_factor(inputs, kLoraB, kLoraBScale, a_.n, rank);
    }
    // Integer factors share a code width, which follows from the columns of lora_a.
    if (lora_a.rank != 3) return error(api_, "lora_a must have three dimensions");
    if (lora_a.type == kUint8) factors->a_type = tiled_type(lora_a.shape[1]);
    if (lora_a.type == kUint8 && lora_b.type == kUint8) factors->b_type = factors->a_type;
    if (a_.has_ranks) return check_parts(inputs, factors);
    // Rows of lora_a are padded to tiles, so the rank follows from lora_b.
    if (lora_b.rank != 3) return error(api_, "lora_b must have three dimensions");
    const int64_t rank = factors->rank = lora_b.shape[1] * chunk_of(factors->b_type);
    const int64_t parts = (int64_t)a_.part_count;
    if (parts > 1 && rank % kTile != 0) {
      return error(api_, "the rank of %lld merged linears must be a multiple of 16, not %lld",
                   (long long)parts, (long long)rank);
    }
    RETURN_IF_FAILED(check_tiled_factor(inputs, kLoraA, kLoraAScale, factors->a_type,
                                        ceil_div(parts * rank, kTile), a_.k));
    return check_tiled_factor(inputs, kLoraB, kLoraBScale, factors->b_type, a_.tiles(), rank);
  }

  // Tiled factors of parts that each have their own rank.
  Status* check_parts(const Tensor* inputs, Factors* factors) const {
    int64_t down_tiles = 0, up_vectors = 0, up_tiles = 0;
    for (size_t i = 0; i < a_.part_count; ++i) {
      const int64_t rank = a_.ranks[i], tiles = ceil_div(a_.parts[i], kTile);
      if (rank == 0) continue;
      if (rank > factors->rank) factors->rank = rank;
      down_tiles += ceil_div(rank, kTile);
      up_vectors += tiles * columns_of(factors->b_type, rank);
      up_tiles += tiles;
    }
    RETURN_IF_FAILED(
        check_tiled_factor(inputs, kLoraA, kLoraAScale, factors->a_type, down_tiles, a_.k));
    RETURN_IF_FAILED(check_factor_type(inputs, kLoraB));
    RETURN_IF_FAILED(require(inputs, kLoraB, {up_vectors, lanes_of(factors->b_type)}, 2));
    return check_tiled_scale(inputs, kLoraB, kLoraBScale, up_tiles);
  }

  Status* check_plain_factor(const Tensor* inputs, Input factor, Input scale, int64_t rows,
                             int64_t columns) const {
    RETURN_IF_FAILED(require(inputs, factor, {rows, columns}, 2));
    if (inputs[factor].type == kInt8) {
      RETURN_IF_FAILED(require(inputs, scale, {rows}, 1));
      return require_type(inputs, scale, kFloat32);
    }
    if (is_float(inputs[factor].type)) return nullptr;
    return error(api_, "%s must be float, float16 or int8", kInputNames[factor]);
  }

  Status* check_tiled_factor(const Tensor* inputs, Input factor, Input scale, int32_t type,
                             int64_t tiles, int64_t columns) const {
    RETURN_IF_FAILED(check_factor_type(inputs, factor));
    RETURN_IF_FAILED(
        require(inputs, factor, {tiles, columns_of(type, columns), lanes_of(type)}, 3));
    return check_tiled_scale(inputs, factor, scale, tiles);
  }

  Status* check_factor_type(const Tensor* inputs, Input factor) const {
    if (is_float(inputs[factor].type) || inputs[factor].type == kUint8) return nullptr;
    return error(api_, "%s must be float, float16 or, for int8 and int4, uint8",
                 kInputNames[factor]);
  }

  // Integer factors have a scale for each row of their tiles.
  Status* check_tiled_scale(const Tensor* inputs, Input factor, Input scale, int64_t tiles) const {
    if (is_float(inputs[factor].type)) return nullptr;
    RETURN_IF_FAILED(require(inputs, scale, {tiles * kTile}, 1));
    return require_type(inputs, scale, kFloat32);
  }

  // The type of an integer lora_a or adapter_a by its vectors for K columns.
  int32_t tiled_type(int64_t vectors) const {
    return vectors == ceil_div(a_.k, chunk_of(EORACC_INT8)) ? EORACC_INT8 : EORACC_INT4;
  }

  // Columns of a factor in one vector of a tile.
  static int64_t chunk_of(int32_t type) {
    return type == EORACC_INT8 ? 4 : type == EORACC_INT4 ? 8 : 1;
  }

  // The last two dimensions of a tiled factor.
  static int64_t columns_of(int32_t type, int64_t columns) {
    return ceil_div(columns, chunk_of(type));
  }
  static int64_t lanes_of(int32_t type) {
    return type == EORACC_INT8 || type == EORACC_INT4 ? kVector : kTile;
  }

  const Api& api_;
  const Attributes& a_;
};

}  // namespace eoracc::ort

#endif  // EORACC_ONNXRUNTIME_CHECKS_H_
