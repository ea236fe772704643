// y[m, n] = sum_k x[m, k] * W[n, k] for a few rows of x: weights are decoded in registers and never stored.
//
//   whole groups (K a multiple of 64):  y = sum_g scale[n, g] * sum_{i < 64} kNf4[code[n, g, i]] * x[m, g, i]
//       x is permuted once a call into [K / 64][M][64] in the order that lookup64 yields codes in; in bf16 and fp16
//       each weight is scaled and rounded before it is multiplied
//   any K:  a row of W is decoded a span at a time into L1
// Threads split N; a sum's order depends on nothing but K.
#pragma once

#include "cpu/decode.h"
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

template <class T>
inline float bias_at(const T* bias, int64_t n) {
  float value = 0.0f;
  if (bias != nullptr) to_floats(bias + n, 1, &value);
  return value;
}

template <class T>
inline void write_one(T* out, float value) {
  from_floats(&value, 1, out);
}

template <class T>
void permute_x(int64_t k, int64_t rows, const T* x, float* permuted) {
  for (int64_t g = 0; g < k / kGroup; ++g)
    for (int64_t m = 0; m < rows; ++m) {
      alignas(32) float natural[kGroup];
      to_floats(x + m * k + g * kGroup, kGroup, natural);
      to_lookup_order(natural, permuted + (g * rows + m) * kGroup);
    }
}

// M sums over one row of W. units: a scale a 32 weights; Split: the two of a group differ (blocks of 32).
template <class T, int M, bool Split>
PEFTRT_INLINE void dot_row(const uint8_t* codes, const float* units, const float* x, int64_t groups, float* sums) {
  F acc[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) acc[m] = zero();
  for (int64_t g = 0; g < groups; ++g, codes += kGroup / 2, units += 2, x += M * kGroup) {
    const F scale = Split ? set_halves(units[0], units[1]) : set1(units[0]);
    F part[M];
    lookup64(codes, [&](int j, F code) {
      const F weight = kIsFloat<T> ? code : round_to<T>(mul(code, scale));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const F lane = loadu(x + m * kGroup + 8 * j);
        part[m] = j == 0 ? mul(weight, lane) : fma(weight, lane, part[m]);
      }
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m] = kIsFloat<T> ? fma(part[m], scale, acc[m]) : add(acc[m], part[m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m] = sum(acc[m]);
}

template <class T, int M>
void linear_groups(const Weight& w, const T* x, const T* bias, T* out, const Parallel& parallel) {
  Scratch<float> permuted(M * w.k);
  permute_x(w.k, M, x, permuted.get());
  for_ranges(parallel, w.n, [&](int64_t begin, int64_t end) {
    Scales decoder(w);
    Scratch<float> units(w.k / 32);
    for (int64_t n = begin; n < end; ++n) {
      decoder.decode(n * w.k / 32, w.k / 32, units.get());
      const uint8_t* codes = w.codes + n * w.k / 2;
      float sums[M];
      if (w.block_size == 32)
        dot_row<T, M, true>(codes, units.get(), permuted.get(), w.k / kGroup, sums);
      else
        dot_row<T, M, false>(codes, units.get(), permuted.get(), w.k / kGroup, sums);
      for (int m = 0; m < M; ++m) write_one(out + m * w.n + n, sums[m] + bias_at(bias, n));
    }
  });
}

template <int M>
void dot_span(const float* weights, const float* x, int64_t ld, int64_t count, float* sums) {
  F acc[M];
  for (int m = 0; m < M; ++m) acc[m] = zero();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const F weight = loadu(weights + i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m] = fma(weight, loadu(x + m * ld + i), acc[m]);
  }
  for (int m = 0; m < M; ++m) {
    float rest = 0.0f;
    for (int64_t j = i; j < count; ++j) rest += weights[j] * x[m * ld + j];
    sums[m] += sum(acc[m]) + rest;
  }
}

template <class T, int M>
void linear_any_k(const Weight& w, const T* x, const T* bias, T* out, const Parallel& parallel) {
  constexpr int64_t kSpan = 512;
  Scratch<float> floats(M * w.k);
  to_floats(x, M * w.k, floats.get());
  for_ranges(parallel, w.n, [&](int64_t begin, int64_t end) {
    Scales decoder(w);
    alignas(32) float weights[kSpan];
    float units[kSpan / 32 + 4];
    for (int64_t n = begin; n < end; ++n) {
      float sums[M] = {0.0f};
      for (int64_t k = 0; k < w.k; k += kSpan) {
        const int64_t start = n * w.k + k, count = min64(kSpan, w.k - k);
        const Units range = units_of(w, start, count);
        decoder.decode(range.first, range.count, units);
        decode_span<T>(w, start, count, units, weights);
        dot_span<M>(weights, floats.get() + k, w.k, count, sums);
      }
      for (int m = 0; m < M; ++m) write_one(out + m * w.n + n, sums[m] + bias_at(bias, n));
    }
  });
}

template <class T, int M>
void linear_rows(const Weight& w, const T* x, const T* bias, T* out, const Parallel& parallel) {
  if (w.k % kGroup == 0 && w.k > 0) return linear_groups<T, M>(w, x, bias, out, parallel);
  linear_any_k<T, M>(w, x, bias, out, parallel);
}

}  // namespace peftrt::cpu::PEFTRT_ISA
