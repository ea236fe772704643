// Scales and spans of weights out of an NF4 tensor, for any offset, parity and block size.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace peftrt::cpu::PEFTRT_ISA {

constexpr int64_t kMaxSpan = 1024;  // weights that one call of decode_span decodes at most

PEFTRT_INLINE float load_float(const uint8_t* bytes, int64_t index) {
  float value;
  std::memcpy(&value, bytes + 4 * index, sizeof value);
  return value;
}

// A NaN becomes the quiet one with a clear payload: round_to<bf16> relies on it, and all its NaNs then look alike.
PEFTRT_INLINE float canonical(float scale) { return scale == scale ? scale : __builtin_nanf(""); }

PEFTRT_INLINE int block_shift(const Weight& w) { return __builtin_ctz(unsigned(w.block_size)); }

// scale[first .. first + count) into out.
inline void decode_scales(const Weight& w, int64_t first, int64_t count, float* out) {
  if (w.nested_absmax == nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = canonical(load_float(w.absmax, first + i));
    return;
  }
  for (int64_t i = 0; i < count;) {
    const int64_t run = (first + i) / kNestedBlock;
    const int64_t left = (run + 1) * kNestedBlock - (first + i);
    const int64_t stop = i + (left < count - i ? left : count - i);
    const float nested_absmax = load_float(w.nested_absmax, run);
    for (; i < stop; ++i)
      out[i] = canonical(nested_scale(dynamic_code(w.absmax[first + i]), nested_absmax, w.nested_offset));
  }
}

// The 64 weights from flat position `start` (a multiple of 64) into out, zeros past the end of the tensor; `scales` are
// those of the blocks from `first_block` on.
template <class T>
inline void decode_group(const Weight& w, int64_t start, const float* scales, int64_t first_block, float* out) {
  const int64_t numel = w.n * w.k, left = numel - start;
  const int shift = block_shift(w);
  const float s0 = scales[(start >> shift) - first_block];
  const float s1 = left > 32 ? scales[((start + 32) >> shift) - first_block] : s0;
  uint8_t staged[32] = {0};
  const uint8_t* codes = w.codes + start / 2;
  if (left < 64) {
    std::memcpy(staged, codes, size_t((left + 1) / 2));
    codes = staged;
  }
  decode64<T>(codes, s0, s1, [&](int j, F v) { storeu(out + 8 * j, v); });
}

// Weights [start, start + count) of the flat tensor into out, in order; count <= kMaxSpan.
template <class T>
inline void decode_span(const Weight& w, int64_t start, int64_t count, float* out) {
  if (count <= 0) return;
  const int shift = block_shift(w);
  const int64_t first_group = start & ~int64_t(63), end = start + count;
  const int64_t first_block = first_group >> shift;
  const int64_t group_end = (end + 63) & ~int64_t(63), numel = w.n * w.k;
  const int64_t last_block = ((group_end < numel ? group_end : numel) - 1) >> shift;
  float scales[(kMaxSpan + 128) / 32];
  decode_scales(w, first_block, last_block - first_block + 1, scales);
  for (int64_t group = first_group; group < end; group += 64) {
    if (group >= start && group + 64 <= end) {
      decode_group<T>(w, group, scales, first_block, out + (group - start));
      continue;
    }
    alignas(32) float whole[64];
    decode_group<T>(w, group, scales, first_block, whole);
    const int64_t from = group < start ? start - group : 0, to = end - group < 64 ? end - group : 64;
    std::memcpy(out + (group + from - start), whole + from, size_t(to - from) * sizeof(float));
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
