#include "tests/native/problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace eoracc::testing {
namespace {

constexpr double kRoundoff = 0x1p-24;  // of float32
constexpr int64_t kTile = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- numbers

// `bits` of the significand are kept, nearest even; the exponent is that of a float.
float keep_bits(float value, int dropped) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const uint32_t odd = (word >> dropped) & 1;
  word += ((uint32_t{1} << (dropped - 1)) - 1) + odd;
  word &= ~((uint32_t{1} << dropped) - 1);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Values here are normal in float16 or zero, so that its exponent range does not matter.
float rounded(Type type, double value) {
  const float single = static_cast<float>(value);
  if (type == Type::kFloat16) return std::fabs(single) < 0x1p-14F ? 0.0F : keep_bits(single, 13);
  if (type == Type::kBfloat16) return keep_bits(single, 16);
  return single;
}

void append(Type type, float value, Bytes* out) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if (type == Type::kFloat16) {
    const uint32_t magnitude = word & 0x7fffffff;
    uint32_t half = magnitude == 0 ? 0 : (magnitude - 0x38000000) >> 13;
    if (magnitude >= 0x7f800000) half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    word = (word >> 16 & 0x8000) | half;
  } else if (type == Type::kBfloat16) {
    word >>= 16;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(&word);
  out->insert(out->end(), bytes, bytes + size_of(type));
}

struct Matrix {
  int64_t rows = 0, columns = 0;
  std::vector<double> values;

  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), columns(c), values(static_cast<size_t>(r * c)) {}
  double& at(int64_t r, int64_t c) { return values[static_cast<size_t>(r * columns + c)]; }
  double at(int64_t r, int64_t c) const { return values[static_cast<size_t>(r * columns + c)]; }
  // Zero outside.
  double padded(int64_t r, int64_t c) const { return r < rows && c < columns ? at(r, c) : 0; }
};

// Copies a matrix to the first columns of `whole`, from row `first` on.
void place(const Matrix& matrix, int64_t first, Matrix* whole) {
  for (int64_t r = 0; r < matrix.rows; ++r) {
    for (int64_t c = 0; c < matrix.columns; ++c) whole->at(first + r, c) = matrix.at(r, c);
  }
}

// ---- kernel order

int64_t chunk_columns(int bits) { return bits == 8 ? 4 : bits == 4 ? 8 : bits == 3 ? 32 : 16; }

// One bit of `value` at a time, by the definition of the layout.
Bytes pack_codes(const Matrix& codes, int bits) {
  const int64_t chunk = chunk_columns(bits), chunks = ceil_div(codes.columns, chunk);
  const int64_t chunk_bytes = kTile * chunk * bits / 8;
  Bytes out(static_cast<size_t>(ceil_div(codes.rows, kTile) * chunks * chunk_bytes));
  for (int64_t n = 0; n < codes.rows; ++n) {
    for (int64_t k = 0; k < codes.columns; ++k) {
      const int64_t base = (n / kTile * chunks + k / chunk) * chunk_bytes;
      const int64_t quad = k % chunk / 4, lane = n % kTile * 4 + k % 4;
      const auto code = static_cast<uint32_t>(codes.at(n, k));
      const auto put = [&](int64_t vector, int64_t shift, uint32_t value) {
        out[static_cast<size_t>(base + vector * 64 + lane)] |= static_cast<uint8_t>(value << shift);
      };
      switch (bits) {
        case 2:
          put(0, 2 * quad, code);
          break;
        case 3:
          put(quad / 4, 2 * (quad % 4), code & 3);
          put(2, quad, code >> 2);
          break;
        case 4:
          put(0, 4 * quad, code);
          break;
        case 6:
          put(quad / 2, 4 * (quad % 2), code & 15);
          put(2, 2 * quad, code >> 4);
          break;
        default:
          put(0, 0, code);
      }
    }
  }
  return out;
}

// [rows, columns] -> [ceil(rows / 16), columns, 16].
Bytes pack_rows(const Matrix& matrix, Type type) {
  Bytes out;
  for (int64_t tile = 0; tile < ceil_div(matrix.rows, kTile); ++tile) {
    for (int64_t c = 0; c < matrix.columns; ++c) {
      for (int64_t r = 0; r < kTile; ++r) {
        append(type, static_cast<float>(matrix.padded(tile * kTile + r, c)), &out);
      }
    }
  }
  return out;
}

