// Few rows of X with AVX2, FMA and F16C: as with AVX-512, a lane sums one row of a tile, but a
// vector holds only half of the tile's rows. Both halves of a unit are multiplied before the next
// one is read.

#include <immintrin.h>

#include "cpu/rows.inl"

namespace eoracc {
namespace {

constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kQuads = kUnit / 4;  // of a unit
constexpr int64_t kVector = 64;        // bytes of a quad's codes
constexpr int64_t kHalf = 8;           // rows of a tile in a vector register
constexpr int64_t kAhead = 1024;       // bytes of codes that are fetched before they are needed

// ---- codes

// The eight vectors of half a unit with one code in each byte.
struct Quads {
  __m256i codes[kQuads];
};

inline __m256i load(const uint8_t* bytes) { return _mm256_loadu_si256((const __m256i*)bytes); }

// Bits [from, from + count) of each byte.
template <int from, int count>
inline __m256i bits_of(__m256i bytes) {
  return _mm256_and_si256(_mm256_srli_epi16(bytes, from),
                          _mm256_set1_epi8((char)((1 << count) - 1)));
}

// Moves bit `from` of each byte to bit `to`, and clears the rest.
template <int from, int to>
inline __m256i move_bit(__m256i bytes) {
  const __m256i moved = from < to ? _mm256_slli_epi16(bytes, from < to ? to - from : 0)
                                  : _mm256_srli_epi16(bytes, from < to ? 0 : from - to);
  return _mm256_and_si256(moved, _mm256_set1_epi8((char)(1 << to)));
}

// Four quads of three bits: `low` holds two bits of each, and bits `first`.. of `high` the third
// ones. Even and odd quads are first put together to four bits each, two in a byte.
template <int first>
[[gnu::always_inline]] inline void unpack_three(__m256i low, __m256i high, __m256i* codes) {
  const __m256i pairs = _mm256_set1_epi8(0x33);
  const __m256i even_thirds =
      _mm256_or_si256(move_bit<first, 2>(high), move_bit<first + 2, 6>(high));
  const __m256i odd_thirds =
      _mm256_or_si256(move_bit<first + 1, 2>(high), move_bit<first + 3, 6>(high));
  const __m256i even = _mm256_or_si256(_mm256_and_si256(low, pairs), even_thirds);
  const __m256i odd =
      _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 2), pairs), odd_thirds);
  codes[0] = bits_of<0, 4>(even);
  codes[1] = bits_of<0, 4>(odd);
  codes[2] = bits_of<4, 4>(even);
  codes[3] = bits_of<4, 4>(odd);
}

// Four quads of six bits: two vectors of four bits each, and `high` with the other two of all four.
[[gnu::always_inline]] inline void unpack_six(__m256i first, __m256i second, __m256i high,
                                              __m256i* codes) {
  const __m256i top = _mm256_set1_epi8(0x30);
  const auto join = [&](__m256i low, __m256i shifted) {
    return _mm256_or_si256(low, _mm256_and_si256(shifted, top));
  };
  codes[0] = join(bits_of<0, 4>(first), _mm256_slli_epi16(high, 4));
  codes[1] = join(bits_of<4, 4>(first), _mm256_slli_epi16(high, 2));
  codes[2] = join(bits_of<0, 4>(second), high);
  codes[3] = join(bits_of<4, 4>(second), _mm256_srli_epi16(high, 2));
}

