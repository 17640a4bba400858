// Many rows on AMX: bfloat16 X and weights, float32 sums, 16 x 16 x 32 products at a time.
//
// Weights are unpacked to bfloat16 by truncation, which needs no instruction: merging two floats
// keeps their upper halves. A truncated weight is too small by up to 2^-7 of itself, by
// 2^-8 / ln 4 on average (the mean of 1 / m over mantissas m in [1, 2) is 1 / ln 4). Scaling X up
// by this average centres the error, which is then on average no larger than with rounding to
// nearest.

#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/rows.inl"

namespace eoracc {
namespace {

constexpr int64_t kRowBlock = 32;
constexpr int64_t kPanelTiles = 2;
constexpr int64_t kDensePasses = 1;
constexpr int64_t kAmxUnit = 32;      // columns that a tile register holds
constexpr int64_t kTileBytes = 1024;  // of a tile register
constexpr float kCentre = 1 + 0x1p-8f * 0.72134752f;

struct Shape {
  int64_t unit, down_unit;
  int64_t panel_columns;          // columns of W in a panel
  int64_t item_rows, item_tiles;  // most of an item

  int64_t x_bytes(int64_t) const { return 2 * kTileBytes; }
  int64_t panel_bytes(int64_t) const { return kTileBytes; }
};

inline Shape shape_of(const eoracc_matmul& m);

inline void pause() { _mm_pause(); }

// Tile registers 0 to 3 hold sums, 4 and 5 rows of X, 6 and 7 the weight.
class Guard {
 public:
  Guard() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t column_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.column_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~Guard() { _tile_release(); }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
};

// A row block is [units, 2, 16 rows, 32 columns].
inline void pack_row(const float* values, int64_t, int64_t units, int64_t row, uint8_t* block) {
  uint8_t* out = block + row / 16 * kTileBytes + row % 16 * 64;
  const __m512 centre = _mm512_set1_ps(kCentre);
  for (int64_t unit = 0; unit < units; ++unit) {
    __m512 x[2];
    for (int half = 0; half < 2; ++half) {
      x[half] = _mm512_mul_ps(_mm512_loadu_ps(values + unit * kAmxUnit + half * 16), centre);
    }
    _mm512_store_si512(out + unit * 2 * kTileBytes, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
  }
}

// ---- weights to bfloat16
//
// A dword holds the codes of four columns, one a byte. Moved into a float's mantissa with its
// lowest bit at bit p, under the exponent of 2^(23 - p), code c makes the float 2^(23 - p) + c.
// One fused multiply-add takes off 2^(23 - p) + zero point and multiplies with the scale, exactly:
// with p >= 11 and a float16 scale the product that it subtracts fits a float.

template <int bits, int p>
__m512 code_at(__m512i words) {
  constexpr uint32_t mask = ((1u << bits) - 1) << p, exponent = (uint32_t)(127 + 23 - p) << 23;
  // (words & mask) | exponent
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(words, _mm512_set1_epi32((int)mask),
                                                       _mm512_set1_epi32((int)exponent), 0xea));
}

// The upper halves of both, `even` in the even words.
inline __m512i truncate(__m512 even, __m512 odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                 _mm512_castps_si512(odd));
}

struct Group {
  __m512 scale;
  __m512 zero11, zero16, zero19;  // -(2^(23 - p) + zero point) * scale
};

inline __m512 load_lanes(int32_t type, const void* data, int64_t index) {
  if (type == EORACC_FLOAT32) return _mm512_loadu_ps((const float*)data + index);
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)data + index)));
}

template <int bits>
inline Group load_group(const Tiles& w, int64_t index) {
  __m512 zero = _mm512_set1_ps(1 << (bits - 1));
  if (w.zero_points != nullptr) {
    zero = _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w.zero_points + index))));
  }
  Group group;
  group.scale = load_lanes(w.scales_type, w.scales, index);
  const auto offset = [&](float magnitude) {
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(-magnitude), zero), group.scale);
  };
  group.zero11 = offset(4096);
  group.zero16 = offset(128);
  group.zero19 = offset(16);
  return group;
}

