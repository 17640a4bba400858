// Y = act(norm(X) * dequant(W)^T + (norm(X) * A^T) * B^T + (norm(X) * Ai^T) * Bi^T + bias)
//     + residual, behind a C ABI.
//
// W has 2, 3, 4, 6 or 8 bits per weight. A (lora_a) and B (lora_b) are low-rank factors that
// compensate for quantization, Ai and Bi those of the adapter that a row uses. The interface does
// not depend on ONNX Runtime: the caller lends operands and threads. Operands are read in place,
// need no alignment and are not kept after a call.
//
// The tiled layout. Sixteen rows of a weight form a tile; rows are padded to whole tiles. A quad is
// four consecutive columns. In a 64-byte vector of codes, byte 4 * r + i belongs to row r of the
// tile and column 4 * q + i of quad q. A chunk is the least run of columns that fills whole
// vectors; columns are padded to whole chunks with code 0, and X counts as 0 there:
//
//   bits   columns   bytes   a chunk's vectors
//      8         4      64   vector 0 is quad 0
//      4         8      64   low nibbles are quad 0, high nibbles quad 1
//      2        16      64   bits [2m, 2m + 2) of each byte are quad m
//      3        32     192   vectors 0 and 1 hold the low two bits of quads 0..3 and 4..7 as at two
//                            bits; bit q of each byte of vector 2 is the high bit of quad q
//      6        16     192   vectors 0 and 1 hold the low four bits of quads 0..1 and 2..3 as at
//                            four bits; vector 2 holds the high two bits of all four as at two bits

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
#define EORACC_ABI_VERSION 4

// Rows of a weight in a tile.
#define EORACC_TILE 16

// Most linears that one weight can merge.
#define EORACC_MAX_PARTS 8

typedef enum eoracc_type {
  EORACC_NONE = 0,  // the operand is absent
  EORACC_FLOAT32 = 1,
  EORACC_FLOAT16 = 2,
  EORACC_INT8 = 3,  // of a factor: 8-bit tiles, code = value + 128, and a scale for each row
  EORACC_BFLOAT16 = 4,
  EORACC_INT4 = 5,  // of a factor: 4-bit tiles, code = value + 8, and a scale for each row
} eoracc_type;

typedef enum eoracc_isa {
  EORACC_ISA_BEST = 0,         // the best one that this processor has
  EORACC_ISA_SCALAR = 1,       // what every processor of the architecture has
  EORACC_ISA_AVX2 = 2,         // with FMA and F16C
  EORACC_ISA_AVX512 = 3,       // F, BW, DQ, VL
  EORACC_ISA_AVX512_VNNI = 4,  // with VNNI, VBMI and GFNI
  EORACC_ISA_AMX = 5,          // AVX512_VNNI with AVX-512 BF16, AMX tiles and AMX BF16
  EORACC_ISA_NEON_DOTPROD = 6,
  EORACC_ISA_NEON_I8MM = 7,
} eoracc_isa;

typedef enum eoracc_activation {
  EORACC_IDENTITY = 0,
  EORACC_SILU = 1,       // g / (1 + exp(-g))
  EORACC_GELU_TANH = 2,  // g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3)))
} eoracc_activation;

typedef enum eoracc_result {
  EORACC_OK = 0,
  EORACC_BAD_OPERAND = 1,    // sizes, attributes or types that no kernel supports
  EORACC_NO_SUCH_ISA = 2,    // this processor or this build lacks the instruction set
  EORACC_OUT_OF_MEMORY = 3,  // scratch
} eoracc_result;

// Adapters: a second low-rank term. Each row of x uses the factors of its own adapter, or none. The
// factors of all adapters have one type and follow one another, each laid out as lora_a and lora_b:
//
//   a        [count] times lora_a of `rank`
//   b        [count] times lora_b of `rank`
//   a_scale  [count, P * rank] floats, for factors of any type: multiplies the down-projected
//            values. 0 marks a rank that pads the adapter to `rank`; a tile of 16 padding ranks is
//            not read
//   b_scale  [count, tiles(out_features) * 16] floats, for int8 or int4
//   index    [index_count] the adapter of each run of `index_rows` rows of x: below count,
//            negative for none
typedef struct eoracc_bank {
  int64_t count;        // positive, below 2^31
  int64_t rank;         // of each part, a multiple of 16; 0 turns the term off
  int64_t index_count;  // index_count * index_rows is the number of rows
  int64_t index_rows;
  int32_t type;  // eoracc_type of a and b: float32, float16, int8 or int4; any at rank 0
  const void* a;
  const void* b;
  const float* a_scale;
  const float* b_scale;
  const int32_t* index;
} eoracc_bank;

