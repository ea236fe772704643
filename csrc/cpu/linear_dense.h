// y = x W^T and dx = dy W over a dense W for a few rows of x or dy: bound by reading W, once, as it lies. More rows go
// by panels (linear_panels.h, linear_dx_panels.h).
#pragma once

#include "cpu/finish.h"
#include "cpu/linear_rows.h"
#include "cpu/lines.h"

namespace peftrt::cpu::PEFTRT_ISA {

// Rows [0, m) as floats, and pointers to them.
template <class T>
class FloatRows {
 public:
  FloatRows(const T* from, int64_t m, int64_t width) : floats_(kIsFloat<T> ? 0 : m * width), lines_(m) {
    if constexpr (!kIsFloat<T>) to_floats(from, m * width, floats_.get());
    for (int64_t i = 0; i < m; ++i) {
      if constexpr (kIsFloat<T>)
        lines_.get()[i] = from + i * width;
      else
        lines_.get()[i] = floats_.get() + i * width;
    }
  }
  const float* const* get() const { return lines_.get(); }

 private:
  Scratch<float> floats_;
  Scratch<const float*> lines_;
};

// Threads split N. The order of a sum depends on K alone.
template <class T>
void dense_rows(const Base& base, int64_t m, const T* x, const T* bias, const Finish& finish, T* out,
                const Parallel& parallel) {
  const T* weight = static_cast<const T*>(base.dense);
  const FloatRows<T> lines(x, m, base.k);
  for_ranges(parallel, ceil_div(base.n, kTogetherRows), [&](int64_t begin, int64_t end) {
    Scratch<float> sums(m * kTogetherRows);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t n0 = block * kTogetherRows, rows = min64(kTogetherRows, base.n - n0);
      dots(lines.get(), m, 0, base.k, weight + n0 * base.stride, base.stride, rows, sums.get());
      for (int64_t i = 0; i < m; ++i)
        for (int64_t r = 0; r < rows; ++r)
          store_one(out + i * finish.stride + n0 + r,
                    finished(sums.get()[i * kTogetherRows + r], nullptr, bias, finish.at(i), n0 + r));
    }
  });
}

// partial[m][k] = the rows [n0, n1) of W times their columns of dy: so many columns at a time that their sums stay in
// L1 while kTogetherRows rows of W pass.
template <class T>
void add_dense_rows(const Base& base, int64_t m, int64_t n0, int64_t n1, const float* const* dy, float* partial) {
  constexpr int64_t kDeep = 8 * kTogetherRows;  // rows of W whose pieces are read one after the other
  const int64_t columns = max64(4096 / m / 64, 1) * 64;
  const T* weight = static_cast<const T*>(base.dense);
  const T* lines[kTogetherRows];
  Scratch<float> factors(m * kDeep);
  for (int64_t n = n0; n < n1; n += kDeep) {
    const int64_t deep = min64(kDeep, n1 - n);
    for (int64_t i = 0; i < m; ++i) std::memcpy(factors.get() + i * kDeep, dy[i] + n, size_t(deep) * sizeof(float));
    for (int64_t k = 0; k < base.k; k += columns)
      for (int64_t d = 0; d < deep; d += kTogetherRows) {
        const int64_t depth = min64(kTogetherRows, deep - d);
        for (int64_t r = 0; r < depth; ++r) lines[r] = weight + (n + d + r) * base.stride + k;
        combine(m, depth, lines, min64(columns, base.k - k), factors.get() + d, kDeep, 1, partial + k, base.k,
                n + d > n0);
      }
  }
}

// Threads split N, so that each reads W as it lies; the pieces that they take depend on N alone, and are added in their
// order.
template <class T>
void dense_dx_rows(const Base& base, int64_t m, const T* dy, const Finish& finish, T* out, const Parallel& parallel) {
  constexpr int64_t kMaxPieces = 16;
  const int64_t rows = ceil_div(ceil_div(base.n, kMaxPieces), kTogetherRows) * kTogetherRows;
  const int64_t pieces = ceil_div(base.n, rows), size = m * base.k;
  const FloatRows<T> lines(dy, m, base.n);
  Scratch<float> partial(pieces * size);
  for_each(parallel, pieces, [&](int64_t piece) {
    add_dense_rows<T>(base, m, piece * rows, min64(piece * rows + rows, base.n), lines.get(),
                      partial.get() + piece * size);
  });
  constexpr int64_t kColumns = 256;
  for_ranges(parallel, ceil_div(base.k, kColumns), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * kColumns; k < min64(end * kColumns, base.k); k += kColumns)
      for (int64_t i = 0; i < m; ++i) {
        const int64_t count = min64(kColumns, base.k - k);
        float* sums = partial.get() + i * base.k + k;
        for (int64_t piece = 1; piece < pieces; ++piece)
          add_floats(partial.get() + piece * size + i * base.k + k, count, sums);
        add_addend(finish.at(i), k, count, sums);
        from_floats(sums, count, out + i * finish.stride + k);
      }
  });
}

}  // namespace peftrt::cpu::PEFTRT_ISA
