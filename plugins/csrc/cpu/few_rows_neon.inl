// Few rows of X on AArch64, compiled once for each set of its instructions: dot products (ARMv8.2),
// and int8 matrix products on top of them (ARMv8.6).
//
// A value for each of a tile's 16 rows fills four registers, its parts. A part of a quad's codes is
// one register, which is what a dot product instruction takes: four rows of the tile and four
// columns of each. Up to kSharedRows rows of X share the unpacking in registers. More of them share
// a panel: some columns of the tile that are unpacked to the stack.

#include <arm_neon.h>

#include "cpu/rows.inl"

namespace eoracc {
namespace {

constexpr int kParts = 4;
constexpr int kSharedRows = 4;
constexpr int64_t kQuads = kUnit / 4;  // of a unit
constexpr int64_t kQuadBytes = 64;     // of a quad's codes when they are a byte each
constexpr int64_t kPanelQuads = 16;    // of floats: 4 KiB

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

// ---- int8 activations
//
// A block is a run of columns with one scale of X: a whole unit, or less of it. Its products are
// exact, so that neither the instructions nor the number of rows changes a result.

// Codes of a block as they are stored. The instructions multiply signed bytes: codes of 8 bits are
// taken less 128, and so are their zero points.
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

// Codes of a block as `fill_panel` left them: what quad() or pair() gave, one after another.
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

// sums[row] += rows [first, first + rows) of x times block `index`.
template <int rows, bool whole, typename Codes>
inline void add_block(const Activations& x, int64_t first, int64_t index, const Codes& codes,
                      int64_t quads, const Grid& grid, float* sums) {
  const int8_t* start = x.codes + first * x.stride + index * x.block;
  int32x4_t products[rows][kParts];
#if defined(__ARM_FEATURE_MATMUL_INT8)
  if constexpr (rows > 1) {
    multiply_by_matrices<rows, whole>(codes, quads, start, x.stride, products);
  } else {
    multiply_by_dots<rows, whole>(codes, quads, start, x.stride, products);
  }
#else
  multiply_by_dots<rows, whole>(codes, quads, start, x.stride, products);
#endif
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
    const int64_t at = (first + row) * (x.stride / x.block) + index;
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const int32x4_t dots = vmlaq_n_s32(products[row][p], grid.zero_points[p], x.minus[at]);
      const float32x4_t scale = vmulq_n_f32(grid.scales[p], x.scales[at]);
      float* sum = sums + (first + row) * kTile + 4 * p;
      vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), vcvtq_f32_s32(dots), scale));
    }
  }
}

// The same for all rows of x.
template <int bits, bool whole>
inline void add_block_to_all(const Activations& x, int64_t index, const PackedCodes<bits>& codes,
                             int64_t quads, const Grid& grid, float* sums) {
  int64_t row = 0;
  if (x.rows > kSharedRows) {
    alignas(16) int8_t panel[kQuads * kQuadBytes];
    fill_panel(codes, quads, panel);
    const PanelCodes unpacked{panel};
    for (; row + kSharedRows <= x.rows; row += kSharedRows) {
      add_block<kSharedRows, whole>(x, row, index, unpacked, quads, grid, sums);
    }
  }
  switch (x.rows - row) {
    case 4:
      return add_block<4, whole>(x, row, index, codes, quads, grid, sums);
    case 3:
      return add_block<3, whole>(x, row, index, codes, quads, grid, sums);
    case 2:
      return add_block<2, whole>(x, row, index, codes, quads, grid, sums);
    case 1:
      return add_block<1, whole>(x, row, index, codes, quads, grid, sums);
  }
}

template <int bits>
inline void int8_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  const uint8_t* codes = w.codes + tile * w.tile_bytes;
  const int64_t stored_quads = w.tile_bytes / (8 * bits), block_quads = x.block / 4;
  const int64_t blocks = ceil_div(x.columns, x.block), group_blocks = w.group_size / x.block;
  int64_t index = 0;
  for (int64_t group = 0; group < w.groups; ++group) {
    Grid grid = read_grid(w, tile, group);
    if constexpr (bits == 8) {
      for (int32x4_t& zero_points : grid.zero_points) {
        zero_points = vsubq_s32(zero_points, vdupq_n_s32(128));
      }
    }
    for (const int64_t end = smaller(index + group_blocks, blocks); index < end; ++index) {
      const int64_t quad = index * block_quads, quads = smaller(block_quads, stored_quads - quad);
      const uint8_t* unit = codes + quad / kQuads * kQuads * 8 * bits;
      if (quads == kQuads) {
        add_block_to_all<bits, true>(x, index, PackedCodes<bits>{unit, 0}, quads, grid, sums);
      } else {
        add_block_to_all<bits, false>(x, index, PackedCodes<bits>{unit, quad % kQuads}, quads, grid,
                                      sums);
      }
    }
  }
}