Bytes pack_bytes(const Matrix& matrix) {
  Bytes out;
  for (int64_t tile = 0; tile < ceil_div(matrix.rows, kTile); ++tile) {
    for (int64_t c = 0; c < matrix.columns; ++c) {
      for (int64_t r = 0; r < kTile; ++r) {
        out.push_back(static_cast<uint8_t>(matrix.padded(tile * kTile + r, c)));
      }
    }
  }
  return out;
}

// ---- drawing

class Draw {
 public:
  explicit Draw(std::mt19937_64& random) : random_(random) {}

  double normal() { return normal_(random_); }
  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random_);
  }
  int64_t integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

 private:
  std::mt19937_64& random_;
  std::normal_distribution<double> normal_;
};

bool is_integer(Type type) { return type == Type::kInt8 || type == Type::kInt4; }

// Draws a factor, appends it in kernel order, and returns what it stands for.
Matrix draw_factor(Draw& draw, int64_t rows, int64_t columns, double size, Type type, Bytes* stored,
                   Bytes* stored_scale) {
  Matrix values(rows, columns);
  if (!is_integer(type)) {
    for (double& value : values.values) value = rounded(type, draw.normal() * size);
    const Bytes packed = pack_rows(values, type);
    stored->insert(stored->end(), packed.begin(), packed.end());
    return values;
  }
  // Rows and columns that fill up tiles and chunks stand for 0.
  const int bits = type == Type::kInt8 ? 8 : 4;
  const int64_t zero = int64_t{1} << (bits - 1), chunk = chunk_columns(bits);
  Matrix codes(ceil_div(rows, kTile) * kTile, ceil_div(columns, chunk) * chunk);
  for (int64_t r = 0; r < codes.rows; ++r) {
    const auto row_scale = static_cast<float>(
        r < rows ? 2 * size * draw.uniform(0.5, 1.5) / static_cast<double>(zero) : 0);
    append(Type::kFloat32, row_scale, stored_scale);
    for (int64_t c = 0; c < codes.columns; ++c) {
      const bool inside = r < rows && c < columns;
      const int64_t value = inside ? draw.integer(1 - zero, zero - 1) : 0;
      codes.at(r, c) = static_cast<double>(value + zero);
      if (inside) values.at(r, c) = static_cast<double>(value) * row_scale;
    }
  }
  const Bytes packed = pack_codes(codes, bits);
  stored->insert(stored->end(), packed.begin(), packed.end());
  return values;
}

// Low-rank factors as they are meant: a [parts * rank, K], b [N, rank].
struct Term {
  int64_t rank;
  Matrix a, b;
};

// Draws an adapter. Some tiles of ranks only fill it up: their scale is 0, whatever lies in them.
Term draw_adapter(Draw& draw, const Shape& shape, Bytes* a, Bytes* b, Bytes* a_scale,
                  Bytes* b_scale) {
  const int64_t rank = shape.adapter_rank, ranks = shape.part_count() * rank;
  Term term{rank, {}, {}};
  Bytes scales;
  term.a = draw_factor(draw, ranks, shape.in_features, 0.25, shape.adapter_type, a, &scales);
  term.b = draw_factor(draw, shape.out_features, rank, 0.25, shape.adapter_type, b, b_scale);
  for (int64_t tile = 0; tile < ranks / kTile; ++tile) {
    const bool fills_up = draw.integer(0, 3) == 0;
    for (int64_t r = tile * kTile; r < (tile + 1) * kTile; ++r) {
      float scale = 1;
      if (is_integer(shape.adapter_type)) {
        std::memcpy(&scale, scales.data() + 4 * r, sizeof scale);
      }
      const double weight = fills_up ? 0 : is_integer(shape.adapter_type) ? 1 : 1.5;
      append(Type::kFloat32, static_cast<float>(scale * weight), a_scale);
      for (int64_t k = 0; k < shape.in_features; ++k) term.a.at(r, k) *= weight;
    }
  }
  return term;
}

