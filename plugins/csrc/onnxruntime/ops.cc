// eoracc::MatMulNBitsLowRank as an ONNX Runtime custom op: checks the tensors, calls the kernel.

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <new>

#include "cpu/layout.h"
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

constexpr size_t kMaxRank = 8;  // dimensions of X
constexpr int64_t kTile = EORACC_TILE;
constexpr int64_t kVector = 64;  // bytes of a quad of an int8 factor

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__attribute__((format(printf, 2, 3))) Status* error(const Api& api, const char* format, ...) {
  char text[256];
  const int prefix = snprintf(text, sizeof text, "%s: ", kOp);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text + prefix, sizeof text - (size_t)prefix, format, arguments);
  va_end(arguments);
  return api.create_status(kInvalidArgument, text);
}

Status* out_of_memory(const Api& api) {
  return api.create_status(kFail, "MatMulNBitsLowRank: out of memory");
}

// Hands a failed status of the runtime on to the caller.
#define RETURN_IF_FAILED(expression)                             \
  do {                                                           \
    if (Status* failure = (expression); failure) return failure; \
  } while (false)

// Set when the library is registered, null for a runtime that lacks it.
std::atomic<ShapeReference> shape_reference_of_runtime{nullptr};

struct Tensor {
  const void* data = nullptr;
  ElementType type = kUndefined;
  size_t rank = 0;
  int64_t shape[kMaxRank] = {};
  bool present = false;
};

Status* too_many_dimensions(const Api& api, size_t index, size_t rank) {
  return error(api, "%s has %zu dimensions, at most %zu are supported", kInputNames[index], rank,
               kMaxRank);
}

Status* read_shape(const Api& api, const Value* value, size_t index, Tensor* tensor) {
  TensorInfo* info = nullptr;
  RETURN_IF_FAILED(api.tensor_info(value, &info));
  Status* failure = api.element_type(info, &tensor->type);
  if (!failure) failure = api.dimension_count(info, &tensor->rank);
  if (!failure && tensor->rank > kMaxRank) failure = too_many_dimensions(api, index, tensor->rank);
  if (!failure) failure = api.dimensions(info, tensor->shape, tensor->rank);
  api.release_tensor_info(info);
  return failure;
}

Status* read_tensor(const Api& api, const Value* value, size_t index, Tensor* tensor) {
  if (value == nullptr) return nullptr;
  const ShapeReference shape_reference = shape_reference_of_runtime.load(std::memory_order_relaxed);
  if (shape_reference != nullptr) {
    const int64_t* shape = nullptr;
    RETURN_IF_FAILED(shape_reference(value, &tensor->type, &shape, &tensor->rank));
    if (tensor->rank > kMaxRank) return too_many_dimensions(api, index, tensor->rank);
    for (size_t i = 0; i < tensor->rank; ++i) tensor->shape[i] = shape[i];
  } else {
    RETURN_IF_FAILED(read_shape(api, value, index, tensor));
  }
  tensor->present = true;
  return api.tensor_data(const_cast<Value*>(value), const_cast<void**>(&tensor->data));
}

