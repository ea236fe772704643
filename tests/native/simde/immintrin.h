// In place of the compiler's immintrin.h: SIMDe's (https://github.com/simd-everywhere/simde) emulation of AVX-512, so
// that simd_avx512.h runs on any x86-64 CPU and under sanitizers.
//
// What SIMDe 0.7.4 has no or no public name for is below, mostly as loops over the lanes; the macros hide the ones of
// later releases.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "cpu/half.h"

using __mmask16 = simde__mmask16;

namespace peftrt::cpu::PEFTRT_ISA::emulated {

inline __m512 cvtph_ps(__m256i halves) {
  fp16 from[16];
  float to[16];
  std::memcpy(from, &halves, 32);
  for (int i = 0; i < 16; ++i) to[i] = to_float(from[i]);
  return _mm512_loadu_ps(to);
}

inline __m256i cvtps_ph(__m512 floats, int) {
  float from[16];
  fp16 to[16];
  std::memcpy(from, &floats, 64);
  for (int i = 0; i < 16; ++i) to[i] = from_float<fp16>(from[i]);
  __m256i halves;
  std::memcpy(&halves, to, 32);
  return halves;
}

inline __m512i cvtepu16_epi32(__m256i words) {
  uint16_t from[16];
  uint32_t to[16];
  std::memcpy(from, &words, 32);
  for (int i = 0; i < 16; ++i) to[i] = from[i];
  return _mm512_loadu_si512(to);
}

inline __m256i cvtepi32_epi16(__m512i words) {
  uint32_t from[16];
  uint16_t to[16];
  std::memcpy(from, &words, 64);
  for (int i = 0; i < 16; ++i) to[i] = uint16_t(from[i]);
  __m256i low;
  std::memcpy(&low, to, 32);
  return low;
}

inline __m256 extractf32x8_ps(__m512 floats, int half) {
  float from[16];
  std::memcpy(from, &floats, 64);
  return _mm256_loadu_ps(from + 8 * half);
}

}  // namespace peftrt::cpu::PEFTRT_ISA::emulated

#undef _mm512_shuffle_f32x4
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_extractf32x8_ps
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
