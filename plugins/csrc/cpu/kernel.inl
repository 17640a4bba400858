// The kernel, written once and compiled once for each instruction set.
//
// The file that includes this one defines
//   EORACC_ISA       the namespace, so that builds for different processors never mix
//   EORACC_LANES     floats in a vector register
//   EORACC_ROW_TILE  rows of X in a register tile; its accumulators take 2 * EORACC_ROW_TILE
//                    registers
//
// Vectors are the GCC and Clang vector extension, which both compile to the instruction set at
// hand. Nothing from the standard library's templates is used: the linker would keep one copy of
// an instance for all instruction sets, possibly one that this processor cannot run.
//
// Eight codes, a "run", fill whole bytes at every width and lie in one group. All code below goes
// run by run: a lane holds one run in a 32-bit word (two words at 8 bits), and shifting all lanes
// by j * bits yields code j of each lane's run. So one unpacking serves every width.
//
// There are two ways through the product:
//   few rows   a lane is a run of one row of W. X is permuted once to match; W is streamed once.
//   many rows  a lane is a row of W, so that unpacking yields the panel [k][n] that a register
//              tile wants. W is dequantised panel by panel and each panel used for many rows of X.

#include <stdlib.h>
#include <string.h>

#include "cpu/isa.h"
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace eoracc::EORACC_ISA {
namespace {

constexpr int64_t kLanes = EORACC_LANES;
constexpr int64_t kRun = 8;                    // codes in a run
constexpr int64_t kRowTile = EORACC_ROW_TILE;  // rows of X in a register tile
constexpr int64_t kColumnTile = 2 * kLanes;    // rows of W in a register tile, and in a panel
constexpr int64_t kDepth = 256;                // columns of W in a panel: 32 KiB at 16 lanes
constexpr int64_t kFewRows = 4;                // rows of X that share one unpacking
constexpr int64_t kManyRows = 6;               // from here on a panel pays
constexpr int64_t kBlockRows = 40 * kRowTile;  // rows of X that are packed at a time
constexpr int64_t kTaskRows = 20 * kRowTile;   // rows of X in a task
constexpr int64_t kTaskColumns = 4 * kColumnTile;
constexpr int64_t kDownTiles = 8;       // tiles of X in a task that projects them down
constexpr int64_t kTaskMacs = 1 << 16;  // smallest task worth a thread, few rows

typedef float Floats __attribute__((vector_size(4 * EORACC_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * EORACC_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * EORACC_LANES)));
typedef int8_t Bytes __attribute__((vector_size(EORACC_LANES)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));

template <typename T>
T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
void store(void* to, T value) {
  memcpy(to, &value, sizeof value);
}

template <typename To, typename From>
To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  return load<To>(&value);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- float16

#if !defined(__F16C__)
// Shifting a half's exponent and mantissa into place leaves a float too small by 2^112, also for
// subnormals. Infinity and NaN need the rest of their exponent bits.
template <typename F, typename W>
F widen_words(W half) {
  const W magnitude = (half & 0x7fff) << 13;
  const F scaled = bits_of<F>(magnitude) * 0x1p112f;
  const W special = -(W)((half & 0x7c00) == 0x7c00) & 0x7f800000u;
  return bits_of<F>(bits_of<W>(scaled) | special | ((half & 0x8000) << 16));
}
#endif

float widen(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  return widen_words<float>(uint32_t{half});
#endif
}

Floats widen_lanes(const void* halves) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(halves));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load<__m128i>(halves));
#else
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i)
    lanes[i] = widen(load<uint16_t>((const uint16_t*)halves + i));
  return load<Floats>(lanes);
#endif
}

// Rounds to nearest, ties to even, as IEEE 754 asks.
uint16_t narrow(float value) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t word = bits_of<uint32_t>(value);
  const uint32_t sign = (word >> 16) & 0x8000, magnitude = word & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);   // NaN
  if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);  // 65536 and beyond
  if (magnitude < 0x38800000) {  // subnormal: let a float addition round at the right bit
    const float shifted = bits_of<float>(magnitude) + 0.5f;
    return (uint16_t)(sign | (bits_of<uint32_t>(shifted) - 0x3f000000));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
#endif
}

