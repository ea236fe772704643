// y[m, n] = sum_k x[m, k] * W[n, k] for a few rows of x: weights are decoded in registers and never stored.
//
//   whole groups (K a multiple of 64):  y = sum_g scale[n, g] * sum_{i < 64} kNf4[code[n, g, i]] * x[m, g, i]
//       x is permuted once a call into [K / 64][M][64] in the order that lookup64 yields codes in; in bf16 and fp16
//       each weight is scaled and rounded before it is multiplied
//   any K:  a row of W is decoded a span at a time into L1
// An adapter's x A^T comes first; its product with a row of B is added to that row's sums, lane by lane.
// Threads split N; a sum's order depends on nothing but K.
#pragma once

#include "cpu/decode.h"
#include "cpu/finish.h"
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

template <class T>
inline float bias_at(const T* bias, int64_t n) {
  return bias != nullptr ? load_one(bias + n) : 0.0f;
}

inline const float* row_scale_of(const LowRank* adapter) { return adapter == nullptr ? nullptr : adapter->row_scale; }

// An output of column n out of its sum, but for rounding.
template <class T>
inline float finished(float sum, const float* row_scale, const T* bias, const RowFinish* row, int64_t n) {
  if (row_scale != nullptr) sum *= load_one(row_scale + n);
  return finished_one(sum, row, bias_at(bias, n), n);
}

template <class T>
void permute_x(int64_t k, int64_t rows, const T* x, float* permuted) {
  for (int64_t g = 0; g < k / kGroup; ++g)
    for (int64_t m = 0; m < rows; ++m) {
      alignas(sizeof(F)) float natural[kGroup];
      to_floats(x + m * k + g * kGroup, kGroup, natural);
      to_lookup_order(natural, permuted + (g * rows + m) * kGroup);
    }
}

