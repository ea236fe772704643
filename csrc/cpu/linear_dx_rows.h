// dx[m, k] = sum_n dy[m, n] * W[n, k] for a few rows of dy, K in whole groups: every row of W is decoded in registers
// and added, scaled, to sums that lie in L1.
#pragma once

#include "cpu/decode.h"
#include "cpu/dropout.h"
#include "cpu/finish.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

constexpr int64_t kMaxChunks = 16;  // of N, where its parts are summed on their own
constexpr int64_t kChain = 256;     // rows of W in one chain of additions, where sums are kept in registers
constexpr int64_t kTogether = 2;    // rows of W that are added to a group before it is stored

// sums[g][m][64] += R rows of W, a whole row of W apart, times their factors[r][m]; units[r]: a scale a 32 weights.
// The sums of a group stay in registers while its R rows are added: for M > 1, one half of the group after the other.
template <class T, int M, int R, bool Halves>
void add_rows(const uint8_t* codes, int64_t row_bytes, const float* units, int64_t row_units, const float* factors,
              int64_t groups, int64_t ahead, float* sums) {
  constexpr int kParts = M == 1 ? 1 : 2, kWidth = int(kGroup) / kLanes / kParts;
  for (int64_t g = 0; g < groups; ++g, codes += kGroup / 2, units += 2, sums += M * kGroup) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      F acc[M][kWidth];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) acc[m][j] = loadu(sums + m * kGroup + kLanes * (part * kWidth + j));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (part == 0) __builtin_prefetch(codes + r * row_bytes + ahead);
        const float* unit = units + r * row_units;
        const F scale = Halves ? set_halves(unit[0], unit[1]) : set1(unit[0]);
        F scaled[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const F factor = set1(factors[r * M + m]);
          scaled[m] = kIsFloat<T> ? mul(factor, scale) : factor;
        }
        lookup64(codes + r * row_bytes, [&](int j, F code) {
          if (j / kWidth != part) return;
          const F weight = kIsFloat<T> ? code : round_to<T>(mul(code, scale));
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) acc[m][j % kWidth] = fma(weight, scaled[m], acc[m][j % kWidth]);
        });
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) storeu(sums + m * kGroup + kLanes * (part * kWidth + j), acc[m][j]);
    }
  }
}

// partial[g][m][64], in the order that lookup64 yields codes in: the rows [n0, n1) of W times their factors. A slice of
// it is summed at a time, in L1; a chain of additions is no longer than kChain, for accuracy.
template <class T, int M>
void add_chunk(const Weight& w, int64_t n0, int64_t n1, const T* dy, const float* row_scale, Scales& decoder,
               float* partial) {
  constexpr int64_t kSlice = 4096 / M / kGroup;  // groups: 16 KB of sums
  const int64_t groups = w.k / kGroup, row_bytes = w.k / 2;
  const auto add_one = w.block_size == 32 ? add_rows<T, M, 1, true> : add_rows<T, M, 1, false>;
  const auto add_some = w.block_size == 32 ? add_rows<T, M, kTogether, true> : add_rows<T, M, kTogether, false>;
  alignas(sizeof(F)) float sums[kSlice * kGroup * M];
  float units[kTogether][kSlice * 2], factors[kTogether * M];
  for (int64_t first = 0; first < groups; first += kSlice) {
    const int64_t count = min64(kSlice, groups - first), lanes = count * kGroup * M;
    float* total = partial + first * kGroup * M;
    std::memset(total, 0, size_t(lanes) * sizeof(float));
    for (int64_t start = n0; start < n1; start += kChain) {
      std::memset(sums, 0, size_t(lanes) * sizeof(float));
      const int64_t stop = min64(start + kChain, n1);
      for (int64_t n = start; n < stop;) {
        const int64_t rows = n + kTogether <= stop ? kTogether : 1;
        for (int64_t r = 0; r < rows; ++r) {
          decoder.decode(((n + r) * groups + first) * 2, count * 2, units[r]);
          const float scale = row_scale == nullptr ? 1.0f : load_one(row_scale + n + r);
          for (int m = 0; m < M; ++m) factors[r * M + m] = scale * load_one(dy + m * w.n + n + r);
        }
        const int64_t ahead = n + 2 * rows <= w.n ? rows * row_bytes : 0;
        const uint8_t* codes = w.codes + (n * groups + first) * (kGroup / 2);
        (rows == 1 ? add_one : add_some)(codes, row_bytes, units[0], kSlice * 2, factors, count, ahead, sums);
        n += rows;
      }
      for (int64_t i = 0; i < lanes; i += kLanes) storeu(total + i, add(loadu(total + i), loadu(sums + i)));
    }
  }
}

// dx[kGroup] += what the adapter adds to columns [k, k + kGroup) of one row.
inline void add_adapter_to_group(const LowRankGradient& adapter, int64_t row, int64_t columns, int64_t k, float* dx) {
  alignas(sizeof(F)) float line[kGroup] = {}, sums[kGroup] = {};
  for (int64_t r = 0; r < adapter.width(); ++r) {
    read_floats(adapter.a_dtype, adapter.a, r * columns + k, kGroup, line);
    const F factor = set1(load_one(adapter.g + row * adapter.width() + r));
    for (int64_t i = 0; i < kGroup; i += kLanes) storeu(sums + i, fma(factor, loadu(line + i), loadu(sums + i)));
  }
  if (adapter.dropout != nullptr) drop(*adapter.dropout, row * columns + k, kGroup, sums);
  for (int64_t i = 0; i < kGroup; i += kLanes) storeu(dx + i, add(loadu(dx + i), loadu(sums + i)));
}

// A few rows of dy, whole groups. acc[m] += code * (dy[m, n] * scale); in bf16 and fp16 the weight is scaled and
// rounded first. Threads split N, so that each reads W as it lies: pieces of rows cost a third more. The chunks that
// they take depend on N alone, and are added in their order.
template <class T, int M>
void dx_rows(const Weight& w, const T* dy, const LowRankGradient* adapter, const Finish& finish, T* out,
             const Parallel& parallel) {
  const int64_t groups = w.k / kGroup, width = M * w.k;
  const int64_t rows = ceil_div(ceil_div(w.n, kMaxChunks), kChain) * kChain, chunks = ceil_div(w.n, rows);
  const float* row_scale = adapter == nullptr ? nullptr : adapter->row_scale;
  Scratch<float> partial(chunks * width);
  for_ranges(parallel, chunks, [&](int64_t begin, int64_t end) {
    Scales decoder(w);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      add_chunk<T, M>(w, chunk * rows, min64(chunk * rows + rows, w.n), dy, row_scale, decoder,
                      partial.get() + chunk * width);
  });
  for_ranges(parallel, groups, [&](int64_t begin, int64_t end) {
    alignas(sizeof(F)) float sums[kGroup], natural[kGroup];
    for (int64_t at = begin * M; at < end * M; ++at) {
      std::memcpy(sums, partial.get() + at * kGroup, sizeof sums);
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < kGroup; i += kLanes)
          storeu(sums + i, add(loadu(sums + i), loadu(partial.get() + chunk * width + at * kGroup + i)));
      from_lookup_order(sums, natural);
      const int64_t row = at % M, k = at / M * kGroup;
      if (adapter != nullptr) add_adapter_to_group(*adapter, row, w.k, k, natural);
      add_addend(finish.at(row), k, kGroup, natural);
      from_floats(natural, kGroup, out + row * w.k + k);
    }
  });
}

}  // namespace peftrt::cpu::PEFTRT_ISA