// ---- reading an operand of any type

float read(int32_t type, const void* data, int64_t index) {
  switch (type) {
    case EORACC_FLOAT16:
      return widen(load<uint16_t>((const uint16_t*)data + index));
    case EORACC_INT8:
      return ((const int8_t*)data)[index];
    default:
      return load<float>((const float*)data + index);
  }
}

template <int32_t type>
Floats read_lanes(const void* data, int64_t index) {
  if constexpr (type == EORACC_FLOAT16) return widen_lanes((const uint16_t*)data + index);
  if constexpr (type == EORACC_INT8) {
    return __builtin_convertvector(load<Bytes>((const int8_t*)data + index), Floats);
  }
  return load<Floats>((const float*)data + index);
}

template <int32_t type>
void read_row(const void* data, int64_t start, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, read_lanes<type>(data, start + i));
  for (; i < count; ++i) out[i] = read(type, data, start + i);
}

// Copies elements [start, start + count) of an operand to floats.
void read_row(int32_t type, const void* data, int64_t start, int64_t count, float* out) {
  switch (type) {
    case EORACC_FLOAT16:
      return read_row<EORACC_FLOAT16>(data, start, count, out);
    case EORACC_INT8:
      return read_row<EORACC_INT8>(data, start, count, out);
    default:
      return read_row<EORACC_FLOAT32>(data, start, count, out);
  }
}

// table[lanes[i]] in lane i, for lanes below kLanes.
Floats pick(const float* table, Words lanes) {
#if defined(__clang__)
  float values[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) values[i] = table[lanes[i]];
  return load<Floats>(values);
#else
  return __builtin_shuffle(load<Floats>(table), lanes);
#endif
}