// Half a unit; `packed` points at that half of its first vector.
template <int bits>
[[gnu::always_inline]] inline Quads unpack(const uint8_t* packed) {
  Quads quads;
  if constexpr (bits == 8) {
    for (int64_t q = 0; q < kQuads; ++q) quads.codes[q] = load(packed + q * kVector);
  } else if constexpr (bits == 4) {
    for (int64_t v = 0; v < 4; ++v) {
      const __m256i bytes = load(packed + v * kVector);
      quads.codes[2 * v] = bits_of<0, 4>(bytes);
      quads.codes[2 * v + 1] = bits_of<4, 4>(bytes);
    }
  } else if constexpr (bits == 2) {
    for (int64_t v = 0; v < 2; ++v) {
      const __m256i bytes = load(packed + v * kVector);
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
    const __m256i high = load(packed + 2 * kVector);
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

  Units(const Tiles& w, int64_t tile) : next_(w.codes + tile * w.tile_bytes), left_(w.tile_bytes) {}

  [[gnu::always_inline]] const uint8_t* next() {
    for (int64_t line = 0; line < kBytes; line += 64) {
      _mm_prefetch((const char*)next_ + kAhead + line, _MM_HINT_T0);
    }
    if (__builtin_expect(left_ < kBytes, 0)) {
      memset(padded_, 0, kBytes);
      memcpy(padded_, next_, (size_t)left_);
      return padded_;
    }
    const uint8_t* unit = next_;
    next_ += kBytes;
    left_ -= kBytes;
    return unit;
  }

 private:
  const uint8_t* next_;
  int64_t left_;
  alignas(kVector) uint8_t padded_[kBytes];
};

// ---- scales and zero points

inline __m256 load_lanes(int32_t type, const void* data, int64_t index) {
  if (type == EORACC_FLOAT32) return _mm256_loadu_ps((const float*)((const char*)data + 4 * index));
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const char*)data + 2 * index)));
}

// Walks the groups of a tile.
template <int bits>
class Groups {
 public:
  Groups(const Tiles& w, int64_t tile)
      : w_(w), index_(tile * w.groups), end_(index_ + w.groups), left_(w.group_size) {
    read();
  }

  __m256 scales[2];        // of the group at hand, for either half of the tile
  __m256i zero_points[2];  // as 32-bit integers

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
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = index_ * kTile + half * kHalf;
      scales[half] = load_lanes(w_.scales_type, w_.scales, at);
      if (w_.zero_points == nullptr) {
        zero_points[half] = _mm256_set1_epi32(1 << (bits - 1));
      } else {
        const __m128i bytes = _mm_loadl_epi64((const __m128i*)(w_.zero_points + at));
        zero_points[half] = _mm256_cvtepu8_epi32(bytes);
      }
    }
  }

 private:
  const Tiles& w_;
  int64_t index_, end_, left_;
};

// ---- int8 activations

inline __m256i broadcast_quad(const int8_t* codes) {
  int32_t quad;
  memcpy(&quad, codes, sizeof quad);
  return _mm256_set1_epi32(quad);
}

// The products of `count` quads, summed in each lane. Two products of up to 4 bits by 7 are below
// 2^12, so that eight quads fit 16 bits. Two of 6 bits by 7 are at most 2 * 63 * 127, so that two
// quads fit. Codes of 8 bits have been made signed: their magnitudes multiply with activations that
// take their signs, and two such products just fit.
template <int bits, int64_t count>
inline __m256i dot(const __m256i* codes, const int8_t* activations) {
  static_assert(count <= 8 && count % 2 == 0, "16 bits hold eight quads, and those of 6 bits pair");
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256(), pair = sum;
  for (int64_t q = 0; q < count; ++q) {
    const __m256i quad = broadcast_quad(activations + 4 * q);
    if constexpr (bits == 8) {
      const __m256i value = _mm256_xor_si256(codes[q], _mm256_set1_epi8((char)0x80));
      const __m256i products =
          _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(quad, value));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, ones));
    } else if constexpr (bits == 6) {
      const __m256i products = _mm256_maddubs_epi16(codes[q], quad);
      pair = q % 2 ? _mm256_add_epi16(pair, products) : products;
      if (q % 2) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pair, ones));
    } else {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes[q], quad));
    }
  }
  return bits > 4 ? sum : _mm256_madd_epi16(sum, ones);
}

