// The slice of ONNX Runtime's C interface that the ops use.
//
// ONNX Runtime promises that OrtApi only ever grows at its end, so a function is known by its
// position in the table for good. The ops ask for version 17 of the interface, the first with
// KernelContext_ParallelFor; every later runtime hands it out. Of a newer one they use a function
// that spares an allocation for each tensor.
// tests/plugins/test_onnxruntime_abi.py checks each slot against the runtime that is installed.

#ifndef EORACC_ONNXRUNTIME_C_API_H_
#define EORACC_ONNXRUNTIME_C_API_H_

#include <stddef.h>
#include <stdint.h>

namespace eoracc::ort {

// Opaque to a custom op.
struct KernelContext;
struct KernelInfo;
struct SessionOptions;
struct Status;  // null is success
struct TensorInfo;
struct Value;
struct OpDomain;

constexpr uint32_t kApiVersion = 17;
constexpr uint32_t kShapeReferenceVersion = 24;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int {
  kUndefined = 0,
  kFloat32 = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
  kBfloat16 = 16,
};
enum Presence : int { kRequired = 0, kOptional = 1 };

// Positions in OrtApi.
enum Slot : int {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelInfoGetAttributeString = 87,
  kKernelContextGetInputCount = 88,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelInfoGetAttributeInt64Array = 163,
  kKernelInfoGetConstantInput = 249,
  kKernelContextParallelFor = 274,
  kGetTensorElementTypeAndShapeDataReference = 414,
};

// OrtApiBase.
struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

struct CustomOp;

// Type and shape of a tensor, where it keeps them; null before version 24.
typedef Status* (*ShapeReference)(const Value*, ElementType*, const int64_t** shape, size_t* rank);

inline ShapeReference shape_reference(const void* const* table) {
  return reinterpret_cast<ShapeReference>(
      const_cast<void*>(table[kGetTensorElementTypeAndShapeDataReference]));
}

// The functions of OrtApi under their own types, for a kernel of `op`, which errors name.
class Api {
 public:
  explicit Api(const void* const* table, const char* op = "eoracc") : table_(table), op_(op) {}

  const char* op() const { return op_; }

  Status* create_status(ErrorCode code, const char* message) const {
    return at<Status* (*)(ErrorCode, const char*)>(kCreateStatus)(code, message);
  }
  Status* create_domain(const char* name, OpDomain** out) const {
    return at<Status* (*)(const char*, OpDomain**)>(kCreateCustomOpDomain)(name, out);
  }
  Status* add_op(OpDomain* domain, const CustomOp* op) const {
    return at<Status* (*)(OpDomain*, const CustomOp*)>(kCustomOpDomainAdd)(domain, op);
  }
  Status* add_domain(SessionOptions* options, OpDomain* domain) const {
    return at<Status* (*)(SessionOptions*, OpDomain*)>(kAddCustomOpDomain)(options, domain);
  }
  Status* tensor_data(Value* value, void** out) const {
    return at<Status* (*)(Value*, void**)>(kGetTensorMutableData)(value, out);
  }
  Status* element_type(const TensorInfo* info, ElementType* out) const {
    return at<Status* (*)(const TensorInfo*, ElementType*)>(kGetTensorElementType)(info, out);
  }
  Status* dimension_count(const TensorInfo* info, size_t* out) const {
    return at<Status* (*)(const TensorInfo*, size_t*)>(kGetDimensionsCount)(info, out);
  }
  Status* dimensions(const TensorInfo* info, int64_t* out, size_t count) const {
    return at<Status* (*)(const TensorInfo*, int64_t*, size_t)>(kGetDimensions)(info, out, count);
  }
  Status* tensor_info(const Value* value, TensorInfo** out) const {
    return at<Status* (*)(const Value*, TensorInfo**)>(kGetTensorTypeAndShape)(value, out);
  }
  Status* int_attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, int64_t*)>(kKernelInfoGetAttributeInt64)(
        info, name, out);
  }
  Status* float_attribute(const KernelInfo* info, const char* name, float* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, float*)>(kKernelInfoGetAttributeFloat)(
        info, name, out);
  }
  // `size` is the room in `out` and becomes the length, the final NUL included.
  Status* string_attribute(const KernelInfo* info, const char* name, char* out,
                           size_t* size) const {
    return at<Status* (*)(const KernelInfo*, const char*, char*, size_t*)>(
        kKernelInfoGetAttributeString)(info, name, out, size);
  }
  // `size` is the room in `out` and becomes the number of elements.
  Status* ints_attribute(const KernelInfo* info, const char* name, int64_t* out,
                         size_t* size) const {
    return at<Status* (*)(const KernelInfo*, const char*, int64_t*, size_t*)>(
        kKernelInfoGetAttributeInt64Array)(info, name, out, size);
  }
  // The value of an input that no run can change; it lives as long as the session.
  Status* constant_input(const KernelInfo* info, size_t index, int* is_constant,
                         const Value** out) const {
    return at<Status* (*)(const KernelInfo*, size_t, int*, const Value**)>(
        kKernelInfoGetConstantInput)(info, index, is_constant, out);
  }
  Status* input_count(const KernelContext* context, size_t* out) const {
    return at<Status* (*)(const KernelContext*, size_t*)>(kKernelContextGetInputCount)(context,
                                                                                       out);
  }
  Status* input(const KernelContext* context, size_t index, const Value** out) const {
    return at<Status* (*)(const KernelContext*, size_t, const Value**)>(kKernelContextGetInput)(
        context, index, out);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* shape, size_t rank,
                 Value** out) const {
    return at<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(
        kKernelContextGetOutput)(context, index, shape, rank, out);
  }
  void release_status(Status* status) const { at<void (*)(Status*)>(kReleaseStatus)(status); }
  void release_tensor_info(TensorInfo* info) const {
    at<void (*)(TensorInfo*)>(kReleaseTensorTypeAndShapeInfo)(info);
  }
  // Calls task(data, i) for each i in [0, count); batches = 0 lets the runtime choose.
  Status* parallel_for(const KernelContext* context, void (*task)(void*, size_t), size_t count,
                       size_t batches, void* data) const {
    return at<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(
        kKernelContextParallelFor)(context, task, count, batches, data);
  }

 private:
  template <typename Function>
  Function at(Slot slot) const {
    return reinterpret_cast<Function>(const_cast<void*>(table_[slot]));
  }

  const void* const* table_;
  const char* op_;
};

// OrtCustomOp as of version 17: the runtime reads no further for an op that says so.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* const* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t index);
  size_t (*input_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t index);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy_kernel)(void* kernel);
  Presence (*input_presence)(const CustomOp*, size_t index);
  Presence (*output_presence)(const CustomOp*, size_t index);
  int (*input_memory)(const CustomOp*, size_t index);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_same_type)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_same_type)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* const* api, const KernelInfo*,
                              void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, void* context);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  // Added in version 18 and left null.
  void* may_inplace[4];
};

}  // namespace eoracc::ort

#endif  // EORACC_ONNXRUNTIME_C_API_H_
