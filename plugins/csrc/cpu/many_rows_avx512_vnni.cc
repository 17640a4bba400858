// Many rows with int8 activations on AVX-512 VNNI: 6 rows of X by two tiles.
//
// The sums of a unit, the columns that share a scale of X, are int32 and start at minus the unit's
// activation codes times the zero point. They are then scaled and added to float32 sums.

#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/rows.inl"

namespace eoracc {
namespace {

constexpr int64_t kRowBlock = 6;
constexpr int64_t kPanelTiles = 2;
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
  // A unit of a panel is its codes [unit / 4, 64], scales [16] and zero points [16] in words.
  int64_t panel_bytes(int64_t columns) const { return columns * kTile + 128; }
};

// Panels of 512 columns, 10 KiB a tile, stay in the first-level cache while all rows use them.
inline Shape shape_of(const eoracc_matmul& m) {
  const int64_t unit = m.group_size % 32 == 0 ? 32 : m.group_size % 16 == 0 ? 16 : 8;
  return {unit, kUnit, 512, 84 * kRowBlock, 4};
}

inline void pause() { _mm_pause(); }

inline void pack_row(const float* values, int64_t columns, int64_t units, int64_t row,
                     uint8_t* block) {
  for (int64_t unit = 0; unit < units; ++unit, values += columns) {
    uint8_t* out = block + unit * kRowBlock * (columns + 8);
    float* scales = (float*)(out + kRowBlock * columns);
    int8_t codes[kUnit];
    float scale;
    int32_t minus;
    quantize_row(values, columns, columns, codes, &scale, &minus);
    memcpy(out + row * columns, codes, (size_t)columns);
    memcpy(scales + row, &scale, sizeof scale);
    memcpy(scales + kRowBlock + row, &minus, sizeof minus);
  }
}

inline __m512 load_lanes(int32_t type, const void* data, int64_t index) {
  if (type == EORACC_FLOAT32) return _mm512_loadu_ps((const float*)data + index);
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)data + index)));
}

// Quads [begin, end) of a tile; `begin` is the first of a chunk and of a unit.
template <int bits>
void fill_quads(const Tiles& w, int64_t tile, int64_t unit, int64_t begin, int64_t end,
                uint8_t* panel) {
  constexpr int kQuads = chunk_quads(bits);
  constexpr int64_t kChunkBytes = chunk_bytes(bits);
  const uint8_t* tile_codes = w.codes + tile * w.tile_bytes;
  const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
  const int64_t unit_quads = unit / 4;
  for (int64_t first = begin; first < end; first += unit_quads) {
    for (int64_t quad = first; quad < first + unit_quads; ++quad, panel += 64) {
      if (quad >= end) {
        _mm512_storeu_si512(panel, _mm512_setzero_si512());
        continue;
      }
      const uint8_t* codes = tile_codes + quad / kQuads * kChunkBytes;
      const int i = (int)(quad % kQuads);
      __m512i words;
      if constexpr (bits == 3) {
        const __m512i low = _mm512_srl_epi32(_mm512_loadu_si512(codes + i / 4 * 64),
                                             _mm_cvtsi32_si128(2 * (i % 4)));
        const __m512i high = _mm512_slli_epi32(
            _mm512_and_si512(
                _mm512_srl_epi32(_mm512_loadu_si512(codes + 128), _mm_cvtsi32_si128(i)),
                _mm512_set1_epi8(1)),
            2);
        words = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(3)), high);
      } else if constexpr (bits == 6) {
        const __m512i low = _mm512_srl_epi32(_mm512_loadu_si512(codes + i / 2 * 64),
                                             _mm_cvtsi32_si128(4 * (i % 2)));
        const __m512i high = _mm512_slli_epi32(
            _mm512_and_si512(
                _mm512_srl_epi32(_mm512_loadu_si512(codes + 128), _mm_cvtsi32_si128(2 * i)),
                _mm512_set1_epi8(3)),
            4);
        words = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(15)), high);
      } else {
        words = _mm512_and_si512(
            _mm512_srl_epi32(_mm512_loadu_si512(codes), _mm_cvtsi32_si128(bits * i)), mask);
      }
      _mm512_storeu_si512(panel, words);
    }
    const int64_t index = (tile * w.groups + first * 4 / w.group_size) * kTile;
    _mm512_storeu_ps(panel, load_lanes(w.scales_type, w.scales, index));
    __m512i zeros = _mm512_set1_epi32(1 << (bits - 1));
    if (w.zero_points != nullptr) {
      zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w.zero_points + index)));
    }
    _mm512_storeu_si512(panel + 64, zeros);
    panel += 128;
  }
}

