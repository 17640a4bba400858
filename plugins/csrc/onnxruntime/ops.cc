// eoracc::MatMulNBitsLowRank as an ONNX Runtime custom op: checks the tensors, calls the kernel.

#include <stdarg.h>
#include <stdio.h>

#include <new>

#include "cpu/matmul_nbits_lowrank.h"
#include "onnxruntime/c_api.h"

namespace {

using namespace eoracc::ort;

constexpr const char* kDomain = "eoracc";
constexpr const char* kOp = "MatMulNBitsLowRank";

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
  kInputs,
};
constexpr const char* kInputNames[kInputs] = {
    "X", "B", "scales", "zero_points", "bias", "lora_a", "lora_b", "lora_a_scale", "lora_b_scale"};

constexpr size_t kMaxRank = 8;  // dimensions of X

__attribute__((format(printf, 2, 3))) Status* error(const Api& api, const char* format, ...) {
  char text[256];
  const int prefix = snprintf(text, sizeof text, "%s: ", kOp);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text + prefix, sizeof text - (size_t)prefix, format, arguments);
  va_end(arguments);
  return api.create_status(kInvalidArgument, text);
}

// Hands a failed status of the runtime on to the caller.
#define RETURN_IF_FAILED(expression)                             \
  do {                                                           \
    if (Status* failure = (expression); failure) return failure; \
  } while (false)

struct Tensor {
  const void* data = nullptr;
  ElementType type = kUndefined;
  size_t rank = 0;
  int64_t shape[kMaxRank] = {};
  bool present = false;
};

Status* read_tensor(const Api& api, const KernelContext* context, size_t index, Tensor* tensor) {
  const Value* value = nullptr;
  RETURN_IF_FAILED(api.input(context, index, &value));
  if (value == nullptr) return nullptr;
  TensorInfo* info = nullptr;
  RETURN_IF_FAILED(api.tensor_info(value, &info));
  Status* failure = api.element_type(info, &tensor->type);
  if (!failure) failure = api.dimension_count(info, &tensor->rank);
  if (!failure && tensor->rank > kMaxRank) {
    failure = error(api, "%s has %zu dimensions, at most %zu are supported", kInputNames[index],
                    tensor->rank, kMaxRank);
  }
  if (!failure) failure = api.dimensions(info, tensor->shape, tensor->rank);
  api.release_tensor_info(info);
  if (failure) return failure;
  tensor->present = true;
  return api.tensor_data(const_cast<Value*>(value), const_cast<void**>(&tensor->data));
}

int32_t kernel_type(ElementType type) {
  switch (type) {
    case kFloat32:
      return EORACC_FLOAT32;
    case kFloat16:
      return EORACC_FLOAT16;
    case kInt8:
      return EORACC_INT8;
    default:
      return EORACC_NONE;
  }
}

// Lends the threads of the running session. A failure to hand out the work is kept for the end.
struct Lender {
  const Api* api;
  const KernelContext* context;
  Status* failure = nullptr;

  static void run(void* pool, size_t count, void (*task)(void*, size_t), void* data) {
    Lender& lender = *static_cast<Lender*>(pool);
    Status* failure = lender.api->parallel_for(lender.context, task, count, 0, data);
    if (failure == nullptr) return;
    if (lender.failure == nullptr) {
      lender.failure = failure;
    } else {
      lender.api->release_status(failure);
    }
  }
};

class Kernel {
 public:
  Kernel(const Api& api, int64_t k, int64_t n, int64_t bits, int64_t block_size)
      : api_(api), k_(k), n_(n), bits_(bits), block_size_(block_size) {}

