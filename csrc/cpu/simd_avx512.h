// AVX-512 F, BW, DQ and VL: sixteen floats in a zmm register, and NF4 by one permutation.
//
// The codebook is sixteen floats, so it fits one register and vpermps looks up sixteen codes at once. It reads the low
// four bits of each 32-bit index and ignores the others: a code only has to be shifted to the bottom of its lane.
#pragma once

// GCC 12's own header leaves the masked-off lanes of some intrinsics unset, and then warns of it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "cpu/half.h"
#include "nf4.h"

namespace peftrt::cpu::PEFTRT_ISA {

using F = __m512;
constexpr int kLanes = 16;
// Of 32 registers. Twelve rows of one vector already hide an FMA's latency, and more would not fill its ports better.
constexpr int kMicroRows2 = 12, kMicroRows1 = 12;

PEFTRT_INLINE F set1(float value) { return _mm512_set1_ps(value); }
PEFTRT_INLINE F set_halves(float a, float b) { return _mm512_mask_broadcastss_ps(set1(a), 0xff00, _mm_set_ss(b)); }
PEFTRT_INLINE F zero() { return _mm512_setzero_ps(); }
PEFTRT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
PEFTRT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
PEFTRT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
PEFTRT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
PEFTRT_INLINE F sqrt(F v) { return _mm512_sqrt_ps(v); }
PEFTRT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
PEFTRT_INLINE F loadu(const float* p) { return _mm512_loadu_ps(p); }
PEFTRT_INLINE void storeu(float* p, F v) { _mm512_storeu_ps(p, v); }

PEFTRT_INLINE __m256i load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
PEFTRT_INLINE F load(const float* p) { return loadu(p); }
PEFTRT_INLINE F load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits(p)), 16));
}
PEFTRT_INLINE F load(const fp16* p) { return _mm512_cvtph_ps(load_bits(p)); }

