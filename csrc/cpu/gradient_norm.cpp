// The norm of many gradients together, and what they are multiplied with to clip it; peftrt/ops/_gradient_norm.py.
//
// Squares are summed in fp64: those of a chunk over kSumLanes lanes, the chunks' sums over kFinalLanes. The square of
// an fp32 number is exact there. An order that depends on nothing.
#include <cmath>

#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kSumLanes = 256, kFinalLanes = 1024;

// The upper half of the lanes is added to the lower, again and again.
template <int64_t kCount>
double fold(double* lanes) {
  for (int64_t half = kCount / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[half + i];
  return lanes[0];
}

template <class T>
double sum_of_squares(const T* from, int64_t count) {
  alignas(64) double lanes[kSumLanes] = {};
  alignas(64) float row[kSumLanes];
  for (int64_t i = 0; i < count; i += kSumLanes) {
    // Two rows ahead: 4.3 ms for 448 gradients of 32768 fp32 elements that took 4.8 (one thread, Zen 3, November 2026).
    for (size_t line = 0; line < kSumLanes * sizeof(T); line += 64)
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(from + i + 2 * kSumLanes) + line);
    const float* values = row;
    if (kIsFloat<T> && count - i >= kSumLanes) {
      values = reinterpret_cast<const float*>(from + i);
    } else {
      const int64_t present = min64(kSumLanes, count - i);
      to_floats(from + i, present, row);
      for (int64_t l = present; l < kSumLanes; ++l) row[l] = 0.0f;
    }
    for (int64_t l = 0; l < kSumLanes; ++l) {
      const double value = load_one(values + l);
      lanes[l] += value * value;
    }
  }
  return fold<kSumLanes>(lanes);
}

double sum_of_squares(const int64_t* address, int64_t first, int64_t count) {
  if (address[1] == 0) return 0.0;
  switch (Dtype(address[2])) {
    case Dtype::kFloat32:
      return sum_of_squares(reinterpret_cast<const float*>(address[1]) + first, count);
    case Dtype::kBFloat16:
      return sum_of_squares(reinterpret_cast<const bf16*>(address[1]) + first, count);
    case Dtype::kFloat16:
      return sum_of_squares(reinterpret_cast<const fp16*>(address[1]) + first, count);
  }
  return 0.0;
}

}  // namespace

void gradient_norm(const int64_t* addresses, const int64_t* chunks, int64_t count, double* partials, double max_norm,
                   float* out, const Parallel& parallel) {
  for_ranges(parallel, count, [&](int64_t begin, int64_t end) {
    for (const int64_t* chunk = chunks + 3 * begin; begin < end; ++begin, chunk += 3)
      partials[begin] = sum_of_squares(addresses + 3 * chunk[0], chunk[1], chunk[2]);
  });
  alignas(64) double lanes[kFinalLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kFinalLanes] += partials[i];
  const double norm = std::sqrt(fold<kFinalLanes>(lanes));
  const double ratio = max_norm / (norm + 1e-6);
  out[0] = float(norm), out[1] = ratio > 1.0 ? 1.0f : float(ratio);
}

}  // namespace peftrt::cpu::PEFTRT_ISA
