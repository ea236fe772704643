// Two products of rows that lie anywhere, of which pointers are given:
//
//   dots:     sums[i, r] = sum_k lines[i][k] * values[r, k]          lanes along k
//   combine:  out[i, c] (+)= sum_d s[i, d] * lines[d][c]             lanes along c
//
// An output has accumulators of its own and one order of summation, whatever else is computed beside it: its bits do
// not depend on how many rows there are.
#pragma once

#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

constexpr int64_t kTogetherRows = 8;  // of `values` in dots, of lines in combine: at most so many at a time
constexpr int64_t kDotSpan = 1024;    // k of a chain of additions: a block of values stays in L1 while rows pass

// R lines by C rows of values, from element `first` of the lines on: 3 x 4 accumulators and what they are fed with fill
// 16 registers.
template <class V, int R, int C>
__attribute__((noinline)) void dot_tile(const float* const* lines, int64_t first, const V* values, int64_t ld,
                                        int64_t count, float* sums) {
  F acc[R][C];
#pragma GCC unroll 3
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[i][c] = zero();
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    F x[R];
#pragma GCC unroll 3
    for (int i = 0; i < R; ++i) x[i] = loadu(lines[i] + first + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const F value = load(values + c * ld + k);
#pragma GCC unroll 3
      for (int i = 0; i < R; ++i) acc[i][c] = fma(x[i], value, acc[i][c]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int c = 0; c < C; ++c) {
      float rest = 0.0f;
      for (int64_t j = k; j < count; ++j) rest += load_one(lines[i] + first + j) * load_one(values + c * ld + j);
      sums[i * kTogetherRows + c] += sum(acc[i][c]) + rest;
    }
}

template <class V, int R, int MaxC>
inline void dot_columns(int64_t columns, const float* const* lines, int64_t first, const V* values, int64_t ld,
                        int64_t count, float* sums) {
  if constexpr (MaxC > 1) {
    if (columns < MaxC) return dot_columns<V, R, MaxC - 1>(columns, lines, first, values, ld, count, sums);
  }
  dot_tile<V, R, MaxC>(lines, first, values, ld, count, sums);
}

template <class V, int MaxR>
inline void dot_rows(int64_t rows, int64_t columns, const float* const* lines, int64_t first, const V* values,
                     int64_t ld, int64_t count, float* sums) {
  if constexpr (MaxR > 1) {
    if (rows < MaxR) return dot_rows<V, MaxR - 1>(rows, columns, lines, first, values, ld, count, sums);
  }
  dot_columns<V, MaxR, 4>(columns, lines, first, values, ld, count, sums);
}

// A span of what dots() sums, added to its sums.
inline void dot_block(const float* const* lines, int64_t rows, int64_t first, const float* values, int64_t ld,
                      int64_t span, int64_t count, float* sums) {
  for (int64_t r = 0; r < count; r += 4)
    for (int64_t i = 0; i < rows; i += 3)
      dot_rows<float, 3>(min64(3, rows - i), min64(4, count - r), lines + i, first, values + r * ld, ld, span,
                         sums + i * kTogetherRows + r);
}

// sums[rows][kTogetherRows] of lines that count from element `first` on, `depth` of them, and `count` rows of values,
// at most kTogetherRows, that are ld apart.
template <class V>
void dots(const float* const* lines, int64_t rows, int64_t first, int64_t depth, const V* values, int64_t ld,
          int64_t count, float* sums) {
  std::memset(sums, 0, size_t(rows * kTogetherRows) * sizeof(float));
  if (rows <= 3) {  // values are read once, as they lie
    for (int64_t r = 0; r < count; r += 4)
      for (int64_t k = 0; k < depth; k += kDotSpan)
        dot_rows<V, 3>(rows, min64(4, count - r), lines, first + k, values + r * ld + k, ld, min64(kDotSpan, depth - k),
                       sums + r);
    return;
  }
  alignas(sizeof(F)) float converted[kTogetherRows * kDotSpan];
  for (int64_t k = 0; k < depth; k += kDotSpan) {
    const int64_t span = min64(kDotSpan, depth - k);
    if constexpr (kIsFloat<V>) {
      dot_block(lines, rows, first + k, values + k, ld, span, count, sums);
    } else {
      for (int64_t r = 0; r < count; ++r) to_floats(values + r * ld + k, span, converted + r * kDotSpan);
      dot_block(lines, rows, first + k, converted, kDotSpan, span, count, sums);
    }
  }
}

// R rows of out by W vectors from `column` on.
template <class V, int R, int W>
__attribute__((noinline)) void combine_tile(int64_t depth, const V* const* lines, int64_t column, const float* s,
                                            int64_t ld_i, int64_t ld_d, float* out, int64_t ld, bool add_to_out) {
  F acc[R][W];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) acc[i][w] = add_to_out ? loadu(out + i * ld + kLanes * w) : zero();
  for (int64_t d = 0; d < depth; ++d) {
    F line[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) line[w] = load(lines[d] + column + kLanes * w);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const F scalar = set1(s[i * ld_i + d * ld_d]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[i][w] = fma(scalar, line[w], acc[i][w]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) storeu(out + i * ld + kLanes * w, acc[i][w]);
}

template <class V, int MaxR, int W>
inline void combine_rows(int64_t rows, int64_t depth, const V* const* lines, int64_t column, const float* s,
                         int64_t ld_i, int64_t ld_d, float* out, int64_t ld, bool add_to_out) {
  if constexpr (MaxR > 1) {
    if (rows < MaxR)
      return combine_rows<V, MaxR - 1, W>(rows, depth, lines, column, s, ld_i, ld_d, out, ld, add_to_out);
  }
  combine_tile<V, MaxR, W>(depth, lines, column, s, ld_i, ld_d, out, ld, add_to_out);
}

// `columns` columns of out [rows][ld] from those of at most kTogetherRows lines; the scalar of row i and line d is s[i
// * ld_i + d * ld_d]. A chain of additions goes on where `add_to_out`.
template <class V>
void combine(int64_t rows, int64_t depth, const V* const* lines, int64_t columns, const float* s, int64_t ld_i,
             int64_t ld_d, float* out, int64_t ld, bool add_to_out) {
  constexpr int kRows = 6;
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t some = min64(kRows, rows - i);
    const float* scalars = s + i * ld_i;
    float* to = out + i * ld;
    int64_t c = 0;
    for (; some == 1 && c + 4 * kLanes <= columns; c += 4 * kLanes)
      combine_tile<V, 1, 4>(depth, lines, c, scalars, ld_i, ld_d, to + c, ld, add_to_out);
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes)
      combine_rows<V, kRows, 2>(some, depth, lines, c, scalars, ld_i, ld_d, to + c, ld, add_to_out);
    for (; c + kLanes <= columns; c += kLanes)
      combine_rows<V, kRows, 1>(some, depth, lines, c, scalars, ld_i, ld_d, to + c, ld, add_to_out);
    for (int64_t row = 0; row < some; ++row)
      for (int64_t at = c; at < columns; ++at) {
        float sum = add_to_out ? load_one(to + row * ld + at) : 0.0f;
        for (int64_t d = 0; d < depth; ++d) sum += scalars[row * ld_i + d * ld_d] * load_one(lines[d] + at);
        store_one(to + row * ld + at, sum);
      }
  }
}

// body(values) with a pointer of the values' own type.
template <class Body>
inline void with_type(Dtype dtype, const void* values, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(static_cast<const float*>(values));
    case Dtype::kBFloat16:
      return body(static_cast<const bf16*>(values));
    case Dtype::kFloat16:
      return body(static_cast<const fp16*>(values));
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
