// The portable eight floats: a vector extension that GCC and Clang lower to whatever the target has.
#pragma once

#include "cpu/half.h"
#include "nf4.h"

namespace peftrt::cpu::PEFTRT_ISA {

typedef float F __attribute__((vector_size(32)));
constexpr int kLanes = 8;
constexpr int kMicroRows2 = 6, kMicroRows1 = 12;

PEFTRT_INLINE F set1(float value) { return F{value, value, value, value, value, value, value, value}; }
PEFTRT_INLINE F set_halves(float a, float b) { return F{a, a, a, a, b, b, b, b}; }
PEFTRT_INLINE F zero() { return set1(0.0f); }
PEFTRT_INLINE F add(F a, F b) { return a + b; }
PEFTRT_INLINE F sub(F a, F b) { return a - b; }
PEFTRT_INLINE F mul(F a, F b) { return a * b; }
PEFTRT_INLINE F div(F a, F b) { return a / b; }
PEFTRT_INLINE F sqrt(F v) {
  for (int i = 0; i < 8; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
PEFTRT_INLINE F fma(F a, F b, F c) { return a * b + c; }

PEFTRT_INLINE F loadu(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PEFTRT_INLINE void storeu(float* p, F v) { std::memcpy(p, &v, sizeof v); }

template <class T>
PEFTRT_INLINE F load(const T* p) {
  F v;
  for (int i = 0; i < 8; ++i) {
    T element;
    std::memcpy(&element, p + i, sizeof element);
    v[i] = to_float(element);
  }
  return v;
}

template <class T>
PEFTRT_INLINE void store(T* p, F v) {
  for (int i = 0; i < 8; ++i) {
    const T element = from_float<T>(v[i]);
    std::memcpy(p + i, &element, sizeof element);
  }
}

PEFTRT_INLINE F canonical_nan(F v) {
  for (int i = 0; i < 8; ++i) v[i] = v[i] == v[i] ? v[i] : __builtin_nanf("");
  return v;
}

template <class T>
PEFTRT_INLINE F round_to(F v) {
  for (int i = 0; i < 8; ++i) v[i] = to_float(from_float<T>(v[i]));
  return v;
}

PEFTRT_INLINE float sum(F v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

PEFTRT_INLINE void transpose(F r[kLanes]) {
  F t[8];
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) t[i][j] = r[j][i];
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Element i of vector j; the first half of every vector comes from the first 32 weights, as set_halves wants it.
PEFTRT_INLINE int lookup_position(int j, int i) { return (i / 4) * 32 + 4 * j + i % 4; }

template <class Sink>
PEFTRT_INLINE void lookup64(const uint8_t* codes, Sink&& sink) {
  for (int j = 0; j < 8; ++j) {
    F v;
    for (int i = 0; i < 8; ++i) v[i] = kNf4[nibble(codes, lookup_position(j, i))];
    sink(j, v);
  }
}

PEFTRT_INLINE void to_lookup_order(const float* from, float* to) {
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 8; ++i) to[8 * j + i] = from[lookup_position(j, i)];
}

PEFTRT_INLINE void from_lookup_order(const float* from, float* to) {
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 8; ++i) to[lookup_position(j, i)] = from[8 * j + i];
}

template <class T, class Sink>
PEFTRT_INLINE void decode64(const uint8_t* codes, float s0, float s1, Sink&& sink) {
  for (int j = 0; j < 8; ++j) {
    F v;
    for (int i = 0; i < 8; ++i) v[i] = kNf4[nibble(codes, 8 * j + i)];
    sink(j, round_to<T>(mul(v, set1(j < 4 ? s0 : s1))));
  }
}

// Quantisation. Magnitudes are compared as integers, where a NaN is above infinity and so is never lost.
typedef int32_t Int8 __attribute__((vector_size(32)));

PEFTRT_INLINE F max_magnitude(F most, F v) {
  const Int8 a = reinterpret_cast<Int8>(most), b = reinterpret_cast<Int8>(v) & 0x7fffffff;
  return reinterpret_cast<F>(a > b ? a : b);
}
PEFTRT_INLINE float largest(F most) {
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits = float_bits(most[i]) > bits ? float_bits(most[i]) : bits;
  return bits_float(bits);
}

template <class T>
PEFTRT_INLINE void encode64(const T* weights, float r0, float r1, uint8_t* codes) {
  for (int j = 0; j < 8; ++j) {
    const F v = mul(load(weights + 8 * j), set1(j < 4 ? r0 : r1));
    Int8 level = {15, 15, 15, 15, 15, 15, 15, 15};
    for (int i = 0; i < 15; ++i) level += v <= kNf4Thresholds.value[i];  // true is -1
    for (int i = 0; i < 4; ++i) codes[4 * j + i] = uint8_t(level[2 * i] << 4 | level[2 * i + 1]);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
