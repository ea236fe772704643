// In the place of csrc/cuda/device.h: the same names on a CPU, so that the kernels' own code runs, and is checked,
// where no GPU is.
//
// A thread of a block is a fiber, and blocks run one after the other. What the hardware leaves open is drawn at random:
// the order of blocks, which fiber goes on after a barrier, and whether an asynchronous copy arrives at once or when it
// is waited for. A product of a warpgroup is done when it is waited for: until then it has read neither the registers
// nor the shared memory that it multiplies, and its sums are NaN. It sees of shared memory what a thread has copied and
// then shown it, NaN where something has been copied since. Shared memory starts as NaN. So a barrier or a wait that is
// missing shows as a wrong value; an address outside of a buffer shows under AddressSanitizer.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define PEFTRT_DEVICE inline
#define PEFTRT_BOTH inline
#define PEFTRT_KERNEL
#define PEFTRT_BOUNDS(threads, blocks)
#define PEFTRT_CONSTANT const
#define PEFTRT_TABLE const

#if !defined(PEFTRT_EMULATED_ARCHITECTURE)
#define PEFTRT_EMULATED_ARCHITECTURE 90
#endif

namespace emulator {

struct Fiber;
struct Place {
  int thread;
  int64_t block, blocks;
};

// ---- what emulator.cpp has ----

const Place& place();
uint8_t* shared_memory();
void sync_block();
// Hands `mine` to the warp and waits until all 32 lanes have: then lane i's words are at [i].
struct Words {
  uint64_t word[16];
};
const Words* exchange(const Words& mine);
struct BarrierState {
  uint16_t count, pending;
  uint32_t phase;
};
void start_barrier(uint64_t* barrier, int count);
void arrive(uint64_t* barrier);
void wait(uint64_t* barrier, uint32_t parity);
void show_products();
void start_products();
// Of a thread of a warpgroup: `sums` results, for rows of 16-bit elements that `value` reads.
struct Product {
  float* sum;
  int sums;
  const uint32_t* a;
  uint64_t rows;
  bool add;
  float (*value)(uint16_t);
};
void multiply_rows(const Product& product);
void commit_products();
void wait_products(int left);
void copy_async(void* to, const void* from, bool there);
void commit_copies();
void wait_copies(int left);
// Runs a grid; returns null, or what was wrong with the launch.
const char* launch(int64_t blocks, int threads, int shared, const std::function<void()>& kernel);
extern int multiprocessors;

float bf16_to_float(uint16_t bits);
float fp16_to_float(uint16_t bits);
uint16_t float_to_bf16(float value);
uint16_t float_to_fp16(float value);

}  // namespace emulator

namespace peftrt::cuda {

inline int thread_index() { return emulator::place().thread; }
inline int64_t block_index() { return emulator::place().block; }
inline int64_t block_count() { return emulator::place().blocks; }
constexpr int kArchitecture = PEFTRT_EMULATED_ARCHITECTURE;
constexpr bool kHasWarpgroups = kArchitecture == 90;
inline uint8_t* shared_memory() { return emulator::shared_memory(); }

// As before sm_90, so that what lies behind it is moved.
constexpr int kFixedAddress = 1024;
inline int fixed_offset() { return 1024; }
inline uint32_t load_fixed(uint32_t offset) {
  uint32_t word;
  std::memcpy(&word, shared_memory() + fixed_offset() + offset, 4);
  return word;
}

inline void sync_block() { emulator::sync_block(); }
inline void sync_warp() { emulator::exchange({}); }
inline bool any_lane(bool value) {
  emulator::Words mine = {};
  mine.word[0] = value;
  const emulator::Words* all = emulator::exchange(mine);
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) any |= all[lane].word[0] != 0;
  return any;
}
using Barrier = uint64_t;
inline void start_barrier(Barrier* barrier, int count) { emulator::start_barrier(barrier, count); }
inline void arrive(Barrier* barrier) { emulator::arrive(barrier); }
inline void wait(Barrier* barrier, uint32_t parity) { emulator::wait(barrier, parity); }
inline void fence_device() {}
inline uint64_t compare_and_swap(uint64_t* word, uint64_t expected, uint64_t desired) {
  const uint64_t before = *word;
  if (before == expected) *word = desired;
  return before;
}

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  emulator::Words mine = {};
  std::memcpy(mine.word, &value, 4);
  const emulator::Words* all = emulator::exchange(mine);
  T other;
  std::memcpy(&other, all[thread_index() % 32 ^ mask].word, 4);
  return other;
}

struct alignas(16) Vector {
  uint32_t word[4];
};