// sums[m] += the sum over `groups` groups of one row of W; scale_at(g) is the scale of group g, lane by lane.
template <class T, int M, class ScaleAt>
PEFTRT_INLINE void dot_groups(const uint8_t* codes, const ScaleAt& scale_at, const float* x, int64_t groups,
                              int64_t ahead, float* sums) {
  F acc[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) acc[m] = loadu(sums + kLanes * m);
  for (int64_t g = 0; g < groups; ++g, codes += kGroup / 2, x += M * kGroup) {
    // Slices of rows are not a stream that the hardware follows: the next block of rows is asked for here.
    __builtin_prefetch(codes + ahead, 0, 2);
    const F scale = scale_at(g);
    // Several short chains of additions where registers allow: the window of a core then holds more groups.
    constexpr int kChains = M == 1 ? 4 : M == 2 ? 2 : 1;
    constexpr int kLength = int(kGroup) / kLanes / kChains;
    F part[kChains][M] = {};
    lookup64(codes, [&](int j, F code) {
      const F weight = kIsFloat<T> ? code : round_to<T>(mul(code, scale));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const F lane = loadu(x + m * kGroup + kLanes * j);
        part[j / kLength][m] = j % kLength == 0 ? mul(weight, lane) : fma(weight, lane, part[j / kLength][m]);
      }
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      F total = part[0][m];
      if constexpr (kChains == 2) total = add(total, part[1][m]);
      if constexpr (kChains == 4) total = add(add(total, part[1][m]), add(part[2][m], part[3][m]));
      acc[m] = kIsFloat<T> ? fma(total, scale, acc[m]) : add(acc[m], total);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) storeu(sums + kLanes * m, acc[m]);
}

// A row of W from group `first` of the tensor on: split where the statistics change runs.
template <class T, int M>
PEFTRT_INLINE void dot_row(const Weight& w, Scales& scales, int64_t first, const float* x, int64_t groups,
                           int64_t ahead, float* sums) {
  const uint8_t* codes = w.codes + first * (kGroup / 2);
  if (w.block_size == 32) {
    const auto scale_at = [&](int64_t g) {
      return set_halves(scales.of_block(2 * (first + g)), scales.of_block(2 * (first + g) + 1));
    };
    return dot_groups<T, M>(codes, scale_at, x, groups, ahead, sums);
  }
  const int shift = __builtin_ctz(unsigned(w.block_size)) - 6;
  if (w.nested_absmax == nullptr) {
    const auto scale_at = [&](int64_t g) {
      const float scale = load_float(w.absmax, (first + g) >> shift);
      return set1(kIsFloat<T> ? scale : canonical(scale));
    };
    return dot_groups<T, M>(codes, scale_at, x, groups, ahead, sums);
  }
  while (groups > 0) {
    const int64_t run = (first >> shift) / kNestedBlock, end = (run + 1) * kNestedBlock << shift;
    const int64_t count = min64(groups, end - first);
    const float* table = scales.of_run(run);
    const auto scale_at = [&](int64_t g) { return set1(table[w.absmax[(first + g) >> shift]]); };
    dot_groups<T, M>(codes, scale_at, x, count, ahead, sums);
    codes += count * (kGroup / 2), x += count * M * kGroup, first += count, groups -= count;
  }
}

template <int M>
void dot_span(const float* weights, const float* x, int64_t ld, int64_t count, float* sums) {
  F acc[M];
  for (int m = 0; m < M; ++m) acc[m] = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
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

// Floats that a part has of a row of the scaled x A^T: whole vectors, zeros behind the rank.
inline int64_t part_stride(const LowRank& adapter) { return ceil_div(adapter.rank, kLanes) * kLanes; }

// The adapter's x A^T for M rows: as it is in adapter.xa, and scaled in [M][parts][part_stride].
template <class T, int M>
void multiply_a_rows(const LowRank& adapter, int64_t k, const T* x, float* scaled, const Parallel& parallel) {
  constexpr int64_t kSpan = 1024;
  const int64_t rank = adapter.rank, stride = part_stride(adapter), all = adapter.parts.count * stride;
  Scratch<float> floats(M * k);
  if (adapter.dropped != nullptr)
    to_floats(adapter.dropped, M * k, floats.get());
  else
    to_floats(x, M * k, floats.get());
  for_ranges(parallel, all, [&](int64_t begin, int64_t end) {
    alignas(sizeof(F)) float row[kSpan];
    for (int64_t at = begin; at < end; ++at) {
      const bool there = at % stride < rank;
      const int64_t r = at / stride * rank + at % stride;
      float sums[M] = {0.0f};
      for (int64_t i = 0; there && i < k; i += kSpan) {
        const int64_t count = min64(kSpan, k - i);
        read_floats(adapter.a_dtype, adapter.a, r * k + i, count, row);
        dot_span<M>(row, floats.get() + i, k, count, sums);
      }
      for (int m = 0; m < M; ++m) {
        if (there) store_one(adapter.xa + m * adapter.width() + r, sums[m]);
        scaled[m * all + at] = sums[m] * adapter.scaling;
      }
    }
  });
}

// sums[i][m] += rows of B from n0 on times the scaled x A^T, lane by lane.
template <int M>
void add_low_rank(const LowRank& adapter, const float* scaled, int64_t n0, int64_t rows, float* sums) {
  const int64_t rank = adapter.rank, stride = part_stride(adapter), all = adapter.parts.count * stride;
  for (int64_t i = 0; i < rows; ++i, sums += M * kLanes) {
    const float* of_part = scaled + adapter.parts.of(n0 + i) * stride;
    for (int64_t first = 0; first < rank; first += kGroup) {
      alignas(sizeof(F)) float b[kGroup];
      const int64_t count = min64(kGroup, rank - first);
      read_floats(adapter.b_dtype, adapter.b, (n0 + i) * rank + first, count, b);
      for (int64_t r = count; r % kLanes != 0; ++r) b[r] = 0.0f;
      for (int m = 0; m < M; ++m) {
        F acc = loadu(sums + m * kLanes);
        for (int64_t r = 0; r < count; r += kLanes) acc = fma(loadu(b + r), loadu(of_part + m * all + first + r), acc);
        storeu(sums + m * kLanes, acc);
      }
    }
  }
}

// A block of rows of W passes over a slice of x that stays in L1: 16 KB of it, for any M.
template <class T, int M>
void linear_groups(const Weight& w, const T* x, const T* bias, const LowRank* adapter, const float* scaled,
                   const Finish& finish, T* out, const Parallel& parallel) {
  constexpr int64_t kRows = 16;
  constexpr int64_t kSlice = 4096 / M / kGroup;  // groups
  const int64_t groups = w.k / kGroup;
  const float* row_scale = row_scale_of(adapter);
  Scratch<float> permuted(M * w.k);
  permute_x(w.k, M, x, permuted.get());
  for_ranges(parallel, ceil_div(w.n, kRows), [&](int64_t begin, int64_t end) {
    Scales scales(w);
    alignas(sizeof(F)) float sums[kRows][M * kLanes];
    for (int64_t n0 = begin * kRows; n0 < min64(end * kRows, w.n); n0 += kRows) {
      const int64_t rows = min64(kRows, w.n - n0);
      std::memset(sums, 0, sizeof sums);
      const int64_t ahead = n0 + 2 * kRows <= w.n ? kRows * groups * (kGroup / 2) : 0;
      for (int64_t g = 0; g < groups; g += kSlice)
        for (int64_t i = 0; i < rows; ++i)
          dot_row<T, M>(w, scales, (n0 + i) * groups + g, permuted.get() + g * M * kGroup, min64(kSlice, groups - g),
                        ahead, sums[i]);
      if (adapter != nullptr) add_low_rank<M>(*adapter, scaled, n0, rows, sums[0]);
      for (int64_t i = 0; i < rows; ++i)
        for (int m = 0; m < M; ++m)
          store_one(out + m * finish.stride + n0 + i,
                    finished(sum(loadu(sums[i] + kLanes * m)), row_scale, bias, finish.at(m), n0 + i));
    }
  });
}

template <class T, int M>
void linear_any_k(const Weight& w, const T* x, const T* bias, const LowRank* adapter, const float* scaled,
                  const Finish& finish, T* out, const Parallel& parallel) {
  constexpr int64_t kSpan = 512;
  const float* row_scale = row_scale_of(adapter);
  Scratch<float> floats(M * w.k);
  to_floats(x, M * w.k, floats.get());
  for_ranges(parallel, w.n, [&](int64_t begin, int64_t end) {
    Scales decoder(w);
    alignas(sizeof(F)) float weights[kSpan];
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
      if (adapter != nullptr) {
        alignas(sizeof(F)) float lanes[M * kLanes] = {0.0f};
        add_low_rank<M>(*adapter, scaled, n, 1, lanes);
        for (int m = 0; m < M; ++m) sums[m] += sum(loadu(lanes + m * kLanes));
      }
      for (int m = 0; m < M; ++m)
        store_one(out + m * finish.stride + n, finished(sums[m], row_scale, bias, finish.at(m), n));
    }
  });
}

template <class T, int M>
void linear_rows(const Weight& w, const T* x, const T* bias, const LowRank* adapter, const Finish& finish, T* out,
                 const Parallel& parallel) {
  Scratch<float> scaled(adapter == nullptr ? 0 : M * adapter->parts.count * part_stride(*adapter));
  if (adapter != nullptr) multiply_a_rows<T, M>(*adapter, w.k, x, scaled.get(), parallel);
  if (w.k % kGroup == 0 && w.k > 0)
    return linear_groups<T, M>(w, x, bias, adapter, scaled.get(), finish, out, parallel);
  linear_any_k<T, M>(w, x, bias, adapter, scaled.get(), finish, out, parallel);
}

}  // namespace peftrt::cpu::PEFTRT_ISA
