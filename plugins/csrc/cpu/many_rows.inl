// The product for many rows of X, written once for every arithmetic.
//
// The weight is unpacked panel by panel into scratch that stays in the second-level cache, in the
// order and the type that the arithmetic multiplies with, and each panel is used for all rows of an
// item. X is converted ("packed") once, after the norm. The down-projection is a product of the
// same kind with lora_a for a weight, its result is packed like X, and the up-projection adds
// lora_b's product to the sums of the backbone before they are finished and stored. Each adapter in
// use is another such product of whole row blocks; in a block with rows of several adapters, every
// row keeps the sums of its own.
//
// The product is one list of items in four stages: pack X, project down, pack the result, and
// finish ranges of tiles. Tasks take items in order from a counter. An item that needs an earlier
// stage waits for it; running tasks have taken all items of that stage, so nothing deadlocks, even
// if the tasks run one after another. The result of an item does not depend on the number of tasks.
//
// The including file defines, in an unnamed namespace of eoracc:
//
//   kRowBlock      rows of X in a call of `multiply`
//   kPanelTiles    tiles of the weight in a call of `multiply`, each a panel
//   kDensePasses   panels that hold a float factor exactly enough
//   Guard          state of a thread while it multiplies
//   Shape          from shape_of(m): the unit (X and panels are padded to this many columns) and
//                  the sizes of blocks and panels
//   pack_row       a row of floats to its place in a row block
//   fill           columns of a tile to a panel
//   multiply       sums[rows, 16] of each tile += row block times its panel
//
// A row block is [units, x_bytes] and a panel [units, panel_bytes], so that both are read forwards.

#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "cpu/low_rank.inl"
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

// Rows of floats, packed: [row blocks, units, shape.x_bytes].
struct Packed {
  uint8_t* data;
  int64_t unit, units;
  int64_t block_bytes;
};

// Which adapter each row uses, and each block of rows, negative for none.
struct Users {
  static constexpr int32_t kSeveral = -2;  // of a block: its rows do not agree

  int32_t* rows;
  int32_t* blocks;

  bool in_block(int64_t adapter, int64_t block, int64_t count) const {
    if (blocks[block] != kSeveral) return blocks[block] == adapter;
    for (int64_t row = 0; row < count; ++row) {
      if (rows[block * kRowBlock + row] == adapter) return true;
    }
    return false;
  }
};

// A low-rank term with its scratch.
struct Term {
  LowRank factors;
  Users users;
  const int32_t* used;  // the adapters that rows use, each once
  int64_t used_count;
  Packed down;         // parts behind one another in its row blocks
  float* down_sums;    // [rows, down_width], before it is packed
  int64_t down_width;  // ranks of all parts, rounded up to tiles
  int64_t part_units;
  int64_t tile_items;  // items of a range of rows and one adapter
  int64_t down_items;
};

inline void fill(const Weight& w, int64_t pass, int64_t tile, int64_t unit, int64_t start,
                 int64_t units, uint8_t* panel);

struct Product {
  eoracc_matmul m;
  Shape shape;
  Output output;
  int64_t first_row;  // of x as the caller knows it
  Weight backbone;
  Packed x;
  Term terms[2];
  int64_t term_count;
  int64_t part_count;
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

// Spins until that many items are done, and yields the processor if that takes long.
inline void wait_for(const Product& p, int64_t items) {
  for (int64_t spins = 0; __atomic_load_n(&p.done, __ATOMIC_ACQUIRE) < items; ++spins) {
    if (spins > 4096) {
      sched_yield();
    } else {
      pause();
    }
  }
}

// Rows of packed activations in whole blocks; the last one may be cut off.
struct Rows {
  const Packed* from;
  int64_t unit_offset, units;  // columns
  int64_t first_block, rows;
  // Only rows that use this adapter count, where `users` is not null.
  const Users* users;
  int64_t adapter;

  int64_t in_block(int64_t block) const {
    return smaller(kRowBlock, rows - (block - first_block) * kRowBlock);
  }

