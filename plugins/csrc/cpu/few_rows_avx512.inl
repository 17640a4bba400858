// Few rows of X with AVX-512: a vector of codes is a quad of all sixteen rows of a tile, so that
// each lane sums one row and nothing is ever added across lanes. Compiled once with VNNI and GFNI
// and once without.
//
// All loops go unit by unit (kUnit columns, eight quads), which is the same at every width once the
// codes are unpacked. Unpacked codes are shared by up to kRowsAtOnce rows of X. Functions that take
// or return vectors are force-inlined, so that the vectors stay in registers.

#include <immintrin.h>

#include "cpu/rows.inl"

namespace eoracc {
namespace {

constexpr int64_t kRowsAtOnce = 8;
// Where a block of int8 activations is shorter than a unit, which only groups that are no multiple
// of 32 make: functions of more rows would be a quarter of the library's code.
constexpr int64_t kShortBlockRowsAtOnce = 4;
constexpr int64_t kDenseRowsAtOnce = 4;
constexpr int64_t kQuads = kUnit / 4;  // of a unit
constexpr int64_t kVector = 64;        // bytes
constexpr int64_t kAhead = 1024;       // bytes of codes that are fetched before they are needed
constexpr int64_t kScalesAhead = 512;  // likewise of scales

// ---- codes

// The eight vectors of a unit with one code in each byte.
struct Quads {
  __m512i codes[kQuads];
};

inline __m512i load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }

// Bits [from, from + count) of each byte.
template <int from, int count>
inline __m512i bits_of(__m512i bytes) {
  const __m512i mask = _mm512_set1_epi8((char)((1 << count) - 1));
  if constexpr (from == 0) return _mm512_and_si512(bytes, mask);
#if defined(__GFNI__)
  // Row i of the matrix, from its top byte down, is the bits that bit i of the result is made of.
  uint64_t matrix = 0;
  for (int bit = 0; bit < count; ++bit) matrix |= uint64_t{1} << (8 * (7 - bit) + from + bit);
  return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64((long long)matrix), 0);
#else
  return _mm512_and_si512(_mm512_srli_epi16(bytes, from), mask);
#endif
}

// Moves bit `low` of each byte to bit 2 and bit `high` to bit 6, and clears the rest.
template <int low, int high>
inline __m512i spread(__m512i bytes) {
#if defined(__GFNI__)
  const uint64_t matrix = uint64_t{1} << (8 * (7 - 2) + low) | uint64_t{1} << (8 * (7 - 6) + high);
  return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64((long long)matrix), 0);
#else
  const __m512i at_two = low < 2 ? _mm512_slli_epi16(bytes, low < 2 ? 2 - low : 0)
                                 : _mm512_srli_epi16(bytes, low < 2 ? 0 : low - 2);
  const __m512i at_six = high < 6 ? _mm512_slli_epi16(bytes, high < 6 ? 6 - high : 0)
                                  : _mm512_srli_epi16(bytes, high < 6 ? 0 : high - 6);
  return _mm512_or_si512(_mm512_and_si512(at_two, _mm512_set1_epi8(1 << 2)),
                         _mm512_and_si512(at_six, _mm512_set1_epi8(1 << 6)));
#endif
}

// Four quads of three bits: `low` holds two bits of each, and bits `first`.. of `high` the third
// ones. Even and odd quads are first put together to four bits each, two in a byte.
template <int first>
[[gnu::always_inline]] inline void unpack_three(__m512i low, __m512i high, __m512i* codes) {
  const __m512i pairs = _mm512_set1_epi8(0x33);
  constexpr int kSelect = 0xca;  // pairs ? the second : the third
  const __m512i even =
      _mm512_ternarylogic_epi32(pairs, low, spread<first, first + 2>(high), kSelect);
  const __m512i odd = _mm512_ternarylogic_epi32(pairs, _mm512_srli_epi16(low, 2),
                                                spread<first + 1, first + 3>(high), kSelect);
  codes[0] = bits_of<0, 4>(even);
  codes[1] = bits_of<0, 4>(odd);
  codes[2] = bits_of<4, 4>(even);
  codes[3] = bits_of<4, 4>(odd);
}

