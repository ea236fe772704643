// out[m, n] = sum_k x[m, k] * W[n, k] + bias[n], W decoded to x's dtype, products summed in fp32; with an adapter, its
// share is in the same sum, and what finish.h has. W may be dense, too.
//
// Threads split N. Two paths, by M: linear_rows.h decodes in registers for a few rows of x, linear_panels.h decodes in
// the packing step of a matrix multiplication above. An output's sum has the same order whatever the thread count and
// whatever the other rows hold; it differs between the paths, and among the few rows of the first. That of the panels
// is one for any M: an invariant call takes them always.
#include "cpu/linear_dense.h"
#include "cpu/linear_panels.h"
#include "cpu/linear_rows.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

// Up to here rows win: at M = 8, N = 2048, K = 4096, fp32, one core takes 2.1 ms against 2.8 by panels of 8 lanes (Zen
// 3, November 2026). Above, the panels' 16 lanes: 3.7 to 3.9 at M = 16.
constexpr int kFewRows = 8;

template <class T, int M>
void linear_few(const Weight& w, int64_t m, const T* x, const T* bias, const LowRank* adapter, const Finish& finish,
                T* out, const Parallel& parallel) {
  if constexpr (M > 1) {
    if (m < M) return linear_few<T, M - 1>(w, m, x, bias, adapter, finish, out, parallel);
  }
  linear_rows<T, M>(w, x, bias, adapter, finish, out, parallel);
}

template <class T>
void multiply(const Base& base, int64_t m, const T* x, const T* bias, const LowRank* adapter, const Finish& finish,
              T* out, const Parallel& parallel) {
  const int64_t n = base.n, k = base.k;
  if (m == 0 || (n == 0 && adapter == nullptr)) return;
  if (m <= kFewRows && !finish.invariant) {
    if (base.nf4 != nullptr) return linear_few<T, kFewRows>(*base.nf4, m, x, bias, adapter, finish, out, parallel);
    if (adapter == nullptr) return dense_rows(base, m, x, bias, finish, out, parallel);
  }
  const int64_t width = adapter == nullptr ? 0 : adapter->width();
  const float* dropped = adapter == nullptr ? nullptr : adapter->dropped;
  if (k == 0) {
    if (width > 0) std::memset(static_cast<void*>(adapter->xa), 0, size_t(m * width) * sizeof(float));
    for (int64_t row = 0; row < m; ++row)
      for (int64_t i = 0; i < n; ++i)
        store_one(out + row * finish.stride + i, finished(0.0f, nullptr, bias, finish.at(row), i));
    return;
  }
  const auto panels = base.nf4 != nullptr ? linear_panels<T, Nf4Rows<T>> : linear_panels<T, DenseRows<T>>;
  const int64_t most = ceil_div(min64(m, kMaxRowsOfX), kTile) * kTile;
  Scratch<float> packed(most * k), packed_xa(most * width);
  for (int64_t first = 0; first < m; first += kMaxRowsOfX) {
    const int64_t rows = min64(kMaxRowsOfX, m - first);
    // What the adapter sees of x passes through the same buffer first, where that is not x itself.
    if (dropped != nullptr) {
      pack_x(k, rows, dropped + first * k, packed.get(), parallel);
      multiply_a_tiles(*adapter, k, first, rows, packed.get(), packed_xa.get(), parallel);
    }
    pack_x(k, rows, x + first * k, packed.get(), parallel);
    if (adapter != nullptr && dropped == nullptr)
      multiply_a_tiles(*adapter, k, first, rows, packed.get(), packed_xa.get(), parallel);
    const Finish of_rows = {finish.stride, finish.invariant, finish.at(first)};
    panels(base, rows, packed.get(), bias, adapter, packed_xa.get(), of_rows, out + first * finish.stride, parallel);
  }
}

template <class T>
void linear_typed(const Base& base, int64_t m, const void* x, const void* bias, const LowRank* adapter,
                  const Finish& finish, void* out, const Parallel& parallel) {
  multiply(base, m, static_cast<const T*>(x), static_cast<const T*>(bias), adapter, finish, static_cast<T*>(out),
           parallel);
}

}  // namespace

void finish_linear(const Base& base, Dtype dtype, int64_t m, const void* x, const void* bias, const LowRank* adapter,
                   const Finish& finish, void* out, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return linear_typed<float>(base, m, x, bias, adapter, finish, out, parallel);
    case Dtype::kBFloat16:
      return linear_typed<bf16>(base, m, x, bias, adapter, finish, out, parallel);
    case Dtype::kFloat16:
      return linear_typed<fp16>(base, m, x, bias, adapter, finish, out, parallel);
  }
}

void linear(const Base& base, Dtype dtype, int64_t m, const void* x, const void* bias, const LowRank* adapter,
            bool invariant, void* out, const Parallel& parallel) {
  finish_linear(base, dtype, m, x, bias, adapter, {base.n, invariant}, out, parallel);
}

}  // namespace peftrt::cpu::PEFTRT_ISA
