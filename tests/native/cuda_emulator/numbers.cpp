// Conversions of 16-bit floats, for the emulator and for what is checked on it.
#include <vector>

#include "cuda/device.h"

namespace emulator {

float bf16_to_float(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

static float fp16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(float(fraction), -24)
                          : exponent == 31 ? (fraction ? NAN : INFINITY)
                                           : std::ldexp(float(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

uint16_t float_to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

float fp16_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> made(65536);
    for (size_t i = 0; i < made.size(); ++i) made[i] = fp16_value(uint16_t(i));
    return made;
  }();
  return table[bits];
}

// To the nearest multiple of its last place, ties to even, by way of doubles.
uint16_t float_to_fp16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  const double magnitude = std::fabs(double(value));
  if (magnitude >= 65520) return uint16_t(sign | 0x7c00);
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const int places = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024 to 2048, less if subnormal
  return uint16_t(sign | ((exponent + 14) * 1024 + places));
}

}  // namespace emulator