// Four quads of six bits: two vectors of four bits each, and `high` with the other two of all four.
[[gnu::always_inline]] inline void unpack_six(__m512i first, __m512i second, __m512i high,
                                              __m512i* codes) {
  const __m512i top = _mm512_set1_epi8(0x30);
  constexpr int kJoin = 0xea;  // (first & second) | third
  const auto join = [&](__m512i low, __m512i shifted) __attribute__((always_inline)) {
    return _mm512_ternarylogic_epi32(shifted, top, low, kJoin);
  };
  codes[0] = join(bits_of<0, 4>(first), _mm512_slli_epi16(high, 4));
  codes[1] = join(bits_of<4, 4>(first), _mm512_slli_epi16(high, 2));
  codes[2] = join(bits_of<0, 4>(second), high);
  codes[3] = join(bits_of<4, 4>(second), _mm512_srli_epi16(high, 2));
}

template <int bits>
[[gnu::always_inline]] inline Quads unpack(const uint8_t* packed) {
  Quads quads;
  if constexpr (bits == 8) {
    for (int64_t q = 0; q < kQuads; ++q) quads.codes[q] = load(packed + q * kVector);
  } else if constexpr (bits == 4) {
    for (int64_t v = 0; v < 4; ++v) {
      const __m512i bytes = load(packed + v * kVector);
      quads.codes[2 * v] = bits_of<0, 4>(bytes);
      quads.codes[2 * v + 1] = bits_of<4, 4>(bytes);
    }
  } else if constexpr (bits == 2) {
    for (int64_t v = 0; v < 2; ++v) {
      const __m512i bytes = load(packed + v * kVector);
      quads.codes[4 * v] = bits_of<0, 2>(bytes);
      quads.codes[4 * v + 1] = bits_of<2, 2>(bytes);
      quads.codes[4 * v + 2] = bits_of<4, 2>(bytes);
      quads.codes[4 * v + 3] = bits_of<6, 2>(bytes);
    }
  } else if constexpr (bits == 6) {
    for (int64_t c = 0; c < 2; ++c) {
      const uint8_t* chunk = packed + c * 3 * kVector;
      unpack_six(load(chunk), load(chunk + kVector), load(chunk + 2 * kVector),
                 quads.codes + 4 * c);
    }
  } else {
    const __m512i high = load(packed + 2 * kVector);
    unpack_three<0>(load(packed), high, quads.codes);
    unpack_three<4>(load(packed + kVector), high, quads.codes + 4);
  }
  return quads;
}

// A tile's codes, unit by unit. The last unit may end behind any chunk; the rest is code 0.
template <int bits>
class Units {
 public:
  static constexpr int64_t kBytes = kUnit * kTile * bits / 8;

  Units(const Tiles& w, int64_t tile, int64_t first = 0)
      : next_(w.codes + tile * w.tile_bytes + first * kBytes),
        left_(w.tile_bytes - first * kBytes) {}

  [[gnu::always_inline]] Quads next() {
    for (int64_t line = 0; line < kBytes; line += 64) {
      _mm_prefetch((const char*)next_ + kAhead + line, _MM_HINT_T0);
    }
    if (__builtin_expect(left_ < kBytes, 0)) {
      alignas(kVector) uint8_t padded[kBytes];
      for (int64_t at = 0; at < kBytes; at += kVector) {
        _mm512_store_si512(padded + at, at < left_ ? load(next_ + at) : _mm512_setzero_si512());
      }
      return unpack<bits>(padded);
    }
    const Quads quads = unpack<bits>(next_);
    next_ += kBytes;
    left_ -= kBytes;
    return quads;
  }

 private:
  const uint8_t* next_;
  int64_t left_;
};

// ---- scales and zero points

inline __m512 load_lanes(int32_t type, const void* data, int64_t index) {
  if (type == EORACC_FLOAT32) return _mm512_loadu_ps((const char*)data + 4 * index);
  const __m256i halves = _mm256_loadu_si256((const __m256i*)((const char*)data + 2 * index));
  return _mm512_maskz_cvtph_ps(0xffff, halves);
}

// Walks the groups of a tile.
template <int bits>
class Groups {
 public:
  Groups(const Tiles& w, int64_t tile)
      : w_(w), index_(tile * w.groups), end_(index_ + w.groups), left_(w.group_size) {
    read();
  }

  __m512 scales;        // of the group at hand
  __m512i zero_points;  // as 32-bit integers

  // Advances by `columns`, at most to the group's end; true if the group ends there.
  [[gnu::always_inline]] bool step(int64_t columns) {
    left_ -= columns;
    if (left_ > 0) return false;
    left_ = w_.group_size;
    ++index_;
    return true;
  }