float sum(Floats v) {
#if EORACC_LANES == 16
  const Floats8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                        __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif EORACC_LANES == 8
  const Floats8 eight = v;
#endif
#if EORACC_LANES == 4
  const Floats4 four = v;
#else
  const Floats4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                       __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The vectors in `quarters`, one behind the other.
Words join(const Words4* quarters) {
#if EORACC_LANES == 4
  return quarters[0];
#else
  const Words8 low = __builtin_shufflevector(quarters[0], quarters[1], 0, 1, 2, 3, 4, 5, 6, 7);
#if EORACC_LANES == 8
  return low;
#else
  const Words8 high = __builtin_shufflevector(quarters[2], quarters[3], 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
#endif
}

// ---- unpacking

// The float 2^23 + c has the bits kTwo23 | c for every integer 0 <= c < 2^23. Subtracting the
// float 2^23 + z from it gives c - z exactly.
constexpr uint32_t kTwo23Bits = 0x4b000000;
constexpr float kTwo23 = 0x1p23f;

// Code j of each lane's run, as the float 2^23 + code. At 8 bits `high` holds codes 4 to 7.
template <int bits>
Floats code(Words low, Words high, int j) {
  const Words word = bits == 8 && j >= 4 ? high : low;
  const uint32_t shift = (uint32_t)(bits == 8 ? bits * (j % 4) : bits * j);
  return bits_of<Floats>(((word >> shift) & ((1u << bits) - 1)) | kTwo23Bits);
}

// One run in a word; at 8 bits its first half.
template <int bits>
uint32_t load_run(const uint8_t* p) {
  if constexpr (bits == 2) return load<uint16_t>(p);
  if constexpr (bits == 3) return load<uint16_t>(p) | (uint32_t)p[2] << 16;
  return load<uint32_t>(p);
}

// Bytes that load_runs reads.
template <int bits>
constexpr int64_t kRunsBytes = bits == 3 ? (kLanes / 4 - 1) * 12 + 16 : kLanes * bits;

// kLanes consecutive runs of one row, one a lane.
template <int bits>
void load_runs(const uint8_t* p, Words* low, Words* high) {
  if constexpr (bits == 2) {
    *low = __builtin_convertvector(load<Halves>(p), Words);
  } else if constexpr (bits == 3) {
    // Four runs are twelve bytes. Each 16-byte piece is spread to four words on its own; a word's
    // top byte is not looked at.
    Words4 quarters[kLanes / 4];
    for (int64_t i = 0; i < kLanes / 4; ++i) {
      const Bytes16 piece = load<Bytes16>(p + 12 * i);
      quarters[i] = (Words4)__builtin_shufflevector(piece, piece, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8,
                                                    9, 9, 10, 11, 12);
    }
    *low = join(quarters);
  } else if constexpr (bits == 4) {
    *low = load<Words>(p);
  } else {
    uint32_t halves[2][kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      halves[0][i] = load<uint32_t>(p + 8 * i);
      halves[1][i] = load<uint32_t>(p + 8 * i + 4);
    }
    *low = load<Words>(halves[0]);
    *high = load<Words>(halves[1]);
  }
}

// ---- what all tasks of one product share

struct Product {
  eoracc_matmul m;
  const float* x;      // [rows, K]
  float* y;            // [rows, N]
  const float* bias;   // [N] or null
  int64_t groups;      // G
  int64_t group_runs;  // runs in a full group
  int64_t row_bytes;   // bytes of codes in a row
  int64_t runs;        // ceil(K / 8)

  // Few rows.
  int64_t vectors;      // ceil(runs / kLanes)
  int64_t padded_rank;  // rank rounded up to kLanes
  float* permuted;      // [rows, vectors, 8, kLanes]: x of lane's run, code by code; 0 past K
  int32_t* lane_group;  // [vectors, kLanes]: group of a lane's run, less that of lane 0
  float* down;          // [rows, padded_rank]: x * lora_a^T, 0 past the rank
  int64_t group_slots;  // G and a vector behind it
  float* group_values;  // [tasks, 2, group_slots]: a row's scales and zero points

  // Many rows; `first` and `count` say which rows of X are packed.
  int64_t first, count;
  float* packed;       // [count / kRowTile, K, kRowTile], 0 past count
  float* packed_down;  // [count / kRowTile, rank, kRowTile]
};

// ---- few rows

// x * lora_a^T for the lora_a rows of a task.
struct DownTask {
  const Product* p;
  int64_t rows_each;
};

template <int32_t type>
float dot(const void* factor, int64_t start, const float* x, int64_t count) {
  Floats total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int64_t u = 0; u < 4; ++u) {
      total[u] +=
          read_lanes<type>(factor, start + i + u * kLanes) * load<Floats>(x + i + u * kLanes);
    }
  }
  for (; i + kLanes <= count; i += kLanes) {
    total[0] += read_lanes<type>(factor, start + i) * load<Floats>(x + i);
  }
  float tail = 0;
  for (; i < count; ++i) tail += read(type, factor, start + i) * x[i];
  return sum((total[0] + total[1]) + (total[2] + total[3])) + tail;
}

template <int32_t type>
void project_down(const Product& p, int64_t begin, int64_t end) {
  const int64_t k = p.m.in_features;
  for (int64_t r = begin; r < end; ++r) {
    const float scale = type == EORACC_INT8 ? p.m.lora_a_scale[r] : 1;
    for (int64_t row = 0; row < p.m.rows; ++row) {
      p.down[row * p.padded_rank + r] = scale * dot<type>(p.m.lora_a, r * k, p.x + row * k, k);
    }
  }
}

void down_task(void* data, size_t index) {
  const DownTask& task = *(const DownTask*)data;
  const Product& p = *task.p;
  const int64_t begin = (int64_t)index * task.rows_each;
  const int64_t end = smaller(begin + task.rows_each, p.m.rank);
  switch (p.m.lora_a_type) {
    case EORACC_FLOAT16:
      return project_down<EORACC_FLOAT16>(p, begin, end);
    case EORACC_INT8:
      return project_down<EORACC_INT8>(p, begin, end);
    default:
      return project_down<EORACC_FLOAT32>(p, begin, end);
  }
}