template <int bits, int64_t block, int64_t rows>
void int8_rows(const Activations& x, int64_t first, const Tiles& w, int64_t tile, float* sums) {
  constexpr int64_t kBlocks = kUnit / block, kBlockQuads = block / 4;
  const int64_t blocks = ceil_div(x.columns, block), row_blocks = x.stride / block;
  const int8_t* activations = x.codes + first * x.stride;
  const float* x_scales = x.scales + first * row_blocks;
  const int32_t* minus = x.minus + first * row_blocks;
  // 128 is subtracted from 8-bit codes before the product.
  const __m256i offset = _mm256_set1_epi32(bits == 8 ? 128 : 0);
  __m256 totals[rows][2];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      totals[row][half] = _mm256_loadu_ps(sums + row * kTile + half * kHalf);
    }
  }

  Units<bits> units(w, tile);
  Groups<bits> groups(w, tile);
  const auto add_block = [&](const __m256i* codes, int64_t b,
                             int64_t half) __attribute__((always_inline)) {
    const __m256i zero_points = _mm256_sub_epi32(groups.zero_points[half], offset);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * row_blocks + b;
      const __m256i correction = _mm256_madd_epi16(zero_points, _mm256_set1_epi32(minus[at]));
      const __m256i product =
          dot<bits, kBlockQuads>(codes, activations + row * x.stride + b * block);
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(product, correction));
      const __m256 scaled = _mm256_mul_ps(sum, _mm256_set1_ps(x_scales[at]));
      totals[row][half] = _mm256_fmadd_ps(scaled, groups.scales[half], totals[row][half]);
    }
  };
  for (int64_t b = 0; b < blocks; b += kBlocks) {
    const uint8_t* unit = units.next();
    if constexpr (kBlocks == 1) {  // half by half: the codes of both do not fit the registers
      for (int64_t half = 0; half < 2; ++half) {
        add_block(unpack<bits>(unit + half * kVector / 2).codes, b, half);
      }
      if (groups.step(block)) groups.read();
    } else {
      const Quads quads[2] = {unpack<bits>(unit), unpack<bits>(unit + kVector / 2)};
      for (int64_t i = 0; i < kBlocks && b + i < blocks; ++i) {
        for (int64_t half = 0; half < 2; ++half) {
          add_block(quads[half].codes + i * kBlockQuads, b + i, half);
        }
        if (groups.step(block)) groups.read();
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      _mm256_storeu_ps(sums + row * kTile + half * kHalf, totals[row][half]);
    }
  }
}

// ---- float activations

// The values of column `i` of each quad, minus the zero point.
inline __m256 column(__m256i codes, int i, __m256 zero_points) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes, 8 * i), _mm256_set1_epi32(255));
  return _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero_points);
}

template <int bits, int64_t rows>
void float_rows(const Activations& x, int64_t first, const Tiles& w, int64_t tile, float* sums) {
  constexpr int64_t kStep = 8;  // every group is a multiple of it
  const float* values = x.values + first * x.stride;
  __m256 totals[rows][2], partial[rows][2];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      totals[row][half] = _mm256_loadu_ps(sums + row * kTile + half * kHalf);
      partial[row][half] = _mm256_setzero_ps();
    }
  }
  const auto finish_group = [&](const __m256* scales) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t half = 0; half < 2; ++half) {
        totals[row][half] = _mm256_fmadd_ps(partial[row][half], scales[half], totals[row][half]);
        partial[row][half] = _mm256_setzero_ps();
      }
    }
  };

  Units<bits> units(w, tile);
  Groups<bits> groups(w, tile);
  bool open = false;  // whether a group has begun
  for (int64_t k = 0; k < x.columns; k += kUnit) {
    const uint8_t* unit = units.next();
    const Quads quads[2] = {unpack<bits>(unit), unpack<bits>(unit + kVector / 2)};
    for (int64_t s = 0; s < kUnit / kStep && k + s * kStep < x.columns; ++s) {
      for (int64_t half = 0; half < 2; ++half) {
        const __m256 zero_points = _mm256_cvtepi32_ps(groups.zero_points[half]);
        for (int64_t i = 0; i < kStep; ++i) {
          const __m256 steps = column(quads[half].codes[2 * s + i / 4], (int)(i % 4), zero_points);
          for (int64_t row = 0; row < rows; ++row) {
            const __m256 value = _mm256_set1_ps(values[row * x.stride + k + s * kStep + i]);
            partial[row][half] = _mm256_fmadd_ps(steps, value, partial[row][half]);
          }
        }
      }
      open = true;
      const __m256 scales[2] = {groups.scales[0], groups.scales[1]};
      if (!groups.step(kStep)) continue;
      finish_group(scales);
      groups.read();
      open = false;
    }
  }
  if (open) finish_group(groups.scales);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      _mm256_storeu_ps(sums + row * kTile + half * kHalf, totals[row][half]);
    }
  }
}

