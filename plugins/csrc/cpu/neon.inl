// Tiles and int8 products on AArch64, compiled once for each set of its instructions: dot products
// (ARMv8.2), and int8 matrix products on top of them (ARMv8.6).
//
// A value for each of a tile's 16 rows fills four registers, its parts. A part of a quad's codes is
// one register, which is what a dot product instruction takes: four rows of the tile and four
// columns of each.

#include <arm_neon.h>

#include "cpu/rows.inl"

namespace eoracc {
namespace {

constexpr int kParts = 4;
constexpr int kSharedRows = 4;         // rows of X that share codes in registers
constexpr int64_t kQuads = kUnit / 4;  // of a unit
constexpr int64_t kQuadBytes = 64;     // of a quad's codes when they are a byte each

// ---- reading a tile

// Codes of a part of quad `q`, a byte each. A constant `q` makes the shifts constant.
template <int bits>
inline uint8x16_t read_quad(const uint8_t* codes, int64_t q, int part) {
  const uint8_t* at = codes + part * 16;
  if constexpr (bits == 8) return vld1q_u8(at + q * 64);
  if constexpr (bits == 4) {
    const uint8x16_t two = vld1q_u8(at + q / 2 * 64);
    return q % 2 ? vshrq_n_u8(two, 4) : vandq_u8(two, vdupq_n_u8(15));
  }
  if constexpr (bits == 6) {
    const uint8_t* chunk = at + q / 4 * 192;
    const uint8x16_t two = vld1q_u8(chunk + q % 4 / 2 * 64);
    const uint8x16_t low = q % 2 ? vshrq_n_u8(two, 4) : two;
    const uint8x16_t high = vshlq_u8(vld1q_u8(chunk + 128), vdupq_n_s8((int8_t)(4 - 2 * (q % 4))));
    // The low bits of `low`, and the two bits of `high` above them.
    return vandq_u8(vbslq_u8(vdupq_n_u8(15), low, high), vdupq_n_u8(63));
  }
  const int64_t vector = bits == 2 ? q / 4 : q / 8 * 3 + q % 8 / 4;
  const int8x16_t down = vdupq_n_s8((int8_t)(-2 * (q % 4)));
  const uint8x16_t low = vandq_u8(vshlq_u8(vld1q_u8(at + vector * 64), down), vdupq_n_u8(3));
  if constexpr (bits == 2) return low;
  const int8x16_t up = vdupq_n_s8((int8_t)(2 - q % 8));
  const uint8x16_t high = vshlq_u8(vld1q_u8(at + (q / 8 * 3 + 2) * 64), up);
  return vbslq_u8(vdupq_n_u8(4), high, low);
}

inline float32x4_t read_floats(int32_t type, const void* data, int64_t index) {
  if (type == EORACC_FLOAT32) return vld1q_f32((const float*)data + index);
  return vcvt_f32_f16(vld1_f16((const float16_t*)data + index));
}

// Scales and zero points of a group.
struct Grid {
  float32x4_t scales[kParts];
  int32x4_t zero_points[kParts];
};

inline Grid read_grid(const Tiles& w, int64_t tile, int64_t group) {
  const int64_t index = (tile * w.groups + group) * kTile;
  const uint8x16_t bytes = w.zero_points != nullptr ? vld1q_u8(w.zero_points + index)
                                                    : vdupq_n_u8((uint8_t)(1 << (w.bits - 1)));
  const uint16x8_t halves[2] = {vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)};
  Grid grid;
  for (int p = 0; p < kParts; ++p) {
    const uint16x8_t half = halves[p / 2];
    const uint32x4_t words = p % 2 ? vmovl_high_u16(half) : vmovl_u16(vget_low_u16(half));
    grid.zero_points[p] = vreinterpretq_s32_u32(words);
    grid.scales[p] = read_floats(w.scales_type, w.scales, index + 4 * p);
  }
  return grid;
}

// Zero points, minus 128 at 8 bits like the codes in PackedCodes.
inline Grid read_signed_grid(const Tiles& w, int64_t tile, int64_t group) {
  Grid grid = read_grid(w, tile, group);
  if (w.bits == 8) {
    for (int32x4_t& zero_points : grid.zero_points) {
      zero_points = vsubq_s32(zero_points, vdupq_n_s32(128));
    }
  }
  return grid;
}

// ---- int8 activations
//
// A block is a run of columns with one scale of X: a unit or a part of one. Its products are exact,
// so neither the instructions nor the number of rows changes a result.

// Codes of a block in their stored form. The instructions multiply signed bytes: 128 is subtracted
// from 8-bit codes and from their zero points.
template <int bits>
struct PackedCodes {
  const uint8_t* codes;  // of the unit
  int64_t first;         // quad of the unit