  Status* compute(KernelContext* context) const {
    Tensor inputs[kInputs];
    size_t count = 0;
    RETURN_IF_FAILED(api_.input_count(context, &count));
    for (size_t i = 0; i < count && i < kInputs; ++i) {
      RETURN_IF_FAILED(read_tensor(api_, context, i, &inputs[i]));
    }
    const Tensor& x = inputs[kX];
    if (!x.present || x.rank == 0 || x.shape[x.rank - 1] != k_) {
      return error(api_, "the last dimension of X is not K = %lld", (long long)k_);
    }
    const int64_t groups = (k_ + block_size_ - 1) / block_size_;
    RETURN_IF_FAILED(require(inputs, kB, {n_, groups, block_size_ * bits_ / 8}, 3));
    RETURN_IF_FAILED(require_type(inputs, kB, kUint8));
    RETURN_IF_FAILED(require(inputs, kScales, {n_, groups}, 2));
    if (inputs[kZeroPoints].present) {
      RETURN_IF_FAILED(require(inputs, kZeroPoints, {n_, groups}, 2));
      RETURN_IF_FAILED(require_type(inputs, kZeroPoints, kUint8));
    }
    if (inputs[kBias].present) {
      RETURN_IF_FAILED(require(inputs, kBias, {n_}, 1));
      RETURN_IF_FAILED(require_type(inputs, kBias, x.type));
    }
    if (const ElementType type = inputs[kScales].type; type != kFloat32 && type != kFloat16) {
      return error(api_, "scales must be float or float16");
    }
    int64_t rank = 0;
    RETURN_IF_FAILED(require_factors(inputs, &rank));

    int64_t shape[kMaxRank];
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < x.rank; ++i) {
      shape[i] = x.shape[i];
      rows *= x.shape[i];
    }
    shape[x.rank - 1] = n_;
    Value* y = nullptr;
    RETURN_IF_FAILED(api_.output(context, 0, shape, x.rank, &y));
    if (rows == 0) return nullptr;

    eoracc_matmul matmul{};
    matmul.rows = rows;
    matmul.in_features = k_;
    matmul.out_features = n_;
    matmul.rank = rank;
    matmul.bits = (int32_t)bits_;
    matmul.group_size = (int32_t)block_size_;
    matmul.x_type = kernel_type(x.type);
    matmul.scales_type = kernel_type(inputs[kScales].type);
    matmul.lora_a_type = kernel_type(inputs[kLoraA].type);
    matmul.lora_b_type = kernel_type(inputs[kLoraB].type);
    matmul.x = x.data;
    matmul.codes = static_cast<const uint8_t*>(inputs[kB].data);
    matmul.scales = inputs[kScales].data;
    matmul.zero_points = static_cast<const uint8_t*>(inputs[kZeroPoints].data);
    matmul.bias = inputs[kBias].data;
    matmul.lora_a = inputs[kLoraA].data;
    matmul.lora_b = inputs[kLoraB].data;
    matmul.lora_a_scale = static_cast<const float*>(inputs[kLoraAScale].data);
    matmul.lora_b_scale = static_cast<const float*>(inputs[kLoraBScale].data);
    RETURN_IF_FAILED(api_.tensor_data(y, &matmul.y));

    Lender lender{&api_, context};
    const eoracc_threads threads{Lender::run, &lender};
    const eoracc_result result = eoracc_matmul_nbits_lowrank(&matmul, &threads, EORACC_ISA_BEST);
    if (lender.failure != nullptr) return lender.failure;
    if (result == EORACC_OUT_OF_MEMORY) return error(api_, "no memory for scratch");
    if (result != EORACC_OK) return error(api_, "the kernel refused its operands");
    return nullptr;
  }

 private:
  struct Shape {
    int64_t sizes[3];
  };

  Status* require(const Tensor* inputs, Input index, Shape expected, size_t rank) const {
    const Tensor& tensor = inputs[index];
    if (!tensor.present) return error(api_, "%s is missing", kInputNames[index]);
    bool fits = tensor.rank == rank;
    for (size_t i = 0; fits && i < rank; ++i) fits = tensor.shape[i] == expected.sizes[i];
    if (fits) return nullptr;
    char text[96] = "";
    int used = 0;
    for (size_t i = 0; i < rank; ++i) {
      used += snprintf(text + used, sizeof text - (size_t)used, "%s%lld", i ? ", " : "",
                       (long long)expected.sizes[i]);
    }
    return error(api_, "%s must have the shape [%s]", kInputNames[index], text);
  }

  Status* require_type(const Tensor* inputs, Input index, ElementType type) const {
    if (inputs[index].type == type) return nullptr;
    return error(api_, "%s must be %s", kInputNames[index],
                 type == kUint8     ? "uint8"
                 : type == kFloat16 ? "float16"
                                    : "float");
  }

  // One factor and, where it is int8, its scale; `shape` is the factor's.
  Status* require_factor(const Tensor* inputs, Input factor, Input scale, int64_t rows,
                         int64_t columns) const {
    RETURN_IF_FAILED(require(inputs, factor, {rows, columns}, 2));
    if (inputs[factor].type == kInt8) {
      RETURN_IF_FAILED(require(inputs, scale, {rows}, 1));
      return require_type(inputs, scale, kFloat32);
    }
    if (kernel_type(inputs[factor].type) == EORACC_NONE) {
      return error(api_, "%s must be float, float16 or int8", kInputNames[factor]);
    }
    return nullptr;
  }

  Status* require_factors(const Tensor* inputs, int64_t* rank) const {
    const Tensor& lora_a = inputs[kLoraA];
    if (!lora_a.present && !inputs[kLoraB].present) return nullptr;
    if (!lora_a.present || !inputs[kLoraB].present) {
      return error(api_, "lora_a and lora_b come together or not at all");
    }
    *rank = lora_a.shape[0];
    RETURN_IF_FAILED(require_factor(inputs, kLoraA, kLoraAScale, *rank, k_));
    return require_factor(inputs, kLoraB, kLoraBScale, n_, *rank);
  }

  Api api_;
  int64_t k_, n_, bits_, block_size_;
};