void permute(Product* p) {
  const int64_t k = p->m.in_features, size = p->vectors * kRun * kLanes;
  memset(p->permuted, 0, sizeof(float) * (size_t)(p->m.rows * size));
  for (int64_t row = 0; row < p->m.rows; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t run = i / kRun;
      p->permuted[row * size + (run / kLanes * kRun + i % kRun) * kLanes + run % kLanes] =
          p->x[row * k + i];
    }
  }
  for (int64_t run = 0; run < p->vectors * kLanes; ++run) {
    // A lane past the row gets the scale behind the last group, which is 0.
    const int64_t group = run < p->runs ? run / p->group_runs : p->groups;
    p->lane_group[run] = (int32_t)(group - run / kLanes * kLanes / p->group_runs);
  }
}

// lora_b's row times x * lora_a^T, lane-wise: the sum over lanes is left to the caller.
template <int32_t type>
Floats project_up(const Product& p, int64_t n, const float* down) {
  Floats total = {};
  const int64_t rank = p.m.rank, whole = rank / kLanes * kLanes;
  for (int64_t r = 0; r < whole; r += kLanes) {
    total += read_lanes<type>(p.m.lora_b, n * rank + r) * load<Floats>(down + r);
  }
  if (whole < rank) {
    float tail[kLanes] = {};
    read_row<type>(p.m.lora_b, n * rank + whole, rank - whole, tail);
    total += load<Floats>(tail) * load<Floats>(down + whole);
  }
  return type == EORACC_INT8 ? total * p.m.lora_b_scale[n] : total;
}

Floats project_up(const Product& p, int64_t n, const float* down) {
  switch (p.m.lora_b_type) {
    case EORACC_FLOAT16:
      return project_up<EORACC_FLOAT16>(p, n, down);
    case EORACC_INT8:
      return project_up<EORACC_INT8>(p, n, down);
    default:
      return project_up<EORACC_FLOAT32>(p, n, down);
  }
}

