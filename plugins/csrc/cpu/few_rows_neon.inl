// Few rows of X on AArch64. Up to kSharedRows rows share the unpacking of a tile in registers. More
// of them share a panel: some columns of the tile that are unpacked to the stack.

#include "cpu/neon.inl"

namespace eoracc {
namespace {

constexpr int64_t kPanelQuads = 16;  // of floats: 4 KiB

// ---- int8 activations

// sums[row] += rows [first, first + rows) of x times block `index`.
template <int rows, bool whole, typename Codes>
inline void add_block(const Activations& x, int64_t first, int64_t index, const Codes& codes,
                      int64_t quads, const Grid& grid, float* sums) {
  const int8_t* start = x.codes + first * x.stride + index * x.block;
  int32x4_t products[rows][kParts];
  multiply_codes<rows, whole>(codes, quads, start, x.stride, products);
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
    const int64_t at = (first + row) * (x.stride / x.block) + index;
    add_products(products[row], grid, x.minus[at], x.scales[at], sums + (first + row) * kTile);
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
    const Grid grid = read_signed_grid(w, tile, group);
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
    case 6:
      return int8_tile<6>(x, w, tile, sums);
    default:
      return int8_tile<8>(x, w, tile, sums);
  }
}

// ---- float activations

// Steps of a part of quad `q`, codes minus their zero points: column 4 * q + i in steps[i].
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
    case 6:
      return float_tile<6>(x, w, tile, sums);
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

constexpr FewRows kFewRowsTable = {read_row,   normalize_row, quantize_row, int8_tile, float_tile,
                                   dense_tile, finish_tile,   nullptr,      nullptr};

}  // namespace
}  // namespace eoracc
