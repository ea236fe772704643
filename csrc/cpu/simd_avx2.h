// AVX2 + FMA + F16C: eight floats in a ymm register, and NF4 by byte planes.
//
// A code is looked up four times by pshufb, once a byte of its fp32 value, and the four planes are unpacked into
// floats: 12 shuffles for 32 weights. The planes of a table of 16 fit one xmm register each.
#pragma once

#include <immintrin.h>

#include "cpu/half.h"
#include "nf4.h"

namespace peftrt::cpu::PEFTRT_ISA {

using F = __m256;
constexpr int kLanes = 8;
constexpr int kMicroRows2 = 6, kMicroRows1 = 12;

PEFTRT_INLINE F set1(float value) { return _mm256_set1_ps(value); }
PEFTRT_INLINE F set_halves(float a, float b) { return _mm256_blend_ps(set1(a), set1(b), 0xf0); }
PEFTRT_INLINE F zero() { return _mm256_setzero_ps(); }
PEFTRT_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
PEFTRT_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
PEFTRT_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
PEFTRT_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
PEFTRT_INLINE F sqrt(F v) { return _mm256_sqrt_ps(v); }
PEFTRT_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
PEFTRT_INLINE F loadu(const float* p) { return _mm256_loadu_ps(p); }
PEFTRT_INLINE void storeu(float* p, F v) { _mm256_storeu_ps(p, v); }

PEFTRT_INLINE F load(const float* p) { return loadu(p); }
PEFTRT_INLINE F load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
PEFTRT_INLINE F load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// Nearest even in the upper 16 bits. A NaN must be quiet with a clear lower half, as decoded scales are made
// (scales.h).
PEFTRT_INLINE __m256i round_bf16_bits(F v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

PEFTRT_INLINE F canonical_nan(F v) {
  const F nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_blendv_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
}

PEFTRT_INLINE void store(float* p, F v) { storeu(p, v); }
PEFTRT_INLINE void store(bf16* p, F v) {
  const __m256i high = _mm256_srli_epi32(round_bf16_bits(canonical_nan(v)), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
PEFTRT_INLINE void store(fp16* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

template <class T>
PEFTRT_INLINE F round_to(F v);
template <>
PEFTRT_INLINE F round_to<float>(F v) {
  return v;
}
template <>
PEFTRT_INLINE F round_to<bf16>(F v) {
  return _mm256_castsi256_ps(_mm256_and_si256(round_bf16_bits(v), _mm256_set1_epi32(int(0xffff0000))));
}
template <>
PEFTRT_INLINE F round_to<fp16>(F v) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

PEFTRT_INLINE float sum(F v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

PEFTRT_INLINE void transpose(F r[kLanes]) {
  const F a0 = _mm256_unpacklo_ps(r[0], r[1]), a1 = _mm256_unpackhi_ps(r[0], r[1]);
  const F a2 = _mm256_unpacklo_ps(r[2], r[3]), a3 = _mm256_unpackhi_ps(r[2], r[3]);
  const F a4 = _mm256_unpacklo_ps(r[4], r[5]), a5 = _mm256_unpackhi_ps(r[4], r[5]);
  const F a6 = _mm256_unpacklo_ps(r[6], r[7]), a7 = _mm256_unpackhi_ps(r[6], r[7]);
  const F b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
  const F b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
  const F b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
  const F b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
  r[0] = _mm256_permute2f128_ps(b0, b4, 0x20), r[4] = _mm256_permute2f128_ps(b0, b4, 0x31);
  r[1] = _mm256_permute2f128_ps(b1, b5, 0x20), r[5] = _mm256_permute2f128_ps(b1, b5, 0x31);
  r[2] = _mm256_permute2f128_ps(b2, b6, 0x20), r[6] = _mm256_permute2f128_ps(b2, b6, 0x31);
  r[3] = _mm256_permute2f128_ps(b3, b7, 0x20), r[7] = _mm256_permute2f128_ps(b3, b7, 0x31);
}

// The four bytes of each NF4 code, twice over: one table a 128-bit lane.
struct Planes {
  alignas(32) uint8_t byte[4][32];
};

constexpr Planes make_planes() {
  Planes planes = {};
  for (int i = 0; i < 32; ++i)
    for (int b = 0; b < 4; ++b) planes.byte[b][i] = uint8_t(__builtin_bit_cast(uint32_t, kNf4[i & 15]) >> (8 * b));
  return planes;
}
// constexpr, since an initialiser compiled for AVX2 must not run where the CPU lacks it.
constexpr Planes kPlanes = make_planes();

// 32 codes, a nibble a byte -> four vectors of floats: vector q has bytes 4q .. 4q + 3 of each lane, in lane order.
PEFTRT_INLINE void lookup32(__m256i index, F out[4]) {
  const auto* table = reinterpret_cast<const __m256i*>(kPlanes.byte);
  const __m256i p0 = _mm256_shuffle_epi8(_mm256_load_si256(table), index);
  const __m256i p1 = _mm256_shuffle_epi8(_mm256_load_si256(table + 1), index);
  const __m256i p2 = _mm256_shuffle_epi8(_mm256_load_si256(table + 2), index);
  const __m256i p3 = _mm256_shuffle_epi8(_mm256_load_si256(table + 3), index);
  const __m256i low0 = _mm256_unpacklo_epi8(p0, p1), low1 = _mm256_unpackhi_epi8(p0, p1);
  const __m256i high0 = _mm256_unpacklo_epi8(p2, p3), high1 = _mm256_unpackhi_epi8(p2, p3);
  out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
  out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
  out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
  out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

// Vectors 0 .. 3 are the even elements, 4 .. 7 the odd ones; lane l of vector q has those of bytes 16 l + 4 q .. + 3.
template <class Sink>
PEFTRT_INLINE void lookup64(const uint8_t* codes, Sink&& sink) {
  const __m256i low4 = _mm256_set1_epi8(15);
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  F v[4];
  lookup32(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low4), v);
  sink(0, v[0]), sink(1, v[1]), sink(2, v[2]), sink(3, v[3]);
  lookup32(_mm256_and_si256(bytes, low4), v);
  sink(4, v[0]), sink(5, v[1]), sink(6, v[2]), sink(7, v[3]);
}

PEFTRT_INLINE void to_lookup_order(const float* from, float* to) {
  for (int q = 0; q < 4; ++q) {
    const F a = loadu(from + 8 * q), b = loadu(from + 32 + 8 * q);
    const F low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    storeu(to + 8 * q, _mm256_shuffle_ps(low, high, 0x88));
    storeu(to + 32 + 8 * q, _mm256_shuffle_ps(low, high, 0xdd));
  }
}

PEFTRT_INLINE void from_lookup_order(const float* from, float* to) {
  for (int q = 0; q < 4; ++q) {
    const F even = loadu(from + 8 * q), odd = loadu(from + 32 + 8 * q);
    const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    storeu(to + 8 * q, _mm256_permute2f128_ps(low, high, 0x20));
    storeu(to + 32 + 8 * q, _mm256_permute2f128_ps(low, high, 0x31));
  }
}

template <class T, class Sink>
PEFTRT_INLINE void decode64(const uint8_t* codes, float s0, float s1, Sink&& sink) {
  // Pairs of bytes (four weights) go to the lanes in turn, so that each looked-up vector is eight neighbours.
  const __m256i to_lanes = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                            0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i low4 = _mm256_set1_epi8(15);
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(raw, to_lanes), 0xd8);
  const __m256i first = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low4), second = _mm256_and_si256(bytes, low4);
  F v[4];
  lookup32(_mm256_unpacklo_epi8(first, second), v);
  for (int q = 0; q < 4; ++q) sink(q, round_to<T>(mul(v[q], set1(s0))));
  lookup32(_mm256_unpackhi_epi8(first, second), v);
  for (int q = 0; q < 4; ++q) sink(4 + q, round_to<T>(mul(v[q], set1(s1))));
}

// Quantisation. Magnitudes are compared as integers, where a NaN is above infinity and so is never lost.
PEFTRT_INLINE F max_magnitude(F most, F v) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most), magnitude));
}
PEFTRT_INLINE float largest(F most) {
  const __m256i eight = _mm256_castps_si256(most);
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}

