// Loops over threads with a lambda, and scratch memory that lives as long as a call.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu/kernels.h"

namespace peftrt::cpu::PEFTRT_ISA {

// body(begin, end) over disjoint ranges of [0, tasks), each thread taking a share of what is left until nothing is:
// half an even share, so that a core that is slower or interrupted does not keep the others waiting. Which thread takes
// what changes no bit: no body sums over ranges.
template <class Body>
inline void for_ranges(const Parallel& parallel, int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  if (parallel.threads <= 1 || tasks == 1) return body(int64_t(0), tasks);
  struct Queue {
    const Body& body;
    const int64_t tasks, threads;
    std::atomic<int64_t> next{0};

    void drain() {
      for (int64_t begin = next.load(); begin < tasks;) {
        const int64_t share = (tasks - begin) / (2 * threads), end = begin + (share < 1 ? 1 : share);
        if (!next.compare_exchange_weak(begin, end)) continue;
        body(begin, end);
        begin = next.load();
      }
    }
  };
  Queue queue{body, tasks, parallel.threads};
  parallel.run(
      parallel.threads, [](int64_t, int64_t, void* context) { static_cast<Queue*>(context)->drain(); }, &queue);
}

// body(task) of every task, taken one at a time: where tasks differ in size, and none is short.
template <class Body>
inline void for_each(const Parallel& parallel, int64_t tasks, const Body& body) {
  if (parallel.threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  struct Queue {
    const Body& body;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
  };
  Queue queue{body, tasks};
  const auto drain = [](int64_t, int64_t, void* context) {
    Queue& from = *static_cast<Queue*>(context);
    for (int64_t task = from.next++; task < from.tasks; task = from.next++) from.body(task);
  };
  parallel.run(parallel.threads, drain, &queue);
}

// Uninitialised, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace peftrt::cpu::PEFTRT_ISA