// y[first .. first + count) for row n of W. `scales` and `zeros` are the row's, as floats, the
// zeros with 2^23 added; behind the last group comes scale 0.
template <int bits, int count>
void few_rows(const Product& p, int64_t first, int64_t n, const float* scales, const float* zeros) {
  const uint8_t* codes = p.m.codes + n * p.row_bytes;
  const uint8_t* end = p.m.codes + p.m.out_features * p.row_bytes;
  const int64_t size = p.vectors * kRun * kLanes;
  const float* x = p.permuted + first * size;
  Floats total[count] = {};
  for (int64_t v = 0; v < p.vectors; ++v, codes += kLanes * bits) {
    Words low, high;
    if (end - codes >= kRunsBytes<bits>) {
      load_runs<bits>(codes, &low, &high);
    } else {  // the operand's last bytes
      uint8_t tail[kRunsBytes<bits>] = {};
      memcpy(tail, codes, (size_t)(end - codes));
      load_runs<bits>(tail, &low, &high);
    }
    const int64_t group = v * kLanes / p.group_runs;
    const Words lanes = load<Words>(p.lane_group + v * kLanes);
    const Floats scale = pick(scales + group, lanes);
    const Floats zero = pick(zeros + group, lanes);
    Floats part[count] = {};
#pragma GCC unroll 8
    for (int j = 0; j < kRun; ++j) {
      const Floats weight = code<bits>(low, high, j) - zero;
#pragma GCC unroll 4
      for (int row = 0; row < count; ++row) {
        part[row] += weight * load<Floats>(x + row * size + (v * kRun + j) * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < count; ++row) total[row] += scale * part[row];
  }
  for (int row = 0; row < count; ++row) {
    if (p.m.rank > 0) total[row] += project_up(p, n, p.down + (first + row) * p.padded_rank);
    p.y[(first + row) * p.m.out_features + n] = sum(total[row]) + (p.bias ? p.bias[n] : 0);
  }
}

struct FewRowsTask {
  const Product* p;
  int64_t columns_each;
};

template <int bits>
void few_rows(const Product& p, int64_t first, int64_t n, const float* scales, const float* zeros) {
  const int64_t left = p.m.rows - first;
  if (left >= 4) return few_rows<bits, 4>(p, first, n, scales, zeros);
  if (left == 3) return few_rows<bits, 3>(p, first, n, scales, zeros);
  if (left == 2) return few_rows<bits, 2>(p, first, n, scales, zeros);
  return few_rows<bits, 1>(p, first, n, scales, zeros);
}

template <int bits>
void few_rows_task(void* data, size_t index) {
  const FewRowsTask& task = *(const FewRowsTask*)data;
  const Product& p = *task.p;
  const int64_t begin = (int64_t)index * task.columns_each;
  const int64_t end = smaller(begin + task.columns_each, p.m.out_features);
  float* scales = p.group_values + (int64_t)index * 2 * p.group_slots;
  float* zeros = scales + p.group_slots;
  for (int64_t i = 0; i < p.group_slots; ++i) {
    scales[i] = 0;
    zeros[i] = kTwo23 + (1 << (bits - 1));
  }
  for (int64_t n = begin; n < end; ++n) {
    read_row(p.m.scales_type, p.m.scales, n * p.groups, p.groups, scales);
    if (p.m.zero_points != nullptr) {
      const uint8_t* zero_points = p.m.zero_points + n * p.groups;
      for (int64_t i = 0; i < p.groups; ++i) zeros[i] = kTwo23 + zero_points[i];
    }
    for (int64_t first = 0; first < p.m.rows; first += kFewRows) {
      few_rows<bits>(p, first, n, scales, zeros);
    }
  }
}

// ---- many rows

// y[row][column] += sum over depth of x[depth][row] * panel[depth][column], for one register tile
// of which `rows` x `columns` are real.
void multiply(const float* x, const float* panel, int64_t depth, float* y, int64_t y_stride,
              int64_t rows, int64_t columns) {
  Floats total[kRowTile][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Floats left = load<Floats>(panel + k * kColumnTile);
    const Floats right = load<Floats>(panel + k * kColumnTile + kLanes);
#pragma GCC unroll 12
    for (int64_t row = 0; row < kRowTile; ++row) {
      const float value = x[k * kRowTile + row];
      total[row][0] += value * left;
      total[row][1] += value * right;
    }
  }
  if (rows == kRowTile && columns == kColumnTile) {
#pragma GCC unroll 12
    for (int64_t row = 0; row < kRowTile; ++row) {
      float* out = y + row * y_stride;
      store(out, load<Floats>(out) + total[row][0]);
      store(out + kLanes, load<Floats>(out + kLanes) + total[row][1]);
    }
    return;
  }
  float edge[kRowTile][kColumnTile];
#pragma GCC unroll 12
  for (int64_t row = 0; row < kRowTile; ++row) {
    store(edge[row], total[row][0]);
    store(edge[row] + kLanes, total[row][1]);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      y[row * y_stride + column] += edge[row][column];
    }
  }
}

// panel[k][lane] = W[n + lane][start + k]; start is a multiple of 8. Lanes past W repeat its last
// row, and up to seven k past K hold padding: neither is stored or multiplied.
template <int bits>
void fill_panel(const Product& p, int64_t n, int64_t start, int64_t depth, float* panel) {
  const int64_t first_run = start / kRun, runs = ceil_div(depth, kRun);
  int64_t row[kColumnTile];
  for (int64_t lane = 0; lane < kColumnTile; ++lane) {
    row[lane] = smaller(n + lane, p.m.out_features - 1);
  }
  Floats scale[2] = {}, zero[2] = {};
  int64_t group_ends = first_run;
  for (int64_t run = first_run; run < first_run + runs; ++run) {
    if (run == group_ends) {
      const int64_t group = run / p.group_runs;
      group_ends = (group + 1) * p.group_runs;
      float values[2][kColumnTile];
      for (int64_t lane = 0; lane < kColumnTile; ++lane) {
        const int64_t i = row[lane] * p.groups + group;
        values[0][lane] = read(p.m.scales_type, p.m.scales, i);
        values[1][lane] = kTwo23 + (p.m.zero_points ? p.m.zero_points[i] : 1 << (bits - 1));
      }
      for (int64_t half = 0; half < 2; ++half) {
        scale[half] = load<Floats>(values[0] + half * kLanes);
        zero[half] = load<Floats>(values[1] + half * kLanes);
      }
    }
    uint32_t words[bits == 8 ? 2 : 1][kColumnTile];
    for (int64_t lane = 0; lane < kColumnTile; ++lane) {
      const uint8_t* codes = p.m.codes + row[lane] * p.row_bytes + run * bits;
      words[0][lane] = load_run<bits>(codes);
      if constexpr (bits == 8) words[1][lane] = load_run<bits>(codes + 4);
    }
    float* out = panel + (run - first_run) * kRun * kColumnTile;
    for (int64_t half = 0; half < 2; ++half) {
      const Words low = load<Words>(words[0] + half * kLanes);
      const Words high = load<Words>(words[bits == 8 ? 1 : 0] + half * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kRun; ++j) {
        store(out + j * kColumnTile + half * kLanes,
              (code<bits>(low, high, j) - zero[half]) * scale[half]);
      }
    }
  }
}

// panel[k][lane] = factor[n + lane][start + k], 0 in lanes past the factor's `rows`.
void fill_panel(int32_t type, const void* factor, const float* row_scale, int64_t rows,
                int64_t columns, int64_t n, int64_t start, int64_t depth, float* panel) {
  float values[kDepth];
  for (int64_t lane = 0; lane < kColumnTile; ++lane) {
    const bool real = n + lane < rows;
    if (real) read_row(type, factor, (n + lane) * columns + start, depth, values);
    const float scale = real && type == EORACC_INT8 ? row_scale[n + lane] : 1;
    for (int64_t k = 0; k < depth; ++k) {
      panel[k * kColumnTile + lane] = real ? values[k] * scale : 0;
    }
  }
}

void pack_task(void* data, size_t index) {
  const Product& p = *(const Product*)data;
  const int64_t k = p.m.in_features, begin = (int64_t)index * kRowTile;
  float* tile = p.packed + begin * k;
  for (int64_t row = 0; row < kRowTile; ++row) {
    const bool real = begin + row < p.count;
    const float* x = p.x + (p.first + begin + row) * k;
    for (int64_t i = 0; i < k; ++i) tile[i * kRowTile + row] = real ? x[i] : 0;
  }
}

// packed_down for one panel of lora_a's rows and some tiles of X.
void packed_down_task(void* data, size_t index) {
  const Product& p = *(const Product*)data;
  const int64_t k = p.m.in_features, rank = p.m.rank;
  const int64_t panels = ceil_div(rank, kColumnTile), tiles = ceil_div(p.count, kRowTile);
  const int64_t r = (int64_t)index % panels * kColumnTile;
  const int64_t begin = (int64_t)index / panels * kDownTiles,
                end = smaller(begin + kDownTiles, tiles);
  float panel[kDepth * kColumnTile];
  float sums[kDownTiles][kRowTile * kColumnTile] = {};
  for (int64_t start = 0; start < k; start += kDepth) {
    const int64_t depth = smaller(kDepth, k - start);
    fill_panel(p.m.lora_a_type, p.m.lora_a, p.m.lora_a_scale, rank, k, r, start, depth, panel);
    for (int64_t tile = begin; tile < end; ++tile) {
      multiply(p.packed + (tile * k + start) * kRowTile, panel, depth, sums[tile - begin],
               kColumnTile, kRowTile, kColumnTile);
    }
  }
  const int64_t real = smaller(kColumnTile, rank - r);
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t lane = 0; lane < real; ++lane) {
      for (int64_t row = 0; row < kRowTile; ++row) {
        p.packed_down[(tile * rank + r + lane) * kRowTile + row] =
            sums[tile - begin][row * kColumnTile + lane];
      }
    }
  }
}

