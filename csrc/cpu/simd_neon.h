// NEON of any aarch64 (ARMv8.0): eight floats in two q registers, and NF4 by byte planes.
//
// A code is looked up four times by tbl, once a byte of its fp32 value, and the four planes are zipped into floats: 4
// tbl and 8 zips for 16 weights. (Tables of 64 bytes would need no zips, but tbl of four registers costs more than it
// saves, and its indices must be spread first.) A bf16 or fp16 weight is one of 16 values a block: the table is scaled
// and rounded in place of the weights, and has two planes.
//
// The order of look-ups and of sums is that of simd_avx2.h, so that both give the same bits.
#pragma once

#include <arm_neon.h>

#include "cpu/half.h"
#include "nf4.h"

namespace peftrt::cpu::PEFTRT_ISA {

struct F {
  float32x4_t low, high;
};

constexpr int kLanes = 8;
constexpr int kMicroRows2 = 6, kMicroRows1 = 12;

PEFTRT_INLINE F set1(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
PEFTRT_INLINE F set_halves(float a, float b) { return {vdupq_n_f32(a), vdupq_n_f32(b)}; }
PEFTRT_INLINE F zero() { return set1(0.0f); }
PEFTRT_INLINE F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
PEFTRT_INLINE F sub(F a, F b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
PEFTRT_INLINE F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
PEFTRT_INLINE F div(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
PEFTRT_INLINE F sqrt(F v) { return {vsqrtq_f32(v.low), vsqrtq_f32(v.high)}; }
PEFTRT_INLINE F fma(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }

// By bytes throughout: an element may lie at an odd address.
PEFTRT_INLINE uint8x16_t load16(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
PEFTRT_INLINE void store16(void* p, uint8x16_t bytes) { vst1q_u8(static_cast<uint8_t*>(p), bytes); }

PEFTRT_INLINE F loadu(const float* p) { return {vreinterpretq_f32_u8(load16(p)), vreinterpretq_f32_u8(load16(p + 4))}; }
PEFTRT_INLINE void storeu(float* p, F v) {
  store16(p, vreinterpretq_u8_f32(v.low)), store16(p + 4, vreinterpretq_u8_f32(v.high));
}

// Elements of 16 bits, four floats at a time. widen takes bits, narrow gives them.
template <class T>
PEFTRT_INLINE F widen(uint16x8_t bits);
template <>
PEFTRT_INLINE F widen<bf16>(uint16x8_t bits) {
  const uint16x8_t none = vdupq_n_u16(0);
  return {vreinterpretq_f32_u16(vzip1q_u16(none, bits)), vreinterpretq_f32_u16(vzip2q_u16(none, bits))};
}
template <>
PEFTRT_INLINE F widen<fp16>(uint16x8_t bits) {
  const float16x8_t halves = vreinterpretq_f16_u16(bits);
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}

// Nearest even in the upper 16 bits. A NaN must be quiet with a clear lower half, as decoded scales are made
// (scales.h).
PEFTRT_INLINE uint16x8_t round_bf16_bits(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd_on_top = vshlq_n_u32(bits, 15);
  return vreinterpretq_u16_u32(vsraq_n_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd_on_top, 31));
}

template <class T>
PEFTRT_INLINE uint16x8_t narrow(F v);
template <>
PEFTRT_INLINE uint16x8_t narrow<bf16>(F v) {
  return vuzp2q_u16(round_bf16_bits(v.low), round_bf16_bits(v.high));
}
template <>
PEFTRT_INLINE uint16x8_t narrow<fp16>(F v) {
  return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.low), v.high));
}

template <class T>
PEFTRT_INLINE F load(const T* p) {
  return widen<T>(vreinterpretq_u16_u8(load16(p)));
}
PEFTRT_INLINE F load(const float* p) { return loadu(p); }

PEFTRT_INLINE void store(float* p, F v) { storeu(p, v); }
PEFTRT_INLINE void store(fp16* p, F v) { store16(p, vreinterpretq_u8_u16(narrow<fp16>(v))); }
PEFTRT_INLINE F canonical_nan(F v) {
  const float32x4_t nan = vdupq_n_f32(__builtin_nanf(""));
  return {vbslq_f32(vceqq_f32(v.low, v.low), v.low, nan), vbslq_f32(vceqq_f32(v.high, v.high), v.high, nan)};
}
PEFTRT_INLINE void store(bf16* p, F v) { store16(p, vreinterpretq_u8_u16(narrow<bf16>(canonical_nan(v)))); }

template <class T>
PEFTRT_INLINE F round_to(F v) {
  return widen<T>(narrow<T>(v));
}
template <>
PEFTRT_INLINE F round_to<float>(F v) {
  return v;
}

PEFTRT_INLINE float sum(F v) {
  const float32x4_t four = vaddq_f32(v.low, v.high);
  return vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}

PEFTRT_INLINE void transpose4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  const float64x2_t ab0 = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab1 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  const float64x2_t cd0 = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd1 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  a = vreinterpretq_f32_f64(vtrn1q_f64(ab0, cd0)), b = vreinterpretq_f32_f64(vtrn1q_f64(ab1, cd1));
  c = vreinterpretq_f32_f64(vtrn2q_f64(ab0, cd0)), d = vreinterpretq_f32_f64(vtrn2q_f64(ab1, cd1));
}

