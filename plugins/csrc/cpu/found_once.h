// A value that is found once in a process.

#ifndef EORACC_CPU_FOUND_ONCE_H_
#define EORACC_CPU_FOUND_ONCE_H_

#include <stdint.h>

#include <atomic>

namespace eoracc {

// A positive number that any thread finds alike, so that several may find it at the same time. A
// static local of a function would bring the C++ library's handling of exceptions with its lock,
// 70 kB in a library that throws none.
class FoundOnce {
 public:
  template <typename Find>
  int64_t get(const Find& find) {
    int64_t value = value_.load(std::memory_order_relaxed);
    if (value == 0) value_.store(value = find(), std::memory_order_relaxed);
    return value;
  }

 private:
  std::atomic<int64_t> value_{0};
};

}  // namespace eoracc

#endif  // EORACC_CPU_FOUND_ONCE_H_
