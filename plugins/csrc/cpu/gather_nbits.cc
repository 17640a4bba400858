// Plain C++ for every processor: a row is a few hundred codes, and few rows are read in a step.

#include "cpu/gather_nbits.h"

#include "cpu/chunk.h"
#include "cpu/layout.h"
#include "cpu/numbers.inl"

namespace eoracc {
namespace {

constexpr int64_t kTile = EORACC_TILE;
constexpr int64_t kRun = 8;  // codes that are read at once, all of one group

// Eight codes of a bit stream, which fill `bits` bytes.
void read_plain(const uint8_t* stream, int32_t bits, uint8_t codes[kRun]) {
  uint64_t word = 0;
  for (int32_t i = 0; i < bits; ++i) word |= (uint64_t)stream[i] << 8 * i;
  const uint64_t mask = (1u << bits) - 1;
  for (int64_t i = 0; i < kRun; ++i) codes[i] = (uint8_t)(word >> (int64_t)bits * i & mask);
}

// Bits [shift, shift + count) of each of four bytes.
uint32_t fields_of(const uint8_t* bytes, int shift, int count) {
  uint32_t word;
  memcpy(&word, bytes, sizeof word);
  return word >> shift & 0x01010101u * ((1u << count) - 1);
}

// Four codes of a row of a tile: `row` points at the row's bytes of the tile's first vector.
void read_quad(const uint8_t* row, int64_t quad, int32_t bits, uint8_t* codes) {
  constexpr int64_t kVector = 64;
  const uint8_t* chunk = row + quad / chunk_quads(bits) * chunk_bytes(bits);
  const int q = (int)(quad % chunk_quads(bits));
  uint32_t word;
  if (bits == 3) {
    word = fields_of(chunk + q / 4 * kVector, 2 * (q % 4), 2);
    word |= fields_of(chunk + 2 * kVector, q, 1) << 2;
  } else if (bits == 6) {
    word = fields_of(chunk + q / 2 * kVector, 4 * (q % 2), 4);
    word |= fields_of(chunk + 2 * kVector, 2 * q, 2) << 4;
  } else {
    word = fields_of(chunk, bits * q, bits);
  }
  memcpy(codes, &word, sizeof word);
}

void gather_row(const Table& t, int64_t row, float* values) {
  const int64_t groups = ceil_div(t.columns, t.group_size);
  const int64_t tile = row / kTile, lane = row % kTile;
  const uint8_t* codes_of_row =
      t.tiled ? t.codes + tile * (int64_t)eoracc_tile_bytes(t.columns, t.bits) + 4 * lane
              : t.codes + row * groups * t.group_size * t.bits / 8;
  for (int64_t k = 0; k < t.columns; k += kRun) {
    // Groups follow one another without padding, so the bit stream is that of the whole row.
    uint8_t codes[kRun] = {};
    if (!t.tiled) {
      read_plain(codes_of_row + k / 8 * t.bits, t.bits, codes);
    } else {
      read_quad(codes_of_row, k / 4, t.bits, codes);
      if (k + 4 < t.columns) read_quad(codes_of_row, k / 4 + 1, t.bits, codes + 4);
    }
    const int64_t group = k / t.group_size;
    const int64_t at = t.tiled ? (tile * groups + group) * kTile + lane : row * groups + group;
    float scale;
    read_elements(t.scales_type, t.scales, at, 1, &scale);
    const int32_t zero_point = t.zero_points != nullptr ? t.zero_points[at] : 1 << (t.bits - 1);
    const int64_t count = smaller(kRun, t.columns - k);
    for (int64_t i = 0; i < count; ++i) values[k + i] = (float)(codes[i] - zero_point) * scale;
  }
}

}  // namespace

void gather_rows(const Table& table, const int64_t* rows, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) gather_row(table, rows[i], values + i * table.columns);
}

}  // namespace eoracc