double act(Activation activation, double x) {
  if (activation == Activation::kSilu) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

// Largest magnitude in each run of `block`, repeated for every element of the run.
std::vector<double> block_peaks(const std::vector<double>& values, int64_t block) {
  std::vector<double> peaks(values.size());
  for (size_t begin = 0; begin < values.size(); begin += static_cast<size_t>(block)) {
    const size_t end = std::min(values.size(), begin + static_cast<size_t>(block));
    double peak = 0;
    for (size_t i = begin; i < end; ++i) peak = std::max(peak, std::fabs(values[i]));
    std::fill(peaks.begin() + static_cast<int64_t>(begin),
              peaks.begin() + static_cast<int64_t>(end), peak);
  }
  return peaks;
}

}  // namespace

Operand::Operand(const Bytes& bytes) : size_(bytes.size()), memory_(new uint8_t[bytes.size() + 1]) {
  std::copy(bytes.begin(), bytes.end(), memory_.get() + 1);
}

Bytes Operand::bytes() const { return Bytes(memory_.get() + 1, memory_.get() + 1 + size_); }

size_t size_of(Type type) { return type == Type::kFloat32 ? 4 : is_integer(type) ? 1 : 2; }

double read(Type type, const Bytes& bytes, size_t index) {
  uint32_t word = 0;
  std::memcpy(&word, bytes.data() + index * size_of(type), size_of(type));
  if (type == Type::kFloat16) {
    const int exponent = static_cast<int>(word >> 10 & 31),
              mantissa = static_cast<int>(word & 1023);
    const double sign = word & 0x8000 ? -1 : 1;
    if (exponent == 31) return mantissa != 0 ? std::nan("") : sign * HUGE_VAL;
    return sign *
           (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25));
  }
  if (type == Type::kBfloat16) word <<= 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

std::string Shape::describe() const {
  const char* types[] = {"float32", "float16", "bfloat16", "int8", "int4"};
  const char* activations[] = {"", " silu", " gelu_tanh"};
  std::string text = "[" + std::to_string(rows) + ", " + std::to_string(in_features) + "] x [" +
                     std::to_string(out_features) + ", " + std::to_string(in_features) + "], " +
                     std::to_string(bits) + " bits, groups of " + std::to_string(group_size) +
                     ", level " + std::to_string(level) + ", x " + types[static_cast<int>(x_type)] +
                     ", scales " + types[static_cast<int>(scales_type)] + ", rank " +
                     std::to_string(rank) + " (" + types[static_cast<int>(lora_a_type)] + ", " +
                     types[static_cast<int>(lora_b_type)] + "), " + std::to_string(part_count()) +
                     " parts";
  for (const int64_t rank : ranks) text += " of rank " + std::to_string(rank);
  text += activations[static_cast<int>(activation)];
  if (zero_points) text += " zero_points";
  if (bias) text += " bias";
  if (norm) text += " norm";
  if (residual) text += " residual";
  if (special) text += " special";
  if (adapters > 0) {
    text += ", " + std::to_string(adapters) + " adapters of rank " + std::to_string(adapter_rank) +
            " (" + types[static_cast<int>(adapter_type)] + "), one for " +
            std::to_string(index_rows) + " rows";
  }
  return text;
}

