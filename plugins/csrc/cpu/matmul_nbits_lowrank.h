// Y = X * dequant(W)^T + (X * lora_a^T) * lora_b^T + bias, on the CPU, behind a C ABI.
//
// Nothing here knows ONNX Runtime: the caller lends operands and threads. Operands are read where
// they lie, with no alignment asked for beyond that of their element, and never repacked or kept.

#ifndef EORACC_CPU_MATMUL_NBITS_LOWRANK_H_
#define EORACC_CPU_MATMUL_NBITS_LOWRANK_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define EORACC_API __declspec(dllexport)
#else
#define EORACC_API __attribute__((visibility("default")))
#endif

// Grows whenever a declaration below changes.
#define EORACC_ABI_VERSION 1

typedef enum eoracc_type {
  EORACC_NONE = 0,  // the operand is absent
  EORACC_FLOAT32 = 1,
  EORACC_FLOAT16 = 2,
  EORACC_INT8 = 3,
} eoracc_type;

typedef enum eoracc_isa {
  EORACC_ISA_BEST = 0,      // the widest one that this processor has
  EORACC_ISA_BASELINE = 1,  // what every processor of the architecture has
  EORACC_ISA_AVX2 = 2,      // with FMA and F16C
  EORACC_ISA_AVX512 = 3,    // F, BW, DQ, VL
} eoracc_isa;

typedef enum eoracc_result {
  EORACC_OK = 0,
  EORACC_BAD_OPERAND = 1,    // sizes, bits, group_size or types are none that the kernel knows
  EORACC_NO_SUCH_ISA = 2,    // this processor or this build lacks the instruction set
  EORACC_OUT_OF_MEMORY = 3,  // scratch: about 512 * in_features floats at most
} eoracc_result;

// The product's operands. With G = ceil(in_features / group_size), row-major:
//   x              [rows, in_features], x_type
//   y              [rows, out_features], x_type, overwritten
//   codes          [out_features, G, group_size * bits / 8] bytes; code i of a group is in its
//                  bits [i * bits, (i + 1) * bits), little endian
//   scales         [out_features, G], scales_type (float32 or float16)
//   zero_points    [out_features, G] bytes, or null for 2^(bits - 1) everywhere
//   bias           [out_features], x_type, or null
//   lora_a         [rank, in_features], lora_type
//   lora_b         [out_features, rank], lora_type
//   lora_a_scale   [rank] and lora_b_scale [out_features]: for int8 factors, else null
// A weight is (code - zero_point) * scale. NaN and infinity propagate as in that formula; codes,
// scales and zero points beyond in_features do not reach a product.
typedef struct eoracc_matmul {
  int64_t rows;          // any, 0 included
  int64_t in_features;   // positive
  int64_t out_features;  // positive
  int64_t rank;          // 0 turns the low-rank term off
  int32_t bits;          // 2, 3, 4 or 8
  int32_t group_size;    // a positive multiple of 8
  int32_t x_type;        // eoracc_type: float32 or float16
  int32_t scales_type;   // eoracc_type: float32 or float16
  int32_t lora_a_type;   // eoracc_type: none only at rank 0
  int32_t lora_b_type;
  const void* x;
  void* y;
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zero_points;
  const void* bias;
  const void* lora_a;
  const void* lora_b;
  const float* lora_a_scale;
  const float* lora_b_scale;
} eoracc_matmul;

// Threads lent by the caller. `run` calls `task(data, i)` once for each i in [0, count), on any
// thread and in any order, and returns when all are done. A null `run` means the calling thread.
typedef struct eoracc_threads {
  void (*run)(void* pool, size_t count, void (*task)(void* data, size_t index), void* data);
  void* pool;
} eoracc_threads;

// Computes y. Sums are in float32 and do not depend on how `threads` spreads the tasks.
EORACC_API eoracc_result eoracc_matmul_nbits_lowrank(const eoracc_matmul* matmul,
                                                     const eoracc_threads* threads, eoracc_isa isa);

// The instruction set that EORACC_ISA_BEST stands for here.
EORACC_API eoracc_isa eoracc_best_isa(void);

// EORACC_ABI_VERSION of the library, which may be older than the header.
EORACC_API int32_t eoracc_abi_version(void);

// Version of the eoracc that the library was built in, such as "0.1.0".
EORACC_API const char* eoracc_version(void);

#ifdef __cplusplus
}
#endif

#endif  // EORACC_CPU_MATMUL_NBITS_LOWRANK_H_
