// Few rows of X in plain C++: runs on every processor of the architecture, and is the simplest
// description of what the other kernels compute.

#include "cpu/rows.inl"

namespace eoracc {
namespace {

constexpr int64_t kQuads = kUnit / 4;  // of a unit
constexpr int64_t kVector = 64;        // bytes of a quad's codes

// The codes of a unit, one byte each: byte 4 * row + i of quad q is column 4 * q + i of the row.
void unpack(const uint8_t* packed, int32_t bits, uint8_t codes[kQuads][kVector]) {
  for (int64_t q = 0; q < kQuads; ++q) {
    for (int64_t i = 0; i < kVector; ++i) {
      switch (bits) {
        case 8:
          codes[q][i] = packed[q * kVector + i];
          break;
        case 4:
          codes[q][i] = packed[q / 2 * kVector + i] >> 4 * (q % 2) & 15;
          break;
        case 2:
          codes[q][i] = packed[q / 4 * kVector + i] >> 2 * (q % 4) & 3;
          break;
        case 6: {
          const uint8_t* chunk = packed + q / 4 * 3 * kVector;
          codes[q][i] = (uint8_t)((chunk[q % 4 / 2 * kVector + i] >> 4 * (q % 2) & 15) |
                                  (chunk[2 * kVector + i] >> 2 * (q % 4) & 3) << 4);
          break;
        }
        default:
          codes[q][i] = (uint8_t)((packed[q / 4 * kVector + i] >> 2 * (q % 4) & 3) |
                                  (packed[2 * kVector + i] >> q & 1) << 2);
      }
    }
  }
}

// Unit u of a tile. The last unit may end after any chunk; the rest counts as code 0.
void unpack_unit(const Tiles& w, int64_t tile, int64_t u, uint8_t codes[kQuads][kVector]) {
  const int64_t unit_bytes = kUnit * kTile * w.bits / 8;
  const uint8_t* packed = w.codes + tile * w.tile_bytes + u * unit_bytes;
  const int64_t left = w.tile_bytes - u * unit_bytes;
  uint8_t padded[kQuads * kVector] = {};
  if (left < unit_bytes) {
    memcpy(padded, packed, (size_t)left);
    packed = padded;
  }
  unpack(packed, w.bits, codes);
}

// Scales and zero points of one group of a tile.
struct Group {
  float scales[kTile];
  int32_t zero_points[kTile];
};

Group read_group(const Tiles& w, int64_t tile, int64_t group) {
  Group values;
  const int64_t index = (tile * w.groups + group) * kTile;
  read_elements(w.scales_type, w.scales, index, kTile, values.scales);
  for (int64_t r = 0; r < kTile; ++r) {
    values.zero_points[r] = w.zero_points != nullptr ? w.zero_points[index + r] : 1 << (w.bits - 1);
  }
  return values;
}

void int8_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  const int64_t blocks = ceil_div(x.columns, x.block), blocks_per_unit = kUnit / x.block;
  uint8_t codes[kQuads][kVector];
  for (int64_t b = 0; b < blocks; ++b) {
    if (b % blocks_per_unit == 0) unpack_unit(w, tile, b / blocks_per_unit, codes);
    const Group group = read_group(w, tile, b * x.block / w.group_size);
    const int64_t first_quad = b % blocks_per_unit * x.block / 4;
    for (int64_t row = 0; row < x.rows; ++row) {
      const int8_t* activations = x.codes + row * x.stride + b * x.block;
      const int64_t at = row * (x.stride / x.block) + b;
      for (int64_t r = 0; r < kTile; ++r) {
        int32_t dot = group.zero_points[r] * x.minus[at];
        for (int64_t i = 0; i < x.block; ++i) {
          dot += codes[first_quad + i / 4][4 * r + i % 4] * activations[i];
        }
        sums[row * kTile + r] += (float)dot * x.scales[at] * group.scales[r];
      }
    }
  }
}

void float_tile(const Activations& x, const Tiles& w, int64_t tile, float* sums) {
  uint8_t codes[kQuads][kVector];
  for (int64_t g = 0; g < w.groups; ++g) {
    const Group group = read_group(w, tile, g);
    float partial[kFewRows][kTile] = {};
    const int64_t end = smaller((g + 1) * w.group_size, w.columns);
    for (int64_t k = g * w.group_size; k < end; ++k) {
      if (k % kUnit == 0) unpack_unit(w, tile, k / kUnit, codes);
      for (int64_t r = 0; r < kTile; ++r) {
        const uint8_t code = codes[k % kUnit / 4][4 * r + k % 4];
        const float step = (float)(code - group.zero_points[r]);
        for (int64_t row = 0; row < x.rows; ++row) {
          partial[row][r] += x.values[row * x.stride + k] * step;
        }
      }
    }
    for (int64_t row = 0; row < x.rows; ++row) {
      for (int64_t r = 0; r < kTile; ++r)
        sums[row * kTile + r] += partial[row][r] * group.scales[r];
    }
  }
}

void dense_tile(const Activations& x, const DenseTiles& w, int64_t tile, float* sums) {
  for (int64_t k = 0; k < w.columns; ++k) {
    float values[kTile];
    read_elements(w.type, w.values, (tile * w.columns + k) * kTile, kTile, values);
    for (int64_t row = 0; row < x.rows; ++row) {
      const float activation = x.values[row * x.stride + k];
      for (int64_t r = 0; r < kTile; ++r) sums[row * kTile + r] += activation * values[r];
    }
  }
}

}  // namespace

const FewRows few_rows_scalar = {read_row,   normalize_row, quantize_row, int8_tile, float_tile,
                                 dense_tile, finish_tile,   nullptr,      nullptr};

}  // namespace eoracc
