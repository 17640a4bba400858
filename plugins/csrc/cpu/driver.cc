// Few rows of X: lays out scratch, orders the steps and hands them to threads.
//
// A call is one parallel region. Its tasks take work items by an atomic counter: first rows of X to
// be prepared, then tiles of lora_a, then runs of tiles of the weight, long ones first, since
// memory is read fastest in long runs, and short ones last, so that all tasks end together. An item
// that needs what earlier ones make waits for it by spinning; those were taken before it, so that
// running threads hold them, and it cannot wait forever even if the tasks run one after another. A
// weight tile needs the down-projected X only when its own product is done, so that it hardly ever
// waits.
//
// No item's result depends on the thread that computes it or on the size of the runs.

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <atomic>

#include "cpu/kernels.h"
#include "cpu/layout.h"
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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t processors() {
  static const int64_t count = larger(1, smaller(kMaxThreads, sysconf(_SC_NPROCESSORS_ONLN)));
  return count;
}

int64_t element_bytes(int32_t type) { return type == EORACC_FLOAT32 ? 4 : 2; }

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

// Rows of activations while they are made.
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

  // The columns [first, first + columns), where `first` is a multiple of kUnit.
  Activations view(int64_t rows, int64_t first, int64_t columns) const {
    const bool int8 = codes != nullptr;
    return {rows,
            columns,
            stride,
            block,
            values + first,
            int8 ? codes + first : nullptr,
            int8 ? scales + first / block : nullptr,
            int8 ? minus + first / block : nullptr};
  }
};

// A low-rank factor, as tiles of either kind.
struct Factor {
  bool int8;
  Tiles tiles;
  DenseTiles dense;
};

Factor factor_of(int32_t type, const void* values, const float* scales, int64_t columns) {
  Factor factor{};
  factor.int8 = type == EORACC_INT8;
  factor.dense = {columns, type, values};
  factor.tiles.columns = columns;
  factor.tiles.groups = 1;
  factor.tiles.group_size = round_up(columns, kUnit);
  factor.tiles.tile_bytes = (int64_t)eoracc_tile_bytes(columns, 8);
  factor.tiles.bits = 8;
  factor.tiles.scales_type = EORACC_FLOAT32;
  factor.tiles.codes = (const uint8_t*)values;
  factor.tiles.scales = scales;
  return factor;
}

struct Product {
  const FewRows* kernels;
  eoracc_matmul m;
  bool int8;  // activations are rounded to int8
  Tiles weight;
  Factor lora_a, lora_b;
  Output output;
  int64_t parts;
  int64_t tile_part_ends[EORACC_MAX_PARTS];  // tile behind the last one of each part
  int64_t part_stride;                       // columns of `down` between parts
  int64_t out_tiles;                         // tiles of y
  int64_t shortest_run;                      // in tiles of y

  int64_t first_row, rows;  // of the block at hand
  bool at_once;             // its tiles are multiplied kTilesAtOnce at a time
  int64_t down_at_once;     // tiles of lora_a in an item
  Buffer x, down;

  int64_t down_items, tasks;
  std::atomic<int64_t> next, prepared, projected, next_tile;
  std::atomic<bool> down_ready;
};

// Spins until the condition holds, and gives the processor away where that takes long.
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

// Adds x times one tile to sums [rows, 16].
void multiply_one(const Product& p, const Factor& factor, const Activations& x, int64_t tile,
                  float* sums) {
  if (!factor.int8) {
    p.kernels->dense_tile(x, factor.dense, tile, sums);
  } else if (p.int8) {
    p.kernels->int8_tile(x, factor.tiles, tile, sums);
  } else {
    p.kernels->float_tile(x, factor.tiles, tile, sums);
  }
}

