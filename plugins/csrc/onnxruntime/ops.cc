// The ops of the domain as ONNX Runtime custom ops: reads a run, calls the kernel.

#include <stdio.h>

#include <atomic>
#include <new>

#include "cpu/layout.h"
#include "cpu/matmul_nbits_lowrank.h"
#include "onnxruntime/attributes.h"
#include "onnxruntime/c_api.h"
#include "onnxruntime/checks.h"
#include "onnxruntime/gather.h"
#include "onnxruntime/tensor.h"
#include "onnxruntime/threads.h"

namespace {

using namespace eoracc::ort;

class Kernel : public FromMalloc {
 public:
  Kernel(const Api& api, const Attributes& attributes) : api_(api), a_(attributes) {}

  // Reads the constant operands, and tiles the plain ones, once for all runs: reading all operands
  // takes longer than multiplying with a small one.
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
      RETURN_IF_FAILED(read_tensor(api_, value, kInputNames[i], &tensor));
      // A constant that does not fit is left to the checks of a run.
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
    RETURN_IF_FAILED(checks_.operands(inputs, &factors));
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
    if (inputs[kResidual].present) {
      RETURN_IF_FAILED(checks_.require(inputs, kResidual, shape, x.rank));
    }
    Value* y = nullptr;
    RETURN_IF_FAILED(api_.output(context, 0, shape, x.rank, &y));
    if (rows == 0) return nullptr;

    Memory tiled[kInputs];
    const void* data[kInputs];
    RETURN_IF_FAILED(tile_plain(inputs, tiled, data));
    eoracc_matmul matmul = describe(inputs, data, factors);
    matmul.rows = rows;
    matmul.bank = bank.rank > 0 ? &bank : nullptr;
    RETURN_IF_FAILED(api_.tensor_data(y, &matmul.y));
    return multiply(context, matmul);
  }

 private:
  // Reads one operand; a constant is at hand already.
  Status* read_input(const KernelContext* context, Input index, Tensor* inputs) const {
    if (constants_[index].present) {
      inputs[index] = constants_[index];
      return nullptr;
    }
    const Value* value = nullptr;
    RETURN_IF_FAILED(api_.input(context, index, &value));
    return read_tensor(api_, value, kInputNames[index], &inputs[index]);
  }

  // ---- adapters

  // Reads and checks the adapter operands. A bank of rank 0 holds no adapter: only adapter_a and
  // adapter_index are read.
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
    RETURN_IF_FAILED(checks_.adapter_a(a, bank));
    RETURN_IF_FAILED(checks_.adapter_index(inputs, bank));
    if (bank->rank == 0) return nullptr;
    for (size_t i = kAdapterB; i < kAdapterIndex; ++i) {
      RETURN_IF_FAILED(read_input(context, (Input)i, inputs));
    }
    RETURN_IF_FAILED(checks_.adapter_rest(inputs, *bank));
    bank->a = a.data;
    bank->b = inputs[kAdapterB].data;
    bank->a_scale = static_cast<const float*>(inputs[kAdapterAScale].data);
    bank->b_scale = static_cast<const float*>(inputs[kAdapterBScale].data);
    return nullptr;
  }

  // ---- the call

  // All of a call that neither the run's rows nor its adapters decide.
  eoracc_matmul describe(const Tensor* inputs, const void* const* data,
                         const Factors& factors) const {
    eoracc_matmul matmul{};
    matmul.in_features = a_.k;
    matmul.out_features = a_.n;
    matmul.rank = factors.rank;
    matmul.bits = (int32_t)a_.bits;
    matmul.group_size = (int32_t)a_.block_size;
    matmul.accuracy_level = (int32_t)a_.accuracy_level;
    matmul.activation = a_.activation;
    matmul.part_count = (int32_t)a_.part_count;
    matmul.x_type = kernel_type(inputs[kX].type);
    matmul.scales_type = kernel_type(inputs[kScales].type);
    matmul.lora_a_type = factors.a_type;
    matmul.lora_b_type = factors.b_type;
    matmul.norm_epsilon = a_.norm_epsilon;
    matmul.parts = a_.parts;
    matmul.ranks = a_.has_ranks && factors.rank > 0 ? a_.ranks : nullptr;
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
    return matmul;
  }

  Status* multiply(const KernelContext* context, const eoracc_matmul& matmul) const {
    Lender lender{&api_, context};
    const eoracc_threads threads{Lender::run, &lender};
    const eoracc_result result = eoracc_matmul_nbits_lowrank(&matmul, &threads, EORACC_ISA_BEST);
    if (lender.failure != nullptr) return lender.failure;
    if (result == EORACC_OUT_OF_MEMORY) return out_of_memory(api_);
    if (result != EORACC_OK) return error(api_, "the kernel refused its operands");
    return nullptr;
  }

  // ---- operands of the plain layout

  // The data of every input; plain ones are in tiles, made here unless they are constants.
  Status* tile_plain(const Tensor* inputs, Memory* tiled, const void** data) const {
    for (size_t i = 0; i < kInputs; ++i) {
      data[i] = inputs[i].data;
      if (a_.tiled || !is_plain(inputs[i], (Input)i)) continue;
      data[i] = tiled_[i].data();
      if (data[i] != nullptr) continue;
      if (!tile(inputs[i], (Input)i, &tiled[i])) return out_of_memory(api_);
      data[i] = tiled[i].data();
    }
    return nullptr;
  }

  // Whether the kernel needs this tensor in tiles and it has the shape of the plain layout.
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

  static bool is_plain_factor(ElementType type) { return is_float(type) || type == kInt8; }

  // Brings a plain tensor into tiles; false without memory.
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

  Api api_;
  Attributes a_;
  Checks checks_{api_, a_};
  Tensor constants_[kInputs];
  Memory tiled_[kInputs];  // constants of the plain layout, in tiles
};