template <int64_t rows>
void dense_rows(const Activations& x, int64_t first, const DenseTiles& w, int64_t tile,
                float* sums) {
  const float* values = x.values + first * x.stride;
  __m256 totals[rows][2];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      totals[row][half] = _mm256_loadu_ps(sums + row * kTile + half * kHalf);
    }
  }
  for (int64_t k = 0; k < w.columns; ++k) {
    for (int64_t half = 0; half < 2; ++half) {
      const __m256 lanes =
          load_lanes(w.type, w.values, (tile * w.columns + k) * kTile + half * kHalf);
      for (int64_t row = 0; row < rows; ++row) {
        const __m256 value = _mm256_set1_ps(values[row * x.stride + k]);
        totals[row][half] = _mm256_fmadd_ps(lanes, value, totals[row][half]);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      _mm256_storeu_ps(sums + row * kTile + half * kHalf, totals[row][half]);
    }
  }
}

// ---- by width and number of rows

typedef void (*TileRows)(const Activations&, int64_t first, const Tiles&, int64_t tile, float*);
typedef void (*DenseRows)(const Activations&, int64_t first, const DenseTiles&, int64_t tile,
                          float*);

template <int bits, int64_t block>
constexpr TileRows kInt8Rows[kRowsAtOnce] = {int8_rows<bits, block, 1>, int8_rows<bits, block, 2>,
                                             int8_rows<bits, block, 3>, int8_rows<bits, block, 4>};

template <int bits>
constexpr TileRows kFloatRows[kRowsAtOnce] = {float_rows<bits, 1>, float_rows<bits, 2>,
                                              float_rows<bits, 3>, float_rows<bits, 4>};

constexpr DenseRows kDenseRows[kRowsAtOnce] = {dense_rows<1>, dense_rows<2>, dense_rows<3>,
                                               dense_rows<4>};

template <int bits>
const TileRows* int8_rows_of(int64_t block) {
  return block == 32 ? kInt8Rows<bits, 32> : block == 16 ? kInt8Rows<bits, 16> : kInt8Rows<bits, 8>;
}

void int8_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  const TileRows* by_rows = w.bits == 2   ? int8_rows_of<2>(x.block)
                            : w.bits == 3 ? int8_rows_of<3>(x.block)
                            : w.bits == 4 ? int8_rows_of<4>(x.block)
                            : w.bits == 6 ? int8_rows_of<6>(x.block)
                                          : int8_rows_of<8>(x.block);
  for (int64_t row = 0; row < x.rows; row += kRowsAtOnce) {
    by_rows[smaller(kRowsAtOnce, x.rows - row) - 1](x, row, w, tile, sums + row * kTile);
  }
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
  for (int64_t row = 0; row < x.rows; row += kRowsAtOnce) {
    kDenseRows[smaller(kRowsAtOnce, x.rows - row) - 1](x, row, w, tile, sums + row * kTile);
  }
}

}  // namespace

const FewRows few_rows_avx2 = {read_row,   normalize_row, quantize_row, int8_tile, float_tile,
                               dense_tile, finish_tile,   nullptr,      nullptr};

}  // namespace eoracc
