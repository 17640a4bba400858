// Many rows with int8 activations on AArch64: 4 rows of X by one tile at a time.
//
// The products of a unit, the columns that share a scale of X, are exact; they are then corrected
// for the zero points, scaled, and added to float32 sums.

#include "cpu/kernels.h"
#include "cpu/neon.inl"

namespace eoracc {
namespace {

constexpr int64_t kRowBlock = 2 * kSharedRows;
constexpr int64_t kPanelTiles = 1;
// A float factor is the sum of two 8-bit factors, the second of the first one's remainder: 16
// bits below the largest value of a row's unit.
constexpr int64_t kDensePasses = 2;

struct Guard {
  Guard() {}  // holds nothing
};

struct Shape {
  int64_t unit, down_unit;
  int64_t panel_columns;
  int64_t item_rows, item_tiles;

  // A unit of a row block is its codes [rows, unit], scales [rows] and negated sums [rows].
  int64_t x_bytes(int64_t columns) const { return kRowBlock * (columns + 8); }
  // A unit of a panel is its codes, as fill_panel orders them, and its Grid.
  int64_t panel_bytes(int64_t columns) const { return columns * kTile + (int64_t)sizeof(Grid); }
};

// Panels of 512 columns, 10 KiB a tile, stay in the first-level cache while all rows use them.
inline Shape shape_of(const eoracc_matmul& m) {
  const int64_t unit = m.group_size % 32 == 0 ? 32 : m.group_size % 16 == 0 ? 16 : 8;
  return {unit, kUnit, 512, 64 * kRowBlock, 4};
}

inline void pause() { asm volatile("yield"); }

inline void pack_row(const float* values, int64_t columns, int64_t units, int64_t row,
                     uint8_t* block) {
  for (int64_t unit = 0; unit < units; ++unit, values += columns) {
    uint8_t* out = block + unit * kRowBlock * (columns + 8);
    float* scales = (float*)(out + kRowBlock * columns);
    int32_t* minus = (int32_t*)(scales + kRowBlock);
    quantize_row(values, columns, columns, (int8_t*)out + row * columns, scales + row, minus + row);
  }
}

// Quads [begin, end) of a tile, whole units of a panel but for the last.
template <int bits>
void fill_quads(const Tiles& w, int64_t tile, int64_t unit, int64_t begin, int64_t end,
                uint8_t* panel) {
  const int64_t unit_quads = unit / 4;
  for (int64_t quad = begin; quad < end; quad += unit_quads) {
    const uint8_t* codes = w.codes + tile * w.tile_bytes + quad / kQuads * kQuads * 8 * bits;
    const int64_t quads = smaller(unit_quads, end - quad);
    if (quads < unit_quads) memset(panel, 0, (size_t)(unit_quads * kQuadBytes));
    fill_panel(PackedCodes<bits>{codes, quad % kQuads}, quads, (int8_t*)panel);
    panel += unit_quads * kQuadBytes;
    const Grid grid = read_signed_grid(w, tile, quad * 4 / w.group_size);
    memcpy(panel, &grid, sizeof grid);
    panel += sizeof grid;
  }
}

// Columns [begin, end) of a float factor: each row of a unit rounded to 8 bits with a scale of its
// own, or, in the second pass, the remainder.
void fill_dense(const DenseTiles& w, int64_t pass, int64_t tile, int64_t unit, int64_t begin,
                int64_t end, uint8_t* panel) {
  for (int64_t first = begin; first < end; first += unit) {
    const int64_t columns = smaller(unit, end - first);
    int8_t* codes = (int8_t*)panel;
    memset(codes, 0, (size_t)(unit * kTile));
    Grid grid;
    for (int p = 0; p < kParts; ++p) {
      float32x4_t values[kUnit], largest = vdupq_n_f32(0);
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t index = (tile * w.columns + first + i) * kTile + 4 * p;
        values[i] = read_floats(w.type, w.values, index);
        largest = vmaxq_f32(largest, vabsq_f32(values[i]));
      }
      // A row below 2^-100 counts as 0: its inverse would overflow.
      const uint32x4_t tiny = vcltq_f32(largest, vdupq_n_f32(0x1p-100f));
      const float32x4_t inverse =
          vbslq_f32(tiny, vdupq_n_f32(0), vdivq_f32(vdupq_n_f32(127), largest));
      const float32x4_t scale = vdivq_f32(largest, vdupq_n_f32(127));
      for (int64_t i = 0; i < columns; ++i) {
        float32x4_t rounded = vrndnq_f32(vmulq_f32(values[i], inverse));
        if (pass == 1) {
          const float32x4_t rest = vfmsq_f32(values[i], rounded, scale);
          rounded = vrndnq_f32(vmulq_n_f32(vmulq_f32(rest, inverse), 254));
        }
        int32_t four[4];
        vst1q_s32(four, vcvtq_s32_f32(rounded));
        for (int r = 0; r < 4; ++r) codes[panel_index(4 * p + r, i)] = (int8_t)four[r];
      }
      grid.scales[p] = pass == 1 ? vdivq_f32(scale, vdupq_n_f32(254)) : scale;
      grid.zero_points[p] = vdupq_n_s32(0);
    }
    panel += unit * kTile;
    memcpy(panel, &grid, sizeof grid);
    panel += sizeof grid;
  }
}

// sums[row] += kSharedRows rows from `first` on of a row block times a panel.
template <bool whole>
void multiply_shared_rows(const uint8_t* x, int64_t first, const uint8_t* panel, int64_t unit,
                          int64_t units, float* sums) {
  for (int64_t u = 0; u < units; ++u) {
    const float* scales = (const float*)(x + kRowBlock * unit);
    const int32_t* minus = (const int32_t*)(scales + kRowBlock);
    int32x4_t products[kSharedRows][kParts];
    multiply_codes<kSharedRows, whole>(PanelCodes{(const int8_t*)panel}, unit / 4,
                                       (const int8_t*)x + first * unit, unit, products);
    Grid grid;
    memcpy(&grid, panel + unit * kTile, sizeof grid);
#pragma GCC unroll 4
    for (int row = 0; row < kSharedRows; ++row) {
      add_products(products[row], grid, minus[first + row], scales[first + row],
                   sums + (first + row) * kTile);
    }
    x += kRowBlock * (unit + 8);
    panel += unit * kTile + (int64_t)sizeof grid;
  }
}

inline void multiply(const uint8_t* x, const uint8_t* panel, int64_t, int64_t unit, int64_t units,
                     int64_t rows, float* sums, int64_t) {
  for (int64_t first = 0; first < rows; first += kSharedRows) {
    if (unit == kUnit) {
      multiply_shared_rows<true>(x, first, panel, unit, units, sums);
    } else {
      multiply_shared_rows<false>(x, first, panel, unit, units, sums);
    }
  }
}

}  // namespace
}  // namespace eoracc