void int8_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  switch (w.bits) {
    case 2:
      return int8_tile<2>(x, w, tile, sums);
    case 3:
      return int8_tile<3>(x, w, tile, sums);
    case 4:
      return int8_tile<4>(x, w, tile, sums);
    default:
      return int8_tile<8>(x, w, tile, sums);
  }
}

// ---- float activations

// Steps of a part of quad `q`, codes less their zero points: column 4 * q + i in steps[i].
template <int bits>
inline void read_steps(const uint8_t* codes, int64_t q, int part, float32x4_t zero_points,
                       float32x4_t steps[4]) {
  const uint32x4_t words = vreinterpretq_u32_u8(read_quad<bits>(codes, q, part));
  const uint32x4_t byte = vdupq_n_u32(255);
  steps[0] = vcvtq_f32_u32(vandq_u32(words, byte));
  steps[1] = vcvtq_f32_u32(vandq_u32(vshrq_n_u32(words, 8), byte));
  steps[2] = vcvtq_f32_u32(vandq_u32(vshrq_n_u32(words, 16), byte));
  steps[3] = vcvtq_f32_u32(vshrq_n_u32(words, 24));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) steps[i] = vsubq_f32(steps[i], zero_points);
}

// totals[row][part] += four columns of rows that are `stride` apart times read(part, columns).
template <int rows, typename Read>
inline void add_quad(const float* x, int64_t stride, const Read& read,
                     float32x4_t totals[rows][kParts]) {
  float32x4_t four[rows];
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) four[row] = vld1q_f32(x + row * stride);
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    float32x4_t columns[4];
    read(p, columns);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      float32x4_t total = totals[row][p];
      total = vfmaq_laneq_f32(total, columns[0], four[row], 0);
      total = vfmaq_laneq_f32(total, columns[1], four[row], 1);
      total = vfmaq_laneq_f32(total, columns[2], four[row], 2);
      totals[row][p] = vfmaq_laneq_f32(total, columns[3], four[row], 3);
    }
  }
}

// sums[row] += totals[row] * scales.
template <int rows>
inline void add_totals(float32x4_t totals[rows][kParts], const float32x4_t scales[kParts],
                       float* sums) {
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      float* sum = sums + row * kTile + 4 * p;
      vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), totals[row][p], scales[p]));
    }
  }
}

// A run of quads of one tile and group, at most kPanelQuads, with float activations.
struct Run {
  const uint8_t* codes;  // of the tile
  int64_t first, last;   // quads
  float32x4_t zero_points[kParts];
  const Grid* grid;
};

template <int bits, int rows>
inline void add_run(const Run& run, const float* x, int64_t stride, float* sums) {
  float32x4_t totals[rows][kParts] = {};
  for (int64_t q = run.first; q < run.last; ++q) {
    const auto read = [&](int p, float32x4_t steps[4]) __attribute__((always_inline)) {
      read_steps<bits>(run.codes, q, p, run.zero_points[p], steps);
    };
    add_quad<rows>(x + 4 * q, stride, read, totals);
  }
  add_totals<rows>(totals, run.grid->scales, sums);
}

// The same with steps [quad][part][column][row] that add_run_to_all has unpacked.
inline void add_panel(const Run& run, const float* panel, const float* x, int64_t stride,
                      float* sums) {
  float32x4_t totals[kSharedRows][kParts] = {};
  for (int64_t q = run.first; q < run.last; ++q) {
    const float* unpacked = panel + (q - run.first) * kQuadBytes;
    const auto read = [&](int p, float32x4_t steps[4]) __attribute__((always_inline)) {
      for (int i = 0; i < 4; ++i) steps[i] = vld1q_f32(unpacked + 16 * p + 4 * i);
    };
    add_quad<kSharedRows>(x + 4 * q, stride, read, totals);
  }
  add_totals<kSharedRows>(totals, run.grid->scales, sums);
}