// The product's operands, in the tiled layout. With tiles(n) = ceil(n / 16),
// G = ceil(in_features / group_size), P = part_count and all arrays row-major:
//
//   x             [rows, in_features], x_type
//   norm_weight   [in_features] floats, or null: x is first divided by the root of its row's mean
//                 square plus norm_epsilon, then multiplied with norm_weight
//   codes         [tiles(out_features), chunks, bytes of a chunk] bytes
//   scales        [tiles(out_features), G, 16], scales_type (float32 or float16)
//   zero_points   [tiles(out_features), G, 16] bytes, or null for 2^(bits - 1) everywhere
//   lora_a        [tiles(P * rank), in_features, 16] of float32 or float16, or
//                 [tiles(P * rank), ceil(in_features / 4), 64] bytes for int8, / 8 for int4
//   lora_a_scale  [tiles(P * rank) * 16] floats, for int8 or int4 lora_a
//   lora_b        [tiles(out_features), rank, 16] of float32 or float16, or
//                 [tiles(out_features), ceil(rank / 4), 64] bytes for int8, / 8 for int4
//   lora_b_scale  [tiles(out_features) * 16] floats, for int8 or int4 lora_b
//   bank          the adapters of the rows, or null
//   bias          [out_features], x_type, or null
//   residual      [rows, width of y], x_type, or null; may be y itself
//   y             [rows, out_features], or [rows, out_features / 2] with an activation; x_type,
//                 overwritten
//
// A weight is (code - zero_point) * scale. Padding rows have scale 0, those of factors value 0.
//
// Parts are linears of one input whose rows are stacked. With more than one part, each has `rank`
// rows of lora_a, a multiple of 16, and its rows of lora_b multiply only those. An activation needs
// exactly two equal parts: y = act(part 0) * part 1.
//
// With `ranks`, part p has a rank R of its own, any up to `rank`. Each operand of the term holds
// what the parts would have alone, one part after the other, and nothing for a part of rank 0:
//
//   lora_a        for each part tiles(R) tiles as above
//   lora_a_scale  for each part tiles(R) * 16 floats
//   lora_b        for each part its tiles as above, with R for `rank`
//   lora_b_scale  for each part of rank above 0 a float for each of its rows
//
// accuracy_level 0: sums and operands in float32. accuracy_level 4: activations may be rounded to
// int8 with a scale for each block of gcd(group_size, 32) columns, or to bfloat16. NaN and infinity
// in x propagate: as in the formula at level 0, to the whole row of y at level 4.
typedef struct eoracc_matmul {
  int64_t rows;            // any, 0 included
  int64_t in_features;     // positive, below 2^31
  int64_t out_features;    // positive, below 2^31
  int64_t rank;            // 0 turns the low-rank term off
  int32_t bits;            // 2, 3, 4, 6 or 8
  int32_t group_size;      // a positive multiple of 8
  int32_t accuracy_level;  // 0 or 4
  int32_t activation;      // eoracc_activation
  int32_t part_count;      // 1 to EORACC_MAX_PARTS; 0 means 1
  int32_t x_type;          // eoracc_type: float32, float16 or bfloat16
  int32_t scales_type;     // eoracc_type: float32 or float16
  int32_t lora_a_type;     // eoracc_type: float32, float16, int8 or int4; none only at rank 0
  int32_t lora_b_type;
  float norm_epsilon;
  const int64_t* parts;  // [part_count] out features of each, multiples of 16; may be null for one
  const int64_t* ranks;  // [part_count] of each, at most `rank`; null for `rank` in all parts
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
  const float* norm_weight;
  const void* residual;
  const eoracc_bank* bank;
} eoracc_matmul;

// Threads lent by the caller. `run` calls `task(data, i)` once for each i in [0, count), on any
// thread and in any order, one after another if need be, and returns when all are done. A null
// `run` means the calling thread.
typedef struct eoracc_threads {
  void (*run)(void* pool, size_t count, void (*task)(void* data, size_t index), void* data);
  void* pool;
} eoracc_threads;

// Computes y. The result depends on the operands and the instruction set, never on `threads`.
EORACC_API eoracc_result eoracc_matmul_nbits_lowrank(const eoracc_matmul* matmul,
                                                     const eoracc_threads* threads, eoracc_isa isa);

// The instruction set that EORACC_ISA_BEST selects on this processor.
EORACC_API eoracc_isa eoracc_best_isa(void);

// EORACC_ABI_VERSION of the library, which may be older than the header.
EORACC_API int32_t eoracc_abi_version(void);

// Version of eoracc that the library was built from, such as "0.1.0".
EORACC_API const char* eoracc_version(void);

#ifdef __cplusplus
}
#endif

#endif  // EORACC_CPU_MATMUL_NBITS_LOWRANK_H_
