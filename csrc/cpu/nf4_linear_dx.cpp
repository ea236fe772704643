// out[m, k] = sum_n dy[m, n] * W[n, k], W decoded to dy's dtype, products summed in fp32; with an adapter, drop'(g A)
// is in the same sum, and what finish.h has.
//
// From the same bytes as the forward, without a transposed copy: W is row-major in n, so its k run along the lanes.
// Two paths, by M: linear_dx_rows.h decodes in registers for a few rows of dy, linear_dx_panels.h decodes in the
// packing step of a matrix multiplication above. An output's sum has the same order whatever the thread count; it
// differs between the ranges of M, but for an invariant call.
#include "cpu/linear_dense.h"
#include "cpu/linear_dx_panels.h"
#include "cpu/linear_dx_rows.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

// At M = 4 both ways take 6.2 ms on one core, at M = 6 the sums of rows leave the registers: 14.8 ms against 6.2 by
// panels (N = K = 4096, fp32, W in no cache, Zen 3, November 2026).
constexpr int kFewRows = 3;

template <class T, int M>
void linear_dx_few(const Weight& w, int64_t m, const T* dy, const LowRankGradient* adapter, const Finish& finish,
                   T* out, const Parallel& parallel) {
  if constexpr (M > 1) {
    if (m < M) return linear_dx_few<T, M - 1>(w, m, dy, adapter, finish, out, parallel);
  }
  dx_rows<T, M>(w, dy, adapter, finish, out, parallel);
}

template <class T>
void multiply_dx(const Base& base, int64_t m, const void* dy_bytes, const LowRankGradient* adapter,
                 const Finish& finish, void* out_bytes, const Parallel& parallel) {
  const T* dy = static_cast<const T*>(dy_bytes);
  T* out = static_cast<T*>(out_bytes);
  if (m == 0 || base.k == 0) return;
  if (base.n == 0) {
    std::memset(out_bytes, 0, size_t(m * base.k) * sizeof(T));
    return;
  }
  if (base.nf4 == nullptr) {
    if (m <= kFewRows && !finish.invariant && adapter == nullptr)
      return dense_dx_rows(base, m, dy, finish, out, parallel);
    return dx_panels<T, DenseColumns<T>>(base, m, dy, adapter, finish, out, parallel);
  }
  if (m <= kFewRows && base.k % kGroup == 0 && !finish.invariant)
    return linear_dx_few<T, kFewRows>(*base.nf4, m, dy, adapter, finish, out, parallel);
  dx_panels<T, Nf4Columns<T>>(base, m, dy, adapter, finish, out, parallel);
}

}  // namespace

void finish_linear_dx(const Base& base, Dtype dtype, int64_t m, const void* dy, const LowRankGradient* adapter,
                      const Finish& finish, void* out, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return multiply_dx<float>(base, m, dy, adapter, finish, out, parallel);
    case Dtype::kBFloat16:
      return multiply_dx<bf16>(base, m, dy, adapter, finish, out, parallel);
    case Dtype::kFloat16:
      return multiply_dx<fp16>(base, m, dy, adapter, finish, out, parallel);
  }
}

void linear_dx(const Base& base, Dtype dtype, int64_t m, const void* dy, const LowRankGradient* adapter, bool invariant,
               void* out, const Parallel& parallel) {
  finish_linear_dx(base, dtype, m, dy, adapter, {base.k, invariant}, out, parallel);
}

}  // namespace peftrt::cpu::PEFTRT_ISA