Shape draw_shape(std::mt19937_64& random) {
  const auto integer = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  const auto chance = [&](int one_in) { return integer(1, one_in) == 1; };
  const auto any_of = [&](std::initializer_list<int64_t> values) {
    return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
  };
  Shape shape;
  shape.bits = static_cast<int>(any_of({2, 3, 4, 6, 8}));
  shape.level = static_cast<int>(any_of({0, 4}));
  shape.rows = chance(3) ? 1 : chance(8) ? integer(30, 80) : integer(0, 20);
  shape.in_features = chance(2) ? 32 * integer(1, 10) : integer(1, 300);
  shape.out_features = chance(2) ? 16 * integer(1, 6) : integer(1, 90);
  shape.group_size = any_of({8, 16, 24, 32, 40, 64, 96, 128, 256, 0});
  shape.rank = chance(3) ? 0 : chance(50) ? 1024 : chance(2) ? integer(1, 40) : 16 * integer(1, 5);
  const Type floats[] = {Type::kFloat32, Type::kFloat16, Type::kBfloat16};
  const Type factors[] = {Type::kFloat32, Type::kFloat16, Type::kInt8, Type::kInt4};
  shape.x_type = chance(2) ? Type::kFloat32 : floats[integer(1, 2)];
  shape.scales_type = floats[integer(0, 1)];
  shape.lora_a_type = factors[integer(0, 3)];
  shape.lora_b_type = factors[integer(0, 3)];
  shape.zero_points = chance(2);
  shape.bias = chance(2);
  shape.norm = chance(3);
  shape.residual = chance(3);
  shape.special = chance(10) && shape.rows > 0;
  if (chance(20)) {  // enough for several tasks
    shape.in_features = integer(500, 800);
    shape.out_features = integer(200, 400);
  }
  if (chance(3)) {
    shape.rank = (shape.rank + 15) / 16 * 16;
    if (chance(2)) {
      shape.parts.assign(2, 16 * integer(1, 3));
      shape.activation = static_cast<Activation>(integer(0, 2));
    } else {
      for (int64_t part = integer(2, 4); part > 0; --part)
        shape.parts.push_back(16 * integer(1, 3));
    }
    shape.out_features = 0;
    for (const int64_t part : shape.parts) shape.out_features += part;
  }
  if (chance(3)) {
    for (int64_t part = shape.part_count(); part > 0; --part) {
      shape.ranks.push_back(chance(4) ? 0 : integer(0, 40));
    }
    shape.rank = *std::max_element(shape.ranks.begin(), shape.ranks.end());
  }
  if (chance(2)) {
    shape.adapters = integer(1, 5);
    shape.adapter_rank = 16 * integer(0, 3);
    shape.adapter_type = factors[integer(0, 3)];
    shape.index_rows = chance(3) ? shape.rows : shape.rows % 3 == 0 ? 3 : 1;
  }
  if (shape.group_size == 0) shape.group_size = ceil_div(shape.in_features, 8) * 8;
  return shape;
}