// The levels of eight scaled values, less 8. A cubic guesses the threshold that is nearest, by number: it is off by no
// more than 0.13 at each of them, so a value whose guess rounds to i lies between thresholds i - 1 and i + 1, and one
// comparison with threshold i settles it. min makes 1 of a NaN, and bounds the guess to -8 .. 6 (negative: the lower
// eight thresholds).
PEFTRT_INLINE __m256i nearest_levels(F scaled) {
  const F v = _mm256_min_ps(scaled, set1(1.0f));
  const F guess = fma(fma(fma(set1(-4.5676875f), v, set1(0.5615256f)), v, set1(11.484821f)), v, set1(-1.3650532f));
  const __m256i index = _mm256_cvtps_epi32(guess);
  const F below = _mm256_permutevar8x32_ps(loadu(kNf4Thresholds.value), index);
  const F above = _mm256_permutevar8x32_ps(loadu(kNf4Thresholds.value + 8), index);
  const F threshold = _mm256_blendv_ps(above, below, _mm256_castsi256_ps(index));
  return _mm256_sub_epi32(index, _mm256_castps_si256(_mm256_cmp_ps(v, threshold, _CMP_GT_OQ)));
}

template <class T>
PEFTRT_INLINE void encode64(const T* weights, float r0, float r1, uint8_t* codes) {
  __m256i v[8];
  for (int j = 0; j < 8; ++j) v[j] = nearest_levels(mul(load(weights + 8 * j), set1(j < 4 ? r0 : r1)));
  // Bytes: lane l has elements 4 l .. 4 l + 3 of each of four vectors. Then 16 times the first of a pair plus the
  // second.
  const __m256i eights = _mm256_set1_epi8(8), weigh = _mm256_set1_epi16(0x0110);
  const __m256i first = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  const __m256i second = _mm256_packs_epi16(_mm256_packs_epi32(v[4], v[5]), _mm256_packs_epi32(v[6], v[7]));
  const __m256i pairs = _mm256_packus_epi16(_mm256_maddubs_epi16(_mm256_add_epi8(first, eights), weigh),
                                            _mm256_maddubs_epi16(_mm256_add_epi8(second, eights), weigh));
  const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm_unpacklo_epi16(low, high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm_unpackhi_epi16(low, high));
}

}  // namespace peftrt::cpu::PEFTRT_ISA
