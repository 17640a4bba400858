// Float types and the few functions of floats that kernels need, one value at a time and without a
// branch, so that a loop over them is vectorised for the instruction set of the including file.

#ifndef EORACC_CPU_NUMBERS_INL_
#define EORACC_CPU_NUMBERS_INL_

#include <stdint.h>
#include <string.h>

#include "cpu/matmul_nbits_lowrank.h"

namespace eoracc {
namespace {

inline float float_of(uint32_t word) {
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

inline uint32_t word_of(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return word;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Shifting a half's exponent and mantissa into place leaves a float too small by 2^112, also for
// subnormals. Infinity and NaN need the rest of their exponent bits.
inline float widen_half(uint16_t half) {
  const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
  const uint32_t scaled = word_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
  return float_of(scaled | special | (uint32_t)(half & 0x8000) << 16);
}

// Rounds to nearest, ties to even, as the next one does.
inline uint16_t narrow_to_half(float value) {
  const uint32_t word = word_of(value), magnitude = word & 0x7fffffff;
  // A subnormal half: let a float addition round at the right bit.
  const uint32_t subnormal = word_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? 0x7c00 : half;  // 65536 and beyond
  half = magnitude > 0x7f800000 ? 0x7e00 : half;   // NaN
  return (uint16_t)(half | (word >> 16 & 0x8000));
}

inline float widen_bfloat(uint16_t bfloat) { return float_of((uint32_t)bfloat << 16); }

inline uint16_t narrow_to_bfloat(float value) {
  const uint32_t word = word_of(value);
  const uint32_t rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  const bool is_nan = (word & 0x7fffffff) > 0x7f800000;
  return (uint16_t)(is_nan ? word >> 16 | 0x40 : rounded);
}

// Element `index` of an array of float32, float16 or bfloat16, aligned or not.
inline float read_element(int32_t type, const void* data, int64_t index) {
  if (type == EORACC_FLOAT32) {
    float value;
    memcpy(&value, (const char*)data + 4 * index, sizeof value);
    return value;
  }
  uint16_t value;
  memcpy(&value, (const char*)data + 2 * index, sizeof value);
  return type == EORACC_FLOAT16 ? widen_half(value) : widen_bfloat(value);
}

// The `count` elements from `index` on as floats.
inline void read_elements(int32_t type, const void* data, int64_t index, int64_t count,
                          float* values) {
  if (type == EORACC_FLOAT32) {
    memcpy(values, (const char*)data + 4 * index, (size_t)count * sizeof(float));
  } else if (type == EORACC_FLOAT16) {
    for (int64_t i = 0; i < count; ++i) values[i] = read_element(EORACC_FLOAT16, data, index + i);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = read_element(EORACC_BFLOAT16, data, index + i);
  }
}

// The inverse, rounded.
inline void write_elements(int32_t type, const float* values, int64_t count, void* data,
                           int64_t index) {
  if (type == EORACC_FLOAT32) {
    memcpy((char*)data + 4 * index, values, (size_t)count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t value =
        type == EORACC_FLOAT16 ? narrow_to_half(values[i]) : narrow_to_bfloat(values[i]);
    memcpy((char*)data + 2 * (index + i), &value, sizeof value);
  }
}

// e^x to about an ulp, for x clamped to where neither it nor 1 / it overflows: n = x / ln 2 rounded
// by adding 1.5 * 2^23, the Taylor polynomial for the rest in [-ln 2 / 2, ln 2 / 2], whose next
// term is below 2^-27, and n into the exponent. A NaN stays one.
inline float exponential(float x) {
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 0x1.715476p+0f + 0x1.8p23f;
  const float n = shifted - 0x1.8p23f;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return p * float_of((word_of(shifted) + 127) << 23);
}

// eoracc_activation of a gate.
inline float activate(int32_t activation, float gate) {
  float argument = gate;
  if (activation == EORACC_GELU_TANH) {
    // (1 + tanh(z)) / 2 is the logistic function of 2 z.
    argument = 0x1.988454p+0f * (gate + 0.044715f * gate * gate * gate);
  }
  return gate / (1.0f + exponential(-argument));
}

}  // namespace
}  // namespace eoracc

#endif  // EORACC_CPU_NUMBERS_INL_
