// The attributes of a node, read and checked.

#ifndef EORACC_ONNXRUNTIME_ATTRIBUTES_H_
#define EORACC_ONNXRUNTIME_ATTRIBUTES_H_

#include <string.h>

#include "cpu/chunk.h"
#include "cpu/matmul_nbits_lowrank.h"
#include "onnxruntime/c_api.h"
#include "onnxruntime/tensor.h"

namespace eoracc::ort {

struct Attributes {
  int64_t k = 0, n = 0, bits = 0, block_size = 0;
  int64_t accuracy_level = 0;
  bool tiled = false;
  int32_t activation = EORACC_IDENTITY;
  float norm_epsilon = 0;
  size_t part_count = 1;
  int64_t parts[EORACC_MAX_PARTS] = {};
  bool has_ranks = false;
  int64_t ranks[EORACC_MAX_PARTS] = {};  // of the parts, where each has its own

  int64_t groups() const { return ceil_div(k, block_size); }
  int64_t tiles() const { return ceil_div(n, kTile); }
  int64_t width() const { return activation == EORACC_IDENTITY ? n : n / 2; }
};

// An absent attribute keeps its default.
inline Status* read_optional(const Api& api, Status* absent) {
  if (absent != nullptr) api.release_status(absent);
  return nullptr;
}

inline Status* read_activation(const Api& api, const KernelInfo* info, int32_t* activation) {
  char name[16] = "";
  size_t size = sizeof name;
  if (Status* absent = api.string_attribute(info, "activation", nullptr, &size); absent) {
    return read_optional(api, absent);
  }
  if (size <= sizeof name) {
    RETURN_IF_FAILED(api.string_attribute(info, "activation", name, &size));
    if (strcmp(name, "") == 0) return nullptr;
    if (strcmp(name, "silu") == 0) *activation = EORACC_SILU;
    if (strcmp(name, "gelu_tanh") == 0) *activation = EORACC_GELU_TANH;
  }
  if (*activation != EORACC_IDENTITY) return nullptr;
  return error(api, "activation must be \"\", \"silu\" or \"gelu_tanh\"");
}

inline Status* read_parts(const Api& api, const KernelInfo* info, Attributes* a) {
  size_t count = 0;
  if (Status* absent = api.ints_attribute(info, "parts", nullptr, &count); absent) {
    RETURN_IF_FAILED(read_optional(api, absent));
    count = 0;
  }
  if (count > EORACC_MAX_PARTS) {
    return error(api, "there may be at most %d parts, not %zu", EORACC_MAX_PARTS, count);
  }
  a->part_count = count > 0 ? count : 1;
  a->parts[0] = a->n;
  if (count > 0) RETURN_IF_FAILED(api.ints_attribute(info, "parts", a->parts, &count));
  int64_t sum = 0;
  for (size_t i = 0; i < a->part_count; ++i) {
    const int64_t part = a->parts[i];
    if (part <= 0 || part > a->n || (a->part_count > 1 && part % kTile != 0)) {
      return error(api, "each of several parts must be a positive multiple of 16");
    }
    sum += part;
  }
  if (sum != a->n) return error(api, "parts must add up to N = %lld", (long long)a->n);
  return nullptr;
}

constexpr int64_t kLimit = int64_t{1} << 31;

inline Status* read_ranks(const Api& api, const KernelInfo* info, Attributes* a) {
  size_t count = 0;
  if (Status* absent = api.ints_attribute(info, "ranks", nullptr, &count); absent) {
    return read_optional(api, absent);
  }
  if (count == 0) return nullptr;
  if (count != a->part_count) {
    return error(api, "there must be a rank for each of %zu parts, not %zu ranks", a->part_count,
                 count);
  }
  RETURN_IF_FAILED(api.ints_attribute(info, "ranks", a->ranks, &count));
  for (size_t i = 0; i < count; ++i) {
    if (a->ranks[i] < 0 || a->ranks[i] >= kLimit) {
      return error(api, "ranks must not be negative, and below 2^31");
    }
  }
  a->has_ranks = true;
  return nullptr;
}

// The attributes that describe a weight.
inline Status* read_weight_attributes(const Api& api, const KernelInfo* info, Attributes* a) {
  RETURN_IF_FAILED(api.int_attribute(info, "K", &a->k));
  RETURN_IF_FAILED(api.int_attribute(info, "bits", &a->bits));
  RETURN_IF_FAILED(api.int_attribute(info, "block_size", &a->block_size));
  int64_t layout = 0;
  read_optional(api, api.int_attribute(info, "layout", &layout));
  if (a->k <= 0 || a->k >= kLimit) return error(api, "K must be positive and below 2^31");
  if (!is_code_width(a->bits)) {
    return error(api, "bits must be 2, 3, 4, 6 or 8, not %lld", (long long)a->bits);
  }
  if (a->block_size <= 0 || a->block_size % 8 != 0 || a->block_size >= kLimit) {
    return error(api, "block_size must be a positive multiple of 8, not %lld",
                 (long long)a->block_size);
  }
  if (layout != 0 && layout != 1) {
    return error(api, "layout must be 0 or 1, not %lld", (long long)layout);
  }
  a->tiled = layout == 1;
  return nullptr;
}

// The attributes of GatherNBits; without N, which older graphs lack, all rows of its tiles count.
inline Status* read_table_attributes(const Api& api, const KernelInfo* info, Attributes* a) {
  RETURN_IF_FAILED(read_weight_attributes(api, info, a));
  read_optional(api, api.int_attribute(info, "N", &a->n));
  if (a->n < 0 || a->n >= kLimit) return error(api, "N must not be negative, and below 2^31");
  return nullptr;
}

// The attributes of MatMulNBitsLowRank.
inline Status* read_attributes(const Api& api, const KernelInfo* info, Attributes* a) {
  RETURN_IF_FAILED(read_weight_attributes(api, info, a));
  RETURN_IF_FAILED(api.int_attribute(info, "N", &a->n));
  read_optional(api, api.int_attribute(info, "accuracy_level", &a->accuracy_level));
  read_optional(api, api.float_attribute(info, "norm_epsilon", &a->norm_epsilon));
  if (a->n <= 0 || a->n >= kLimit) return error(api, "N must be positive and below 2^31");
  if (a->accuracy_level != 0 && a->accuracy_level != 4) {
    return error(api, "accuracy_level must be 0 or 4, not %lld", (long long)a->accuracy_level);
  }
  RETURN_IF_FAILED(read_activation(api, info, &a->activation));
  RETURN_IF_FAILED(read_parts(api, info, a));
  RETURN_IF_FAILED(read_ranks(api, info, a));
  if (!a->tiled && a->part_count > 1) return error(api, "parts need layout 1");
  if (!a->tiled && a->has_ranks) return error(api, "ranks need layout 1");
  if (a->activation != EORACC_IDENTITY && (a->part_count != 2 || a->parts[0] != a->parts[1])) {
    return error(api, "an activation needs two equal parts");
  }
  return nullptr;
}

}  // namespace eoracc::ort

#endif  // EORACC_ONNXRUNTIME_ATTRIBUTES_H_