template <int bits>
void many_rows_task(void* data, size_t index) {
  const Product& p = *(const Product*)data;
  const int64_t k = p.m.in_features, n = p.m.out_features, rank = p.m.rank;
  const int64_t column_tasks = ceil_div(n, kTaskColumns);
  const int64_t first_column = (int64_t)index % column_tasks * kTaskColumns;
  const int64_t last_column = smaller(first_column + kTaskColumns, n);
  const int64_t first_row = (int64_t)index / column_tasks * kTaskRows;
  const int64_t last_row = smaller(first_row + kTaskRows, p.count);
  float* y = p.y + p.first * n;
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t column = first_column; column < last_column; ++column) {
      y[row * n + column] = p.bias ? p.bias[column] : 0;
    }
  }

  float panel[kDepth * kColumnTile];
  const auto use_panel = [&](const float* packed, int64_t columns_of_packed, int64_t column,
                             int64_t start, int64_t depth) {
    for (int64_t row = first_row; row < last_row; row += kRowTile) {
      multiply(packed + row * columns_of_packed + start * kRowTile, panel, depth,
               y + row * n + column, n, smaller(kRowTile, last_row - row),
               smaller(kColumnTile, last_column - column));
    }
  };
  for (int64_t start = 0; start < k; start += kDepth) {
    const int64_t depth = smaller(kDepth, k - start);
    for (int64_t column = first_column; column < last_column; column += kColumnTile) {
      fill_panel<bits>(p, column, start, depth, panel);
      use_panel(p.packed, k, column, start, depth);
    }
  }
  for (int64_t start = 0; start < rank; start += kDepth) {
    const int64_t depth = smaller(kDepth, rank - start);
    for (int64_t column = first_column; column < last_column; column += kColumnTile) {
      fill_panel(p.m.lora_b_type, p.m.lora_b, p.m.lora_b_scale, n, rank, column, start, depth,
                 panel);
      use_panel(p.packed_down, rank, column, start, depth);
    }
  }
}