// One quad, whose codes are the low bits of the bytes: two rows of a weight tile register.
template <int bits>
inline void store_quad(__m512i words, const Group& group, __m512i* out) {
  __m512 w[4];
  if constexpr (bits > 4) {
    w[0] = code_at<bits, 11>(_mm512_slli_epi32(words, 11));
    w[1] = code_at<bits, 11>(_mm512_slli_epi32(words, 3));
    w[2] = code_at<bits, 11>(_mm512_srli_epi32(words, 5));
    w[3] = code_at<bits, 11>(_mm512_srli_epi32(words, 13));
    for (int i = 0; i < 4; ++i) w[i] = _mm512_fmadd_ps(w[i], group.scale, group.zero11);
  } else {
    const __m512i up = _mm512_slli_epi32(words, 11);
    w[0] = _mm512_fmadd_ps(code_at<bits, 11>(up), group.scale, group.zero11);
    w[1] = _mm512_fmadd_ps(code_at<bits, 19>(up), group.scale, group.zero19);
    w[2] = _mm512_fmadd_ps(code_at<bits, 16>(words), group.scale, group.zero16);
    w[3] =
        _mm512_fmadd_ps(code_at<bits, 11>(_mm512_srli_epi32(words, 13)), group.scale, group.zero11);
  }
  _mm512_store_si512(out, truncate(w[0], w[1]));
  _mm512_store_si512(out + 1, truncate(w[2], w[3]));
}

// Quads [begin, end) of a tile; `begin` is the first of a chunk. As many codes behind them are
// prefetched, which the next panel of this tile is made of.
template <int bits>
void fill_quads(const Tiles& w, int64_t tile, int64_t begin, int64_t end, uint8_t* panel) {
  constexpr int kQuads = chunk_quads(bits);
  constexpr int64_t kChunkBytes = chunk_bytes(bits);
  const int64_t ahead = (end - begin + kQuads - 1) / kQuads * kChunkBytes;
  __m512i* out = (__m512i*)panel;
  const uint8_t* codes = w.codes + tile * w.tile_bytes + begin / kQuads * kChunkBytes;
  const int64_t group_quads = w.group_size / 4;
  int64_t group = begin / group_quads, group_end = (group + 1) * group_quads;
  Group values = load_group<bits>(w, (tile * w.groups + group) * kTile);
  for (int64_t quad = begin; quad < end; quad += kQuads, codes += kChunkBytes) {
    constexpr int kVectors = (int)(kChunkBytes / 64);
    __m512i vectors[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      vectors[i] = _mm512_loadu_si512(codes + 64 * i);
      _mm_prefetch((const char*)codes + ahead + 64 * i, _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQuads; ++i) {
      if (quad + i >= end) break;
      if (quad + i == group_end) {
        ++group;
        group_end += group_quads;
        values = load_group<bits>(w, (tile * w.groups + group) * kTile);
      }
      __m512i words;
      if constexpr (bits == 3) {
        const __m512i low = _mm512_srli_epi32(vectors[i / 4], 2 * (i % 4));
        const __m512i high =
            i < 2 ? _mm512_slli_epi32(vectors[2], 2 - i) : _mm512_srli_epi32(vectors[2], i - 2);
        // low where the mask is set, high elsewhere
        words = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), low, high, 0xca);
      } else if constexpr (bits == 6) {
        const __m512i low = _mm512_srli_epi32(vectors[i / 2], 4 * (i % 2));
        const __m512i high = i < 2 ? _mm512_slli_epi32(vectors[2], 4 - 2 * i)
                                   : _mm512_srli_epi32(vectors[2], 2 * i - 4);
        words = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), low, high, 0xca);
      } else {
        words = _mm512_srli_epi32(vectors[0], bits * i);
      }
      store_quad<bits>(words, values, out);
      out += 2;
    }
  }
}

