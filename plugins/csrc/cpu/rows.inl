// The FewRows functions that plain loops do well, compiled for the instruction set of the including
// file.

#include "cpu/kernels.h"
#include "cpu/numbers.inl"

namespace eoracc {
namespace {

inline void read_row(int32_t type, const void* x, int64_t columns, int64_t stride, float* values) {
  read_elements(type, x, 0, columns, values);
  for (int64_t i = columns; i < stride; ++i) values[i] = 0;
}

inline void normalize_row(const float* weight, int64_t columns, float epsilon, float* values) {
  float partial[16] = {};
  int64_t i = 0;
  for (; i + 16 <= columns; i += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) partial[lane] += values[i + lane] * values[i + lane];
  }
  for (; i < columns; ++i) partial[i % 16] += values[i] * values[i];
  float sum = 0;
  for (int64_t lane = 0; lane < 16; ++lane) sum += partial[lane];
  const float factor = 1 / __builtin_sqrtf(sum / (float)columns + epsilon);
  for (i = 0; i < columns; ++i) {
    float w;
    memcpy(&w, weight + i, sizeof w);
    values[i] = values[i] * factor * w;
  }
}

// One block of `kBlock` columns. Magnitudes are compared as integers, where NaN and infinity are
// above all numbers. A block whose largest is below 2^-119 counts as 0: its codes would overflow.
template <int64_t kBlock>
inline void quantize_block(const float* values, int8_t* codes, float* scale, int32_t* minus) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = word_of(values[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool special = largest >= 0x7f800000, zero = largest < 0x04000000;
  const float top = float_of(largest);
  const float inverse = zero || special ? 0 : 127 / top;
  *scale = special ? float_of(0x7fc00000) : zero ? 0 : top / 127;
  int32_t sum = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
    const uint32_t shifted = word_of((special ? 0 : values[i]) * inverse + 0x1.8p23f);
    const int32_t code = (int32_t)(shifted - 0x4b400000);
    codes[i] = (int8_t)code;
    sum += code;
  }
  *minus = -sum;
}

inline void quantize_row(const float* values, int64_t stride, int64_t block, int8_t* codes,
                         float* scales, int32_t* minus) {
  for (int64_t b = 0; b < stride / block; ++b) {
    const int64_t i = b * block;
    if (block == 32) {
      quantize_block<32>(values + i, codes + i, scales + b, minus + b);
    } else if (block == 16) {
      quantize_block<16>(values + i, codes + i, scales + b, minus + b);
    } else {
      quantize_block<8>(values + i, codes + i, scales + b, minus + b);
    }
  }
}

// Elements [index, index + count) of an operand that may be absent, as 16 floats.
inline void read_lanes(int32_t type, const void* data, int64_t index, int64_t count, float* lanes) {
  for (int64_t lane = 0; lane < kTile; ++lane) lanes[lane] = 0;
  if (data != nullptr) read_elements(type, data, index, count, lanes);
}

inline void finish_tile(const Output& output, int64_t first, int64_t rows, int64_t column,
                        int64_t count, const float* gates, const float* sums) {
  float bias[kTile], gate_bias[kTile], residual[kTile], y[kTile];
  // With an activation, part 0 is the gate and column `column` of part 1 comes behind it.
  read_lanes(output.type, output.bias, output.gate_width + column, count, bias);
  if (gates != nullptr) read_lanes(output.type, output.bias, column, count, gate_bias);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t index = (first + row) * output.width + column;
    read_lanes(output.type, output.residual, index, count, residual);
    for (int64_t lane = 0; lane < kTile; ++lane) y[lane] = sums[row * kTile + lane] + bias[lane];
    if (gates != nullptr && output.activation == EORACC_SILU) {
      for (int64_t lane = 0; lane < kTile; ++lane) {
        y[lane] *= activate(EORACC_SILU, gates[row * kTile + lane] + gate_bias[lane]);
      }
    } else if (gates != nullptr) {
      for (int64_t lane = 0; lane < kTile; ++lane) {
        y[lane] *= activate(EORACC_GELU_TANH, gates[row * kTile + lane] + gate_bias[lane]);
      }
    }
    for (int64_t lane = 0; lane < kTile; ++lane) y[lane] += residual[lane];
    write_elements(output.type, y, count, output.y, index);
  }
}

}  // namespace
}  // namespace eoracc
