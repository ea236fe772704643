// The nearest levels of the 8-bit maps: how many of a map's midpoints are below a value in [-1, 1].
//
// A value's exponent and the first bits of its mantissa are its bin. No bin has more than one midpoint inside, and one
// word a bin is enough to settle it: the number of midpoints below the bin above what a value's other bits must be
// added to so that they carry into it exactly where they are larger than the midpoint's.
#pragma once

#include "adamw_state.h"
#include "cpu/half.h"

namespace peftrt::cpu::PEFTRT_ISA {

constexpr uint32_t constant_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

// Of kCount non-negative levels from 0 to 1: kShift bits of a value do not count for its bin, and what is below kFloor,
// which is below all midpoints, is in the first.
template <int kCount, int kShift, uint32_t kFloor>
struct LevelBins {
  static constexpr int kLevels = kCount, kShiftBits = kShift;
  static constexpr uint32_t kFloorBits = kFloor, kTop = 0x3f800000, kRest = (2u << kShift) - 1;
  uint32_t word[((kTop - kFloor) >> kShift) + 1];
  bool settled;

  constexpr explicit LevelBins(const float* level) : word(), settled(false) {
    int below = 0, most = 0;
    for (uint32_t begin = kFloor; begin <= kTop; begin += 1u << kShift) {
      const int before = below;
      uint32_t rest = 0;  // never carries
      for (; below < kCount - 1; ++below) {
        const uint32_t midpoint = constant_bits((level[below] + level[below + 1]) / 2);
        if (midpoint >= begin + (1u << kShift)) break;
        rest = kRest - (midpoint - begin);
      }
      word[(begin - kFloor) >> kShift] = uint32_t(before) << (kShift + 1) | rest;
      most = below - before > most ? below - before : most;
    }
    settled = below == kCount - 1 && most == 1 && constant_bits((level[0] + level[1]) / 2) > kFloor;
  }

  // Of a magnitude of at most 1, as bits.
  static PEFTRT_INLINE uint32_t bin(uint32_t magnitude) { return (magnitude - kFloor) >> kShift; }
  static PEFTRT_INLINE uint32_t rest(uint32_t magnitude) { return magnitude & ((1u << kShift) - 1); }
};

constexpr LevelBins<129, 17, 0x34800000> kSignedBins(kDynamicMagnitude);
constexpr LevelBins<256, 16, 0x34000000> kUnsignedBins(kDynamicUnsigned);
static_assert(kSignedBins.settled && kUnsignedBins.settled);

// The levels of kCount values of at most 1 after division, by a map with signs or without: a tie goes down, a NaN to
// the top. Words are looked up in a loop of their own, so that those before and after it are vectors; gathers of AVX2
// were no faster (0.45 ns a level, Zen 3, November 2026).
template <int kCount, class Table>
inline void nearest_dynamic(const Table& bins, const float* values, float divisor, uint8_t* levels) {
  constexpr bool kSigned = Table::kLevels < 256;
  int32_t negative[kCount];
  uint32_t word[kCount], rest[kCount];
  for (int i = 0; i < kCount; ++i) {
    const float scaled = values[i] / divisor;
    const int32_t bits = int32_t(float_bits(scaled < 1.0f ? scaled : 1.0f));
    negative[i] = kSigned ? bits >> 31 : 0;
    const int32_t magnitude = kSigned ? bits & 0x7fffffff : bits;
    const uint32_t bounded = magnitude < int32_t(Table::kFloorBits) ? Table::kFloorBits : uint32_t(magnitude);
    word[i] = Table::bin(bounded);
    rest[i] = Table::rest(bounded) - uint32_t(negative[i]);  // below zero, what is at a midpoint counts
  }
  for (int i = 0; i < kCount; ++i) word[i] = bins.word[word[i]];
  for (int i = 0; i < kCount; ++i) {
    const int32_t below = int32_t((word[i] + rest[i]) >> (Table::kShiftBits + 1));
    const int32_t level = kSigned ? 127 + (below ^ negative[i]) - negative[i] : below;
    levels[i] = uint8_t(level < 0 ? 0 : level);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
