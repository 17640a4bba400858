// The inputs of the ops by name, and the tensors of a run as plain structures.

#ifndef EORACC_ONNXRUNTIME_TENSOR_H_
#define EORACC_ONNXRUNTIME_TENSOR_H_

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <new>

#include "cpu/matmul_nbits_lowrank.h"
#include "onnxruntime/c_api.h"

namespace eoracc::ort {

constexpr const char* kDomain = "eoracc";
constexpr const char* kOp = "MatMulNBitsLowRank";
constexpr const char* kGatherOp = "GatherNBits";

// Of MatMulNBitsLowRank.
enum Input : size_t {
  kX,
  kB,
  kScales,
  kZeroPoints,
  kBias,
  kLoraA,
  kLoraB,
  kLoraAScale,
  kLoraBScale,
  kNormWeight,
  kResidual,
  kAdapterA,
  kAdapterB,
  kAdapterAScale,
  kAdapterBScale,
  kAdapterIndex,
  kInputs,
};
constexpr const char* kInputNames[kInputs] = {"X",
                                              "B",
                                              "scales",
                                              "zero_points",
                                              "bias",
                                              "lora_a",
                                              "lora_b",
                                              "lora_a_scale",
                                              "lora_b_scale",
                                              "norm_weight",
                                              "residual",
                                              "adapter_a",
                                              "adapter_b",
                                              "adapter_a_scale",
                                              "adapter_b_scale",
                                              "adapter_index"};

// Of GatherNBits.
enum GatherInput : size_t {
  kGatherIndices,
  kGatherB,
  kGatherScales,
  kGatherZeroPoints,
  kGatherInputs
};
constexpr const char* kGatherInputNames[kGatherInputs] = {"indices", "B", "scales", "zero_points"};

constexpr size_t kMaxRank = 8;          // dimensions of X and of indices
constexpr int64_t kTile = EORACC_TILE;  // rows of W
constexpr int64_t kVector = 64;         // bytes of a quad of an int8 factor

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__attribute__((format(printf, 2, 3))) inline Status* error(const Api& api, const char* format,
                                                           ...) {
  char text[256];
  const int prefix = snprintf(text, sizeof text, "%s: ", api.op());
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text + prefix, sizeof text - (size_t)prefix, format, arguments);
  va_end(arguments);
  return api.create_status(kInvalidArgument, text);
}

inline Status* out_of_memory(const Api& api) {
  char text[64];
  snprintf(text, sizeof text, "%s: out of memory", api.op());
  return api.create_status(kFail, text);
}

// Returns a failed status of the runtime to the caller.
#define RETURN_IF_FAILED(expression)                             \
  do {                                                           \
    if (Status* failure = (expression); failure) return failure; \
  } while (false)

// Set when the library is registered; null for a runtime without it.
inline std::atomic<ShapeReference> shape_reference_of_runtime{nullptr};

struct Tensor {
  const void* data = nullptr;
  ElementType type = kUndefined;
  size_t rank = 0;
  int64_t shape[kMaxRank] = {};
  bool present = false;
};

inline Status* too_many_dimensions(const Api& api, const char* name, size_t rank) {
  return error(api, "%s has %zu dimensions, at most %zu are supported", name, rank, kMaxRank);
}

inline Status* read_shape(const Api& api, const Value* value, const char* name, Tensor* tensor) {
  TensorInfo* info = nullptr;
  RETURN_IF_FAILED(api.tensor_info(value, &info));
  Status* failure = api.element_type(info, &tensor->type);
  if (!failure) failure = api.dimension_count(info, &tensor->rank);
  if (!failure && tensor->rank > kMaxRank) failure = too_many_dimensions(api, name, tensor->rank);
  if (!failure) failure = api.dimensions(info, tensor->shape, tensor->rank);
  api.release_tensor_info(info);
  return failure;
}

inline Status* read_tensor(const Api& api, const Value* value, const char* name, Tensor* tensor) {
  if (value == nullptr) return nullptr;
  const ShapeReference shape_reference = shape_reference_of_runtime.load(std::memory_order_relaxed);
  if (shape_reference != nullptr) {
    const int64_t* shape = nullptr;
    RETURN_IF_FAILED(shape_reference(value, &tensor->type, &shape, &tensor->rank));
    if (tensor->rank > kMaxRank) return too_many_dimensions(api, name, tensor->rank);
    for (size_t i = 0; i < tensor->rank; ++i) tensor->shape[i] = shape[i];
  } else {
    RETURN_IF_FAILED(read_shape(api, value, name, tensor));
  }
  tensor->present = true;
  return api.tensor_data(const_cast<Value*>(value), const_cast<void**>(&tensor->data));
}

inline int32_t kernel_type(ElementType type) {
  switch (type) {
    case kFloat32:
      return EORACC_FLOAT32;
    case kFloat16:
      return EORACC_FLOAT16;
    case kBfloat16:
      return EORACC_BFLOAT16;
    case kInt8:
    case kUint8:
      return EORACC_INT8;
    default:
      return EORACC_NONE;
  }
}

inline const char* type_name(ElementType type) {
  switch (type) {
    case kUint8:
      return "uint8";
    case kInt8:
      return "int8";
    case kInt32:
      return "int32";
    case kFloat16:
      return "float16";
    case kBfloat16:
      return "bfloat16";
    default:
      return "float";
  }
}

inline size_t element_bytes(ElementType type) {
  return type == kFloat32 ? 4 : type == kFloat16 || type == kBfloat16 ? 2 : 1;
}

inline bool is_float(ElementType type) { return type == kFloat32 || type == kFloat16; }

// Memory of one object from malloc, not from the C++ library's operator new, whose handler of
// exceptions would add 70 kB to a library that throws none.
struct FromMalloc {
  static void* operator new(size_t size, const std::nothrow_t&) noexcept { return malloc(size); }
  static void operator delete(void* object) noexcept { free(object); }
};

// Memory that is freed with its owner.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(data_); }

  // Room for `bytes`, aligned for vectors; null without memory.
  void* take(size_t bytes) {
    free(data_);
    data_ = nullptr;
    if (posix_memalign(&data_, kVector, bytes == 0 ? 1 : bytes) != 0) data_ = nullptr;
    return data_;
  }

  const void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

}  // namespace eoracc::ort

#endif  // EORACC_ONNXRUNTIME_TENSOR_H_