#include "cpu/many_rows.inl"

namespace eoracc {
namespace {

// Units [start, start + units) of a tile, or zeros for tile -1.
inline void fill(const Weight& w, int64_t pass, int64_t tile, int64_t unit, int64_t start,
                 int64_t units, uint8_t* panel) {
  if (tile < 0) {
    memset(panel, 0, (size_t)units * (size_t)(unit * kTile + (int64_t)sizeof(Grid)));
    return;
  }
  const bool dense = w.is_dense();
  const int64_t begin = start * unit;
  const int64_t end = smaller(begin + units * unit, dense ? w.dense.columns : w.tiles.columns);
  const int64_t first_quad = begin / 4, end_quad = ceil_div(end, 4);
  if (dense) {
    fill_dense(w.dense, pass, tile, unit, begin, end, panel);
  } else if (w.tiles.bits == 2) {
    fill_quads<2>(w.tiles, tile, unit, first_quad, end_quad, panel);
  } else if (w.tiles.bits == 3) {
    fill_quads<3>(w.tiles, tile, unit, first_quad, end_quad, panel);
  } else if (w.tiles.bits == 4) {
    fill_quads<4>(w.tiles, tile, unit, first_quad, end_quad, panel);
  } else if (w.tiles.bits == 6) {
    fill_quads<6>(w.tiles, tile, unit, first_quad, end_quad, panel);
  } else {
    fill_quads<8>(w.tiles, tile, unit, first_quad, end_quad, panel);
  }
}

}  // namespace
}  // namespace eoracc
