// The low-rank terms for both drivers: one kind of term, with the factors that all rows share
// (lora_a, lora_b) or with those of the adapters in a bank.

#include "cpu/kernels.h"
#include "cpu/numbers.inl"

namespace eoracc {
namespace {

// A factor, or any other weight: n-bit tiles if they have codes, or else tiles of a float type.
struct Weight {
  Tiles tiles;
  DenseTiles dense;

  bool is_dense() const { return tiles.codes == nullptr; }
};

// What a part has of the factors.
struct LowRankPart {
  int64_t rank;
  int64_t first_down;  // tile of lora_a
  int64_t first_tile;  // of the weight
  Weight b;            // its tiles of lora_b, of adapter 0
};

struct LowRank {
  int64_t rank;   // the largest of a part, 0 where there is no such term
  int64_t tiles;  // of lora_a: those of each part one after the other
  Weight a;       // of adapter 0
  bool is_b_dense;
  int64_t part_count;
  LowRankPart parts[EORACC_MAX_PARTS];
  int64_t adapters;
  int64_t a_bytes, b_bytes;    // from one adapter to the next
  int64_t a_scales, b_scales;  // likewise
  const eoracc_bank* bank;     // null where all rows share the factors
};

inline int64_t element_bytes(int32_t type) { return type == EORACC_FLOAT32 ? 4 : 2; }

inline int64_t part_count(const eoracc_matmul& m) { return m.part_count > 1 ? m.part_count : 1; }

inline int64_t part_tiles(const eoracc_matmul& m, int64_t part) {
  return ceil_div(m.part_count > 1 ? m.parts[part] : m.out_features, kTile);
}

inline Weight factor_of(int32_t type, const void* values, const float* scales, int64_t columns) {
  Weight factor{};
  if (type != EORACC_INT8 && type != EORACC_INT4) {
    factor.dense = {columns, type, values};
    return factor;
  }
  Tiles& tiles = factor.tiles;
  tiles.columns = columns;
  tiles.groups = 1;
  tiles.group_size = ceil_div(columns, kUnit) * kUnit;
  tiles.bits = type == EORACC_INT8 ? 8 : 4;
  tiles.tile_bytes = ceil_div(columns, type == EORACC_INT8 ? 4 : 8) * 64;
  tiles.scales_type = EORACC_FLOAT32;
  tiles.codes = (const uint8_t*)values;
  tiles.scales = scales;
  return factor;
}

inline int64_t tile_bytes_of(const Weight& factor) {
  const DenseTiles& dense = factor.dense;
  return factor.is_dense() ? dense.columns * kTile * element_bytes(dense.type)
                           : factor.tiles.tile_bytes;
}

inline Weight moved(Weight factor, int64_t bytes, int64_t scales) {
  if (factor.is_dense()) {
    factor.dense.values = (const char*)factor.dense.values + bytes;
  } else {
    factor.tiles.codes += bytes;
    factor.tiles.scales = (const float*)factor.tiles.scales + scales;
  }
  return factor;
}

// Finds what each part has of factors whose lora_b begins at `values`. `ranks` is null where all
// have the rank of the term.
inline void add_parts(LowRank* term, const eoracc_matmul& m, const int64_t* ranks, int32_t type,
                      const void* values, const float* scales) {
  term->is_b_dense = type != EORACC_INT8 && type != EORACC_INT4;
  term->part_count = part_count(m);
  int64_t first_tile = 0;
  for (int64_t i = 0; i < term->part_count; ++i) {
    LowRankPart& part = term->parts[i];
    const int64_t tiles = part_tiles(m, i);
    part.rank = ranks == nullptr ? term->rank : ranks[i];
    part.first_down = term->tiles;
    part.first_tile = first_tile;
    first_tile += tiles;
    term->tiles += ceil_div(part.rank, kTile);
    if (part.rank == 0) continue;  // and so nothing of it is stored
    part.b = moved(factor_of(type, values, scales, part.rank), term->b_bytes, term->b_scales);
    term->b_bytes += tiles * tile_bytes_of(part.b);
    term->b_scales += tiles * kTile;
  }
}

// The factors that all rows share.
inline LowRank shared_factors(const eoracc_matmul& m) {
  LowRank term{};
  if (m.rank == 0) return term;
  term.rank = m.rank;
  term.adapters = 1;
  term.a = factor_of(m.lora_a_type, m.lora_a, m.lora_a_scale, m.in_features);
  add_parts(&term, m, m.ranks, m.lora_b_type, m.lora_b, m.lora_b_scale);
  return term;
}

inline LowRank bank_factors(const eoracc_matmul& m) {
  LowRank term{};
  if (m.bank == nullptr || m.bank->rank == 0) return term;
  const eoracc_bank& bank = *m.bank;
  term.rank = bank.rank;
  term.adapters = bank.count;
  term.a = factor_of(bank.type, bank.a, bank.a_scale, m.in_features);
  add_parts(&term, m, nullptr, bank.type, bank.b, bank.b_scale);
  term.a_bytes = term.tiles * tile_bytes_of(term.a);
  term.a_scales = term.tiles * kTile;
  term.bank = m.bank;
  return term;
}

inline Weight down_factor(const LowRank& term, int64_t adapter) {
  return moved(term.a, adapter * term.a_bytes, adapter * term.a_scales);
}

// The tiles of lora_b of a part, whose rank is not 0.
inline Weight up_factor(const LowRank& term, int64_t adapter, const LowRankPart& part) {
  return moved(part.b, adapter * term.b_bytes, adapter * term.b_scales);
}

// The part that a tile of lora_a belongs to.
inline const LowRankPart& part_of_down(const LowRank& term, int64_t tile) {
  const LowRankPart* part = term.parts;
  while (part + 1 < term.parts + term.part_count && tile >= part[1].first_down) ++part;
  return *part;
}

// The adapter that row `row` of x uses, negative for none.
inline int64_t adapter_of(const LowRank& term, int64_t row) {
  if (term.bank == nullptr) return 0;
  int32_t adapter;
  memcpy(&adapter, term.bank->index + row / term.bank->index_rows, sizeof adapter);
  return adapter;
}

// Reads the scales of the down-projected values of a tile of an adapter's lora_a. Returns false if
// all are 0: such a tile only pads the adapter to the rank of its bank.
inline bool read_down_scales(const LowRank& term, int64_t adapter, int64_t tile, float* scales) {
  memcpy(scales, term.bank->a_scale + adapter * term.a_scales + tile * kTile,
         kTile * sizeof(float));
  bool any = false;
  for (int64_t lane = 0; lane < kTile; ++lane) any |= scales[lane] != 0;
  return any;
}

// Ranks of a part, without the trailing tiles of padding of an adapter.
inline int64_t ranks_of(const LowRank& term, int64_t adapter, int64_t part) {
  if (term.bank == nullptr) return term.parts[part].rank;
  const int64_t tiles = term.rank / kTile;
  float scales[kTile];
  for (int64_t tile = tiles; tile > 0; --tile) {
    if (read_down_scales(term, adapter, part * tiles + tile - 1, scales)) return tile * kTile;
  }
  return 0;
}

}  // namespace
}  // namespace eoracc
