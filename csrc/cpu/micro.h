// The outer-product micro-kernel that forward and dX share, and the packing of what goes into it.
//
//   C[i, v] (+)= sum_p S[i, p] * B[p, v]      i < R rows of scalars, v < kLanes * V lanes, p < depth
//
// S is row-major with stride ld_s, B is [depth][kLanes * V] packed, C is row-major with stride ld_c. Forward: S =
// decoded weights (rows n), B = x transposed (lanes m). dX: S = dy (rows m), B = decoded weights (lanes k).
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace peftrt::cpu::PEFTRT_ISA {

// R x V accumulators fill the registers (kMicroRows2 x 2 or kMicroRows1 x 1); the pragmas keep GCC from spilling them.
// Never inlined: in a larger function they spill after all.
template <int R, int V>
__attribute__((noinline)) void micro(int64_t depth, const float* s, int64_t ld_s, const float* b, float* c,
                                     int64_t ld_c, bool add_to_c) {
  F acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[i][v] = zero();
  for (int64_t p = 0; p < depth; ++p) {
    F lane[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) lane[v] = loadu(b + p * kLanes * V + kLanes * v);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const F scalar = set1(s[i * ld_s + p]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[i][v] = fma(scalar, lane[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* at = c + i * ld_c + kLanes * v;
      storeu(at, add_to_c ? add(loadu(at), acc[i][v]) : acc[i][v]);
    }
}

// `rows` rows, at most MaxR; an output's bits do not depend on how rows are grouped, since each has its own
// accumulator.
template <int MaxR, int V>
inline void micro_rows(int64_t rows, int64_t depth, const float* s, int64_t ld_s, const float* b, float* c,
                       int64_t ld_c, bool add_to_c) {
  if constexpr (MaxR > 1) {
    if (rows < MaxR) return micro_rows<MaxR - 1, V>(rows, depth, s, ld_s, b, c, ld_c, add_to_c);
  }
  micro<MaxR, V>(depth, s, ld_s, b, c, ld_c, add_to_c);
}

// One element, at any alignment.
template <class T>
PEFTRT_INLINE float load_one(const T* from) {
  T element;
  std::memcpy(&element, from, sizeof element);
  return to_float(element);
}
template <class T>
PEFTRT_INLINE void store_one(T* to, float value) {
  const T element = from_float<T>(value);
  std::memcpy(to, &element, sizeof element);
}

// `count` elements as floats; nothing past them is touched.
template <class T>
inline void to_floats(const T* from, int64_t count, float* to) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) storeu(to + i, load(from + i));
  for (int64_t i = 0; i < count - whole; ++i) to[whole + i] = load_one(from + whole + i);
}

// `count` elements from the `first` of a tensor on, as floats.
inline void read_floats(Dtype dtype, const void* tensor, int64_t first, int64_t count, float* to) {
  switch (dtype) {
    case Dtype::kFloat32:
      return to_floats(static_cast<const float*>(tensor) + first, count, to);
    case Dtype::kBFloat16:
      return to_floats(static_cast<const bf16*>(tensor) + first, count, to);
    case Dtype::kFloat16:
      return to_floats(static_cast<const fp16*>(tensor) + first, count, to);
  }
}

// floats[i] *= factors[i].
inline void scale_floats(const float* factors, int64_t count, float* floats) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) storeu(floats + i, mul(loadu(floats + i), loadu(factors + i)));
  for (int64_t i = whole; i < count; ++i) floats[i] *= load_one(factors + i);
}

// And back to T.
template <class T>
inline void from_floats(const float* from, int64_t count, T* to) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(to + i, loadu(from + i));
  for (int64_t i = 0; i < count - whole; ++i) store_one(to + whole + i, from[whole + i]);
}

// x[0 .. rows, k0 .. k0 + depth) with row stride ld -> packed[p][lanes], lanes of rows past the last are zero.
template <class T>
inline void pack_transposed(const T* x, int64_t ld, int64_t rows, int64_t depth, int lanes, float* packed) {
  for (int first = 0; first < lanes; first += kLanes) {
    const int64_t present = rows - first < 0 ? 0 : (rows - first < kLanes ? rows - first : kLanes);
    int64_t p = 0;
    for (; p + kLanes <= depth; p += kLanes) {
      F r[kLanes];
      for (int i = 0; i < kLanes; ++i) r[i] = i < present ? load(x + (first + i) * ld + p) : zero();
      transpose(r);
      for (int i = 0; i < kLanes; ++i) storeu(packed + (p + i) * lanes + first, r[i]);
    }
    for (; p < depth; ++p)
      for (int i = 0; i < kLanes; ++i)
        packed[p * lanes + first + i] = i < present ? load_one(x + (first + i) * ld + p) : 0.0f;
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
