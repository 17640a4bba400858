// Compares every instruction set of this processor with the reference, over seeded random shapes.
//
//   check_kernels [CASES [SEED [INSTRUCTION_SET...]]]
//
// Each product runs with its tasks one after another, in reverse, and on threads: all three must
// agree to the bit. Exits with 1 and names the product when one is off, or when the processor lacks
// an instruction set that is asked for.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "tests/native/call.h"

namespace {

using namespace eoracc::testing;

using Task = void (*)(void*, size_t);

void run_forwards(void*, size_t count, Task task, void* data) {
  for (size_t i = 0; i < count; ++i) task(data, i);
}

void run_backwards(void*, size_t count, Task task, void* data) {
  while (count-- > 0) task(data, count);
}

// One thread a task, or as many as there may be with the tasks dealt out.
void run_on_threads(void*, size_t count, Task task, void* data) {
  const size_t threads = count < 4 ? count : 4;
  std::vector<std::thread> pool;
  for (size_t first = 0; first < threads; ++first) {
    pool.emplace_back([=] {
      for (size_t i = first; i < count; i += threads) task(data, i);
    });
  }
  for (std::thread& thread : pool) thread.join();
}

class Checker {
 public:
  // Returns false when the processor lacks the instruction set.
  bool check(const InstructionSet& set, const Shape& shape, const Operands& operands,
             const Expected& expected) {
    const size_t bytes = static_cast<size_t>(shape.rows * shape.outputs()) * size_of(shape.x_type);
    const eoracc_bank bank = bank_of(shape, operands);
    constexpr void (*kRuns[])(void*, size_t, Task, void*) = {run_forwards, run_backwards,
                                                             run_on_threads};
    Bytes first;
    for (const auto& run : kRuns) {
      const Operand y(Bytes(bytes, 0xff));  // NaN of every type
      const eoracc_matmul m = matmul_of(shape, operands, y, bank);
      const eoracc_threads threads{run, nullptr};
      const eoracc_result result = eoracc_matmul_nbits_lowrank(&m, &threads, set.isa);
      if (result == EORACC_NO_SUCH_ISA) return false;
      if (result != EORACC_OK) {
        fail(set, shape, "was refused with " + std::to_string(result));
        return true;
      }
      if (run == run_forwards) {
        first = y.bytes();
      } else if (y.bytes() != first) {
        fail(set, shape, "depends on how its tasks are spread");
        return true;
      }
    }
    compare(set, shape, first, expected);
    return true;
  }

  bool failed() const { return failures_ > 0; }
  bool hopeless() const { return failures_ >= 10; }

  // Whether the tolerance is far below the signal, so that a comparison means something. An
  // activation closes half of the gates and is left out.
  double looseness(int level) const { return tolerance_[level] / signal_[level]; }

 private:
  void compare(const InstructionSet& set, const Shape& shape, const Bytes& y,
               const Expected& expected) {
    for (size_t i = 0; i < expected.y.size(); ++i) {
      const double actual = read(shape.x_type, y, i);
      const double error = std::fabs(actual - expected.y[i]);
      if (std::isnan(actual) && std::isnan(expected.y[i])) continue;
      if (error <= expected.bound[i]) {
        if (shape.activation == Activation::kNone) {
          signal_[shape.level] += std::fabs(expected.y[i]);
          tolerance_[shape.level] += expected.bound[i];
        }
        continue;
      }
      char text[160];
      std::snprintf(text, sizeof text, "is %.8g at [%lld, %lld], not %.8g within %.2g", actual,
                    static_cast<long long>(i) / static_cast<long long>(shape.outputs()),
                    static_cast<long long>(i) % static_cast<long long>(shape.outputs()),
                    expected.y[i], expected.bound[i]);
      fail(set, shape, text);
      return;
    }
  }

  void fail(const InstructionSet& set, const Shape& shape, const std::string& what) {
    std::fprintf(stderr, "%s: %s %s\n", set.name, shape.describe().c_str(), what.c_str());
    ++failures_;
  }

  int failures_ = 0;
  double signal_[5] = {}, tolerance_[5] = {};  // by level
};

}  // namespace

int main(int count, char** arguments) {
  const long cases = count > 1 ? std::strtol(arguments[1], nullptr, 10) : 300;
  const unsigned long seed = count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 0;
  std::mt19937_64 random(seed);
  Checker checker;
  std::vector<const char*> present;
  for (long i = 0; i < cases && !checker.hopeless(); ++i) {
    const Shape shape = draw_shape(random);
    Operands operands;
    Expected expected;
    draw_operands(shape, random, &operands, &expected);
    for (const InstructionSet& set : kInstructionSets) {
      if (checker.check(set, shape, operands, expected) && i == 0) present.push_back(set.name);
    }
  }
  bool complete = true;
  for (int i = 3; i < count; ++i) {
    const bool found = std::any_of(present.begin(), present.end(), [&](const char* name) {
      return std::strcmp(name, arguments[i]) == 0;
    });
    if (!found) std::fprintf(stderr, "%s did not run\n", arguments[i]);
    complete = complete && found;
  }
  std::printf("%ld products with", cases);
  for (const char* name : present) std::printf(" %s", name);
  std::printf(": %s; tolerances are %.1e of the signal at level 0, %.1e at level 4\n",
              checker.failed() ? "FAILED" : "right", checker.looseness(0), checker.looseness(4));
  const bool meaningful = checker.looseness(0) < 0.05 && checker.looseness(4) < 0.2;
  if (!meaningful) std::fprintf(stderr, "the tolerances are too large to mean something\n");
  return complete && meaningful && !checker.failed() ? 0 : 1;
}