  // Reads the scales and zero points of the current group, if there is one.
  [[gnu::always_inline]] void read() {
    if (index_ >= end_) return;
    const int64_t bytes_each = w_.scales_type == EORACC_FLOAT32 ? 64 : 32;
    _mm_prefetch((const char*)w_.scales + index_ * bytes_each + kScalesAhead, _MM_HINT_T0);
    scales = load_lanes(w_.scales_type, w_.scales, index_ * kTile);
    if (w_.zero_points == nullptr) {
      zero_points = _mm512_set1_epi32(1 << (bits - 1));
    } else {
      const __m128i bytes = _mm_loadu_si128((const __m128i*)(w_.zero_points + index_ * kTile));
      zero_points = _mm512_cvtepu8_epi32(bytes);
    }
  }

 private:
  const Tiles& w_;
  int64_t index_, end_, left_;
};

// ---- int8 activations

inline __m512i broadcast_quad(const int8_t* codes) {
  int32_t quad;
  memcpy(&quad, codes, sizeof quad);
  return _mm512_set1_epi32(quad);
}

// sum + the products of four unsigned codes and four signed activations in each lane.
template <int bits>
inline __m512i dot(__m512i sum, __m512i codes, __m512i activations) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, codes, activations);
#else
  // Two products of at most 7 bits by 7 never saturate 16 bits; an eighth bit goes its own way.
  const __m512i ones = _mm512_set1_epi16(1);
  if constexpr (bits == 8) {
    const __m512i top = _mm512_and_si512(_mm512_srli_epi16(codes, 7), _mm512_set1_epi8(1));
    const __m512i tops = _mm512_maddubs_epi16(top, activations);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(tops, _mm512_set1_epi16(128)));
    codes = _mm512_and_si512(codes, _mm512_set1_epi8(127));
  }
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, activations), ones));
#endif
}

template <int bits, int64_t block, int64_t rows>
void int8_rows(const Activations& x, int64_t first, const Tiles& w, int64_t tile, float* sums) {
  constexpr int64_t kBlocks = kUnit / block, kBlockQuads = block / 4;
  const int64_t blocks = ceil_div(x.columns, block), row_blocks = x.stride / block;
  const int8_t* activations = x.codes + first * x.stride;
  const float* x_scales = x.scales + first * row_blocks;
  const int32_t* minus = x.minus + first * row_blocks;
  __m512 totals[rows];
  for (int64_t row = 0; row < rows; ++row) totals[row] = _mm512_loadu_ps(sums + row * kTile);

  Units<bits> units(w, tile);
  Groups<bits> groups(w, tile);
  for (int64_t b = 0; b < blocks; b += kBlocks) {
    const Quads quads = units.next();
    for (int64_t i = 0; i < kBlocks && b + i < blocks; ++i) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * row_blocks + b + i;
        const int8_t* codes = activations + row * x.stride + (b + i) * block;
        __m512i sum = _mm512_madd_epi16(groups.zero_points, _mm512_set1_epi32(minus[at]));
        for (int64_t q = 0; q < kBlockQuads; ++q) {
          sum = dot<bits>(sum, quads.codes[i * kBlockQuads + q], broadcast_quad(codes + 4 * q));
        }
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x_scales[at]));
        totals[row] = _mm512_fmadd_ps(scaled, groups.scales, totals[row]);
      }
      if (groups.step(block)) groups.read();
    }
  }
  for (int64_t row = 0; row < rows; ++row) _mm512_storeu_ps(sums + row * kTile, totals[row]);
}