template <int bits>
inline void add_run_to_all(const Activations& x, const Run& run, float* sums) {
  int64_t row = 0;
  if (x.rows > kSharedRows) {
    float panel[kPanelQuads * kQuadBytes];
    for (int64_t q = run.first; q < run.last; ++q) {
      for (int p = 0; p < kParts; ++p) {
        float32x4_t steps[4];
        read_steps<bits>(run.codes, q, p, run.zero_points[p], steps);
        float* unpacked = panel + (q - run.first) * kQuadBytes + 16 * p;
        for (int i = 0; i < 4; ++i) vst1q_f32(unpacked + 4 * i, steps[i]);
      }
    }
    for (; row + kSharedRows <= x.rows; row += kSharedRows) {
      add_panel(run, panel, x.values + row * x.stride, x.stride, sums + row * kTile);
    }
  }
  const float* values = x.values + row * x.stride;
  switch (x.rows - row) {
    case 4:
      return add_run<bits, 4>(run, values, x.stride, sums + row * kTile);
    case 3:
      return add_run<bits, 3>(run, values, x.stride, sums + row * kTile);
    case 2:
      return add_run<bits, 2>(run, values, x.stride, sums + row * kTile);
    case 1:
      return add_run<bits, 1>(run, values, x.stride, sums + row * kTile);
  }
}

template <int bits>
inline void float_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  Run run;
  run.codes = w.codes + tile * w.tile_bytes;
  const int64_t quads = ceil_div(w.columns, 4), group_quads = w.group_size / 4;
  for (int64_t group = 0; group < w.groups; ++group) {
    const Grid grid = read_grid(w, tile, group);
    run.grid = &grid;
    for (int p = 0; p < kParts; ++p) run.zero_points[p] = vcvtq_f32_s32(grid.zero_points[p]);
    const int64_t end = smaller((group + 1) * group_quads, quads);
    for (run.first = group * group_quads; run.first < end; run.first = run.last) {
      run.last = smaller(run.first + kPanelQuads, end);
      add_run_to_all<bits>(x, run, sums);
    }
  }
}

void float_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  switch (w.bits) {
    case 2:
      return float_tile<2>(x, w, tile, sums);
    case 3:
      return float_tile<3>(x, w, tile, sums);
    case 4:
      return float_tile<4>(x, w, tile, sums);
    default:
      return float_tile<8>(x, w, tile, sums);
  }
}

// Columns [begin, end) of a factor times rows of x.
template <int rows>
inline void add_columns(const DenseTiles& w, int64_t tile, int64_t begin, int64_t end,
                        const float* x, int64_t stride, float* sums) {
  float32x4_t totals[rows][kParts];
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) totals[row][p] = vld1q_f32(sums + row * kTile + 4 * p);
  }
  int64_t k = begin;
  for (; k + 4 <= end; k += 4) {
    const auto read = [&](int p, float32x4_t columns[4]) __attribute__((always_inline)) {
      for (int i = 0; i < 4; ++i) {
        columns[i] = read_floats(w.type, w.values, (tile * w.columns + k + i) * kTile + 4 * p);
      }
    };
    add_quad<rows>(x + k, stride, read, totals);
  }
  for (; k < end; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const float32x4_t column =
          read_floats(w.type, w.values, (tile * w.columns + k) * kTile + 4 * p);
#pragma GCC unroll 4
      for (int row = 0; row < rows; ++row) {
        totals[row][p] = vfmaq_n_f32(totals[row][p], column, x[row * stride + k]);
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) vst1q_f32(sums + row * kTile + 4 * p, totals[row][p]);
  }
}

void dense_tile(const Activations& x, const DenseTiles& w, int64_t tile, float* sums) {
  constexpr int64_t kColumns = 256;  // at most 16 KiB, read for every four rows
  for (int64_t begin = 0; begin < w.columns; begin += kColumns) {
    const int64_t end = smaller(begin + kColumns, w.columns);
    for (int64_t row = 0; row < x.rows; row += kSharedRows) {
      const float* values = x.values + row * x.stride;
      float* totals = sums + row * kTile;
      switch (smaller(kSharedRows, x.rows - row)) {
        case 4:
          add_columns<4>(w, tile, begin, end, values, x.stride, totals);
          break;
        case 3:
          add_columns<3>(w, tile, begin, end, values, x.stride, totals);
          break;
        case 2:
          add_columns<2>(w, tile, begin, end, values, x.stride, totals);
          break;
        default:
          add_columns<1>(w, tile, begin, end, values, x.stride, totals);
      }
    }
  }
}

constexpr FewRows kFewRowsTable = {read_row,   normalize_row, quantize_row, int8_tile,
                                   float_tile, dense_tile,    finish_tile};

}  // namespace
}  // namespace eoracc