Status* create_kernel(const CustomOp*, const void* const* table, const KernelInfo* info,
                      void** kernel) {
  const Api api(table);
  int64_t k = 0, n = 0, bits = 0, block_size = 0, accuracy_level = 0;
  RETURN_IF_FAILED(api.int_attribute(info, "K", &k));
  RETURN_IF_FAILED(api.int_attribute(info, "N", &n));
  RETURN_IF_FAILED(api.int_attribute(info, "bits", &bits));
  RETURN_IF_FAILED(api.int_attribute(info, "block_size", &block_size));
  if (Status* absent = api.int_attribute(info, "accuracy_level", &accuracy_level); absent) {
    api.release_status(absent);
    accuracy_level = 0;
  }
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (k <= 0 || n <= 0 || k >= kLimit || n >= kLimit) {
    return error(api, "K and N must be positive and below 2^31");
  }
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return error(api, "bits must be 2, 3, 4 or 8, not %lld", (long long)bits);
  }
  if (block_size <= 0 || block_size % 8 != 0 || block_size >= kLimit) {
    return error(api, "block_size must be a positive multiple of 8, not %lld",
                 (long long)block_size);
  }
  // Level 4 allows int8 activations; float ones satisfy it too.
  if (accuracy_level != 0 && accuracy_level != 4) {
    return error(api, "accuracy_level must be 0 or 4, not %lld", (long long)accuracy_level);
  }
  *kernel = new (std::nothrow) Kernel(api, k, n, bits, block_size);
  return *kernel ? nullptr : api.create_status(kFail, "MatMulNBitsLowRank: out of memory");
}

// X, bias and Y share a type, which is the op's; any other input may be of its own.
template <ElementType type>
ElementType input_type(const CustomOp*, size_t index) {
  switch (index) {
    case kX:
    case kBias:
      return type;
    case kB:
    case kZeroPoints:
      return kUint8;
    case kLoraAScale:
    case kLoraBScale:
      return kFloat32;
    default:
      return kUndefined;
  }
}

template <ElementType type>
constexpr CustomOp make_op() {
  CustomOp op{};
  op.version = kApiVersion;
  op.name = [](const CustomOp*) { return kOp; };
  op.execution_provider = [](const CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.input_type = input_type<type>;
  op.input_count = [](const CustomOp*) -> size_t { return kInputs; };
  op.output_type = [](const CustomOp*, size_t) { return type; };
  op.output_count = [](const CustomOp*) -> size_t { return 1; };
  op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_presence = [](const CustomOp*, size_t index) {
    return index <= kScales ? kRequired : kOptional;
  };
  op.output_presence = [](const CustomOp*, size_t) { return kRequired; };
  op.input_memory = [](const CustomOp*, size_t) { return 0; };
  op.create_kernel_v2 = create_kernel;
  op.compute_v2 = [](void* kernel, KernelContext* context) {
    return static_cast<const Kernel*>(kernel)->compute(context);
  };
  op.start_version = [](const CustomOp*) { return 1; };
  op.end_version = [](const CustomOp*) { return INT32_MAX; };
  return op;
}

constexpr CustomOp kOps[] = {make_op<kFloat32>(), make_op<kFloat16>()};

}  // namespace

// The entry point that ONNX Runtime looks up in a custom op library.
extern "C" EORACC_API Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  const void* const* table = base->get_api(kApiVersion);
  if (table == nullptr) {
    return Api(base->get_api(1))
        .create_status(kFail, "eoracc needs ONNX Runtime 1.17 or newer: upgrade onnxruntime");
  }
  const Api api(table);
  // The domain serves every session that registers the library, and the process may make one at
  // any time, so it is never released.
  OpDomain* domain = nullptr;
  RETURN_IF_FAILED(api.create_domain(kDomain, &domain));
  for (const CustomOp& op : kOps) RETURN_IF_FAILED(api.add_op(domain, &op));
  return api.add_domain(options, domain);
}