// One row of X times four tiles, whose sums are as int8_rows makes them.
template <int bits, int64_t block>
void int8_side_by_side(const Activations& x, const Tiles& w, int64_t tile, int64_t stride,
                       float* sums) {
  constexpr int64_t kBlocks = kUnit / block, kBlockQuads = block / 4;
  const int64_t blocks = ceil_div(x.columns, block);
  static_assert(kTilesAtOnce == 4, "as many streams as are set up here");
  const int64_t second = tile + stride, third = second + stride, fourth = third + stride;
  Units<bits> units[] = {{w, tile}, {w, second}, {w, third}, {w, fourth}};
  Groups<bits> groups[] = {{w, tile}, {w, second}, {w, third}, {w, fourth}};
  __m512 totals[kTilesAtOnce];
  for (int64_t t = 0; t < kTilesAtOnce; ++t) totals[t] = _mm512_loadu_ps(sums + t * kTile);
  for (int64_t b = 0; b < blocks; b += kBlocks) {
#pragma GCC unroll 4
    for (int64_t t = 0; t < kTilesAtOnce; ++t) {
      const Quads quads = units[t].next();
      for (int64_t i = 0; i < kBlocks && b + i < blocks; ++i) {
        const int8_t* codes = x.codes + (b + i) * block;
        __m512i sum = _mm512_madd_epi16(groups[t].zero_points, _mm512_set1_epi32(x.minus[b + i]));
        for (int64_t q = 0; q < kBlockQuads; ++q) {
          sum = dot<bits>(sum, quads.codes[i * kBlockQuads + q], broadcast_quad(codes + 4 * q));
        }
        const __m512 scaled =
            _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x.scales[b + i]));
        totals[t] = _mm512_fmadd_ps(scaled, groups[t].scales, totals[t]);
        if (groups[t].step(block)) groups[t].read();
      }
    }
  }
  for (int64_t t = 0; t < kTilesAtOnce; ++t) _mm512_storeu_ps(sums + t * kTile, totals[t]);
}

// One row of X times one tile of a factor: four runs of units are summed side by side, then the
// remaining units.
template <int bits, int64_t block>
void int8_factor_rows(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  constexpr int64_t kStreams = 4, kBlocks = kUnit / block, kBlockQuads = block / 4;
  const int64_t blocks = ceil_div(x.columns, block);
  const int64_t all_units = ceil_div(x.columns, kUnit), run = all_units / kStreams;
  const __m512i zero_point = _mm512_set1_epi32(1 << (bits - 1));
  __m512 totals[kStreams];
  for (int64_t t = 0; t < kStreams; ++t) totals[t] = _mm512_setzero_ps();
  const auto add_unit = [&](Units<bits>& units, int64_t unit,
                            __m512& total) __attribute__((always_inline)) {
    const Quads quads = units.next();
    for (int64_t i = 0; i < kBlocks && unit * kBlocks + i < blocks; ++i) {
      const int64_t b = unit * kBlocks + i;
      const int8_t* codes = x.codes + b * block;
      __m512i sum = _mm512_madd_epi16(zero_point, _mm512_set1_epi32(x.minus[b]));
      for (int64_t q = 0; q < kBlockQuads; ++q) {
        sum = dot<bits>(sum, quads.codes[i * kBlockQuads + q], broadcast_quad(codes + 4 * q));
      }
      total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x.scales[b]), total);
    }
  };
  static_assert(kStreams == 4, "as many streams as are set up here");
  Units<bits> streams[] = {{w, tile}, {w, tile, run}, {w, tile, 2 * run}, {w, tile, 3 * run}};
  for (int64_t unit = 0; unit < run; ++unit) {
#pragma GCC unroll 4
    for (int64_t t = 0; t < kStreams; ++t) add_unit(streams[t], t * run + unit, totals[t]);
  }
  for (int64_t unit = kStreams * run; unit < all_units; ++unit) {
    add_unit(streams[kStreams - 1], unit, totals[unit - kStreams * run]);
  }
  const __m512 sum =
      _mm512_add_ps(_mm512_add_ps(totals[0], totals[1]), _mm512_add_ps(totals[2], totals[3]));
  const __m512 scales = load_lanes(w.scales_type, w.scales, tile * kTile);
  _mm512_storeu_ps(sums, _mm512_fmadd_ps(sum, scales, _mm512_loadu_ps(sums)));
}

// ---- float activations

// The values of column `i` of each quad, minus the zero point. Codes of up to four bits index a
// table of floats, for which the bits above them need not be cleared.
template <int bits>
inline __m512 column(__m512i codes, int i, __m512 zero_points) {
  const __m512i shifted = _mm512_srli_epi32(codes, (unsigned)(8 * i));
  if constexpr (bits > 4) {
    const __m512i code = _mm512_and_si512(shifted, _mm512_set1_epi32(255));
    return _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero_points);
  }
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_sub_ps(_mm512_permutexvar_ps(shifted, table), zero_points);
}