  // Whether any row counts.
  bool any() const {
    if (users == nullptr) return rows > 0;
    for (int64_t block = first_block; (block - first_block) * kRowBlock < rows; ++block) {
      if (users->in_block(adapter, block, in_block(block))) return true;
    }
    return false;
  }
};

// `multiply` for a block of rows of which only some count: their sums are the same.
inline void multiply_some(const Rows& x, int64_t block, const uint8_t* values,
                          const uint8_t* panels, int64_t panel_bytes, int64_t depth, float* sums,
                          int64_t stride) {
  alignas(64) float all[kPanelTiles * kRowBlock * kTile];
  const int64_t rows = x.in_block(block);
  for (int64_t i = 0; i < kPanelTiles; ++i) {
    memcpy(all + i * kRowBlock * kTile, sums + i * stride, sizeof(float) * kRowBlock * kTile);
  }
  multiply(values, panels, panel_bytes, x.from->unit, depth, rows, all, kRowBlock * kTile);
  for (int64_t row = 0; row < rows; ++row) {
    if (x.users->rows[block * kRowBlock + row] != x.adapter) continue;
    for (int64_t i = 0; i < kPanelTiles; ++i) {
      memcpy(sums + i * stride + row * kTile, all + (i * kRowBlock + row) * kTile,
             sizeof(float) * kTile);
    }
  }
}

// sums[tiles, stride, 16] += x * W^T for the given tiles, -1 where there is none.
inline void accumulate(const Product& p, const Rows& x, const Weight& w, const int64_t* tiles,
                       int64_t tile_count, uint8_t* panels, float* sums, int64_t stride) {
  const Shape shape = p.shape;
  const Packed& from = *x.from;
  const int64_t x_bytes = shape.x_bytes(from.unit);
  const int64_t deepest = shape.panel_columns / from.unit;
  const int64_t panel_bytes = deepest * shape.panel_bytes(from.unit);
  const int64_t passes = w.is_dense() ? kDensePasses : 1;
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (int64_t start = 0; start < x.units; start += deepest) {
      const int64_t depth = smaller(deepest, x.units - start);
      const uint8_t* values = from.data + (x.unit_offset + start) * x_bytes;
      for (int64_t first = 0; first < tile_count; first += kPanelTiles) {
        for (int64_t i = 0; i < kPanelTiles; ++i) {
          fill(w, pass, tiles[first + i], from.unit, start, depth, panels + i * panel_bytes);
        }
        for (int64_t row = 0; row < x.rows; row += kRowBlock) {
          const int64_t block = x.first_block + row / kRowBlock, rows = x.in_block(block);
          const uint8_t* of_block = values + block * from.block_bytes;
          float* of_rows = sums + (first * stride + row) * kTile;
          if (x.users == nullptr || x.users->blocks[block] == x.adapter) {
            multiply(of_block, panels, panel_bytes, from.unit, depth, rows, of_rows,
                     stride * kTile);
          } else if (x.users->in_block(x.adapter, block, rows)) {
            multiply_some(x, block, of_block, panels, panel_bytes, depth, of_rows, stride * kTile);
          }
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
  // The values of rows without an adapter.
  for (int64_t i = 0; i < p.term_count; ++i) {
    const Term& term = p.terms[i];
    if (term.factors.bank == nullptr) continue;
    memset(term.down_sums + block * kRowBlock * term.down_width, 0,
           sizeof(float) * (size_t)(rows * term.down_width));
  }
}

// The users of a term's adapters, null where all rows are.
inline const Users* users_of(const Term& term) {
  return term.factors.bank == nullptr ? nullptr : &term.users;
}

inline void down_item(Product& p, int64_t item, uint8_t* scratch) {
  const Term* of_item = p.terms;
  for (; item >= of_item->down_items; ++of_item) item -= of_item->down_items;
  const Term& term = *of_item;
  const int64_t first_block = item % p.row_items * p.item_blocks;
  const int64_t first_tile = item / p.row_items % term.tile_items * kPanelTiles;
  const int64_t adapter = term.used[item / p.row_items / term.tile_items];
  const int64_t first_row = first_block * kRowBlock;
  const int64_t rows = smaller(p.item_blocks * kRowBlock, p.m.rows - first_row);
  const int64_t stride = p.item_blocks * kRowBlock;
  const Users* users = users_of(term);
  const Rows x{&p.x, 0, p.x.units, first_block, rows, users, adapter};
  if (!x.any()) return;
  int64_t tiles[kPanelTiles];
  float scales[kPanelTiles][kTile];
  bool any = false;
  for (int64_t i = 0; i < kPanelTiles; ++i) {
    const int64_t tile = first_tile + i;
    const bool is_there =
        tile < term.factors.tiles &&
        (users == nullptr || read_down_scales(term.factors, adapter, tile, scales[i]));
    tiles[i] = is_there ? tile : -1;
    any |= is_there;
  }
  if (!any) return;
  float* sums = (float*)(scratch + p.panels_bytes);
  memset(sums, 0, sizeof(float) * (size_t)(kPanelTiles * stride * kTile));
  const Weight factor = down_factor(term.factors, adapter);
  accumulate(p, x, factor, tiles, kPanelTiles, scratch, sums, stride);
  for (int64_t i = 0; i < kPanelTiles; ++i) {
    if (tiles[i] < 0) continue;
    for (int64_t row = 0; row < rows; ++row) {
      if (users != nullptr && users->rows[first_row + row] != adapter) continue;
      float* down = term.down_sums + (first_row + row) * term.down_width + tiles[i] * kTile;
      memcpy(down, sums + (i * stride + row) * kTile, kTile * sizeof(float));
      // The scales of integer factors are in the sums already.
      for (int64_t r = 0; r < kTile && users != nullptr && factor.is_dense(); ++r) {
        down[r] *= scales[i][r];
      }
    }
  }
}

inline void repack_item(Product& p, int64_t block, uint8_t* scratch) {
  const Term* term = p.terms;
  for (; block >= p.row_blocks; ++term) block -= p.row_blocks;
  const int64_t unit = term->down.unit;
  float* values = row_scratch(scratch);
  uint8_t* out = term->down.data + block * term->down.block_bytes;
  const int64_t part_bytes = term->part_units * p.shape.x_bytes(unit);
  const int64_t rows = smaller(kRowBlock, p.m.rows - block * kRowBlock);
  if (rows < kRowBlock) memset(out, 0, (size_t)term->down.block_bytes);
  for (int64_t i = 0; i < p.part_count; ++i) {
    const LowRankPart& part = term->factors.parts[i];
    if (part.rank == 0) continue;  // and so nothing reads them
    const float* down = term->down_sums + block * kRowBlock * term->down_width;
    down += part.first_down * kTile;
    for (int64_t r = part.rank; r < term->part_units * unit; ++r) values[r] = 0;
    for (int64_t row = 0; row < rows; ++row) {
      memcpy(values, down + row * term->down_width, sizeof(float) * (size_t)part.rank);
      pack_row(values, unit, term->part_units, row, out + i * part_bytes);
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

// Up to sixteen elements, `count` of which exist.
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

// The ranges of an item: one, or with an activation one of each part. Each part is split into
// ranges of item_tiles separately.
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
  accumulate(p, {&p.x, 0, p.x.units, first_block, rows, nullptr, 0}, p.backbone, tiles,
             range_count * slots, scratch, sums, stride);
  if (p.term_count > 0) wait_for(p, p.finish_begin);
  for (int64_t t = 0; t < p.term_count; ++t) {
    const Term& term = p.terms[t];
    for (int64_t user = 0; user < term.used_count; ++user) {
      Rows down{&term.down, 0, 0, first_block, rows, users_of(term), term.used[user]};
      if (!down.any()) continue;
      for (int64_t i = 0; i < range_count; ++i) {
        const int64_t at = ranges[i].part;
        const LowRankPart& part = term.factors.parts[at];
        down.unit_offset = at * term.part_units;
        down.units = ceil_div(ranks_of(term.factors, down.adapter, at), term.down.unit);
        if (down.units == 0) continue;
        int64_t of_part[kMaxTiles];
        for (int64_t s = 0; s < slots; ++s) {
          const int64_t tile = tiles[i * slots + s];
          of_part[s] = tile < 0 ? -1 : tile - part.first_tile;
        }
        accumulate(p, down, up_factor(term.factors, down.adapter, part), of_part, slots, scratch,
                   sums + i * slots * stride * kTile, stride);
      }
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

inline void describe(const eoracc_matmul& m, Product* p) {
  p->m = m;
  p->part_count = part_count(m);
  p->half = m.activation != EORACC_IDENTITY ? m.out_features / 2 / kTile : 0;
  p->output.type = m.x_type;
  p->output.activation = m.activation;
  p->output.gate_width = p->half * kTile;
  p->output.width = m.out_features - p->output.gate_width;
  p->output.bias = m.bias;
  p->output.residual = m.residual;
  p->output.y = m.y;

  Tiles& w = p->backbone.tiles;
  const int64_t chunk = 4 * chunk_quads(m.bits);
  w.columns = m.in_features;
  w.group_size = m.group_size;
  w.groups = ceil_div(m.in_features, m.group_size);
  w.tile_bytes = ceil_div(m.in_features, chunk) * chunk_bytes(m.bits);
  w.bits = m.bits;
  w.scales_type = m.scales_type;
  w.codes = m.codes;
  w.scales = m.scales;
  w.zero_points = m.zero_points;
}

// Determines which adapters the rows use, in `memory` for one int32 per row block and two per row.
// An adapter of padding ranks alone counts as none.
inline void find_users(const Product& p, Term* term, int32_t* memory) {
  const int64_t rows = p.m.rows;
  term->users = {memory, memory + rows};
  int32_t* used = memory + rows + p.row_blocks;
  term->used = used;
  int64_t last = -1;  // what the row before asks for
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t adapter = adapter_of(term->factors, p.first_row + row);
    if (row > 0 && adapter == last) {
      memory[row] = memory[row - 1];
    } else {
      int64_t ranks = 0;
      for (int64_t part = 0; part < p.part_count && adapter >= 0; ++part) {
        ranks += ranks_of(term->factors, adapter, part);
      }
      memory[row] = ranks > 0 ? (int32_t)adapter : -1;
      int64_t user = 0;
      while (user < term->used_count && used[user] != adapter) ++user;
      if (ranks > 0 && user == term->used_count) used[term->used_count++] = (int32_t)adapter;
    }
    last = adapter;
    int32_t* block = &term->users.blocks[row / kRowBlock];
    *block = row % kRowBlock == 0 || *block == memory[row] ? memory[row] : Users::kSeveral;
  }
}

// Sets up the low-rank terms that are present.
inline void add_terms(Product* p, int32_t* memory) {
  static const int32_t kShared[] = {0};
  Term shared{}, bank{};
  shared.factors = shared_factors(p->m);
  shared.used = kShared;
  shared.used_count = 1;
  if (shared.factors.rank > 0) p->terms[p->term_count++] = shared;
  bank.factors = bank_factors(p->m);
  if (bank.factors.rank > 0) find_users(*p, &bank, memory);
  if (bank.used_count > 0) p->terms[p->term_count++] = bank;
}

inline void lay_out(Product* p) {
  const eoracc_matmul& m = p->m;
  const Shape& shape = p->shape;
  p->x.unit = shape.unit;
  p->x.units = ceil_div(m.in_features, shape.unit);
  p->x.block_bytes = p->x.units * shape.x_bytes(shape.unit);

  // Enough items for threads to share, and no more sums with an activation, which has two ranges.
  const int64_t ranges = p->half > 0 ? 2 : 1;
  const int64_t share = ceil_div(m.out_features, kTile * kShares * kPanelTiles) * kPanelTiles;
  p->item_tiles = smaller(smaller(shape.item_tiles, kMaxTiles), share);
  if (p->item_tiles >= ranges * kPanelTiles) p->item_tiles /= ranges;
  p->item_blocks = smaller(ceil_div(shape.item_rows, kRowBlock), p->row_blocks);
  p->row_items = ceil_div(p->row_blocks, p->item_blocks);
  p->pack_begin = 0;
  p->down_begin = p->repack_begin = p->row_blocks;
  for (int64_t i = 0; i < p->term_count; ++i) {
    Term& term = p->terms[i];
    term.down.unit = shape.down_unit;
    term.part_units = ceil_div(term.factors.rank, shape.down_unit);
    term.down.units = p->part_count * term.part_units;
    term.down.block_bytes = term.down.units * shape.x_bytes(shape.down_unit);
    term.down_width = term.factors.tiles * kTile;
    term.tile_items = ceil_div(term.factors.tiles, kPanelTiles);
    term.down_items = term.used_count * p->row_items * term.tile_items;
    p->repack_begin += term.down_items;
  }
  p->finish_begin = p->repack_begin + p->term_count * p->row_blocks;
  p->end = p->finish_begin + p->row_items * range_items(*p);
}

// Scratch sizes are rounded up, so that every array begins at a cache line.
inline int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

inline eoracc_result multiply_packed(Product& p, const eoracc_threads& threads) {
  const eoracc_matmul& m = p.m;
  lay_out(&p);
  const Shape& shape = p.shape;
  const int64_t slots = ceil_div(p.item_tiles, kPanelTiles) * kPanelTiles * (p.half > 0 ? 2 : 1);
  int64_t panel_bytes = shape.panel_columns / shape.unit * shape.panel_bytes(shape.unit);
  int64_t row_values = p.x.units * p.x.unit, terms_bytes = 0;
  for (int64_t i = 0; i < p.term_count; ++i) {
    const Term& term = p.terms[i];
    const int64_t down = shape.panel_columns / shape.down_unit * shape.panel_bytes(shape.down_unit);
    if (down > panel_bytes) panel_bytes = down;
    if (term.part_units * term.down.unit > row_values)
      row_values = term.part_units * term.down.unit;
    terms_bytes += whole_lines(p.row_blocks * term.down.block_bytes);
    terms_bytes += whole_lines(4 * m.rows * term.down_width);
  }
  p.panels_bytes = kPanelTiles * panel_bytes;
  if (p.panels_bytes < 4 * row_values) p.panels_bytes = 4 * row_values;
  p.panels_bytes = whole_lines(p.panels_bytes);
  p.scratch_bytes = p.panels_bytes + whole_lines(4 * kTile * slots * p.item_blocks * kRowBlock);

  const int64_t processors = (int64_t)sysconf(_SC_NPROCESSORS_ONLN);
  const bool alone = (double)m.rows * (double)m.out_features * (double)m.in_features < kAloneMacs;
  const int64_t tasks = alone ? 1 : smaller(processors > 0 ? processors : 1, p.end);
  const int64_t x_bytes = whole_lines(p.row_blocks * p.x.block_bytes);
  const int64_t total = x_bytes + terms_bytes + tasks * p.scratch_bytes;
  uint8_t* memory = (uint8_t*)malloc((size_t)total + 64);
  if (memory == nullptr) return EORACC_OUT_OF_MEMORY;
  uint8_t* at = memory + (64 - (uintptr_t)memory % 64) % 64;
  p.x.data = at;
  at += x_bytes;
  for (int64_t i = 0; i < p.term_count; ++i) {
    Term& term = p.terms[i];
    term.down.data = at;
    at += whole_lines(p.row_blocks * term.down.block_bytes);
    term.down_sums = (float*)at;
    at += whole_lines(4 * m.rows * term.down_width);
  }
  p.scratch = at;
  if (tasks == 1) {
    run_items(&p, 0);
  } else {
    threads.run(threads.pool, (size_t)tasks, run_items, &p);
  }
  free(memory);
  return EORACC_OK;
}

// The rows from `first_row` on of the caller's product.
inline eoracc_result multiply_rows(const eoracc_matmul& m, int64_t first_row,
                                   const eoracc_threads& threads) {
  Product p{};
  describe(m, &p);
  p.first_row = first_row;
  p.shape = shape_of(m);
  p.row_blocks = ceil_div(m.rows, kRowBlock);
  int32_t* users = nullptr;
  if (m.bank != nullptr && m.bank->rank > 0) {
    users = (int32_t*)malloc(sizeof(int32_t) * (size_t)(2 * m.rows + p.row_blocks));
    if (users == nullptr) return EORACC_OUT_OF_MEMORY;
  }
  add_terms(&p, users);
  const eoracc_result result = multiply_packed(p, threads);
  free(users);
  return result;
}

// A few thousand rows at a time, which bounds the memory of packed X.
inline eoracc_result many_rows(const eoracc_matmul& m, const eoracc_threads& threads) {
  const int64_t element = m.x_type == EORACC_FLOAT32 ? 4 : 2;
  const int64_t width = m.activation != EORACC_IDENTITY ? m.out_features / 2 : m.out_features;
  for (int64_t first = 0; first < m.rows; first += kCallRows) {
    eoracc_matmul part = m;
    part.rows = smaller(kCallRows, m.rows - first);
    part.x = (const char*)m.x + first * m.in_features * element;
    part.y = (char*)m.y + first * width * element;
    if (m.residual != nullptr) part.residual = (const char*)m.residual + first * width * element;
    const eoracc_result result = multiply_rows(part, first, threads);
    if (result != EORACC_OK) return result;
  }
  return EORACC_OK;
}

}  // namespace
}  // namespace eoracc
