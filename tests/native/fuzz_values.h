// What the fuzzer of the kernels draws, reads and compares: buffers of exactly their size at odd addresses, the dtypes
// in doubles, a case and how it is reported.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace {

using peftrt::Dtype;
using peftrt::cpu::Parallel;

std::mt19937_64 generator;

int64_t pick(std::initializer_list<int64_t> values) { return values.begin()[generator() % values.size()]; }

// `size` bytes that start one byte into a heap block and end with it.
class Bytes {
 public:
  explicit Bytes(size_t size) : block_(new uint8_t[size + 1]), size_(size) {
    for (size_t i = 0; i <= size; ++i) block_[i] = 0xff;  // NaN in every dtype
  }
  uint8_t* get() const { return block_.get() + 1; }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<uint8_t[]> block_;
  size_t size_;
};

size_t width(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(float(fraction), -24)
                          : exponent == 31 ? (fraction ? NAN : INFINITY)
                                           : std::ldexp(float(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

double read(const Bytes& bytes, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) {
    float value;
    std::memcpy(&value, bytes.get() + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, bytes.get() + 2 * i, 2);
  if (dtype == Dtype::kFloat16) return half_to_float(bits);
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// The nearest number of the dtype, ties to even, by way of doubles; overflow aside.
double rounded(float value, Dtype dtype) {
  if (dtype == Dtype::kFloat32 || value == 0) return value;
  const bool half = dtype == Dtype::kFloat16;
  const int exponent = std::max(std::ilogb(value), half ? -14 : -126);
  const double quantum = std::ldexp(1.0, exponent - (half ? 10 : 7));
  return std::nearbyint(value / quantum) * quantum;
}

// A multiple of 1/16 in [-2, 2]: the same number in every dtype.
void write_small(const Bytes& bytes, Dtype dtype, int64_t i) {
  const float value = float(int64_t(generator() % 65) - 32) / 16;
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (dtype == Dtype::kFloat32) {
    std::memcpy(bytes.get() + 4 * i, &word, 4);
    return;
  }
  uint16_t bits = uint16_t(word >> 16);
  if (dtype == Dtype::kFloat16) {
    const int exponent = int(word >> 23 & 255) - 127 + 15;
    bits = value == 0 ? 0 : uint16_t((word >> 16 & 0x8000) | unsigned(exponent) << 10 | (word >> 13 & 1023));
  }
  std::memcpy(bytes.get() + 2 * i, &bits, 2);
}

void run_threads(int64_t tasks, Parallel::Body body, void* context) {
  const int64_t middle = tasks / 2;
#if defined(PEFTRT_FUZZ_ONE_THREAD)  // for emulators of a bare CPU
  body(0, middle, context);
  body(middle, tasks, context);
#else
  std::thread other([=] { body(0, middle, context); });
  body(middle, tasks, context);
  other.join();
#endif
}

constexpr float kTiny[] = {0x1p-130f, 0x1p-130f, 0x1p-18f};

struct Case {
  Dtype dtype;
  int64_t m, n, k;
  int block_size;
  bool nested, bias;
};

int fail(const char* op, const Case& c, int64_t i, double got, double want) {
  std::printf("%s: dtype %d M %ld N %ld K %ld G %d nested %d bias %d: element %ld is %.9g, expected %.9g\n", op,
              int(c.dtype), long(c.m), long(c.n), long(c.k), c.block_size, c.nested, c.bias, long(i), got, want);
  return 1;
}

int compare(const char* op, const Case& c, const Bytes& out, const std::vector<double>& want,
            const std::vector<double>& magnitude) {
  const double relative = c.dtype == Dtype::kFloat32 ? 2e-6 : c.dtype == Dtype::kBFloat16 ? 5e-3 : 1e-3;
  for (size_t i = 0; i < want.size(); ++i) {
    const double got = read(out, c.dtype, int64_t(i));
    if (!(std::fabs(got - want[i]) <= relative * magnitude[i] + 1e-7)) return fail(op, c, int64_t(i), got, want[i]);
  }
  return 0;
}

float* floats(const Bytes& bytes) { return reinterpret_cast<float*>(bytes.get()); }

// The sums of products a[i][p] * b[p][j] and of their magnitudes, each times `factor`.
struct Sums {
  std::vector<double> value, magnitude;
};
template <class A, class B>
Sums product(int64_t rows, int64_t depth, int64_t columns, double factor, const A& a, const B& b) {
  Sums sums = {std::vector<double>(size_t(rows * columns)), std::vector<double>(size_t(rows * columns))};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t j = 0; j < columns; ++j) {
        const double term = factor * a(i, p) * b(p, j);
        sums.value[size_t(i * columns + j)] += term, sums.magnitude[size_t(i * columns + j)] += std::fabs(term);
      }
  return sums;
}

}  // namespace