// ---- the whole product

// Scratch memory, asked for piece by piece and freed at once.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (int i = 0; i < used_; ++i) free(pieces_[i]);
  }

  template <typename T>
  T* take(int64_t count) {
    void* piece = malloc(sizeof(T) * (size_t)count);
    if (piece == nullptr) failed_ = true;
    pieces_[used_++] = piece;
    return (T*)piece;
  }

  bool failed() const { return failed_; }

 private:
  void* pieces_[8] = {};
  int used_ = 0;
  bool failed_ = false;
};

typedef void (*Task)(void* data, size_t index);

Task for_bits(int32_t bits, Task two, Task three, Task four, Task eight) {
  return bits == 2 ? two : bits == 3 ? three : bits == 4 ? four : eight;
}

void run(const eoracc_threads& threads, int64_t count, Task task, void* data) {
  if (count == 1) return task(data, 0);
  threads.run(threads.pool, (size_t)count, task, data);
}

eoracc_result few_rows(Product& p, const eoracc_threads& threads, Scratch& scratch) {
  const int64_t k = p.m.in_features, n = p.m.out_features, rank = p.m.rank, rows = p.m.rows;
  const int64_t columns_each = smaller(n, ceil_div(ceil_div(kTaskMacs, k * rows), kLanes) * kLanes);
  const int64_t tasks = ceil_div(n, columns_each);
  p.vectors = ceil_div(p.runs, kLanes);
  p.padded_rank = ceil_div(rank, kLanes) * kLanes;
  p.group_slots = p.groups + kLanes;
  p.permuted = scratch.take<float>(rows * p.vectors * kRun * kLanes);
  p.lane_group = scratch.take<int32_t>(p.vectors * kLanes);
  p.group_values = scratch.take<float>(tasks * 2 * p.group_slots);
  p.down = scratch.take<float>(rows * p.padded_rank + 1);
  if (scratch.failed()) return EORACC_OUT_OF_MEMORY;

  permute(&p);
  if (rank > 0) {
    memset(p.down, 0, sizeof(float) * (size_t)(rows * p.padded_rank));
    DownTask down{&p, smaller(rank, ceil_div(kTaskMacs, k * rows))};
    run(threads, ceil_div(rank, down.rows_each), down_task, &down);
  }
  FewRowsTask task{&p, columns_each};
  run(threads, tasks,
      for_bits(p.m.bits, few_rows_task<2>, few_rows_task<3>, few_rows_task<4>, few_rows_task<8>),
      &task);
  return EORACC_OK;
}

