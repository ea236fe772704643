// What every simd_<isa>.h has in common: bf16 and fp16 as bits, with conversions in plain integer code for the tails of
// vector loops and the portable path.
#pragma once

#include <cstdint>
#include <cstring>

#define PEFTRT_INLINE inline __attribute__((always_inline))

namespace peftrt::cpu::PEFTRT_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Whether T is float, whose loads and stores convert nothing.
template <class T>
constexpr bool kIsFloat = false;
template <>
inline constexpr bool kIsFloat<float> = true;

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) { return bits_float(uint32_t(value.bits) << 16); }

inline float to_float(fp16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13 | ((rest & 0x3ff) ? 0x400000 : 0));
  if (rest >= 0x400) return bits_float(sign | ((rest << 13) + ((127 - 15) << 23)));
  // Subnormal: rest * 2^-24, exact in fp32.
  return bits_float(sign | float_bits(float(rest) * 5.9604644775390625e-8f));
}

template <class T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bf16 from_float<bf16>(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline fp16 from_float<fp16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff))};
  if (rest >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 65536 and up
  if (rest < 0x38800000) {                                   // under 2^-14: a multiple of 2^-24, rounded by the adder
    const uint32_t shifted = float_bits(bits_float(rest) + 0.5f);
    return {uint16_t(sign | (shifted - 0x3f000000))};
  }
  const uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
  return {uint16_t(sign | (rounded - ((127 - 15) << 23)) >> 13)};
}

}  // namespace peftrt::cpu::PEFTRT_ISA
