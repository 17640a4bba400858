// The product for many rows of X, written once for every arithmetic.
//
// The weight is unpacked panel by panel into scratch that stays in the second-level cache, in the
// order and the type that the arithmetic multiplies with, and each panel is used for all rows of an
// item. X is converted ("packed") once, after the norm. The down-projection is a product of the
// same kind with lora_a for a weight, its result is packed like X, and the up-projection adds
// lora_b's product to the sums of the backbone before they are finished and stored.
//
// All of it is one list of items in four stages: pack X, project down, pack what came out, and
// finish ranges of tiles. Tasks take items in order from a counter and wait where one needs the
// results of a stage before: those items have all been taken by tasks that run, so nothing
// deadlocks, even if the tasks run one after another. What an item computes does not depend on how
// many tasks there are.
//
// The including file defines, in an unnamed namespace of eoracc:
//
//   kRowBlock      rows of X that `multiply` is handed
//   kPanelTiles    tiles of the weight that `multiply` is handed, each a panel
//   kDensePasses   panels that it takes to hold a float factor exactly enough
//   Guard          what a task holds while it multiplies
//   Shape          shape_of(m): the unit, that is the columns that X and panels are padded to, and
//                  the sizes of blocks and panels
//   pack_row       a row of floats to its place in a row block
//   fill           columns of a tile to a panel
//   multiply       sums[rows, 16] of each tile += row block times its panel
//
// A row block is [units, x_bytes] and a panel [units, panel_bytes], so that both are read forwards.

#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "cpu/many_rows.h"