template <int bits, int64_t rows>
void float_rows(const Activations& x, int64_t first, const Tiles& w, int64_t tile, float* sums) {
  constexpr int64_t kStep = 8;                   // every group is a multiple of it
  constexpr int64_t kChains = rows > 2 ? 1 : 4;  // sums of a row, to hide the latency of one
  const float* values = x.values + first * x.stride;
  __m512 totals[rows], partial[rows][kChains];
  for (int64_t row = 0; row < rows; ++row) {
    totals[row] = _mm512_loadu_ps(sums + row * kTile);
    for (int64_t c = 0; c < kChains; ++c) partial[row][c] = _mm512_setzero_ps();
  }
  const auto finish_group = [&](__m512 scales) {
    for (int64_t row = 0; row < rows; ++row) {
      __m512 sum = partial[row][0];
      if constexpr (kChains == 4) {
        sum = _mm512_add_ps(_mm512_add_ps(sum, partial[row][1]),
                            _mm512_add_ps(partial[row][2], partial[row][3]));
      }
      totals[row] = _mm512_fmadd_ps(sum, scales, totals[row]);
      for (int64_t c = 0; c < kChains; ++c) partial[row][c] = _mm512_setzero_ps();
    }
  };

  Units<bits> units(w, tile);
  Groups<bits> groups(w, tile);
  __m512 zero_points = _mm512_cvtepi32_ps(groups.zero_points);
  bool open = false;  // whether a group has begun
  for (int64_t k = 0; k < x.columns; k += kUnit) {
    const Quads quads = units.next();
#pragma GCC unroll 4
    for (int64_t s = 0; s < kUnit / kStep; ++s) {
      if (k + s * kStep >= x.columns) break;
      for (int64_t i = 0; i < kStep; ++i) {
        const __m512 steps = column<bits>(quads.codes[2 * s + i / 4], (int)(i % 4), zero_points);
        for (int64_t row = 0; row < rows; ++row) {
          const __m512 value = _mm512_set1_ps(values[row * x.stride + k + s * kStep + i]);
          partial[row][i % kChains] = _mm512_fmadd_ps(steps, value, partial[row][i % kChains]);
        }
      }
      open = true;
      const __m512 scales = groups.scales;
      if (!groups.step(kStep)) continue;
      finish_group(scales);
      groups.read();
      zero_points = _mm512_cvtepi32_ps(groups.zero_points);
      open = false;
    }
  }
  if (open) finish_group(groups.scales);
  for (int64_t row = 0; row < rows; ++row) _mm512_storeu_ps(sums + row * kTile, totals[row]);
}

// As many chains for any number of rows: a row's sums do not depend on what else is in the batch.
template <int64_t rows>
void dense_rows(const Activations& x, int64_t first, const DenseTiles& w, int64_t tile,
                float* sums) {
  constexpr int64_t kChains = 4;
  const float* values = x.values + first * x.stride;
  __m512 partial[rows][kChains];
  for (int64_t row = 0; row < rows; ++row) {
    partial[row][0] = _mm512_loadu_ps(sums + row * kTile);
    for (int64_t c = 1; c < kChains; ++c) partial[row][c] = _mm512_setzero_ps();
  }
  const int64_t line = tile * w.columns;
  int64_t k = 0;
  for (; k + kChains <= w.columns; k += kChains) {
    for (int64_t c = 0; c < kChains; ++c) {
      const __m512 lanes = load_lanes(w.type, w.values, (line + k + c) * kTile);
      for (int64_t row = 0; row < rows; ++row) {
        const __m512 value = _mm512_set1_ps(values[row * x.stride + k + c]);
        partial[row][c] = _mm512_fmadd_ps(lanes, value, partial[row][c]);
      }
    }
  }
  for (; k < w.columns; ++k) {
    const __m512 lanes = load_lanes(w.type, w.values, (line + k) * kTile);
    for (int64_t row = 0; row < rows; ++row) {
      const __m512 value = _mm512_set1_ps(values[row * x.stride + k]);
      partial[row][0] = _mm512_fmadd_ps(lanes, value, partial[row][0]);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 1; c < kChains; ++c) {
      partial[row][0] = _mm512_add_ps(partial[row][0], partial[row][c]);
    }
    _mm512_storeu_ps(sums + row * kTile, partial[row][0]);
  }
}

// ---- by width and number of rows

typedef void (*TileRows)(const Activations&, int64_t first, const Tiles&, int64_t tile, float*);
typedef void (*DenseRows)(const Activations&, int64_t first, const DenseTiles&, int64_t tile,
                          float*);

