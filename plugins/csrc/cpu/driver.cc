// Few rows of X: lays out scratch, orders the steps and hands them to threads.
//
// A call is one parallel region. Its tasks take work items from an atomic counter: first rows of X
// to prepare, then tiles of lora_a (of the shared factors, and of each adapter in use), then runs
// of tiles of the weight. Long runs come first, since memory is read fastest in them, and short
// ones last, so that all tasks end together. An item spins until its inputs are ready. Running
// threads have taken the items that make these inputs, so the wait ends even if the tasks run one
// after another. A weight tile needs the down-projected X only after its own product, and hardly
// ever waits.
//
// The result of an item depends neither on its thread nor on the size of the runs.

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <atomic>

#include "cpu/found_once.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/low_rank.inl"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

namespace eoracc {
namespace {

constexpr int64_t kMaxThreads = 256;
constexpr int64_t kAlignment = 64;
constexpr int64_t kRunBytes = 32 << 10;    // codes in the shortest run of tiles
constexpr int64_t kAloneBytes = 32 << 10;  // codes below which waking a thread takes longer

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t processors() {
  static FoundOnce count;
  return count.get([] { return larger(1, smaller(kMaxThreads, sysconf(_SC_NPROCESSORS_ONLN))); });
}

// The largest power of two up to 32 that divides the group size, a multiple of 8.
int64_t block_of(int64_t group_size) {
  return group_size % 32 == 0 ? 32 : group_size % 16 == 0 ? 16 : 8;
}

// Pieces of one allocation, each aligned. Measured first, with a null base, and then laid out.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * (int64_t)sizeof(T), kAlignment);
    return (T*)piece;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Rows of activations under preparation.
struct Buffer {
  int64_t stride, block;
  float* values;
  int8_t* codes;
  float* scales;
  int32_t* minus;

  void take(Scratch& scratch, int64_t rows, bool int8) {
    values = scratch.take<float>(rows * stride);
    codes = int8 ? scratch.take<int8_t>(rows * stride) : nullptr;
    scales = int8 ? scratch.take<float>(rows * stride / block) : nullptr;
    minus = int8 ? scratch.take<int32_t>(rows * stride / block) : nullptr;
  }

  // The columns [first, first + columns), a multiple of kUnit on, of rows from `row` on.
  Activations view(int64_t row, int64_t rows, int64_t first, int64_t columns) const {
    const bool int8 = codes != nullptr;
    const int64_t at = row * stride + first;
    return {rows,
            columns,
            stride,
            block,
            values + at,
            int8 ? codes + at : nullptr,
            int8 ? scales + at / block : nullptr,
            int8 ? minus + at / block : nullptr};
  }
};

// Consecutive rows of the current block that use the same adapter.
struct Run {
  int64_t adapter, first, rows;
};

// A low-rank term with its scratch.
struct Term {
  LowRank factors;
  Buffer down;           // down-projected rows, each by the adapter that it uses
  int64_t part_stride;   // columns of `down` between parts
  int64_t rows_at_once;  // most rows that are multiplied together

  // For the current block.
  int64_t run_count, used_count;
  Run runs[kFewRows];
  int64_t used[kFewRows];                     // the adapters of the runs, each once
  int32_t ranks[kFewRows][EORACC_MAX_PARTS];  // of each of them
  int64_t items;                              // tiles of their lora_a
};

struct Product {
  const FewRows* kernels;
  eoracc_matmul m;
  bool int8;  // activations are rounded to int8
  Tiles weight;
  Term terms[2];
  int64_t term_count;
  Output output;
  int64_t parts;
  int64_t tile_part_ends[EORACC_MAX_PARTS];  // tile behind the last one of each part
  int64_t out_tiles;                         // tiles of y
  int64_t shortest_run;                      // in tiles of y

  int64_t first_row, rows;  // of the block at hand
  bool at_once;             // its tiles are multiplied kTilesAtOnce at a time
  Buffer x;