namespace eoracc {
namespace {

constexpr int64_t kMaxTiles = 16;    // tiles in an item
constexpr int64_t kCallRows = 2048;  // rows of X that are packed at a time
constexpr int64_t kShares = 16;      // items that there should be at least
constexpr double kAloneMacs = 1e6;   // products below which waking a thread takes longer

// The vector extension of GCC and Clang: loops over an array of sixteen are not always vectorised.
typedef float Lanes __attribute__((vector_size(64)));

inline Lanes load_sums(const float* sums) {
  Lanes lanes;
  memcpy(&lanes, sums, sizeof lanes);
  return lanes;
}

// Where the columns of a weight come from: an n-bit weight, or a factor of a float type.
struct Weight {
  Tiles tiles;       // if codes is not null
  DenseTiles dense;  // else
  int64_t passes() const { return tiles.codes != nullptr ? 1 : kDensePasses; }
};

// Rows of floats, packed: [row blocks, units, shape.x_bytes].
struct Packed {
  uint8_t* data;
  int64_t unit, units;
  int64_t block_bytes;
};

inline void fill(const Weight& w, int64_t pass, int64_t tile, int64_t unit, int64_t start,
                 int64_t units, uint8_t* panel);

struct Product {
  eoracc_matmul m;
  Shape shape;
  Output output;
  Weight backbone, lora_a, lora_b;
  Packed x;
  Packed down;         // parts behind one another in its row blocks
  float* down_sums;    // [rows, down_width], before it is packed
  int64_t down_width;  // ranks of all parts, rounded up to tiles
  int64_t part_count, part_units;
  int64_t half;         // tiles of part 0 with an activation, else 0
  int64_t row_blocks;   // of X
  int64_t item_blocks;  // row blocks in an item of the products
  int64_t item_tiles;   // tiles in one
  int64_t row_items;
  int64_t pack_begin, down_begin, repack_begin, finish_begin, end;  // items of the stages
  int64_t next, done;  // items taken and finished; atomic
  uint8_t* scratch;    // [tasks, scratch_bytes]
  int64_t scratch_bytes, panels_bytes;
};

// Spins until that many items are done, and gives the processor away where that takes long.
inline void wait_for(const Product& p, int64_t items) {
  for (int64_t spins = 0; __atomic_load_n(&p.done, __ATOMIC_ACQUIRE) < items; ++spins) {
    if (spins > 4096) {
      sched_yield();
    } else {
      pause();
    }
  }
}

// sums[tiles, stride, 16] += x[rows of the blocks] * W^T for the given tiles, -1 where there is
// none.
inline void accumulate(const Product& p, const Packed& x, int64_t unit_offset, int64_t units,
                       int64_t first_block, int64_t rows, const Weight& w, const int64_t* tiles,
                       int64_t tile_count, uint8_t* panels, float* sums, int64_t stride) {
  const Shape shape = p.shape;
  const int64_t x_bytes = shape.x_bytes(x.unit);
  const int64_t deepest = shape.panel_columns / x.unit;
  const int64_t panel_bytes = deepest * shape.panel_bytes(x.unit);
  for (int64_t pass = 0; pass < w.passes(); ++pass) {
    for (int64_t start = 0; start < units; start += deepest) {
      const int64_t depth = smaller(deepest, units - start);
      const uint8_t* blocks =
          x.data + first_block * x.block_bytes + (unit_offset + start) * x_bytes;
      for (int64_t first = 0; first < tile_count; first += kPanelTiles) {
        for (int64_t i = 0; i < kPanelTiles; ++i) {
          fill(w, pass, tiles[first + i], x.unit, start, depth, panels + i * panel_bytes);
        }
        for (int64_t row = 0; row < rows; row += kRowBlock) {
          multiply(blocks + row / kRowBlock * x.block_bytes, panels, panel_bytes, x.unit, depth,
                   smaller(kRowBlock, rows - row), sums + (first * stride + row) * kTile,
                   stride * kTile);
        }
      }
    }
  }
}

// ---- the stages

inline float* row_scratch(uint8_t* scratch) { return (float*)scratch; }

inline void pack_item(Product& p, int64_t block, uint8_t* scratch) {
  const int64_t k = p.m.in_features, padded = p.x.units * p.x.unit;
  uint8_t* out = p.x.data + block * p.x.block_bytes;
  float* values = row_scratch(scratch);
  for (int64_t i = k; i < padded; ++i) values[i] = 0;
  const int64_t rows = smaller(kRowBlock, p.m.rows - block * kRowBlock);
  if (rows < kRowBlock) memset(out, 0, (size_t)p.x.block_bytes);
  for (int64_t row = 0; row < rows; ++row) {
    read_elements(p.m.x_type, p.m.x, (block * kRowBlock + row) * k, k, values);
    if (p.m.norm_weight != nullptr) normalize_row(p.m.norm_weight, k, p.m.norm_epsilon, values);
    // Infinity becomes NaN, which spreads to the whole row of y whatever the weights are.
    if (p.m.accuracy_level == 4) {
      for (int64_t i = 0; i < k; ++i) values[i] += values[i] - values[i];
    }
    pack_row(values, p.x.unit, p.x.units, row, out);
  }
}

inline void down_item(Product& p, int64_t item, uint8_t* scratch) {
  const int64_t first_block = item % p.row_items * p.item_blocks;
  const int64_t first_tile = item / p.row_items * kPanelTiles;
  const int64_t first_row = first_block * kRowBlock;
  const int64_t rows = smaller(p.item_blocks * kRowBlock, p.m.rows - first_row);
  const int64_t stride = p.item_blocks * kRowBlock;
  float* sums = (float*)(scratch + p.panels_bytes);
  memset(sums, 0, sizeof(float) * (size_t)(kPanelTiles * stride * kTile));
  int64_t tiles[kPanelTiles];
  for (int64_t i = 0; i < kPanelTiles; ++i) {
    tiles[i] = first_tile + i < p.down_width / kTile ? first_tile + i : -1;
  }
  accumulate(p, p.x, 0, p.x.units, first_block, rows, p.lora_a, tiles, kPanelTiles, scratch, sums,
             stride);
  for (int64_t i = 0; i < kPanelTiles && tiles[i] >= 0; ++i) {
    for (int64_t row = 0; row < rows; ++row) {
      memcpy(p.down_sums + (first_row + row) * p.down_width + tiles[i] * kTile,
             sums + (i * stride + row) * kTile, kTile * sizeof(float));
    }
  }
}

inline void repack_item(Product& p, int64_t block, uint8_t* scratch) {
  const int64_t rank = p.m.rank, unit = p.down.unit;
  float* values = row_scratch(scratch);
  uint8_t* out = p.down.data + block * p.down.block_bytes;
  const int64_t part_bytes = p.part_units * p.shape.x_bytes(unit);
  const int64_t rows = smaller(kRowBlock, p.m.rows - block * kRowBlock);
  if (rows < kRowBlock) memset(out, 0, (size_t)p.down.block_bytes);
  for (int64_t i = rank; i < p.part_units * unit; ++i) values[i] = 0;
  for (int64_t part = 0; part < p.part_count; ++part) {
    for (int64_t row = 0; row < rows; ++row) {
      memcpy(values, p.down_sums + (block * kRowBlock + row) * p.down_width + part * rank,
             sizeof(float) * (size_t)rank);
      pack_row(values, unit, p.part_units, row, out + part * part_bytes);
    }
  }
}

// y = act(gate), the loop of which is vectorised.
inline Lanes activate_lanes(int32_t activation, Lanes gate) {
  float values[kTile];
  memcpy(values, &gate, sizeof values);
  if (activation == EORACC_SILU) {
    for (int64_t lane = 0; lane < kTile; ++lane) values[lane] = activate(EORACC_SILU, values[lane]);
  } else {
    for (int64_t lane = 0; lane < kTile; ++lane) {
      values[lane] = activate(EORACC_GELU_TANH, values[lane]);
    }
  }
  return load_sums(values);
}

// Sixteen elements of which only `count` are there.
inline Lanes load_elements(int32_t type, const void* data, int64_t index, int64_t count) {
  Lanes lanes = {};
  if (count == kTile && type == EORACC_FLOAT32) {
    memcpy(&lanes, (const char*)data + 4 * index, sizeof lanes);
  } else {
    float values[kTile];
    read_lanes(type, data, index, count, values);
    lanes = load_sums(values);
  }
  return lanes;
}

inline void store_elements(int32_t type, Lanes lanes, int64_t count, void* data, int64_t index) {
  if (count == kTile && type == EORACC_FLOAT32) {
    memcpy((char*)data + 4 * index, &lanes, sizeof lanes);
    return;
  }
  float values[kTile];
  memcpy(values, &lanes, sizeof values);
  write_elements(type, values, count, data, index);
}

// Writes the columns of `count` tiles of y from `tile` on, row by row so that a row's are written
// together. sums and gates are [tiles, stride, 16]; `gates` is null without an activation.
inline void finish(const Product& p, int64_t first_row, int64_t rows, int64_t tile, int64_t count,
                   const float* gates, const float* sums, int64_t stride) {
  const Output& out = p.output;
  Lanes bias[kMaxTiles] = {}, gate_bias[kMaxTiles] = {};
  for (int64_t i = 0; i < count && out.bias != nullptr; ++i) {
    const int64_t column = (tile + i) * kTile, width = smaller(kTile, out.width - column);
    bias[i] = load_elements(out.type, out.bias, out.gate_width + column, width);
    if (gates != nullptr) gate_bias[i] = load_elements(out.type, out.bias, column, width);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = (tile + i) * kTile, width = smaller(kTile, out.width - column);
      const int64_t index = (first_row + row) * out.width + column;
      const int64_t at = (i * stride + row) * kTile;
      Lanes y = load_sums(sums + at) + bias[i];
      if (gates != nullptr) {
        y *= activate_lanes(out.activation, load_sums(gates + at) + gate_bias[i]);
      }
      if (out.residual != nullptr) y += load_elements(out.type, out.residual, index, width);
      store_elements(out.type, y, width, out.y, index);
    }
  }
}

// A run of tiles of one part.
struct Range {
  int64_t part, first, count;
};

// The ranges of an item: one, or with an activation one of each part. Every part is cut into ranges
// of item_tiles by itself.
inline int64_t ranges_of(const Product& p, int64_t item, Range* ranges) {
  if (p.half > 0) {
    const int64_t first = item * p.item_tiles;
    const int64_t count = smaller(p.item_tiles, p.half - first);
    ranges[0] = {0, first, count};
    ranges[1] = {1, p.half + first, count};
    return 2;
  }
  int64_t first = 0;
  for (int64_t part = 0;; ++part) {
    const int64_t tiles = ceil_div(p.part_count > 1 ? p.m.parts[part] : p.m.out_features, kTile);
    const int64_t items = ceil_div(tiles, p.item_tiles);
    if (item < items) {
      const int64_t offset = item * p.item_tiles;
      ranges[0] = {part, first + offset, smaller(p.item_tiles, tiles - offset)};
      return 1;
    }
    item -= items;
    first += tiles;
  }
}

inline int64_t range_items(const Product& p) {
  if (p.half > 0) return ceil_div(p.half, p.item_tiles);
  if (p.part_count <= 1) return ceil_div(ceil_div(p.m.out_features, kTile), p.item_tiles);
  int64_t items = 0;
  for (int64_t part = 0; part < p.part_count; ++part) {
    items += ceil_div(p.m.parts[part] / kTile, p.item_tiles);
  }
  return items;
}

inline void finish_item(Product& p, int64_t item, uint8_t* scratch) {
  const int64_t first_block = item % p.row_items * p.item_blocks;
  const int64_t first_row = first_block * kRowBlock;
  const int64_t rows = smaller(p.item_blocks * kRowBlock, p.m.rows - first_row);
  const int64_t stride = p.item_blocks * kRowBlock;
  float* sums = (float*)(scratch + p.panels_bytes);
  Range ranges[2];
  const int64_t range_count = ranges_of(p, item / p.row_items, ranges);
  // A range fills whole panels, so that no panel has tiles of two parts.
  const int64_t slots = ceil_div(ranges[0].count, kPanelTiles) * kPanelTiles;
  int64_t tiles[2 * kMaxTiles];
  for (int64_t i = 0; i < range_count * slots; ++i) {
    const Range& range = ranges[i / slots];
    tiles[i] = i % slots < range.count ? range.first + i % slots : -1;
  }
  memset(sums, 0, sizeof(float) * (size_t)(range_count * slots * stride * kTile));
  accumulate(p, p.x, 0, p.x.units, first_block, rows, p.backbone, tiles, range_count * slots,
             scratch, sums, stride);
  if (p.m.rank > 0) {
    wait_for(p, p.finish_begin);
    for (int64_t i = 0; i < range_count; ++i) {
      accumulate(p, p.down, ranges[i].part * p.part_units, p.part_units, first_block, rows,
                 p.lora_b, tiles + i * slots, slots, scratch, sums + i * slots * stride * kTile,
                 stride);
    }
  }
  finish(p, first_row, rows, ranges[0].first, ranges[0].count, range_count > 1 ? sums : nullptr,
         sums + (range_count - 1) * slots * stride * kTile, stride);
}

inline void run_items(void* data, size_t index) {
  Product& p = *(Product*)data;
  const Guard guard;
  uint8_t* scratch = p.scratch + (int64_t)index * p.scratch_bytes;
  for (;;) {
    const int64_t item = __atomic_fetch_add(&p.next, 1, __ATOMIC_RELAXED);
    if (item >= p.end) return;
    if (item < p.down_begin) {
      pack_item(p, item, scratch);
    } else if (item < p.repack_begin) {
      wait_for(p, p.down_begin);
      down_item(p, item - p.down_begin, scratch);
    } else if (item < p.finish_begin) {
      wait_for(p, p.repack_begin);
      repack_item(p, item - p.repack_begin, scratch);
    } else {
      wait_for(p, p.down_begin);
      finish_item(p, item - p.finish_begin, scratch);
    }
    __atomic_fetch_add(&p.done, 1, __ATOMIC_RELEASE);
  }
}

// ---- the whole product

inline Weight factor(int32_t type, const void* values, const float* scale, int64_t columns) {
  Weight w{};
  if (type == EORACC_INT8) {
    w.tiles.columns = columns;
    w.tiles.groups = 1;
    w.tiles.group_size = ceil_div(columns, kUnit) * kUnit;
    w.tiles.tile_bytes = ceil_div(columns, 4) * 64;
    w.tiles.bits = 8;
    w.tiles.scales_type = EORACC_FLOAT32;
    w.tiles.codes = (const uint8_t*)values;
    w.tiles.scales = scale;
  } else {
    w.dense = {columns, type, values};
  }
  return w;
}

inline void describe(const eoracc_matmul& m, Product* p) {
  p->m = m;
  p->part_count = m.part_count > 0 ? m.part_count : 1;
  p->half = m.activation != EORACC_IDENTITY ? m.out_features / 2 / kTile : 0;
  p->output.type = m.x_type;
  p->output.activation = m.activation;
  p->output.gate_width = p->half * kTile;
  p->output.width = m.out_features - p->output.gate_width;
  p->output.bias = m.bias;
  p->output.residual = m.residual;
  p->output.y = m.y;

  Tiles& w = p->backbone.tiles;
  const int64_t chunk = m.bits == 8 ? 4 : m.bits == 4 ? 8 : m.bits == 2 ? 16 : 32;
  w.columns = m.in_features;
  w.group_size = m.group_size;
  w.groups = ceil_div(m.in_features, m.group_size);
  w.tile_bytes = ceil_div(m.in_features, chunk) * (m.bits == 3 ? 192 : 64);
  w.bits = m.bits;
  w.scales_type = m.scales_type;
  w.codes = m.codes;
  w.scales = m.scales;
  w.zero_points = m.zero_points;
  if (m.rank > 0) {
    p->lora_a = factor(m.lora_a_type, m.lora_a, m.lora_a_scale, m.in_features);
    p->lora_b = factor(m.lora_b_type, m.lora_b, m.lora_b_scale, m.rank);
  }
}

inline void lay_out(Product* p) {
  const eoracc_matmul& m = p->m;
  p->shape = shape_of(m);
  const Shape& shape = p->shape;
  p->x.unit = shape.unit;
  p->x.units = ceil_div(m.in_features, shape.unit);
  p->x.block_bytes = p->x.units * shape.x_bytes(shape.unit);
  p->down.unit = shape.down_unit;
  p->part_units = ceil_div(m.rank, shape.down_unit);
  p->down.units = p->part_count * p->part_units;
  p->down.block_bytes = p->down.units * shape.x_bytes(shape.down_unit);
  p->down_width = m.rank > 0 ? ceil_div(p->part_count * m.rank, kTile) * kTile : 0;

  p->row_blocks = ceil_div(m.rows, kRowBlock);
  // Enough items for threads to share, and no more sums with an activation, which has two ranges.
  const int64_t ranges = p->half > 0 ? 2 : 1;
  const int64_t share = ceil_div(m.out_features, kTile * kShares * kPanelTiles) * kPanelTiles;
  p->item_tiles = smaller(smaller(shape.item_tiles, kMaxTiles), share);
  if (p->item_tiles >= ranges * kPanelTiles) p->item_tiles /= ranges;
  p->item_blocks = smaller(ceil_div(shape.item_rows, kRowBlock), p->row_blocks);
  p->row_items = ceil_div(p->row_blocks, p->item_blocks);
  p->pack_begin = 0;
  p->down_begin = p->row_blocks;
  p->repack_begin = p->down_begin + p->row_items * ceil_div(p->down_width, kTile * kPanelTiles);
  p->finish_begin = p->repack_begin + (m.rank > 0 ? p->row_blocks : 0);
  p->end = p->finish_begin + p->row_items * range_items(*p);
}

// Scratch sizes are rounded up, so that every array begins at a cache line.
inline int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

inline eoracc_result multiply_rows(const eoracc_matmul& m, const eoracc_threads& threads) {
  Product p{};
  describe(m, &p);
  lay_out(&p);
  const Shape& shape = p.shape;
  const int64_t slots = ceil_div(p.item_tiles, kPanelTiles) * kPanelTiles * (p.half > 0 ? 2 : 1);
  int64_t panel_bytes = shape.panel_columns / shape.unit * shape.panel_bytes(shape.unit);
  if (m.rank > 0) {
    const int64_t down = shape.panel_columns / shape.down_unit * shape.panel_bytes(shape.down_unit);
    if (down > panel_bytes) panel_bytes = down;
  }
  const int64_t row_bytes = 4 * (p.x.units * p.x.unit + p.part_units * p.down.unit);
  p.panels_bytes = kPanelTiles * panel_bytes;
  if (p.panels_bytes < row_bytes) p.panels_bytes = row_bytes;
  p.panels_bytes = whole_lines(p.panels_bytes);
  p.scratch_bytes = p.panels_bytes + whole_lines(4 * kTile * slots * p.item_blocks * kRowBlock);

  const int64_t processors = (int64_t)sysconf(_SC_NPROCESSORS_ONLN);
  const bool alone = (double)m.rows * (double)m.out_features * (double)m.in_features < kAloneMacs;
  const int64_t tasks = alone ? 1 : smaller(processors > 0 ? processors : 1, p.end);
  const int64_t x_bytes = whole_lines(p.row_blocks * p.x.block_bytes);
  const int64_t down_bytes = whole_lines(p.row_blocks * p.down.block_bytes);
  const int64_t sums_bytes = whole_lines(4 * m.rows * p.down_width);
  const int64_t total = x_bytes + down_bytes + sums_bytes + tasks * p.scratch_bytes;
  uint8_t* memory = (uint8_t*)malloc((size_t)total + 64);
  if (memory == nullptr) return EORACC_OUT_OF_MEMORY;
  uint8_t* at = memory + (64 - (uintptr_t)memory % 64) % 64;
  p.x.data = at;
  p.down.data = at += x_bytes;
  p.down_sums = (float*)(at += down_bytes);
  p.scratch = at + sums_bytes;
  if (tasks == 1) {
    run_items(&p, 0);
  } else {
    threads.run(threads.pool, (size_t)tasks, run_items, &p);
  }
  free(memory);
  return EORACC_OK;
}

// A few thousand rows at a time, which bounds the memory that X takes when it is packed.
inline eoracc_result many_rows(const eoracc_matmul& m, const eoracc_threads& threads) {
  const int64_t element = m.x_type == EORACC_FLOAT32 ? 4 : 2;
  const int64_t width = m.activation != EORACC_IDENTITY ? m.out_features / 2 : m.out_features;
  for (int64_t first = 0; first < m.rows; first += kCallRows) {
    eoracc_matmul part = m;
    part.rows = smaller(kCallRows, m.rows - first);
    part.x = (const char*)m.x + first * m.in_features * element;
    part.y = (char*)m.y + first * width * element;
    if (m.residual != nullptr) part.residual = (const char*)m.residual + first * width * element;
    const eoracc_result result = multiply_rows(part, threads);
    if (result != EORACC_OK) return result;
  }
  return EORACC_OK;
}

}  // namespace
}  // namespace eoracc