using Policy = uint64_t;
inline Policy read_once() { return 0; }
inline Policy read_again() { return 0; }
inline uint32_t load_word(const void* from, Policy) { return *static_cast<const uint32_t*>(from); }
inline uint32_t load_half_word(const void* from, Policy) { return *static_cast<const uint16_t*>(from); }
inline float load_of_blocks(const float* from) { return *from; }
inline Vector load_of_blocks(const Vector* from) { return *from; }
inline uint64_t load_of_blocks(const uint64_t* from) { return *from; }
// It reads, so that a sanitizer sees an address that is not there.
inline void prefetch(const void* from) { static_cast<void>(*static_cast<const volatile uint8_t*>(from)); }
inline void store_streaming(Vector* to, Vector value) { *to = value; }

inline void copy_async(void* to, const void* from, bool there) { emulator::copy_async(to, from, there); }
inline void copy_async(void* to, const void* from, bool there, Policy) { emulator::copy_async(to, from, there); }
inline void commit_copies() { emulator::commit_copies(); }
template <int kLeft>
void wait_copies() {
  emulator::wait_copies(kLeft);
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float reciprocal(float a) { return 1.0f / a; }
inline uint32_t float_bits(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  return bits;
}
inline float bits_float(uint32_t a) {
  float value;
  std::memcpy(&value, &a, 4);
  return value;
}
inline void forget(int&) {}

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
inline float to_float(float a) { return a; }
inline float to_float(Bf16 a) { return emulator::bf16_to_float(a.bits); }
inline float to_float(Fp16 a) { return emulator::fp16_to_float(a.bits); }

template <class T>
uint32_t pack(float first, float second);
template <>
inline uint32_t pack<Bf16>(float first, float second) {
  return emulator::float_to_bf16(first) | uint32_t(emulator::float_to_bf16(second)) << 16;
}
template <>
inline uint32_t pack<Fp16>(float first, float second) {
  return emulator::float_to_fp16(first) | uint32_t(emulator::float_to_fp16(second)) << 16;
}

inline void load_matrices(const void* row, uint32_t (&word)[4]) {
  emulator::Words mine = {};
  std::memcpy(mine.word, static_cast<const Vector*>(row), 16);
  const emulator::Words* all = emulator::exchange(mine);
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(all[8 * i + lane / 4].word);
    std::memcpy(&word[i], bytes + lane % 4 * 4, 4);
  }
}

// The sum of exact products in double, rounded once: within what the hardware's order and truncation may differ by.
template <class T>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Words mine = {};
  for (int i = 0; i < 4; ++i) mine.word[i] = a[i];
  mine.word[4] = b0, mine.word[5] = b1;
  const emulator::Words* all = emulator::exchange(mine);
  const auto element = [](uint64_t pair, int i) { return double(to_float(T{uint16_t(pair >> 16 * i)})); };
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, below = i / 2, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const emulator::Words &left = all[4 * row + k % 8 / 2], &right = all[4 * column + k % 8 / 2];
      sum += element(left.word[k / 8 * 2 + below], k % 2) * element(right.word[4 + k / 8], k % 2);
    }
    c[i] = float(sum);
  }
}

template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}
inline void show_products() { emulator::show_products(); }
using Rows = uint64_t;
inline Rows rows_at(const void* first) {
  const uint64_t offset = uint64_t(static_cast<const uint8_t*>(first) - shared_memory());
  return offset / 16 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 62;
}
inline Rows rows_after(Rows rows, int bytes) { return rows + uint64_t(bytes / 16); }
inline void start_products() { emulator::start_products(); }
template <class T, int kSums>
void multiply_rows(float (&sum)[kSums], const uint32_t (&a)[4], Rows b, bool add) {
  emulator::multiply_rows({sum, kSums, a, b, add, [](uint16_t bits) { return to_float(T{bits}); }});
}
inline void commit_products() { emulator::commit_products(); }
template <int kLeft, int kSums>
void wait_products(float (&)[kSums]) {
  emulator::wait_products(kLeft);
}

inline const char* multiprocessors(int* count) {
  *count = emulator::multiprocessors;
  return nullptr;
}
template <class... Parameters>
const char* architecture(void (*)(Parameters...), int* found) {
  *found = kArchitecture;
  return nullptr;
}
// (What asks is only ever a kernel for warpgroups.)
template <class... Parameters>
const char* takes_threads(void (*)(Parameters...), int, bool* found) {
  *found = kHasWarpgroups;
  return nullptr;
}
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, void*,
                   Parameters... parameters) {
  return emulator::launch(blocks, threads, shared, [=] { kernel(parameters...); });
}

}  // namespace peftrt::cuda