  int64_t down_items, tasks;
  std::atomic<int64_t> next, prepared, projected, next_tile;
  std::atomic<bool> down_ready;
};

// Spins until the condition holds, and yields the processor if that takes long.
template <typename Condition>
void wait_for(Condition condition) {
  for (int64_t spins = 0; !condition(); ++spins) {
    if (spins > 4096) {
      sched_yield();
      continue;
    }
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

void wait_for_rows(const Product& p) {
  wait_for([&] { return p.prepared.load(std::memory_order_acquire) == p.rows; });
}

void quantize(const Product& p, const Buffer& buffer, int64_t row) {
  const int64_t at = row * buffer.stride, block = at / buffer.block;
  p.kernels->quantize_row(buffer.values + at, buffer.stride, buffer.block, buffer.codes + at,
                          buffer.scales + block, buffer.minus + block);
}

void prepare_row(Product& p, int64_t row) {
  const int64_t columns = p.m.in_features;
  float* values = p.x.values + row * p.x.stride;
  const char* x = (const char*)p.m.x + (p.first_row + row) * columns * element_bytes(p.m.x_type);
  p.kernels->read_row(p.m.x_type, x, columns, p.x.stride, values);
  if (p.m.norm_weight != nullptr) {
    p.kernels->normalize_row(p.m.norm_weight, columns, p.m.norm_epsilon, values);
  }
  if (p.int8) quantize(p, p.x, row);
  p.prepared.fetch_add(1, std::memory_order_release);
}

// The part that a tile of the weight belongs to.
int64_t part_of(const Product& p, int64_t tile) {
  int64_t part = 0;
  while (part + 1 < p.parts && tile >= p.tile_part_ends[part]) ++part;
  return part;
}

// Some tiles of a factor or of the weight, 1 or kTilesAtOnce of them, `stride` apart.
struct Streams {
  int64_t first, stride, count;

  int64_t tile(int64_t stream) const { return first + stream * stride; }
};

// Adds rows of x times one tile to sums [rows, 16].
void multiply_one(const Product& p, const Weight& factor, const Activations& x, int64_t tile,
                  float* sums) {
  if (factor.is_dense()) {
    p.kernels->dense_tile(x, factor.dense, tile, sums);
  } else if (p.int8) {
    p.kernels->int8_tile(x, factor.tiles, tile, sums);
  } else {
    p.kernels->float_tile(x, factor.tiles, tile, sums);
  }
}

// The same for those rows of the block, whose sums these are, that use adapter `adapter`.
void multiply_users(const Product& p, const Term& term, int64_t adapter, const Weight& factor,
                    const Buffer& x, int64_t first, int64_t columns, int64_t tile, float* sums) {
  for (int64_t i = 0; i < term.run_count; ++i) {
    const Run& run = term.runs[i];
    if (run.adapter != adapter) continue;
    const int64_t end = run.first + run.rows;
    for (int64_t row = run.first; row < end; row += term.rows_at_once) {
      const int64_t rows = smaller(term.rows_at_once, end - row);
      multiply_one(p, factor, x.view(row, rows, first, columns), tile, sums + row * kTile);
    }
  }
}

// Multiplies the rows that use the adapter with a tile of lora_a, one by one: sums are in the order
// of a row alone, so that rounding the result to int8 is the same whatever else is in the batch.
void project_rows(const Product& p, const Term& term, int64_t adapter, const Tiles& factor,
                  int64_t tile, float* sums) {
  for (int64_t i = 0; i < term.run_count; ++i) {
    const Run& run = term.runs[i];
    if (run.adapter != adapter) continue;
    for (int64_t row = run.first; row < run.first + run.rows; ++row) {
      p.kernels->int8_factor_tile(p.x.view(row, 1, 0, p.m.in_features), factor, tile,
                                  sums + row * kTile);
    }
  }
}

// Keeps the sums [rows, 16] of a tile of lora_a for the rows that use the adapter.
void keep_down(const Term& term, int64_t adapter, int64_t tile, const float* scales,
               const float* sums) {
  const LowRankPart& part = part_of_down(term.factors, tile);
  const int64_t rank = (tile - part.first_down) * kTile;
  const int64_t ranks = smaller(kTile, part.rank - rank);
  const int64_t column = (&part - term.factors.parts) * term.part_stride + rank;
  for (int64_t i = 0; i < term.run_count; ++i) {
    const Run& run = term.runs[i];
    if (run.adapter != adapter) continue;
    for (int64_t row = run.first; row < run.first + run.rows; ++row) {
      float* down = term.down.values + row * term.down.stride + column;
      memcpy(down, sums + row * kTile, (size_t)ranks * sizeof(float));
      for (int64_t r = 0; r < ranks && scales != nullptr; ++r) down[r] *= scales[r];
    }
  }
}

// Fetches a tile of a factor while there is something to wait for.
void fetch_tile(const Weight& factor, int64_t tile) {
  const int64_t bytes = tile_bytes_of(factor);
  const char* from =
      (const char*)(factor.is_dense() ? factor.dense.values : factor.tiles.codes) + tile * bytes;
  for (int64_t line = 0; line < bytes; line += kAlignment) __builtin_prefetch(from + line);
}

// One item of the terms' lora_a: a tile of one adapter. The task that finishes the last one rounds
// the down-projected rows to int8.
void project_down(Product& p, int64_t item) {
  const Term* of_item = p.terms;
  for (; item >= of_item->items; ++of_item) item -= of_item->items;
  const Term& term = *of_item;
  const int64_t adapter = term.used[item / term.factors.tiles], tile = item % term.factors.tiles;
  const Weight factor = down_factor(term.factors, adapter);
  const bool is_bank = term.factors.bank != nullptr;
  alignas(kAlignment) float sums[kFewRows * kTile];
  float scales[kTile];
  if (!is_bank || read_down_scales(term.factors, adapter, tile, scales)) {
    if (p.rows == 1) fetch_tile(factor, tile);
    memset(sums, 0, sizeof(float) * (size_t)(p.rows * kTile));
    wait_for_rows(p);
    if (p.int8 && !factor.is_dense() && p.kernels->int8_factor_tile != nullptr) {
      project_rows(p, term, adapter, factor.tiles, tile, sums);
    } else {
      multiply_users(p, term, adapter, factor, p.x, 0, p.m.in_features, tile, sums);
    }
    // The scales of integer factors are in the sums already.
    keep_down(term, adapter, tile, is_bank && factor.is_dense() ? scales : nullptr, sums);
  }
  if (p.projected.fetch_add(1, std::memory_order_acq_rel) + 1 < p.down_items) return;
  for (const Term& each : p.terms) {
    if (each.items == 0 || each.down.codes == nullptr) continue;
    for (int64_t row = 0; row < p.rows; ++row) quantize(p, each.down, row);
  }
  p.down_ready.store(true, std::memory_order_release);
}

// Adds the term of one adapter for some tiles to sums [count, rows, 16].
void add_up(const Product& p, const Term& term, int64_t user, const Streams& tiles, float* sums) {
  const int64_t adapter = term.used[user], first_part = part_of(p, tiles.first);
  if (tiles.count == kTilesAtOnce && first_part == part_of(p, tiles.tile(kTilesAtOnce - 1))) {
    const LowRankPart& part = term.factors.parts[first_part];
    const int64_t ranks = term.ranks[user][first_part];
    if (ranks == 0) return;
    const Weight factor = up_factor(term.factors, adapter, part);
    if (!factor.is_dense()) {
      p.kernels->int8_tiles(term.down.view(0, 1, first_part * term.part_stride, ranks),
                            factor.tiles, tiles.first - part.first_tile, tiles.stride, sums);
      return;
    }
  }
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t at = part_of(p, tiles.tile(t)), ranks = term.ranks[user][at];
    if (ranks == 0) continue;
    const LowRankPart& part = term.factors.parts[at];
    Weight factor = up_factor(term.factors, adapter, part);
    if (!factor.is_dense()) factor.tiles.columns = ranks;
    multiply_users(p, term, adapter, factor, term.down, at * term.part_stride, ranks,
                   tiles.tile(t) - part.first_tile, sums + t * p.rows * kTile);
  }
}

// Tiles of the weight with their low-rank terms, sums [count, rows, 16].
void multiply_tiles(const Product& p, const Streams& tiles, float* sums) {
  memset(sums, 0, sizeof(float) * (size_t)(tiles.count * p.rows * kTile));
  const Activations x = p.x.view(0, p.rows, 0, p.m.in_features);
  if (tiles.count == kTilesAtOnce) {
    p.kernels->int8_tiles(x, p.weight, tiles.first, tiles.stride, sums);
  } else {
    (p.int8 ? p.kernels->int8_tile : p.kernels->float_tile)(x, p.weight, tiles.first, sums);
  }
  if (p.down_items == 0) return;
  wait_for([&] { return p.down_ready.load(std::memory_order_acquire); });
  for (int64_t i = 0; i < p.term_count; ++i) {
    const Term& term = p.terms[i];
    for (int64_t user = 0; user < term.used_count; ++user) add_up(p, term, user, tiles, sums);
  }
}

void multiply_and_finish(const Product& p, const Streams& tiles) {
  alignas(kAlignment) float sums[kFewRows * kTile], gates[kFewRows * kTile];
  const int64_t gate_width = p.output.gate_width;
  if (gate_width != 0) multiply_tiles(p, tiles, gates);
  multiply_tiles(p, {gate_width / kTile + tiles.first, tiles.stride, tiles.count}, sums);
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t column = tiles.tile(t) * kTile, at = t * p.rows * kTile;
    p.kernels->finish_tile(p.output, p.first_row, p.rows, column,
                           smaller(kTile, p.output.width - column),
                           gate_width != 0 ? gates + at : nullptr, sums + at);
  }
}

// A run is read in streams that each continue from tile to tile and never restart.
void multiply_run(const Product& p, int64_t first, int64_t last) {
  wait_for_rows(p);
  const int64_t length = p.at_once ? (last - first) / kTilesAtOnce : 0;
  for (int64_t i = 0; i < length; ++i) {
    multiply_and_finish(p, {first + i, length, kTilesAtOnce});
  }
  for (int64_t tile = first + length * kTilesAtOnce; tile < last; ++tile) {
    multiply_and_finish(p, {tile, 1, 1});
  }
}

// Takes half of a task's share of the remaining tiles; false if there are none.
bool take_run(Product& p, int64_t* first, int64_t* last) {
  *first = p.next_tile.load(std::memory_order_relaxed);
  do {
    const int64_t left = p.out_tiles - *first;
    if (left <= 0) return false;
    *last = *first + smaller(left, larger(p.shortest_run, left / (2 * p.tasks)));
  } while (!p.next_tile.compare_exchange_weak(*first, *last, std::memory_order_relaxed));
  return true;
}

void take_items(void* data, size_t) {
  Product& p = *(Product*)data;
  while (true) {
    const int64_t item = p.next.fetch_add(1, std::memory_order_relaxed);
    if (item >= p.rows + p.down_items) break;
    if (item < p.rows) {
      prepare_row(p, item);
    } else {
      project_down(p, item - p.rows);
    }
  }
  int64_t first, last;
  while (take_run(p, &first, &last)) multiply_run(p, first, last);
}

void lay_out(Product& p, Scratch& scratch, int64_t rows) {
  p.x.take(scratch, rows, p.int8);
  for (int64_t i = 0; i < p.term_count; ++i) {
    Term& term = p.terms[i];
    term.down.take(scratch, rows, p.int8 && !term.factors.is_b_dense);
  }
}

void add_term(Product& p, const LowRank& factors) {
  if (factors.rank == 0) return;
  Term& term = p.terms[p.term_count++];
  term.factors = factors;
  term.part_stride = round_up(factors.rank, kUnit);
  term.down.stride = p.parts * term.part_stride;
  term.down.block = kUnit;
  // Kernels may sum floats in another order for more rows. An adapter's term must not depend on how
  // many other rows use the same adapter: two rows are summed like one.
  const bool exact = p.int8 && !factors.a.is_dense();
  term.rows_at_once = factors.bank == nullptr || exact ? kFewRows : 2;
}

// Determines which adapters the rows of the current block use. An adapter of padding ranks alone
// counts as none.
void find_users(const Product& p, Term& term) {
  term.run_count = term.used_count = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t adapter = adapter_of(term.factors, p.first_row + row);
    if (adapter < 0) continue;
    Run* last = term.run_count > 0 ? &term.runs[term.run_count - 1] : nullptr;
    if (last != nullptr && last->adapter == adapter && last->first + last->rows == row) {
      ++last->rows;
      continue;
    }
    int64_t user = 0;
    while (user < term.used_count && term.used[user] != adapter) ++user;
    if (user == term.used_count) {
      int64_t ranks = 0;
      for (int64_t part = 0; part < p.parts; ++part) {
        term.ranks[user][part] = (int32_t)ranks_of(term.factors, adapter, part);
        ranks += term.ranks[user][part];
      }
      if (ranks == 0) continue;
      term.used[term.used_count++] = adapter;
    }
    term.runs[term.run_count++] = {adapter, row, 1};
  }
}

}  // namespace