Status* create_kernel(const CustomOp*, const void* const* table, const KernelInfo* info,
                      void** out) {
  const Api api(table, kOp);
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

Status* create_gather_kernel(const CustomOp*, const void* const* table, const KernelInfo* info,
                             void** out) {
  const Api api(table, kGatherOp);
  Attributes attributes;
  RETURN_IF_FAILED(read_table_attributes(api, info, &attributes));
  *out = new (std::nothrow) GatherKernel(api, attributes);
  return *out == nullptr ? out_of_memory(api) : nullptr;
}

// X, bias, residual and Y share the type of the op; other inputs have their own.
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

// What the ops have in common: the first three inputs are required, and there is one output.
constexpr CustomOp make_base() {
  CustomOp op{};
  op.version = kApiVersion;
  op.execution_provider = [](const CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.output_count = [](const CustomOp*) -> size_t { return 1; };
  op.input_presence = [](const CustomOp*, size_t index) {
    return index <= kScales ? kRequired : kOptional;
  };
  op.output_presence = [](const CustomOp*, size_t) { return kRequired; };
  op.input_memory = [](const CustomOp*, size_t) { return 0; };
  op.start_version = [](const CustomOp*) { return 1; };
  op.end_version = [](const CustomOp*) { return INT32_MAX; };
  return op;
}

template <ElementType type>
constexpr CustomOp make_matmul() {
  CustomOp op = make_base();
  op.name = [](const CustomOp*) { return kOp; };
  op.input_type = input_type<type>;
  op.input_count = [](const CustomOp*) -> size_t { return kInputs; };
  op.output_type = [](const CustomOp*, size_t) { return type; };
  op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.create_kernel_v2 = create_kernel;
  op.compute_v2 = [](void* kernel, KernelContext* context) {
    return static_cast<const Kernel*>(kernel)->compute(context);
  };
  return op;
}

constexpr CustomOp make_gather() {
  CustomOp op = make_base();
  op.name = [](const CustomOp*) { return kGatherOp; };
  op.input_type = [](const CustomOp*, size_t index) {
    return index == kGatherIndices ? kInt64 : index == kGatherScales ? kUndefined : kUint8;
  };
  op.input_count = [](const CustomOp*) -> size_t { return kGatherInputs; };
  op.output_type = [](const CustomOp*, size_t) { return kFloat32; };
  op.destroy_kernel = [](void* kernel) { delete static_cast<GatherKernel*>(kernel); };
  op.create_kernel_v2 = create_gather_kernel;
  op.compute_v2 = [](void* kernel, KernelContext* context) {
    return static_cast<const GatherKernel*>(kernel)->compute(context);
  };
  return op;
}

constexpr CustomOp kOps[] = {make_matmul<kFloat32>(), make_matmul<kFloat16>(),
                             make_matmul<kBfloat16>(), make_gather()};

}  // namespace

// The entry point that ONNX Runtime looks up in a custom op library.
extern "C" EORACC_API Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  const void* const* table = base->get_api(kApiVersion);
  if (table == nullptr) {
    return Api(base->get_api(1))
        .create_status(kFail, "eoracc needs ONNX Runtime 1.17 or newer: upgrade onnxruntime");
  }
  const Api api(table);
  // Only ask for an interface that the runtime has: it reports others on stderr.
  int major = 0, minor = 0;
  if (sscanf(base->get_version_string(), "%d.%d", &major, &minor) == 2 &&
      (major > 1 || minor >= (int)kShapeReferenceVersion)) {
    if (const void* const* newer = base->get_api(kShapeReferenceVersion); newer != nullptr) {
      shape_reference_of_runtime.store(shape_reference(newer), std::memory_order_relaxed);
    }
  }
  // Never released: the process may make another session with this library at any time.
  OpDomain* domain = nullptr;
  RETURN_IF_FAILED(api.create_domain(kDomain, &domain));
  for (const CustomOp& op : kOps) RETURN_IF_FAILED(api.add_op(domain, &op));
  return api.add_domain(options, domain);
}
