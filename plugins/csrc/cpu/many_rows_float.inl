// Many rows in float32, by the vector extension of GCC and Clang, compiled for the instruction set
// of the including file, which defines
//
//   EORACC_LANES      floats in a vector register, 8 or 16
//   EORACC_ROW_BLOCK  rows of X in a register block; its sums take twice as many registers

#include "cpu/kernels.h"
#include "cpu/rows.inl"

namespace eoracc {
namespace {

constexpr int64_t kRowBlock = EORACC_ROW_BLOCK;
constexpr int64_t kPanelTiles = 2 * EORACC_LANES / kTile;
constexpr int64_t kDensePasses = 1;
constexpr int64_t kFloatUnit = 8;
constexpr int64_t kTileVectors = kTile / EORACC_LANES;

typedef float Vector __attribute__((vector_size(4 * EORACC_LANES)));
typedef float TileFloats __attribute__((vector_size(4 * EORACC_TILE)));
typedef uint32_t TileWords __attribute__((vector_size(4 * EORACC_TILE)));

struct Guard {
  Guard() {}  // holds nothing
};

struct Shape {
  int64_t unit, down_unit;
  int64_t panel_columns;
  int64_t item_rows, item_tiles;

  int64_t x_bytes(int64_t) const { return 4 * kFloatUnit * kRowBlock; }
  int64_t panel_bytes(int64_t) const { return 4 * kFloatUnit * kTile; }
};

// Panels of 256 columns, 16 or 32 KiB, stay in the first-level cache while all rows use them.
inline Shape shape_of(const eoracc_matmul&) {
  return {kFloatUnit, kFloatUnit, 256, 40 * kRowBlock, 4};
}

inline void pause() { __builtin_ia32_pause(); }

// A row block is [columns, kRowBlock].
inline void pack_row(const float* values, int64_t, int64_t units, int64_t row, uint8_t* block) {
  float* out = (float*)block + row;
  for (int64_t i = 0; i < units * kFloatUnit; ++i) out[i * kRowBlock] = values[i];
}

// ---- weights to floats, a panel is [columns, 16]

template <typename T>
inline T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
inline void store(void* to, T value) {
  memcpy(to, &value, sizeof value);
}

inline TileFloats load_tile(int32_t type, const void* data, int64_t index) {
  float values[kTile];
  read_elements(type, data, index, kTile, values);
  return load<TileFloats>(values);
}

// The float 2^23 + c has the bits 0x4b000000 | c for every integer 0 <= c < 2^23. Subtracting the
// float 2^23 + zero point leaves their difference exactly.
template <int bits>
inline TileFloats zeros_of(const Tiles& w, int64_t index) {
  TileFloats zeros = {};
  for (int64_t lane = 0; lane < kTile; ++lane) {
    zeros[lane] = 0x1p23f + (w.zero_points ? w.zero_points[index + lane] : 1 << (bits - 1));
  }
  return zeros;
}

// Quads [begin, end) of a tile; `begin` is the first of a chunk.
template <int bits>
void fill_quads(const Tiles& w, int64_t tile, int64_t begin, int64_t end, uint8_t* panel) {
  constexpr int kQuads = chunk_quads(bits);
  constexpr int64_t kChunkBytes = chunk_bytes(bits);
  const uint8_t* codes = w.codes + tile * w.tile_bytes + begin / kQuads * kChunkBytes;
  const int64_t group_quads = w.group_size / 4;
  TileFloats scale = {}, zero = {};
  int64_t group = begin / group_quads, group_begin = begin;
  for (int64_t quad = begin; quad < end; quad += kQuads, codes += kChunkBytes) {
    const TileWords first = load<TileWords>(codes);
    TileWords second = first, high = first;
    if constexpr (kChunkBytes == 192) {
      second = load<TileWords>(codes + 64);
      high = load<TileWords>(codes + 128);
    }
    for (int64_t i = 0; i < kQuads && quad + i < end; ++i) {
      if (quad + i == group_begin) {
        const int64_t index = (tile * w.groups + group) * kTile;
        scale = load_tile(w.scales_type, w.scales, index);
        zero = zeros_of<bits>(w, index);
        ++group;
        group_begin = group * group_quads;
      }
      TileWords words;
      if constexpr (bits == 3) {
        const TileWords low = (i < 4 ? first : second) >> (uint32_t)(2 * (i % 4));
        words = (low & 0x03030303) | ((high >> (uint32_t)i & 0x01010101) << 2);
      } else if constexpr (bits == 6) {
        const TileWords low = (i < 2 ? first : second) >> (uint32_t)(4 * (i % 2));
        words = (low & 0x0f0f0f0f) | ((high >> (uint32_t)(2 * i) & 0x03030303) << 4);
      } else {
        words = first >> (uint32_t)(bits * i);
      }
      float* out = (float*)panel + (quad + i - begin) * 4 * kTile;
#pragma GCC unroll 4
      for (uint32_t column = 0; column < 4; ++column) {
        const TileWords code = ((words >> 8 * column) & ((1u << bits) - 1)) | 0x4b000000;
        store(out + column * kTile, ((TileFloats)code - zero) * scale);
      }
    }
  }
}

// sums[row] of each tile += the row block times the tiles' panels.
template <int64_t rows>
void multiply_block(const float* x, const uint8_t* panel, int64_t panel_stride, int64_t columns,
                    float* sums, int64_t stride) {
  const float* weights[2];
  float* out[2];
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t tile = i / kTileVectors, offset = i % kTileVectors * EORACC_LANES;
    weights[i] = (const float*)(panel + tile * panel_stride) + offset;
    out[i] = sums + tile * stride + offset;
  }
  Vector total[rows][2] = {};
  for (int64_t k = 0; k < columns; ++k) {
    const Vector left = load<Vector>(weights[0] + k * kTile);
    const Vector right = load<Vector>(weights[1] + k * kTile);
#pragma GCC unroll 12
    for (int64_t row = 0; row < rows; ++row) {
      const float value = x[k * kRowBlock + row];
      total[row][0] += value * left;
      total[row][1] += value * right;
    }
  }
#pragma GCC unroll 12
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < 2; ++i) {
      store(out[i] + row * kTile, load<Vector>(out[i] + row * kTile) + total[row][i]);
    }
  }
}