  int8x16_t quad(int64_t q, int part) const {
    const uint8x16_t bytes = read_quad<bits>(codes, first + q, part);
    return vreinterpretq_s8_u8(bits == 8 ? veorq_u8(bytes, vdupq_n_u8(128)) : bytes);
  }

  // Quads q and q + 1, or q and zeros: eight columns of the part's first two rows, then of the
  // other two.
  int8x16x2_t pair(int64_t q, bool both, int part) const {
    const int32x4_t left = vreinterpretq_s32_s8(quad(q, part));
    const int32x4_t right = both ? vreinterpretq_s32_s8(quad(q + 1, part)) : vdupq_n_s32(0);
    return {{vreinterpretq_s8_s32(vzip1q_s32(left, right)),
             vreinterpretq_s8_s32(vzip2q_s32(left, right))}};
  }
};

// Codes of a block as `fill_panel` stored them: the results of quad() or pair() in sequence.
struct PanelCodes {
  const int8_t* codes;

  int8x16_t quad(int64_t q, int part) const { return vld1q_s8(codes + q * kQuadBytes + part * 16); }

  int8x16x2_t pair(int64_t q, bool, int part) const {
    const int8_t* at = codes + q * kQuadBytes + part * 32;
    return {{vld1q_s8(at), vld1q_s8(at + 16)}};
  }
};

// products[row][part] = a block times rows of x that are `stride` apart. `whole` says that it has
// kQuads quads.
template <int rows, bool whole, typename Codes>
inline void multiply_by_dots(const Codes& w, int64_t quads, const int8_t* x, int64_t stride,
                             int32x4_t products[rows][kParts]) {
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) products[row][p] = vdupq_n_s32(0);
  }
  if constexpr (whole) {
#pragma GCC unroll 2
    for (int64_t q = 0; q < kQuads; q += 4) {
      int8x16_t sixteen[rows];
#pragma GCC unroll 4
      for (int row = 0; row < rows; ++row) sixteen[row] = vld1q_s8(x + row * stride + 4 * q);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const int8x16_t w0 = w.quad(q, p), w1 = w.quad(q + 1, p);
        const int8x16_t w2 = w.quad(q + 2, p), w3 = w.quad(q + 3, p);
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
          int32x4_t sum = products[row][p];
          sum = vdotq_laneq_s32(sum, w0, sixteen[row], 0);
          sum = vdotq_laneq_s32(sum, w1, sixteen[row], 1);
          sum = vdotq_laneq_s32(sum, w2, sixteen[row], 2);
          products[row][p] = vdotq_laneq_s32(sum, w3, sixteen[row], 3);
        }
      }
    }
  } else {
    for (int64_t q = 0; q < quads; ++q) {
#pragma GCC unroll 4
      for (int row = 0; row < rows; ++row) {
        const int32_t* four = (const int32_t*)(x + row * stride + 4 * q);
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
          products[row][p] =
              vdotq_s32(products[row][p], w.quad(q, p), vreinterpretq_s8_s32(vld1q_dup_s32(four)));
        }
      }
    }
  }
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// The same by matrix products of two rows of x and two of the tile, eight columns of each.
template <int rows, bool whole, typename Codes>
inline void multiply_by_matrices(const Codes& w, int64_t quads, const int8_t* x, int64_t stride,
                                 int32x4_t products[rows][kParts]) {
  constexpr int kPairs = (rows + 1) / 2;
  int32x4_t squares[kPairs][2 * kParts];  // row 0 of x times rows 0, 1 of the tile, then row 1
#pragma GCC unroll 2
  for (int i = 0; i < kPairs; ++i) {
#pragma GCC unroll 8
    for (int p = 0; p < 2 * kParts; ++p) squares[i][p] = vdupq_n_s32(0);
  }
  const auto add = [&](int64_t q, bool both) __attribute__((always_inline)) {
    int8x16_t two_rows[kPairs];
#pragma GCC unroll 2
    for (int i = 0; i < kPairs; ++i) {
      const int8_t* row = x + 2 * i * stride + 4 * q;
      two_rows[i] = vcombine_s8(vld1_s8(row), vld1_s8(2 * i + 1 < rows ? row + stride : row));
    }
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const int8x16x2_t four_rows = w.pair(q, both, p);
#pragma GCC unroll 2
      for (int i = 0; i < kPairs; ++i) {
        squares[i][2 * p] = vmmlaq_s32(squares[i][2 * p], two_rows[i], four_rows.val[0]);
        squares[i][2 * p + 1] = vmmlaq_s32(squares[i][2 * p + 1], two_rows[i], four_rows.val[1]);
      }
    }
  };
  if constexpr (whole) {
#pragma GCC unroll 4
    for (int64_t q = 0; q < kQuads; q += 2) add(q, true);
  } else {
    for (int64_t q = 0; q < quads; q += 2) add(q, q + 1 < quads);
  }
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const int64x2_t low = vreinterpretq_s64_s32(squares[row / 2][2 * p]);
      const int64x2_t high = vreinterpretq_s64_s32(squares[row / 2][2 * p + 1]);
      const int64x2_t of_row = row % 2 ? vzip2q_s64(low, high) : vzip1q_s64(low, high);
      products[row][p] = vreinterpretq_s32_s64(of_row);
    }
  }
}

