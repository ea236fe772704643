// Spans of weights out of an NF4 tensor, in order, for any offset, parity and block size.
#pragma once

#include "cpu/scales.h"

namespace peftrt::cpu::PEFTRT_ISA {

// Reads a byte, for its cache line to come near. A prefetch instruction would be dropped where the page is not in the
// TLB, which for a weight is the usual case: with touch, dX at M = 4 takes 3.3 ms where it took 4.3 with and without
// prefetches (N = K = 4096, cold, two threads, Zen 3, November 2026).
PEFTRT_INLINE void touch(const uint8_t* byte) { (void)*static_cast<const volatile uint8_t*>(byte); }

constexpr int64_t kGroup = 64;  // weights decoded together: 32 bytes of codes

// Unit (32 weights) range that the groups touched by [start, start + count) need, clipped to the tensor.
struct Units {
  int64_t first;
  int64_t count;
};
inline Units units_of(const Weight& w, int64_t start, int64_t count) {
  const int64_t first = start / kGroup * 2, numel = w.n * w.k;
  int64_t end = (start + count + kGroup - 1) / kGroup * kGroup;
  if (end > numel) end = numel;
  return {first, (end + 31) / 32 - first};
}

// One group from flat position `start` (a multiple of 64), zeros past the end of the tensor; units[0], units[1] are its
// scales. Nothing is read behind the codes.
template <class T>
inline void decode_group(const Weight& w, int64_t start, const float* units, float* out) {
  const int64_t left = w.n * w.k - start;
  uint8_t staged[32] = {0};
  const uint8_t* codes = w.codes + start / 2;
  if (left < kGroup) {
    std::memcpy(staged, codes, size_t((left + 1) / 2));
    codes = staged;
  }
  decode64<T>(codes, units[0], left > 32 ? units[1] : units[0], [&](int j, F v) { storeu(out + kLanes * j, v); });
}

// Weights [start, start + count) of the flat tensor into out; units = decoded scales of units_of(start, count).
template <class T>
inline void decode_span(const Weight& w, int64_t start, int64_t count, const float* units, float* out) {
  const int64_t end = start + count;
  int64_t group = start / kGroup * kGroup;
  const auto part = [&](int64_t from, int64_t to) {
    alignas(sizeof(F)) float whole[kGroup];
    decode_group<T>(w, group, units, whole);
    std::memcpy(out + (group + from - start), whole + from, size_t(to - from) * sizeof(float));
  };
  if (group < start) {
    part(start - group, end - group < kGroup ? end - group : kGroup);
    group += kGroup, units += 2;
  }
  for (; group + kGroup <= end; group += kGroup, units += 2) {
    float* to = out + (group - start);
    decode64<T>(w.codes + group / 2, units[0], units[1], [&](int j, F v) { storeu(to + kLanes * j, v); });
  }
  if (group < end) part(0, end - group);
}

}  // namespace peftrt::cpu::PEFTRT_ISA