PEFTRT_INLINE void transpose(F r[kLanes]) {
  transpose4(r[0].low, r[1].low, r[2].low, r[3].low);
  transpose4(r[4].high, r[5].high, r[6].high, r[7].high);
  transpose4(r[0].high, r[1].high, r[2].high, r[3].high);
  transpose4(r[4].low, r[5].low, r[6].low, r[7].low);
  for (int i = 0; i < 4; ++i) {
    const float32x4_t upper = r[i].high;
    r[i].high = r[i + 4].low, r[i + 4].low = upper;
  }
}

// The bytes of 16 values of type T, byte b of value i at plane[b][i].
template <class T>
struct Planes {
  uint8x16_t plane[sizeof(T)];
};

struct alignas(16) PlaneBytes {
  uint8_t byte[4][16];
};
constexpr PlaneBytes make_planes(const float* values) {
  PlaneBytes planes = {};
  for (int i = 0; i < 16; ++i)
    for (int b = 0; b < 4; ++b) planes.byte[b][i] = uint8_t(__builtin_bit_cast(uint32_t, values[i]) >> (8 * b));
  return planes;
}
constexpr PlaneBytes kPlanes = make_planes(kNf4), kThresholdPlanes = make_planes(kNf4Thresholds.value);

PEFTRT_INLINE Planes<float> planes_of(const PlaneBytes& made) {
  return {{load16(made.byte[0]), load16(made.byte[1]), load16(made.byte[2]), load16(made.byte[3])}};
}

// The planes of round_to<T>(kNf4 * scale), in 16 bits.
template <class T>
PEFTRT_INLINE Planes<T> scaled_planes(float scale) {
  const uint8x16_t a = vreinterpretq_u8_u16(narrow<T>(mul(loadu(kNf4), set1(scale))));
  const uint8x16_t b = vreinterpretq_u8_u16(narrow<T>(mul(loadu(kNf4 + 8), set1(scale))));
  return {{vuzp1q_u8(a, b), vuzp2q_u8(a, b)}};
}

PEFTRT_INLINE uint16x8_t zip_low(uint8x16_t a, uint8x16_t b) { return vreinterpretq_u16_u8(vzip1q_u8(a, b)); }
PEFTRT_INLINE uint16x8_t zip_high(uint8x16_t a, uint8x16_t b) { return vreinterpretq_u16_u8(vzip2q_u8(a, b)); }