inline void multiply(const uint8_t* x, const uint8_t* panel, int64_t panel_stride, int64_t,
                     int64_t units, int64_t rows, float* sums, int64_t stride) {
  const int64_t columns = units * kFloatUnit;
  if (rows > kRowBlock / 2) {
    multiply_block<kRowBlock>((const float*)x, panel, panel_stride, columns, sums, stride);
  } else {
    multiply_block<kRowBlock / 2>((const float*)x, panel, panel_stride, columns, sums, stride);
  }
}

}  // namespace
}  // namespace eoracc

#include "cpu/many_rows.inl"

namespace eoracc {
namespace {

// Units [start, start + units) of a tile, or zeros for tile -1.
inline void fill(const Weight& w, int64_t, int64_t tile, int64_t, int64_t start, int64_t units,
                 uint8_t* panel) {
  const bool dense = w.is_dense();
  const int64_t begin = start * kFloatUnit, last = begin + units * kFloatUnit;
  const int64_t columns = dense ? w.dense.columns : w.tiles.columns;
  const int64_t end = tile < 0 ? begin : smaller(last, columns);
  const int64_t first_quad = begin / 4, end_quad = ceil_div(end, 4);
  if (dense) {
    for (int64_t column = begin; column < end; ++column) {
      store((float*)panel + (column - begin) * kTile,
            load_tile(w.dense.type, w.dense.values, (tile * columns + column) * kTile));
    }
  } else if (w.tiles.bits == 2) {
    fill_quads<2>(w.tiles, tile, first_quad, end_quad, panel);
  } else if (w.tiles.bits == 3) {
    fill_quads<3>(w.tiles, tile, first_quad, end_quad, panel);
  } else if (w.tiles.bits == 4) {
    fill_quads<4>(w.tiles, tile, first_quad, end_quad, panel);
  } else if (w.tiles.bits == 6) {
    fill_quads<6>(w.tiles, tile, first_quad, end_quad, panel);
  } else {
    fill_quads<8>(w.tiles, tile, first_quad, end_quad, panel);
  }
  // Nothing beyond the last column reaches a sum, whatever its scale.
  memset((float*)panel + (end - begin) * kTile, 0, (size_t)((last - end) * kTile) * sizeof(float));
}

}  // namespace
}  // namespace eoracc