void draw_operands(const Shape& shape, std::mt19937_64& random, Operands* operands,
                   Expected* expected) {
  Draw draw(random);
  *operands = Operands();
  const int64_t K = shape.in_features, N = shape.out_features, R = shape.rank,
                P = shape.part_count();
  const int64_t groups = shape.groups();

  // The weight: codes, and a grid a group and row.
  Matrix codes(N, K), scales(N, groups), zeros(N, groups), weight(N, K);
  for (double& code : codes.values)
    code = static_cast<double>(draw.integer(0, (1 << shape.bits) - 1));
  const double step = std::ldexp(1.0, 1 - shape.bits);
  for (double& scale : scales.values) {
    scale = rounded(shape.scales_type, step * draw.uniform(0.5, 1.5));
  }
  for (double& zero : zeros.values) {
    zero = static_cast<double>(shape.zero_points ? draw.integer(0, (1 << shape.bits) - 1)
                                                 : 1 << (shape.bits - 1));
  }
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t g = k / shape.group_size;
      weight.at(n, k) = (codes.at(n, k) - zeros.at(n, g)) * scales.at(n, g);
    }
  }
  operands->codes = Operand(pack_codes(codes, shape.bits));
  operands->scales = Operand(pack_rows(scales, shape.scales_type));
  if (shape.zero_points) operands->zero_points = Operand(pack_bytes(zeros));

  // The term of all rows, if there is one, and then the adapters.
  std::vector<Term> terms;
  if (R > 0) {
    Bytes a, b, a_scale, b_scale;
    if (shape.ranks.empty()) {
      Matrix lora_a = draw_factor(draw, P * R, K, 0.25, shape.lora_a_type, &a, &a_scale);
      Matrix lora_b = draw_factor(draw, N, R, 0.25, shape.lora_b_type, &b, &b_scale);
      terms.push_back({R, std::move(lora_a), std::move(lora_b)});
    } else {
      // What the parts store one after the other is a term of the largest rank with zeros.
      Matrix lora_a(P * R, K), lora_b(N, R);
      int64_t first = 0;
      for (int64_t part = 0; part < P; ++part) {
        const int64_t rank = shape.ranks[static_cast<size_t>(part)], rows = shape.part_rows(part);
        if (rank > 0) {
          const Matrix down = draw_factor(draw, rank, K, 0.25, shape.lora_a_type, &a, &a_scale);
          const Matrix up = draw_factor(draw, rows, rank, 0.25, shape.lora_b_type, &b, &b_scale);
          place(down, part * R, &lora_a);
          place(up, first, &lora_b);
        }
        first += rows;
      }
      terms.push_back({R, std::move(lora_a), std::move(lora_b)});
    }
    operands->lora_a = Operand(a);
    operands->lora_b = Operand(b);
    operands->lora_a_scale = Operand(a_scale);
    operands->lora_b_scale = Operand(b_scale);
  }
  const size_t first_adapter = terms.size();
  std::vector<int64_t> index;
  if (shape.adapters > 0) {
    Bytes a, b, a_scale, b_scale, index_bytes;
    for (int64_t i = 0; i < shape.adapters; ++i) {
      terms.push_back(draw_adapter(draw, shape, &a, &b, &a_scale, &b_scale));
    }
    for (int64_t row = 0; row < shape.rows; row += shape.index_rows) {
      const auto adapter = static_cast<int32_t>(draw.integer(-1, shape.adapters - 1));
      index.push_back(adapter);
      const auto* bytes = reinterpret_cast<const uint8_t*>(&adapter);
      index_bytes.insert(index_bytes.end(), bytes, bytes + sizeof adapter);
    }
    operands->adapter_a = Operand(a);
    operands->adapter_b = Operand(b);
    operands->adapter_a_scale = Operand(a_scale);
    operands->adapter_b_scale = Operand(b_scale);
    operands->adapter_index = Operand(index_bytes);
  }
  const auto terms_of = [&](int64_t row) {
    std::vector<const Term*> used;
    if (first_adapter > 0) used.push_back(&terms[0]);
    const int64_t adapter = index.empty() ? -1 : index[static_cast<size_t>(row / shape.index_rows)];
    if (adapter >= 0) used.push_back(&terms[first_adapter + static_cast<size_t>(adapter)]);
    return used;
  };

  const auto draw_row = [&](int64_t count, Type type, double mean, Bytes* out) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& value : values) {
      value = rounded(type, mean + draw.normal());
      append(type, static_cast<float>(value), out);
    }
    return values;
  };
  Bytes x_bytes, bias_bytes, norm_bytes, residual_bytes;
  std::vector<double> bias, norm_weight;
  if (shape.bias) bias = draw_row(N, shape.x_type, 0, &bias_bytes);
  if (shape.norm) norm_weight = draw_row(K, Type::kFloat32, 1, &norm_bytes);

  expected->y.clear();
  expected->bound.clear();
  const int64_t block = std::gcd(shape.group_size, int64_t{32});
  // Roundings on the way of one product into Y, norm included.
  const double length = static_cast<double>((shape.norm ? 2 : 1) * K + R + shape.adapter_rank + 32);
  for (int64_t m = 0; m < shape.rows; ++m) {
    std::vector<double> x = draw_row(K, shape.x_type, 0, &x_bytes);
    if (shape.special && m == shape.rows / 2) {
      // A NaN reaches all of the row; an infinity does at level 4, where the row is rounded.
      const auto k = static_cast<size_t>(draw.integer(0, K - 1));
      x[k] = shape.level == 4 && draw.integer(0, 1) == 0 ? HUGE_VAL : std::nan("");
      Bytes value;
      append(shape.x_type, static_cast<float>(x[k]), &value);
      std::copy(value.begin(), value.end(),
                x_bytes.end() - static_cast<int64_t>((x.size() - k) * value.size()));
      x.assign(x.size(), std::nan(""));
    }
    if (shape.norm) {
      double squares = 0;
      for (double value : x) squares += value * value;
      const double inverse = 1 / std::sqrt(squares / static_cast<double>(K) + kNormEpsilon);
      for (size_t k = 0; k < x.size(); ++k) x[k] *= inverse * norm_weight[k];
    }
    std::vector<double> steps = block_peaks(x, block);
    for (double& s : steps) s /= 127;

    // The down-projections, with and without signs.
    const std::vector<const Term*> used = terms_of(m);
    std::vector<std::vector<double>> down, down_magnitude;
    for (const Term* term : used) {
      std::vector<double> t(static_cast<size_t>(P * term->rank)), t_magnitude(t.size());
      for (int64_t r = 0; r < P * term->rank; ++r) {
        for (int64_t k = 0; k < K; ++k) {
          const double product = x[static_cast<size_t>(k)] * term->a.at(r, k);
          t[static_cast<size_t>(r)] += product;
          t_magnitude[static_cast<size_t>(r)] += std::fabs(product);
        }
      }
      down.push_back(t);
      down_magnitude.push_back(t_magnitude);
    }

    std::vector<double> y(static_cast<size_t>(N)), bound(y.size());
    int64_t part = 0, part_end = shape.parts.empty() ? N : shape.parts[0];
    for (int64_t n = 0; n < N; ++n) {
      if (n == part_end) part_end += shape.parts[static_cast<size_t>(++part)];
      double sum = 0, magnitude = 0, squares = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double term = x[static_cast<size_t>(k)] * weight.at(n, k);
        sum += term;
        magnitude += std::fabs(term);
        double reach = std::fabs(weight.at(n, k));
        if (shape.level == 4) {
          for (const Term* low_rank : used) {
            double correction = 0;
            for (int64_t r = 0; r < low_rank->rank; ++r) {
              correction += low_rank->a.at(part * low_rank->rank + r, k) * low_rank->b.at(n, r);
            }
            reach += std::fabs(correction);
          }
        }
        reach *= steps[static_cast<size_t>(k)];
        squares += reach * reach;
      }
      for (size_t i = 0; i < used.size(); ++i) {
        const int64_t rank = used[i]->rank, begin = part * rank;
        const std::vector<double> own(down[i].begin() + begin, down[i].begin() + begin + rank);
        const std::vector<double> peaks = block_peaks(own, 32);
        for (int64_t r = 0; r < rank; ++r) {
          const double b = used[i]->b.at(n, r);
          sum += own[static_cast<size_t>(r)] * b;
          magnitude += down_magnitude[i][static_cast<size_t>(begin + r)] * std::fabs(b);
          const double reach = 1.25 * peaks[static_cast<size_t>(r)] / 127 * b;
          squares += reach * reach;
        }
      }
      if (shape.bias) {
        sum += bias[static_cast<size_t>(n)];
        magnitude += std::fabs(bias[static_cast<size_t>(n)]);
      }
      y[static_cast<size_t>(n)] = sum;
      bound[static_cast<size_t>(n)] = length * kRoundoff * magnitude;
      // Roundings to int8 are independent and within half a step each: Hoeffding's inequality,
      // passed by one product in 10^12.
      if (shape.level == 4)
        bound[static_cast<size_t>(n)] += std::sqrt(std::log(2e12) / 2 * squares);
    }

    const int64_t outputs = shape.outputs();
    std::vector<double> residual;
    if (shape.residual) residual = draw_row(outputs, shape.x_type, 0, &residual_bytes);
    for (int64_t i = 0; i < outputs; ++i) {
      const auto at = static_cast<size_t>(i);
      double value = y[at], error = bound[at];
      if (shape.activation != Activation::kNone) {
        const auto up = static_cast<size_t>(outputs + i);
        const double gate = act(shape.activation, y[at]);
        value = gate * y[up];
        // Both activations have slopes below 1.13; 16 roundoffs are for the exponential.
        const double gate_error = 1.13 * bound[at] + 16 * kRoundoff * std::fabs(y[at]);
        error = gate_error * (std::fabs(y[up]) + bound[up]) + std::fabs(gate) * bound[up];
      }
      if (shape.residual) value += residual[at];
      error += 4 * kRoundoff * std::fabs(value);
      if (shape.x_type == Type::kFloat16) error += 0x1p-11 * (std::fabs(value) + error) + 0x1p-25;
      if (shape.x_type == Type::kBfloat16) error += 0x1p-8 * (std::fabs(value) + error);
      expected->y.push_back(value);
      expected->bound.push_back(error);
    }
  }
  operands->x = Operand(x_bytes);
  operands->bias = Operand(bias_bytes);
  operands->norm_weight = Operand(norm_bytes);
  operands->residual = Operand(residual_bytes);
}

}  // namespace eoracc::testing