int32_t kernel_type(ElementType type) {
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

const char* type_name(ElementType type) {
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

size_t element_bytes(ElementType type) {
  return type == kFloat32 ? 4 : type == kFloat16 || type == kBfloat16 ? 2 : 1;
}

// Memory that is freed with its owner.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(data_); }

  // Room for `bytes`, aligned for vectors; null where there is none.
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

struct Attributes {
  int64_t k = 0, n = 0, bits = 0, block_size = 0;
  int64_t accuracy_level = 0;
  bool tiled = false;
  int32_t activation = EORACC_IDENTITY;
  float norm_epsilon = 0;
  size_t part_count = 1;
  int64_t parts[EORACC_MAX_PARTS] = {};

  int64_t groups() const { return ceil_div(k, block_size); }
  int64_t tiles() const { return ceil_div(n, kTile); }
  int64_t width() const { return activation == EORACC_IDENTITY ? n : n / 2; }
};

class Kernel {
 public:
  Kernel(const Api& api, const Attributes& attributes) : api_(api), a_(attributes) {}

  // Reads the operands that no run can change, and tiles the plain ones, once for all runs: asking
  // for all of them takes longer than multiplying with a small one.
  Status* keep_constants(const KernelInfo* info) {
    for (size_t i = kB; i < kInputs; ++i) {
      int is_constant = 0;
      const Value* value = nullptr;
      if (Status* absent = api_.constant_input(info, i, &is_constant, &value); absent) {
        api_.release_status(absent);
        continue;
      }
      if (!is_constant) continue;
      Tensor& tensor = constants_[i];
      RETURN_IF_FAILED(read_tensor(api_, value, i, &tensor));
      // One that does not fit is an error of the run.
      if (a_.tiled || !is_plain(tensor, (Input)i)) continue;
      if (!tile(tensor, (Input)i, &tiled_[i])) return out_of_memory(api_);
    }
    return nullptr;
  }

  Status* compute(KernelContext* context) const {
    Tensor inputs[kInputs];
    size_t count = 0;
    RETURN_IF_FAILED(api_.input_count(context, &count));
    for (size_t i = 0; i < count && i < kAdapterA; ++i) {
      RETURN_IF_FAILED(read_input(context, (Input)i, inputs));
    }
    Factors factors;
    RETURN_IF_FAILED(check(inputs, &factors));
    eoracc_bank bank{};
    if (count > kAdapterA) RETURN_IF_FAILED(read_bank(context, count, inputs, &bank));

    const Tensor& x = inputs[kX];
    int64_t shape[kMaxRank];
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < x.rank; ++i) {
      shape[i] = x.shape[i];
      rows *= x.shape[i];
    }
    shape[x.rank - 1] = a_.width();
    if (inputs[kResidual].present) RETURN_IF_FAILED(require(inputs, kResidual, shape, x.rank));
    Value* y = nullptr;
    RETURN_IF_FAILED(api_.output(context, 0, shape, x.rank, &y));
    if (rows == 0) return nullptr;

    Memory tiled[kInputs];
    const void* data[kInputs];
    for (size_t i = 0; i < kInputs; ++i) {
      data[i] = inputs[i].data;
      if (a_.tiled || !is_plain(inputs[i], (Input)i)) continue;
      data[i] = tiled_[i].data();
      if (data[i] != nullptr) continue;
      if (!tile(inputs[i], (Input)i, &tiled[i])) return out_of_memory(api_);
      data[i] = tiled[i].data();
    }

    eoracc_matmul matmul{};
    matmul.rows = rows;
    matmul.in_features = a_.k;
    matmul.out_features = a_.n;
    matmul.rank = factors.rank;
    matmul.bits = (int32_t)a_.bits;
    matmul.group_size = (int32_t)a_.block_size;
    matmul.accuracy_level = (int32_t)a_.accuracy_level;
    matmul.activation = a_.activation;
    matmul.part_count = (int32_t)a_.part_count;
    matmul.x_type = kernel_type(x.type);
    matmul.scales_type = kernel_type(inputs[kScales].type);
    matmul.lora_a_type = factors.a_type;
    matmul.lora_b_type = factors.b_type;
    matmul.norm_epsilon = a_.norm_epsilon;
    matmul.parts = a_.parts;
    matmul.x = data[kX];
    matmul.codes = static_cast<const uint8_t*>(data[kB]);
    matmul.scales = data[kScales];
    matmul.zero_points = static_cast<const uint8_t*>(data[kZeroPoints]);
    matmul.bias = data[kBias];
    matmul.lora_a = data[kLoraA];
    matmul.lora_b = data[kLoraB];
    matmul.lora_a_scale = static_cast<const float*>(data[kLoraAScale]);
    matmul.lora_b_scale = static_cast<const float*>(data[kLoraBScale]);
    matmul.norm_weight = static_cast<const float*>(data[kNormWeight]);
    matmul.residual = data[kResidual];
    matmul.bank = bank.rank > 0 ? &bank : nullptr;
    RETURN_IF_FAILED(api_.tensor_data(y, &matmul.y));

    Lender lender{&api_, context};
    const eoracc_threads threads{Lender::run, &lender};
    const eoracc_result result = eoracc_matmul_nbits_lowrank(&matmul, &threads, EORACC_ISA_BEST);
    if (lender.failure != nullptr) return lender.failure;
    if (result == EORACC_OUT_OF_MEMORY) return out_of_memory(api_);
    if (result != EORACC_OK) return error(api_, "the kernel refused its operands");
    return nullptr;
  }

 private:
  // What a run's tensors say of lora_a and lora_b: eoracc_type of each, and the rank.
  struct Factors {
    int64_t rank = 0;
    int32_t a_type = EORACC_NONE, b_type = EORACC_NONE;
  };

  // An operand, from where it was kept if no run can change it.
  Status* read_input(const KernelContext* context, Input index, Tensor* inputs) const {
    if (constants_[index].present) {
      inputs[index] = constants_[index];
      return nullptr;
    }
    const Value* value = nullptr;
    RETURN_IF_FAILED(api_.input(context, index, &value));
    return read_tensor(api_, value, index, &inputs[index]);
  }

  // ---- adapters

  // The adapter operands of a run, checked. At rank 0, which is no adapter at all, adapter_a and
  // adapter_index are all that is read.
  Status* read_bank(const KernelContext* context, size_t count, Tensor* inputs,
                    eoracc_bank* bank) const {
    RETURN_IF_FAILED(read_input(context, kAdapterA, inputs));
    if (count > kAdapterIndex) RETURN_IF_FAILED(read_input(context, kAdapterIndex, inputs));
    const Tensor& a = inputs[kAdapterA];
    if (a.present != inputs[kAdapterIndex].present) {
      return error(api_, "adapter_a and adapter_index come together or not at all");
    }
    if (!a.present) return nullptr;
    if (!a_.tiled) return error(api_, "adapters need layout 1");
    RETURN_IF_FAILED(check_adapter_a(a, bank));
    RETURN_IF_FAILED(check_index(inputs, bank));
    if (bank->rank == 0) return nullptr;
    for (size_t i = kAdapterB; i < kAdapterIndex; ++i) {
      RETURN_IF_FAILED(read_input(context, (Input)i, inputs));
    }
    RETURN_IF_FAILED(check_adapter_rest(inputs, *bank));
    bank->a = a.data;
    bank->b = inputs[kAdapterB].data;
    bank->a_scale = static_cast<const float*>(inputs[kAdapterAScale].data);
    bank->b_scale = static_cast<const float*>(inputs[kAdapterBScale].data);
    return nullptr;
  }

  // adapter_a says how many adapters there are, of which rank and type.
  Status* check_adapter_a(const Tensor& a, eoracc_bank* bank) const {
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
  Status* check_index(const Tensor* inputs, eoracc_bank* bank) const {
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

  Status* check_adapter_rest(const Tensor* inputs, const eoracc_bank& bank) const {
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

  // Of an integer lora_a or adapter_a by its columns: int8 has four in a vector, int4 eight.
  int32_t tiled_type(int64_t vectors) const {
    return vectors == ceil_div(a_.k, 4) ? EORACC_INT8 : EORACC_INT4;
  }

  // The last two dimensions of a tiled factor.
  static int64_t columns_of(int32_t type, int64_t columns) {
    return type == EORACC_INT8   ? ceil_div(columns, 4)
           : type == EORACC_INT4 ? ceil_div(columns, 8)
                                 : columns;
  }
  static int64_t lanes_of(int32_t type) {
    return type == EORACC_INT8 || type == EORACC_INT4 ? kVector : kTile;
  }

  // ---- operands of the plain layout

  // Whether the tensor is one that the kernel wants in tiles, and has the plain shape for it.
  bool is_plain(const Tensor& tensor, Input index) const {
    if (!tensor.present) return false;
    const int64_t* shape = tensor.shape;
    const int64_t groups = a_.groups();
    switch (index) {
      case kB:
        return tensor.type == kUint8 && tensor.rank == 3 && shape[0] == a_.n &&
               shape[1] == groups && shape[2] == a_.block_size * a_.bits / 8;
      case kScales:
        return tensor.rank == 2 && shape[0] == a_.n && shape[1] == groups && is_float(tensor.type);
      case kZeroPoints:
        return tensor.type == kUint8 && tensor.rank == 2 && shape[0] == a_.n && shape[1] == groups;
      case kLoraA:
        return tensor.rank == 2 && shape[1] == a_.k && is_plain_factor(tensor.type);
      case kLoraB:
        return tensor.rank == 2 && shape[0] == a_.n && is_plain_factor(tensor.type);
      case kLoraAScale:
      case kLoraBScale:
        return tensor.rank == 1 && tensor.type == kFloat32;
      default:
        return false;
    }
  }

  static bool is_float(ElementType type) { return type == kFloat32 || type == kFloat16; }
  static bool is_plain_factor(ElementType type) { return is_float(type) || type == kInt8; }

  // A plain tensor in tiles; false where there is no memory.
  bool tile(const Tensor& tensor, Input index, Memory* memory) const {
    const int64_t rows = tensor.shape[0], row_tiles = ceil_div(rows, kTile);
    const int64_t columns = tensor.rank > 1 ? tensor.shape[1] : 1;
    if (index == kB) {
      const size_t tile_bytes = eoracc_tile_bytes(a_.k, (int32_t)a_.bits);
      void* codes = memory->take((size_t)row_tiles * tile_bytes);
      if (codes == nullptr) return false;
      eoracc_tile_codes(static_cast<const uint8_t*>(tensor.data), rows, a_.k, (int32_t)a_.bits,
                        a_.block_size, static_cast<uint8_t*>(codes));
    } else if (tensor.type == kInt8) {
      void* values = memory->take((size_t)row_tiles * eoracc_tile_bytes(columns, 8));
      if (values == nullptr) return false;
      eoracc_tile_int8(static_cast<const int8_t*>(tensor.data), rows, columns,
                       static_cast<uint8_t*>(values));
    } else {
      const size_t bytes = element_bytes(tensor.type);
      void* values = memory->take((size_t)(row_tiles * kTile * columns) * bytes);
      if (values == nullptr) return false;
      eoracc_tile_elements(tensor.data, rows, columns, bytes, values);
    }
    return true;
  }

  // ---- checks

  struct Shape {
    int64_t sizes[3];
  };

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

  Status* require(const Tensor* inputs, Input index, Shape expected, size_t rank) const {
    return require(inputs, index, expected.sizes, rank);
  }

  Status* require_type(const Tensor* inputs, Input index, ElementType type) const {
    if (inputs[index].type == type) return nullptr;
    return error(api_, "%s must be %s", kInputNames[index], type_name(type));
  }

  // The tensors of a run against the attributes and one another; describes the factors.
  Status* check(const Tensor* inputs, Factors* factors) const {
    const Tensor& x = inputs[kX];
    if (!x.present || x.rank == 0 || x.shape[x.rank - 1] != a_.k) {
      return error(api_, "the last dimension of X is not K = %lld", (long long)a_.k);
    }
    const int64_t groups = a_.groups();
    if (a_.tiled) {
      const int64_t chunk = a_.bits == 3 ? 192 : 64;
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
    // Rows of lora_a are padded to tiles, so that lora_b says what the rank is. Its integers are of
    // as many bits as those of lora_a, whose columns are known.
    if (lora_a.rank != 3) return error(api_, "lora_a must have three dimensions");
    if (lora_b.rank != 3) return error(api_, "lora_b must have three dimensions");
    if (lora_a.type == kUint8) factors->a_type = tiled_type(lora_a.shape[1]);
    if (lora_a.type == kUint8 && lora_b.type == kUint8) factors->b_type = factors->a_type;
    const int64_t rank = factors->rank = lora_b.shape[1] * (factors->b_type == EORACC_INT8   ? 4
                                                            : factors->b_type == EORACC_INT4 ? 8
                                                                                             : 1);
    const int64_t parts = (int64_t)a_.part_count;
    if (parts > 1 && rank % kTile != 0) {
      return error(api_, "the rank of %lld merged linears must be a multiple of 16, not %lld",
                   (long long)parts, (long long)rank);
    }
    RETURN_IF_FAILED(check_tiled_factor(inputs, kLoraA, kLoraAScale, factors->a_type,
                                        ceil_div(parts * rank, kTile), a_.k));
    return check_tiled_factor(inputs, kLoraB, kLoraBScale, factors->b_type, a_.tiles(), rank);
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
    if (!is_float(inputs[factor].type) && inputs[factor].type != kUint8) {
      return error(api_, "%s must be float, float16 or, for int8 and int4, uint8",
                   kInputNames[factor]);
    }
    RETURN_IF_FAILED(
        require(inputs, factor, {tiles, columns_of(type, columns), lanes_of(type)}, 3));
    if (is_float(inputs[factor].type)) return nullptr;
    RETURN_IF_FAILED(require(inputs, scale, {tiles * kTile}, 1));
    return require_type(inputs, scale, kFloat32);
  }

  Api api_;
  Attributes a_;
  Tensor constants_[kInputs];
  Memory tiled_[kInputs];  // where a constant is plain
};

// ---- attributes

// An attribute that the node may leave out keeps the value that it has.
Status* read_optional(const Api& api, Status* absent) {
  if (absent != nullptr) api.release_status(absent);
  return nullptr;
}

Status* read_activation(const Api& api, const KernelInfo* info, int32_t* activation) {
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

Status* read_parts(const Api& api, const KernelInfo* info, Attributes* a) {
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

Status* read_attributes(const Api& api, const KernelInfo* info, Attributes* a) {
  RETURN_IF_FAILED(api.int_attribute(info, "K", &a->k));
  RETURN_IF_FAILED(api.int_attribute(info, "N", &a->n));
  RETURN_IF_FAILED(api.int_attribute(info, "bits", &a->bits));
  RETURN_IF_FAILED(api.int_attribute(info, "block_size", &a->block_size));
  int64_t layout = 0;
  read_optional(api, api.int_attribute(info, "accuracy_level", &a->accuracy_level));
  read_optional(api, api.int_attribute(info, "layout", &layout));
  read_optional(api, api.float_attribute(info, "norm_epsilon", &a->norm_epsilon));
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (a->k <= 0 || a->n <= 0 || a->k >= kLimit || a->n >= kLimit) {
    return error(api, "K and N must be positive and below 2^31");
  }
  if (a->bits != 2 && a->bits != 3 && a->bits != 4 && a->bits != 8) {
    return error(api, "bits must be 2, 3, 4 or 8, not %lld", (long long)a->bits);
  }
  if (a->block_size <= 0 || a->block_size % 8 != 0 || a->block_size >= kLimit) {
    return error(api, "block_size must be a positive multiple of 8, not %lld",
                 (long long)a->block_size);
  }
  if (a->accuracy_level != 0 && a->accuracy_level != 4) {
    return error(api, "accuracy_level must be 0 or 4, not %lld", (long long)a->accuracy_level);
  }
  if (layout != 0 && layout != 1) {
    return error(api, "layout must be 0 or 1, not %lld", (long long)layout);
  }
  a->tiled = layout == 1;
  RETURN_IF_FAILED(read_activation(api, info, &a->activation));
  RETURN_IF_FAILED(read_parts(api, info, a));
  if (!a->tiled && a->part_count > 1) return error(api, "parts need layout 1");
  if (a->activation != EORACC_IDENTITY && (a->part_count != 2 || a->parts[0] != a->parts[1])) {
    return error(api, "an activation needs two equal parts");
  }
  return nullptr;
}

Status* create_kernel(const CustomOp*, const void* const* table, const KernelInfo* info,
                      void** out) {
  const Api api(table);
  Attributes attributes;
  RETURN_IF_FAILED(read_attributes(api, info, &attributes));
  Kernel* kernel = new (std::nothrow) Kernel(api, attributes);
  if (kernel == nullptr) return out_of_memory(api);
  if (Status* failure = kernel->keep_constants(info); failure) {
    delete kernel;
    return failure;
  }
  *out = kernel;
  return nullptr;
}

// X, bias, residual and Y share a type, which is the op's; any other input may be of its own.
template <ElementType type>
ElementType input_type(const CustomOp*, size_t index) {
  switch (index) {
    case kX:
    case kBias:
    case kResidual:
      return type;
    case kB:
    case kZeroPoints:
      return kUint8;
    case kLoraAScale:
    case kLoraBScale:
    case kNormWeight:
    case kAdapterAScale:
    case kAdapterBScale:
      return kFloat32;
    case kAdapterIndex:
      return kInt32;
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

constexpr CustomOp kOps[] = {make_op<kFloat32>(), make_op<kFloat16>(), make_op<kBfloat16>()};

}  // namespace

// The entry point that ONNX Runtime looks up in a custom op library.
extern "C" EORACC_API Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  const void* const* table = base->get_api(kApiVersion);
  if (table == nullptr) {
    return Api(base->get_api(1))
        .create_status(kFail, "eoracc needs ONNX Runtime 1.17 or newer: upgrade onnxruntime");
  }
  const Api api(table);
  // An interface that the runtime lacks must not be asked for: it would complain on stderr.
  int major = 0, minor = 0;
  if (sscanf(base->get_version_string(), "%d.%d", &major, &minor) == 2 &&
      (major > 1 || minor >= (int)kShapeReferenceVersion)) {
    if (const void* const* newer = base->get_api(kShapeReferenceVersion); newer != nullptr) {
      shape_reference_of_runtime.store(shape_reference(newer), std::memory_order_relaxed);
    }
  }
  // The domain serves every session that registers the library, and the process may make one at
  // any time, so it is never released.
  OpDomain* domain = nullptr;
  RETURN_IF_FAILED(api.create_domain(kDomain, &domain));
  for (const CustomOp& op : kOps) RETURN_IF_FAILED(api.add_op(domain, &op));
  return api.add_domain(options, domain);
}