// One item of lora_a. Whoever finishes the last one rounds the down-projected rows to int8.
void project_down(Product& p, int64_t item) {
  alignas(kAlignment) float sums[kFewRows * kTile];
  wait_for_rows(p);
  const int64_t first = item * p.down_at_once;
  const int64_t count = smaller(p.down_at_once, ceil_div(p.parts * p.m.rank, kTile) - first);
  memset(sums, 0, sizeof(float) * (size_t)(count * p.rows * kTile));
  const Activations x = p.x.view(p.rows, 0, p.m.in_features);
  if (count == kTilesAtOnce) {
    p.kernels->int8_tiles(x, p.lora_a.tiles, first, 1, sums);
  } else {
    for (int64_t t = 0; t < count; ++t) {
      multiply_one(p, p.lora_a, x, first + t, sums + t * p.rows * kTile);
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const int64_t rank = (first + t) * kTile % p.m.rank, part = (first + t) * kTile / p.m.rank;
    const int64_t ranks = smaller(kTile, p.m.rank - rank);
    for (int64_t row = 0; row < p.rows; ++row) {
      memcpy(p.down.values + row * p.down.stride + part * p.part_stride + rank,
             sums + (t * p.rows + row) * kTile, (size_t)ranks * sizeof(float));
    }
  }
  if (p.projected.fetch_add(1, std::memory_order_acq_rel) + 1 < p.down_items) return;
  if (p.down.codes != nullptr) {
    for (int64_t row = 0; row < p.rows; ++row) quantize(p, p.down, row);
  }
  p.down_ready.store(true, std::memory_order_release);
}

// Tiles of the weight with their low-rank terms, sums [count, rows, 16].
void multiply_tiles(const Product& p, const Streams& tiles, float* sums) {
  memset(sums, 0, sizeof(float) * (size_t)(tiles.count * p.rows * kTile));
  const Activations x = p.x.view(p.rows, 0, p.m.in_features);
  if (tiles.count == kTilesAtOnce) {
    p.kernels->int8_tiles(x, p.weight, tiles.first, tiles.stride, sums);
  } else {
    (p.int8 ? p.kernels->int8_tile : p.kernels->float_tile)(x, p.weight, tiles.first, sums);
  }
  if (p.down_items == 0) return;
  wait_for([&] { return p.down_ready.load(std::memory_order_acquire); });
  const auto down = [&](int64_t part) {
    return p.down.view(p.rows, part * p.part_stride, p.m.rank);
  };
  const int64_t part = part_of(p, tiles.first);
  if (tiles.count == kTilesAtOnce && p.lora_b.int8 &&
      part == part_of(p, tiles.tile(kTilesAtOnce - 1))) {
    p.kernels->int8_tiles(down(part), p.lora_b.tiles, tiles.first, tiles.stride, sums);
    return;
  }
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t tile = tiles.tile(t);
    multiply_one(p, p.lora_b, down(part_of(p, tile)), tile, sums + t * p.rows * kTile);
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

// A run is read in streams that each go on from tile to tile, so that none ever starts anew.
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

// Takes half of a task's share of the tiles that are left; false where none are.
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
  if (p.m.rank > 0) p.down.take(scratch, rows, p.int8 && p.lora_b.int8);
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
  p.lora_a = factor_of(m.lora_a_type, m.lora_a, m.lora_a_scale, m.in_features);
  p.lora_b = factor_of(m.lora_b_type, m.lora_b, m.lora_b_scale, m.rank);

  p.parts = larger(1, m.part_count);
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
  const int64_t down_tiles = m.rank > 0 ? ceil_div(p.parts * m.rank, kTile) : 0;

  p.part_stride = round_up(m.rank, kUnit);
  p.x.stride = round_up(m.in_features, kUnit);
  p.x.block = block_of(m.group_size);
  p.down.stride = p.parts * p.part_stride;
  p.down.block = kUnit;
  const int64_t block_rows = smaller(m.rows, kFewRows);
  Scratch measure(nullptr);
  lay_out(p, measure, block_rows);
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, (size_t)measure.used()) != 0) {
    return EORACC_OUT_OF_MEMORY;
  }
  Scratch scratch((char*)memory);
  lay_out(p, scratch, block_rows);
  // The ranks that pad a part stay 0.
  if (down_tiles > 0) {
    memset(p.down.values, 0, sizeof(float) * (size_t)(block_rows * p.down.stride));
  }

  const bool alone = p.out_tiles * out_tile_bytes < kAloneBytes;
  for (p.first_row = 0; p.first_row < m.rows; p.first_row += kFewRows) {
    p.rows = smaller(kFewRows, m.rows - p.first_row);
    p.next = p.prepared = p.projected = p.next_tile = 0;
    p.down_ready = false;
    p.at_once = p.rows == 1 && p.int8 && kernels.int8_tiles != nullptr;
    p.down_at_once = p.at_once && p.lora_a.int8 ? kTilesAtOnce : 1;
    p.down_items = ceil_div(down_tiles, p.down_at_once);
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