eoracc_result multiply_few_rows(const FewRows& kernels, const eoracc_matmul& m,
                                const eoracc_threads& threads) {
  Product p{};
  p.kernels = &kernels;
  p.m = m;
  p.int8 = m.accuracy_level == 4;
  p.weight.columns = m.in_features;
  p.weight.groups = ceil_div(m.in_features, m.group_size);
  p.weight.group_size = m.group_size;
  p.weight.tile_bytes = (int64_t)eoracc_tile_bytes(m.in_features, m.bits);
  p.weight.bits = m.bits;
  p.weight.scales_type = m.scales_type;
  p.weight.codes = m.codes;
  p.weight.scales = m.scales;
  p.weight.zero_points = m.zero_points;

  p.parts = part_count(m);
  int64_t features = 0;
  for (int64_t part = 0; part + 1 < p.parts; ++part) {
    features += m.parts[part];
    p.tile_part_ends[part] = features / kTile;
  }
  const bool gated = m.activation != EORACC_IDENTITY;
  const int64_t width = gated ? m.out_features / 2 : m.out_features;
  p.output = {m.x_type, m.activation, width, gated ? width : 0, m.bias, m.residual, m.y};
  p.out_tiles = ceil_div(width, kTile);
  const int64_t out_tile_bytes = p.weight.tile_bytes * (gated ? 2 : 1);
  p.shortest_run = ceil_div(kRunBytes, out_tile_bytes);

  p.x.stride = round_up(m.in_features, kUnit);
  p.x.block = block_of(m.group_size);
  add_term(p, shared_factors(m));
  add_term(p, bank_factors(m));
  const int64_t block_rows = smaller(m.rows, kFewRows);
  Scratch measure(nullptr);
  lay_out(p, measure, block_rows);
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, (size_t)measure.used()) != 0) {
    return EORACC_OUT_OF_MEMORY;
  }
  Scratch scratch((char*)memory);
  lay_out(p, scratch, block_rows);

  const bool alone = p.out_tiles * out_tile_bytes < kAloneBytes;
  for (p.first_row = 0; p.first_row < m.rows; p.first_row += kFewRows) {
    p.rows = smaller(kFewRows, m.rows - p.first_row);
    p.next = p.prepared = p.projected = p.next_tile = 0;
    p.down_ready = false;
    p.at_once = p.rows == 1 && p.int8 && kernels.int8_tiles != nullptr;
    p.down_items = 0;
    for (int64_t i = 0; i < p.term_count; ++i) {
      Term& term = p.terms[i];
      // The padding ranks of a part, and rows without an adapter.
      memset(term.down.values, 0, sizeof(float) * (size_t)(p.rows * term.down.stride));
      find_users(p, term);
      term.items = term.used_count * term.factors.tiles;
      p.down_items += term.items;
    }
    const int64_t items = p.rows + p.down_items + ceil_div(p.out_tiles, p.shortest_run);
    p.tasks = alone ? 1 : smaller(processors(), items);
    if (p.tasks == 1) {
      take_items(&p, 0);
    } else {
      threads.run(threads.pool, (size_t)p.tasks, take_items, &p);
    }
  }
  free(memory);
  return EORACC_OK;
}

}  // namespace eoracc