template <int bits>
constexpr TileRows kInt8Rows[kRowsAtOnce] = {int8_rows<bits, kUnit, 1>, int8_rows<bits, kUnit, 2>,
                                             int8_rows<bits, kUnit, 3>, int8_rows<bits, kUnit, 4>,
                                             int8_rows<bits, kUnit, 5>, int8_rows<bits, kUnit, 6>,
                                             int8_rows<bits, kUnit, 7>, int8_rows<bits, kUnit, 8>};

template <int bits, int64_t block>
constexpr TileRows kShortBlockRows[kShortBlockRowsAtOnce] = {
    int8_rows<bits, block, 1>, int8_rows<bits, block, 2>, int8_rows<bits, block, 3>,
    int8_rows<bits, block, 4>};

template <int bits>
constexpr TileRows kFloatRows[kRowsAtOnce] = {
    float_rows<bits, 1>, float_rows<bits, 2>, float_rows<bits, 3>, float_rows<bits, 4>,
    float_rows<bits, 5>, float_rows<bits, 6>, float_rows<bits, 7>, float_rows<bits, 8>};

constexpr DenseRows kDenseRows[kDenseRowsAtOnce] = {dense_rows<1>, dense_rows<2>, dense_rows<3>,
                                                    dense_rows<4>};

template <int bits>
const TileRows* int8_rows_of(int64_t block) {
  return block == kUnit ? kInt8Rows<bits>
         : block == 16  ? kShortBlockRows<bits, 16>
                        : kShortBlockRows<bits, 8>;
}

void int8_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  const TileRows* by_rows = w.bits == 2   ? int8_rows_of<2>(x.block)
                            : w.bits == 3 ? int8_rows_of<3>(x.block)
                            : w.bits == 4 ? int8_rows_of<4>(x.block)
                            : w.bits == 6 ? int8_rows_of<6>(x.block)
                                          : int8_rows_of<8>(x.block);
  const int64_t at_once = x.block == kUnit ? kRowsAtOnce : kShortBlockRowsAtOnce;
  for (int64_t row = 0; row < x.rows; row += at_once) {
    by_rows[smaller(at_once, x.rows - row) - 1](x, row, w, tile, sums + row * kTile);
  }
}

typedef void (*TilesOfRow)(const Activations&, const Tiles&, int64_t tile, int64_t stride, float*);

template <int bits>
TilesOfRow int8_side_by_side_of(int64_t block) {
  return block == 32   ? int8_side_by_side<bits, 32>
         : block == 16 ? int8_side_by_side<bits, 16>
                       : int8_side_by_side<bits, 8>;
}

void int8_tiles(const Activations& x, const Tiles& w, int64_t tile, int64_t stride, float* sums) {
  const TilesOfRow multiply = w.bits == 2   ? int8_side_by_side_of<2>(x.block)
                              : w.bits == 3 ? int8_side_by_side_of<3>(x.block)
                              : w.bits == 4 ? int8_side_by_side_of<4>(x.block)
                              : w.bits == 6 ? int8_side_by_side_of<6>(x.block)
                                            : int8_side_by_side_of<8>(x.block);
  multiply(x, w, tile, stride, sums);
}

typedef void (*FactorOfRow)(const Activations&, const Tiles&, int64_t tile, float*);

template <int bits>
FactorOfRow int8_factor_rows_of(int64_t block) {
  return block == 32   ? int8_factor_rows<bits, 32>
         : block == 16 ? int8_factor_rows<bits, 16>
                       : int8_factor_rows<bits, 8>;
}

void int8_factor_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  (w.bits == 4 ? int8_factor_rows_of<4>(x.block) : int8_factor_rows_of<8>(x.block))(x, w, tile,
                                                                                    sums);
}

void float_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  const TileRows* by_rows = w.bits == 2   ? kFloatRows<2>
                            : w.bits == 3 ? kFloatRows<3>
                            : w.bits == 4 ? kFloatRows<4>
                            : w.bits == 6 ? kFloatRows<6>
                                          : kFloatRows<8>;
  for (int64_t row = 0; row < x.rows; row += kRowsAtOnce) {
    by_rows[smaller(kRowsAtOnce, x.rows - row) - 1](x, row, w, tile, sums + row * kTile);
  }
}

void dense_tile(const Activations& x, const DenseTiles& w, int64_t tile, float* sums) {
  for (int64_t row = 0; row < x.rows; row += kDenseRowsAtOnce) {
    kDenseRows[smaller(kDenseRowsAtOnce, x.rows - row) - 1](x, row, w, tile, sums + row * kTile);
  }
}

}  // namespace
}  // namespace eoracc
