// Plain <-> tiled, code by code. It runs once, for an old artifact, so clarity comes before speed.

#include "cpu/layout.h"

#include <string.h>

#include "cpu/chunk.h"

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The place of a code: `low` has its low bits, and at 3 and 6 bits `high` the others.
struct Place {
  int64_t low;  // byte within the tile
  int low_shift;
  int64_t high;
  int high_shift;
};

Place place_of(int64_t row, int64_t column, int32_t bits) {
  const int64_t quad = column / 4, byte = 4 * row + column % 4;
  switch (bits) {
    case 8:
      return {64 * quad + byte, 0, 0, 0};
    case 4:
      return {64 * (quad / 2) + byte, 4 * (int)(quad % 2), 0, 0};
    case 2:
      return {64 * (quad / 4) + byte, 2 * (int)(quad % 4), 0, 0};
    case 6: {
      const int64_t chunk = 192 * (quad / 4), q = quad % 4;
      return {chunk + 64 * (q / 2) + byte, 4 * (int)(q % 2), chunk + 128 + byte, 2 * (int)q};
    }
    default: {
      const int64_t chunk = 192 * (quad / 8), q = quad % 8;
      return {chunk + 64 * (q / 4) + byte, 2 * (int)(q % 4), chunk + 128 + byte, (int)q};
    }
  }
}

// Bits of a code at the place `low`.
int32_t low_bits(int32_t bits) { return bits == 3 ? 2 : bits == 6 ? 4 : bits; }

// Code i of a group's bit stream.
struct Stream {
  int64_t byte;
  int shift;
};

Stream stream_of(int64_t i, int32_t bits) { return {i * bits / 8, (int)(i * bits % 8)}; }

}  // namespace

size_t eoracc_tile_bytes(int64_t columns, int32_t bits) {
  if (!eoracc::is_code_width(bits)) return 0;
  return (size_t)(ceil_div(columns, 4 * eoracc::chunk_quads(bits)) * eoracc::chunk_bytes(bits));
}

void eoracc_tile_codes(const uint8_t* plain, int64_t rows, int64_t columns, int32_t bits,
                       int64_t group_size, uint8_t* tiled) {
  const int64_t tile_bytes = (int64_t)eoracc_tile_bytes(columns, bits);
  const int64_t group_bytes = group_size * bits / 8;
  const int64_t groups = ceil_div(columns, group_size);
  const unsigned mask = (1u << bits) - 1, low_mask = (1u << low_bits(bits)) - 1;
  memset(tiled, 0, (size_t)(ceil_div(rows, EORACC_TILE) * tile_bytes));
  for (int64_t row = 0; row < rows; ++row) {
    uint8_t* tile = tiled + row / EORACC_TILE * tile_bytes;
    for (int64_t column = 0; column < columns; ++column) {
      const uint8_t* group = plain + (row * groups + column / group_size) * group_bytes;
      const Stream from = stream_of(column % group_size, bits);
      unsigned word = group[from.byte];
      if (from.shift + bits > 8) word |= (unsigned)group[from.byte + 1] << 8;
      const unsigned code = (word >> from.shift) & mask;
      const Place to = place_of(row % EORACC_TILE, column, bits);
      tile[to.low] |= (uint8_t)((code & low_mask) << to.low_shift);
      if (code > low_mask) tile[to.high] |= (uint8_t)((code >> low_bits(bits)) << to.high_shift);
    }
  }
}

void eoracc_untile_codes(const uint8_t* tiled, int64_t rows, int64_t columns, int32_t bits,
                         int64_t group_size, uint8_t* plain) {
  const int64_t tile_bytes = (int64_t)eoracc_tile_bytes(columns, bits);
  const int64_t group_bytes = group_size * bits / 8;
  const int64_t groups = ceil_div(columns, group_size);
  const int32_t low = low_bits(bits);
  const unsigned low_mask = (1u << low) - 1, high_mask = (1u << (bits - low)) - 1;
  memset(plain, 0, (size_t)(rows * groups * group_bytes));
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* tile = tiled + row / EORACC_TILE * tile_bytes;
    for (int64_t column = 0; column < columns; ++column) {
      const Place from = place_of(row % EORACC_TILE, column, bits);
      unsigned code = (tile[from.low] >> from.low_shift) & low_mask;
      code |= ((unsigned)(tile[from.high] >> from.high_shift) & high_mask) << low;
      uint8_t* group = plain + (row * groups + column / group_size) * group_bytes;
      const Stream to = stream_of(column % group_size, bits);
      group[to.byte] |= (uint8_t)(code << to.shift);
      if (to.shift + bits > 8) group[to.byte + 1] |= (uint8_t)(code >> (8 - to.shift));
    }
  }
}

void eoracc_tile_elements(const void* plain, int64_t rows, int64_t columns, size_t element_bytes,
                          void* tiled) {
  const size_t tiled_bytes = (size_t)(ceil_div(rows, EORACC_TILE) * EORACC_TILE * columns);
  if (tiled_bytes == 0) return;
  memset(tiled, 0, tiled_bytes * element_bytes);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t to = (row / EORACC_TILE * columns + column) * EORACC_TILE + row % EORACC_TILE;
      memcpy((char*)tiled + (size_t)to * element_bytes,
             (const char*)plain + (size_t)(row * columns + column) * element_bytes, element_bytes);
    }
  }
}

void eoracc_untile_elements(const void* tiled, int64_t rows, int64_t columns, size_t element_bytes,
                            void* plain) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t from = (row / EORACC_TILE * columns + column) * EORACC_TILE + row % EORACC_TILE;
      memcpy((char*)plain + (size_t)(row * columns + column) * element_bytes,
             (const char*)tiled + (size_t)from * element_bytes, element_bytes);
    }
  }
}

void eoracc_tile_int8(const int8_t* plain, int64_t rows, int64_t columns, uint8_t* tiled) {
  const int64_t tile_bytes = (int64_t)eoracc_tile_bytes(columns, 8);
  const size_t bytes = (size_t)(ceil_div(rows, EORACC_TILE) * tile_bytes);
  if (bytes == 0) return;
  memset(tiled, 128, bytes);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const Place to = place_of(row % EORACC_TILE, column, 8);
      tiled[row / EORACC_TILE * tile_bytes + to.low] =
          (uint8_t)(plain[row * columns + column] + 128);
    }
  }
}

void eoracc_untile_int8(const uint8_t* tiled, int64_t rows, int64_t columns, int8_t* plain) {
  const int64_t tile_bytes = (int64_t)eoracc_tile_bytes(columns, 8);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const Place from = place_of(row % EORACC_TILE, column, 8);
      plain[row * columns + column] =
          (int8_t)(tiled[row / EORACC_TILE * tile_bytes + from.low] - 128);
    }
  }
}