// 16 codes, a nibble a byte -> 16 floats, in order.
struct Sixteen {
  F half[2];
};
PEFTRT_INLINE Sixteen look_up(const Planes<float>& table, uint8x16_t index) {
  const uint8x16_t p0 = vqtbl1q_u8(table.plane[0], index), p1 = vqtbl1q_u8(table.plane[1], index);
  const uint8x16_t p2 = vqtbl1q_u8(table.plane[2], index), p3 = vqtbl1q_u8(table.plane[3], index);
  const auto floats = [](uint16x8_t a, uint16x8_t b) -> F {
    return {vreinterpretq_f32_u16(vzip1q_u16(a, b)), vreinterpretq_f32_u16(vzip2q_u16(a, b))};
  };
  return {{floats(zip_low(p0, p1), zip_low(p2, p3)), floats(zip_high(p0, p1), zip_high(p2, p3))}};
}
template <class T>
PEFTRT_INLINE Sixteen look_up(const Planes<T>& table, uint8x16_t index) {
  const uint8x16_t p0 = vqtbl1q_u8(table.plane[0], index), p1 = vqtbl1q_u8(table.plane[1], index);
  return {{widen<T>(zip_low(p0, p1)), widen<T>(zip_high(p0, p1))}};
}

PEFTRT_INLINE uint8x16_t high_nibbles(uint8x16_t bytes) { return vshrq_n_u8(bytes, 4); }
PEFTRT_INLINE uint8x16_t low_nibbles(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }

// Vectors 0 .. 3 are the even elements, 4 .. 7 the odd ones; half l of vector q has those of bytes 16 l + 4 q .. + 3.
template <class Sink>
PEFTRT_INLINE void lookup64(const uint8_t* codes, Sink&& sink) {
  const Planes<float> table = planes_of(kPlanes);
  const uint8x16_t bytes0 = load16(codes), bytes1 = load16(codes + 16);
  const auto four = [&](int j, uint8x16_t index0, uint8x16_t index1) {
    const Sixteen a = look_up(table, index0), b = look_up(table, index1);
    sink(j, F{a.half[0].low, b.half[0].low}), sink(j + 1, F{a.half[0].high, b.half[0].high});
    sink(j + 2, F{a.half[1].low, b.half[1].low}), sink(j + 3, F{a.half[1].high, b.half[1].high});
  };
  four(0, high_nibbles(bytes0), high_nibbles(bytes1));
  four(4, low_nibbles(bytes0), low_nibbles(bytes1));
}

PEFTRT_INLINE void to_lookup_order(const float* from, float* to) {
  for (int q = 0; q < 4; ++q) {
    const F a = loadu(from + 8 * q), b = loadu(from + 32 + 8 * q);
    storeu(to + 8 * q, {vuzp1q_f32(a.low, a.high), vuzp1q_f32(b.low, b.high)});
    storeu(to + 32 + 8 * q, {vuzp2q_f32(a.low, a.high), vuzp2q_f32(b.low, b.high)});
  }
}

PEFTRT_INLINE void from_lookup_order(const float* from, float* to) {
  for (int q = 0; q < 4; ++q) {
    const F even = loadu(from + 8 * q), odd = loadu(from + 32 + 8 * q);
    storeu(to + 8 * q, {vzip1q_f32(even.low, odd.low), vzip2q_f32(even.low, odd.low)});
    storeu(to + 32 + 8 * q, {vzip1q_f32(even.high, odd.high), vzip2q_f32(even.high, odd.high)});
  }
}

template <class T, class Sink>
PEFTRT_INLINE void decode64(const uint8_t* codes, float s0, float s1, Sink&& sink) {
  const auto half = [&](int j, const auto& table, float scale) {
    const uint8x16_t bytes = load16(codes + 4 * j);
    const uint8x16_t first = high_nibbles(bytes), second = low_nibbles(bytes);
    const Sixteen a = look_up(table, vzip1q_u8(first, second)), b = look_up(table, vzip2q_u8(first, second));
    const auto finish = [&](F v) { return kIsFloat<T> ? mul(v, set1(scale)) : v; };
    sink(j, finish(a.half[0])), sink(j + 1, finish(a.half[1]));
    sink(j + 2, finish(b.half[0])), sink(j + 3, finish(b.half[1]));
  };
  if constexpr (kIsFloat<T>) {
    half(0, planes_of(kPlanes), s0), half(4, planes_of(kPlanes), s1);
  } else {
    Planes<T> table = scaled_planes<T>(s0);
    half(0, table, s0);
    if (s0 != s1) table = scaled_planes<T>(s1);  // blocks of 32 only
    half(4, table, s1);
  }
}