// Column `column` of a panel, counted from the panel's first.
inline void clear_column(uint8_t* panel, int64_t column) {
  uint16_t* words = (uint16_t*)panel + column / 2 * 32 + column % 2;
  for (int64_t lane = 0; lane < kTile; ++lane) words[2 * lane] = 0;
}

void fill_dense(const DenseTiles& w, int64_t tile, int64_t begin, int64_t end, uint8_t* panel) {
  const int64_t first = tile * w.columns;
  for (int64_t column = begin; column < end; column += 2) {
    const __m512 even = load_lanes(w.type, w.values, (first + column) * kTile);
    const __m512 odd = column + 1 < end ? load_lanes(w.type, w.values, (first + column + 1) * kTile)
                                        : _mm512_setzero_ps();
    _mm512_store_si512(panel + (column - begin) / 2 * 64, truncate(even, odd));
  }
}

// The sums of 32 or 16 rows: sums[i * stride] is tile i's.
template <bool both>
void multiply_block(const uint8_t* x, const uint8_t* panel, int64_t panel_stride, int64_t units,
                    float* sums, int64_t stride) {
  float* right = sums + stride;
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, right, 64);
  if (both) {
    _tile_loadd(2, sums + 256, 64);
    _tile_loadd(3, right + 256, 64);
  }
  for (int64_t unit = 0; unit < units; ++unit, x += 2 * kTileBytes, panel += kTileBytes) {
    _tile_loadd(6, panel, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + panel_stride, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
      _tile_loadd(5, x + kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, right, 64);
  if (both) {
    _tile_stored(2, sums + 256, 64);
    _tile_stored(3, right + 256, 64);
  }
}

inline void multiply(const uint8_t* x, const uint8_t* panel, int64_t panel_stride, int64_t,
                     int64_t units, int64_t rows, float* sums, int64_t stride) {
  if (rows > 16) {
    multiply_block<true>(x, panel, panel_stride, units, sums, stride);
  } else {
    multiply_block<false>(x, panel, panel_stride, units, sums, stride);
  }
}

}  // namespace
}  // namespace eoracc

#include "cpu/many_rows.inl"

namespace eoracc {
namespace {

// Two panels, 16 KiB, stay in the first-level cache. X comes from the second-level cache; the less
// of it fits, the more tiles an item should have, so that X is read less often.
inline Shape shape_of(const eoracc_matmul& m) {
  Shape shape{};
  shape.unit = shape.down_unit = kAmxUnit;
  shape.panel_columns = 256;
  shape.item_rows = 512;
  const int64_t x_bytes = smaller(m.rows, shape.item_rows) * m.in_features * 2;
  shape.item_tiles = x_bytes <= (1 << 20) ? 4 : x_bytes <= (3 << 20) ? 8 : 16;
  return shape;
}

// Units [start, start + units) of a tile, or zeros for tile -1.
inline void fill(const Weight& w, int64_t, int64_t tile, int64_t, int64_t start, int64_t units,
                 uint8_t* panel) {
  if (tile < 0) {
    memset(panel, 0, (size_t)(units * kTileBytes));
    return;
  }
  const bool dense = w.is_dense();
  const int64_t begin = start * kAmxUnit, last = begin + units * kAmxUnit;
  const int64_t end = smaller(last, dense ? w.dense.columns : w.tiles.columns);
  const int64_t first_quad = begin / 4, end_quad = ceil_div(end, 4);
  if (dense) {
    fill_dense(w.dense, tile, begin, end, panel);
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
  // Columns past the last one add nothing to a sum, whatever their scale.
  for (int64_t column = end; column < last; ++column) clear_column(panel, column - begin);
}

}  // namespace

eoracc_result many_rows_amx(const eoracc_matmul& m, const eoracc_threads& threads) {
  return many_rows(m, threads);
}

}  // namespace eoracc