// Columns [begin, end) of a float factor: each row of a unit rounded to 8 bits with a scale of its
// own, or, in the second pass, the remainder.
void fill_dense(const DenseTiles& w, int64_t pass, int64_t tile, int64_t unit, int64_t begin,
                int64_t end, uint8_t* panel) {
  for (int64_t first = begin; first < end; first += unit) {
    __m512 values[kUnit], largest = _mm512_setzero_ps();
    for (int64_t i = 0; i < unit; ++i) {
      values[i] = first + i < end
                      ? load_lanes(w.type, w.values, (tile * w.columns + first + i) * kTile)
                      : _mm512_setzero_ps();
      largest = _mm512_max_ps(largest, _mm512_abs_ps(values[i]));
    }
    // A row below 2^-100 counts as 0: its inverse would overflow.
    const __mmask16 tiny = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(0x1p-100f), _CMP_LT_OQ);
    const __m512 inverse =
        _mm512_mask_mov_ps(_mm512_div_ps(_mm512_set1_ps(127), largest), tiny, _mm512_setzero_ps());
    __m512 scale = _mm512_div_ps(largest, _mm512_set1_ps(127));
    for (int64_t i = 0; i < unit; i += 4, panel += 64) {
      __m512i words = _mm512_setzero_si512();
      for (int64_t j = 0; j < 4; ++j) {
        const __m512 quotient = _mm512_mul_ps(values[i + j], inverse);
        __m512 rounded = _mm512_roundscale_ps(quotient, _MM_FROUND_TO_NEAREST_INT);
        if (pass == 1) {
          const __m512 rest = _mm512_fnmadd_ps(rounded, scale, values[i + j]);
          rounded =
              _mm512_roundscale_ps(_mm512_mul_ps(_mm512_mul_ps(rest, inverse), _mm512_set1_ps(254)),
                                   _MM_FROUND_TO_NEAREST_INT);
        }
        const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(rounded), _mm512_set1_epi32(128));
        words =
            _mm512_or_si512(words, _mm512_sll_epi32(_mm512_and_si512(code, _mm512_set1_epi32(255)),
                                                    _mm_cvtsi32_si128((int)(8 * j))));
      }
      _mm512_storeu_si512(panel, words);
    }
    if (pass == 1) scale = _mm512_div_ps(scale, _mm512_set1_ps(254));
    _mm512_storeu_ps(panel, scale);
    _mm512_storeu_si512(panel + 64, _mm512_set1_epi32(128));
    panel += 128;
  }
}

// sum + the products of unsigned codes with signed values, four columns a lane. GCC 12 surrounds
// the intrinsic with register moves in a loop over so many sums, which made the product 6% slower.
inline void add_products(__m512i& sum, __m512i codes, __m512i values) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(values));
}

// sums[row] of both tiles += the row block times the tiles' panels.
template <int rows>
void multiply_block(const uint8_t* x, const uint8_t* panel, int64_t panel_stride, int64_t unit,
                    int64_t units, float* sums, int64_t stride) {
  __m512 total[rows][2];
#pragma GCC unroll 6
  for (int row = 0; row < rows; ++row) {
    total[row][0] = _mm512_loadu_ps(sums + row * kTile);
    total[row][1] = _mm512_loadu_ps(sums + stride + row * kTile);
  }
  for (int64_t u = 0; u < units; ++u) {
    const uint8_t* left = panel + u * (unit * kTile + 128);
    const uint8_t* right = left + panel_stride;
    const uint8_t* block = x + u * kRowBlock * (unit + 8);
    const float* scales = (const float*)(block + kRowBlock * unit);
    const int32_t* minus = (const int32_t*)(scales + kRowBlock);
    __m512i dot[rows][2];
    {
      const __m512i zeros[2] = {_mm512_loadu_si512(left + unit * kTile + 64),
                                _mm512_loadu_si512(right + unit * kTile + 64)};
#pragma GCC unroll 6
      for (int row = 0; row < rows; ++row) {
        // Both fit 16 bits: 32 codes of at most 127, and 255.
        const __m512i sum = _mm512_set1_epi32(minus[row]);
        dot[row][0] = _mm512_madd_epi16(zeros[0], sum);
        dot[row][1] = _mm512_madd_epi16(zeros[1], sum);
      }
    }
    for (int64_t quad = 0; quad < unit / 4; ++quad) {
      const __m512i codes[2] = {_mm512_loadu_si512(left + quad * 64),
                                _mm512_loadu_si512(right + quad * 64)};
#pragma GCC unroll 6
      for (int row = 0; row < rows; ++row) {
        int32_t four;
        memcpy(&four, block + row * unit + 4 * quad, sizeof four);
        const __m512i values = _mm512_set1_epi32(four);
        add_products(dot[row][0], codes[0], values);
        add_products(dot[row][1], codes[1], values);
      }
    }
    const __m512 scale[2] = {_mm512_loadu_ps((const float*)(left + unit * kTile)),
                             _mm512_loadu_ps((const float*)(right + unit * kTile))};
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row) {
      const __m512 x_scale = _mm512_set1_ps(scales[row]);
      for (int i = 0; i < 2; ++i) {
        total[row][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[row][i]),
                                        _mm512_mul_ps(scale[i], x_scale), total[row][i]);
      }
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < rows; ++row) {
    _mm512_storeu_ps(sums + row * kTile, total[row][0]);
    _mm512_storeu_ps(sums + stride + row * kTile, total[row][1]);
  }
}

inline void multiply(const uint8_t* x, const uint8_t* panel, int64_t panel_stride, int64_t unit,
                     int64_t units, int64_t rows, float* sums, int64_t stride) {
  if (rows > kRowBlock / 2) {
    multiply_block<kRowBlock>(x, panel, panel_stride, unit, units, sums, stride);
  } else {
    multiply_block<kRowBlock / 2>(x, panel, panel_stride, unit, units, sums, stride);
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
    memset(panel, 0, (size_t)(units * (unit * kTile + 128)));
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

eoracc_result many_rows_avx512_vnni(const eoracc_matmul& m, const eoracc_threads& threads) {
  return many_rows(m, threads);
}

}  // namespace eoracc