// Nearest even in the upper 16 bits. A NaN must be quiet with a clear lower half, as decoded scales are made
// (scales.h). AVX512_BF16 has an instruction for this, but it flushes subnormals.
PEFTRT_INLINE __m512i round_bf16_bits(F v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

PEFTRT_INLINE F canonical_nan(F v) {
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(v, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}

PEFTRT_INLINE void store(float* p, F v) { storeu(p, v); }
PEFTRT_INLINE void store(bf16* p, F v) {
  const __m512i high = _mm512_srli_epi32(round_bf16_bits(canonical_nan(v)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
PEFTRT_INLINE void store(fp16* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

template <class T>
PEFTRT_INLINE F round_to(F v);
template <>
PEFTRT_INLINE F round_to<float>(F v) {
  return v;
}
template <>
PEFTRT_INLINE F round_to<bf16>(F v) {
  return _mm512_castsi512_ps(_mm512_and_si512(round_bf16_bits(v), _mm512_set1_epi32(int(0xffff0000))));
}
template <>
PEFTRT_INLINE F round_to<fp16>(F v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

PEFTRT_INLINE float sum(F v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Four vectors as rows of four 128-bit lanes: lane j of row i and lane i of row j change places.
PEFTRT_INLINE void transpose_lanes(F& a, F& b, F& c, F& d) {
  const F ab0 = _mm512_shuffle_f32x4(a, b, 0x44), ab2 = _mm512_shuffle_f32x4(a, b, 0xee);
  const F cd0 = _mm512_shuffle_f32x4(c, d, 0x44), cd2 = _mm512_shuffle_f32x4(c, d, 0xee);
  a = _mm512_shuffle_f32x4(ab0, cd0, 0x88), b = _mm512_shuffle_f32x4(ab0, cd0, 0xdd);
  c = _mm512_shuffle_f32x4(ab2, cd2, 0x88), d = _mm512_shuffle_f32x4(ab2, cd2, 0xdd);
}

// The same for the four floats of every 128-bit lane.
PEFTRT_INLINE void transpose_within_lanes(F& a, F& b, F& c, F& d) {
  const F ab0 = _mm512_unpacklo_ps(a, b), ab2 = _mm512_unpackhi_ps(a, b);
  const F cd0 = _mm512_unpacklo_ps(c, d), cd2 = _mm512_unpackhi_ps(c, d);
  a = _mm512_shuffle_ps(ab0, cd0, 0x44), b = _mm512_shuffle_ps(ab0, cd0, 0xee);
  c = _mm512_shuffle_ps(ab2, cd2, 0x44), d = _mm512_shuffle_ps(ab2, cd2, 0xee);
}

PEFTRT_INLINE void transpose(F r[kLanes]) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) transpose_within_lanes(r[i], r[i + 1], r[i + 2], r[i + 3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) transpose_lanes(r[i], r[i + 4], r[i + 8], r[i + 12]);
}

PEFTRT_INLINE int load_word(const uint8_t* p) {
  int word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

PEFTRT_INLINE F lookup(__m512i index) { return _mm512_permutexvar_ps(index, loadu(kNf4)); }

// Each lane takes two bytes, that is four weights, and vector j has the j-th of them: element i is weight 4 i + j.
template <class Sink>
PEFTRT_INLINE void lookup64(const uint8_t* codes, Sink&& sink) {
  const __m512i pairs = _mm512_cvtepu16_epi32(load_bits(codes));
  sink(0, lookup(_mm512_srli_epi32(pairs, 4)));
  sink(1, lookup(pairs));
  sink(2, lookup(_mm512_srli_epi32(pairs, 12)));
  sink(3, lookup(_mm512_srli_epi32(pairs, 8)));
}

PEFTRT_INLINE void to_lookup_order(const float* from, float* to) {
  F a = loadu(from), b = loadu(from + 16), c = loadu(from + 32), d = loadu(from + 48);
  transpose_lanes(a, b, c, d);
  transpose_within_lanes(a, b, c, d);
  storeu(to, a), storeu(to + 16, b), storeu(to + 32, c), storeu(to + 48, d);
}

PEFTRT_INLINE void from_lookup_order(const float* from, float* to) {
  F a = loadu(from), b = loadu(from + 16), c = loadu(from + 32), d = loadu(from + 48);
  transpose_within_lanes(a, b, c, d);
  transpose_lanes(a, b, c, d);
  storeu(to, a), storeu(to + 16, b), storeu(to + 32, c), storeu(to + 48, d);
}

template <class T, class Sink>
PEFTRT_INLINE void decode64(const uint8_t* codes, float s0, float s1, Sink&& sink) {
  // Sixteen weights are two words of four bytes, one for each half of the lanes; every lane shifts its own code down.
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i words = _mm512_mask_broadcastd_epi32(_mm512_set1_epi32(load_word(codes + 8 * j)), 0xff00,
                                                       _mm_cvtsi32_si128(load_word(codes + 8 * j + 4)));
    sink(j, round_to<T>(mul(lookup(_mm512_srlv_epi32(words, shifts)), set1(j < 2 ? s0 : s1))));
  }
}

// Quantisation. Magnitudes are compared as integers, where a NaN is above infinity and so is never lost.
PEFTRT_INLINE F max_magnitude(F most, F v) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), magnitude));
}
PEFTRT_INLINE float largest(F most) {
  const __m512i bits = _mm512_castps_si512(most);
  const __m256i eight = _mm256_max_epi32(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}

// The levels of sixteen scaled values. A cubic guesses the threshold that is nearest, by number: it is off by no more
// than 0.13 at each of them, so a value whose guess rounds to i lies between thresholds i - 1 and i + 1, and one
// comparison with threshold i settles it. min makes 1 of a NaN, and bounds the guess to 0 .. 14.
PEFTRT_INLINE __m512i nearest_levels(F scaled) {
  const F v = _mm512_min_ps(scaled, set1(1.0f));
  const F guess = fma(fma(fma(set1(-4.5676875f), v, set1(0.5615256f)), v, set1(11.484821f)), v, set1(6.6349467f));
  // 1.5 * 2^23: the sum is rounded to an integer, which is then its low bits (and SIMDe has no conversion).
  const __m512i low4 = _mm512_set1_epi32(15);
  const __m512i index = _mm512_and_si512(_mm512_castps_si512(add(guess, set1(12582912.0f))), low4);
  const F threshold = _mm512_permutexvar_ps(index, loadu(kNf4Thresholds.value));
  return _mm512_mask_add_epi32(index, _mm512_cmp_ps_mask(v, threshold, _CMP_GT_OQ), index, _mm512_set1_epi32(1));
}

template <class T>
PEFTRT_INLINE void encode64(const T* weights, float r0, float r1, uint8_t* codes) {
  const __m128i weigh = _mm_set1_epi16(0x0110);  // 16 times the first of a pair plus the second
  for (int half = 0; half < 2; ++half) {
    const F r = set1(half == 0 ? r0 : r1);
    const T* from = weights + 32 * half;
    const __m128i a = _mm512_cvtsepi32_epi8(nearest_levels(mul(load(from), r)));
    const __m128i b = _mm512_cvtsepi32_epi8(nearest_levels(mul(load(from + 16), r)));
    const __m128i pairs = _mm_packus_epi16(_mm_maddubs_epi16(a, weigh), _mm_maddubs_epi16(b, weigh));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16 * half), pairs);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