eoracc_result many_rows(Product& p, const eoracc_threads& threads, Scratch& scratch) {
  const int64_t rank = p.m.rank;
  const int64_t block = ceil_div(smaller(p.m.rows, kBlockRows), kRowTile) * kRowTile;
  p.packed = scratch.take<float>(block * p.m.in_features);
  p.packed_down = scratch.take<float>(block * rank + 1);
  if (scratch.failed()) return EORACC_OUT_OF_MEMORY;

  const Task task = for_bits(p.m.bits, many_rows_task<2>, many_rows_task<3>, many_rows_task<4>,
                             many_rows_task<8>);
  for (p.first = 0; p.first < p.m.rows; p.first += block) {
    p.count = smaller(block, p.m.rows - p.first);
    const int64_t tiles = ceil_div(p.count, kRowTile);
    run(threads, tiles, pack_task, &p);
    if (rank > 0) {
      run(threads, ceil_div(tiles, kDownTiles) * ceil_div(rank, kColumnTile), packed_down_task, &p);
    }
    run(threads, ceil_div(p.count, kTaskRows) * ceil_div(p.m.out_features, kTaskColumns), task, &p);
  }
  return EORACC_OK;
}

}  // namespace

eoracc_result matmul(const eoracc_matmul& m, const eoracc_threads& threads) {
  Scratch scratch;
  Product p{};
  p.m = m;
  p.groups = ceil_div(m.in_features, m.group_size);
  p.group_runs = m.group_size / kRun;
  p.row_bytes = p.groups * p.group_runs * m.bits;
  p.runs = ceil_div(m.in_features, kRun);
  p.x = (const float*)m.x;
  p.y = (float*)m.y;
  p.bias = (const float*)m.bias;
  const int64_t y_size = m.rows * m.out_features;
  if (m.x_type == EORACC_FLOAT16) {
    float* x = scratch.take<float>(m.rows * m.in_features);
    float* bias = scratch.take<float>(m.out_features);
    p.y = scratch.take<float>(y_size);
    if (scratch.failed()) return EORACC_OUT_OF_MEMORY;
    read_row(m.x_type, m.x, 0, m.rows * m.in_features, x);
    if (m.bias != nullptr) read_row(m.x_type, m.bias, 0, m.out_features, bias);
    p.x = x;
    p.bias = m.bias != nullptr ? bias : nullptr;
  }
  const eoracc_result result =
      m.rows < kManyRows ? few_rows(p, threads, scratch) : many_rows(p, threads, scratch);
  if (result == EORACC_OK && m.x_type == EORACC_FLOAT16) {
    for (int64_t i = 0; i < y_size; ++i) {
      const uint16_t half = narrow(p.y[i]);
      store((uint16_t*)m.y + i, half);
    }
  }
  return result;
}

}  // namespace eoracc::EORACC_ISA