#endif

// Unpacks a block into the panel that kSharedRows rows want.
template <int bits>
inline void fill_panel(const PackedCodes<bits>& w, int64_t quads, int8_t* panel) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  for (int64_t q = 0; q < quads; q += 2) {
    for (int p = 0; p < kParts; ++p) {
      const int8x16x2_t four_rows = w.pair(q, q + 1 < quads, p);
      vst1q_s8(panel + q * kQuadBytes + 32 * p, four_rows.val[0]);
      vst1q_s8(panel + q * kQuadBytes + 32 * p + 16, four_rows.val[1]);
    }
  }
#else
  for (int64_t q = 0; q < quads; ++q) {
    for (int p = 0; p < kParts; ++p) vst1q_s8(panel + q * kQuadBytes + 16 * p, w.quad(q, p));
  }
#endif
}

// The position of the code of a row and column in a panel.
inline int64_t panel_index(int64_t row, int64_t column) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return column / 8 * (2 * kQuadBytes) + row * 8 + column % 8;
#else
  return column / 4 * kQuadBytes + row * 4 + column % 4;
#endif
}

// The faster of the two.
template <int rows, bool whole, typename Codes>
inline void multiply_codes(const Codes& w, int64_t quads, const int8_t* x, int64_t stride,
                           int32x4_t products[rows][kParts]) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  if constexpr (rows > 1) return multiply_by_matrices<rows, whole>(w, quads, x, stride, products);
#endif
  multiply_by_dots<rows, whole>(w, quads, x, stride, products);
}

// sums [16] += a row's products with a block of the tile, corrected for the zero points.
inline void add_products(const int32x4_t products[kParts], const Grid& grid, int32_t minus,
                         float scale, float* sums) {
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    const int32x4_t dots = vmlaq_n_s32(products[p], grid.zero_points[p], minus);
    const float32x4_t sum = vld1q_f32(sums + 4 * p);
    const float32x4_t scales = vmulq_n_f32(grid.scales[p], scale);
    vst1q_f32(sums + 4 * p, vfmaq_f32(sum, vcvtq_f32_s32(dots), scales));
  }
}

}  // namespace
}  // namespace eoracc
