// Activations and their slopes, element by element, in plain C++ that a compiler makes vectors of: no call, no branch,
// no fused product, so that every instruction set gives the same bits.
//
// Against long double on [-12, 12] tanh, the logistic function and silu are within 2.3 units in the last place; gelu
// and gelu_new, in whose lower tails the exponent's own rounding counts, within 1.2e-6 of the larger of value and 0.001
// (AVX2, November 2026). The coefficients have the least largest error; they were fitted for this file.
#pragma once

#include "cpu/kernels.h"
#include "cpu/micro.h"

namespace peftrt::cpu::PEFTRT_ISA {

constexpr float kLeakySlope = 0.01f;
constexpr float kGeluNew = 0.7978845608f, kGeluCube = 0.044715f;  // sqrt(2 / pi)
constexpr float kDensity = 0.3989422804f;                         // 1 / sqrt(2 pi)

// By bits: of two values that a condition chooses from, a compiler computes one in a branch, and makes no vectors.
PEFTRT_INLINE float pick(bool condition, float a, float b) {
  const uint32_t mask = 0u - uint32_t(condition);
  return bits_float((float_bits(a) & mask) | (float_bits(b) & ~mask));
}
PEFTRT_INLINE float magnitude(float v) { return bits_float(float_bits(v) & 0x7fffffff); }

// e^v = 2^n e^r with |r| <= ln(2) / 2; inf above 89, 0 below -104.
PEFTRT_INLINE float exp_of(float v) {
  constexpr float kToInteger = 12582912.0f;                      // 1.5 * 2^23: a sum with it ends at the units
  constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // ln(2): n times the first is exact
  const float bounded = pick(v > 89.0f, 89.0f, pick(v < -110.0f, -110.0f, v));
  const float shifted = bounded * 1.44269504f + kToInteger, n = shifted - kToInteger;
  const float r = bounded - n * kHigh - n * kLow;
  const float tail = 0.50000001f + r * (0.166665129f + r * (0.0416661873f + r * (0.00836959822f + r * 0.00139517192f)));
  const float value = r * r * tail + r + 1.0f;
  // 2^n in two factors: it may be beyond the range of either
  const int32_t power = int32_t(float_bits(shifted)) - int32_t(float_bits(kToInteger)), half = power >> 1;
  return value * bits_float(uint32_t(half + 127) << 23) * bits_float(uint32_t(power - half + 127) << 23);
}

// The logistic function and its slope, both without a difference.
struct Logistic {
  float value, slope;
};
PEFTRT_INLINE Logistic logistic(float v) {
  const float power = exp_of(-magnitude(v)), share = 1.0f / (1.0f + power), rest = power * share;
  return {pick(v < 0.0f, rest, share), rest * share};
}

PEFTRT_INLINE float tanh_of(float v) {
  const float z = v * v;
  const float small =
      v +
      v * z * (-0.333332839f + z * (0.133314913f + z * (-0.0537434979f + z * (0.0206505868f + z * -0.00571704451f))));
  const float large = 1.0f - 2.0f / (1.0f + exp_of(2.0f * v));
  return pick(z < 0.390625f, small, large);
}

// The normal distribution's share below v, given e^(-v^2 / 2): that of the nearer tail is the density times a
// polynomial in 1 / (1 + |v| / 4), whose relative error is 6e-9.
PEFTRT_INLINE float normal_share(float v, float bell) {
  const float t = 1.0f / (1.0f + 0.25f * magnitude(v));
  const float low =
      0.0662123753f +
      t * (0.102301929f +
           t * (-0.0147142769f + t * (0.0596565586f + t * (0.0293642942f + t * (-0.0537241097f + t * 0.0149752377f)))));
  const float tail = bell * (t * (0.0997577522f + t * (0.0993177742f + t * (0.0968524685f + t * low))));
  return pick(v < 0.0f, tail, 1.0f - tail);
}

PEFTRT_INLINE float bell(float v) { return exp_of(-0.5f * v * v); }

// (1 + tanh(u)) / 2 is the logistic function of 2u.
PEFTRT_INLINE Logistic gelu_new_share(float v) { return logistic(2.0f * kGeluNew * (v + kGeluCube * v * v * v)); }

template <class Function>
inline void map(const float* from, int64_t count, float* to, const Function& function) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] = function(from[i]);
}

// to[i] = act(from[i]); they may be the same.
inline void activate(Activation activation, const float* from, int64_t count, float* to) {
  switch (activation) {
    case Activation::kRelu:
      return map(from, count, to, [](float v) { return pick(v < 0.0f, 0.0f, v); });
    case Activation::kGelu:
      return map(from, count, to, [](float v) { return v * normal_share(v, bell(v)); });
    case Activation::kGeluNew:
      return map(from, count, to, [](float v) { return v * gelu_new_share(v).value; });
    case Activation::kSilu:
      return map(from, count, to, [](float v) { return v * logistic(v).value; });
    case Activation::kTanh:
      return map(from, count, to, [](float v) { return tanh_of(v); });
    case Activation::kSigmoid:
      return map(from, count, to, [](float v) { return logistic(v).value; });
    case Activation::kLeakyRelu:
      return map(from, count, to, [](float v) { return pick(v > 0.0f, v, kLeakySlope * v); });
  }
}

// to[i] = act'(from[i]).
inline void slope(Activation activation, const float* from, int64_t count, float* to) {
  switch (activation) {
    case Activation::kRelu:
      return map(from, count, to, [](float v) { return pick(v <= 0.0f, 0.0f, 1.0f); });
    case Activation::kGelu:
      return map(from, count, to, [](float v) {
        const float height = bell(v);
        return normal_share(v, height) + v * (kDensity * height);
      });
    case Activation::kGeluNew:
      return map(from, count, to, [](float v) {
        const Logistic share = gelu_new_share(v);
        return share.value + v * (share.slope * (2.0f * kGeluNew * (1.0f + 3.0f * kGeluCube * v * v)));
      });
    case Activation::kSilu:
      return map(from, count, to, [](float v) {
        const Logistic share = logistic(v);
        return share.value + v * share.slope;
      });
    case Activation::kTanh:
      return map(from, count, to, [](float v) { return 4.0f * logistic(2.0f * v).slope; });
    case Activation::kSigmoid:
      return map(from, count, to, [](float v) { return logistic(v).slope; });
    case Activation::kLeakyRelu:
      return map(from, count, to, [](float v) { return pick(v > 0.0f, 1.0f, kLeakySlope); });
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