// Quantisation. Magnitudes are compared as integers, where a NaN is above infinity and so is never lost.
PEFTRT_INLINE F max_magnitude(F most, F v) {
  const auto larger = [](float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(vabsq_f32(b))));
  };
  return {larger(most.low, v.low), larger(most.high, v.high)};
}
PEFTRT_INLINE float largest(F most) {
  return bits_float(vmaxvq_u32(vmaxq_u32(vreinterpretq_u32_f32(most.low), vreinterpretq_u32_f32(most.high))));
}

// Bins of 1/32, cut towards zero, of [-1, 1]: bin b has at index b + 31 how many thresholds are below all of it. None
// has more than one threshold inside. Bin -32 is out of the table, where a look-up gives 0 as it should.
struct alignas(16) Bins {
  uint8_t level[64];
  bool settled;  // by one comparison more
};
constexpr int thresholds_below(int edge) {
  int count = 0;
  for (int i = 0; i < 15; ++i) count += kNf4Thresholds.value[i] * 32 < float(edge);
  return count;
}
constexpr Bins make_bins() {
  Bins bins = {{}, thresholds_below(-32) == 0};
  for (int b = -31; b <= 32; ++b) {
    const int first = thresholds_below(b > 0 ? b : b - 1), past = thresholds_below(b < 0 ? b : b + 1);
    bins.level[b + 31] = uint8_t(first);
    bins.settled = bins.settled && past - first <= 1;
  }
  return bins;
}
constexpr Bins kBins = make_bins();
static_assert(kBins.settled);

// The lowest bytes of four vectors of integers.
PEFTRT_INLINE uint8x16_t low_bytes(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
  const uint16x8_t ab = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
  const uint16x8_t cd = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
  return vuzp1q_u8(vreinterpretq_u8_u16(ab), vreinterpretq_u8_u16(cd));
}

// The levels of 16 values, scaled to [-1, 1]: a bin's, or one more where the value is above the threshold in the bin.
PEFTRT_INLINE uint8x16_t nearest_levels(F a, F b) {
  const uint8x16x4_t bins = {
      {load16(kBins.level), load16(kBins.level + 16), load16(kBins.level + 32), load16(kBins.level + 48)}};
  const auto bin = [](float32x4_t v) { return vreinterpretq_u32_s32(vcvtq_n_s32_f32(v, 5)); };
  const uint8x16_t index = low_bytes(bin(a.low), bin(a.high), bin(b.low), bin(b.high));
  const uint8x16_t level = vqtbl4q_u8(bins, vaddq_u8(index, vdupq_n_u8(31)));
  const Sixteen t = look_up(planes_of(kThresholdPlanes), level);
  const uint8x16_t above = low_bytes(vcgtq_f32(a.low, t.half[0].low), vcgtq_f32(a.high, t.half[0].high),
                                     vcgtq_f32(b.low, t.half[1].low), vcgtq_f32(b.high, t.half[1].high));
  return vsubq_u8(level, above);
}

template <class T>
PEFTRT_INLINE void encode64(const T* weights, float r0, float r1, uint8_t* codes) {
  // The minimum makes 1 of a NaN.
  const auto scaled = [&](int j) -> F {
    const F v = mul(load(weights + 8 * j), set1(j < 4 ? r0 : r1));
    return {vminnmq_f32(v.low, vdupq_n_f32(1.0f)), vminnmq_f32(v.high, vdupq_n_f32(1.0f))};
  };
  for (int half = 0; half < 2; ++half) {
    const uint8x16_t a = nearest_levels(scaled(4 * half), scaled(4 * half + 1));
    const uint8x16_t b = nearest_levels(scaled(4 * half + 2), scaled(4 * half + 3));
    store16(codes + 16 * half, vsliq_n_u8(vuzp2q_u8(a, b), vuzp1q_u8(a, b), 4));
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
