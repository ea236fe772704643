// code[i] = the nearest level of w[i] * (1 / max(absmax[i / G], FLT_MIN)), absmax[b] = max |w[i]| of block b; and the
// same for nested statistics, of absmax[b] - offset in blocks of 256 by the 8-bit levels.
//
// In fp32 throughout; bf16 and fp16 are converted in registers. Each block is read twice, the second time from L1.
#include <cmath>
#include <limits>

#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kTask = 16384;   // weights a task, or one block
constexpr int64_t kStretch = 512;  // weights whose scales are found before any is encoded, or one block

// One NaN for all, whatever the block's was.
PEFTRT_INLINE void store_magnitude(uint8_t* to, float found) {
  store_one(reinterpret_cast<float*>(to), std::isnan(found) ? NAN : found);
}

// Finite for zeros, so that they stay zeros.
PEFTRT_INLINE float reciprocal(float magnitude) {
  constexpr float kSmallest = std::numeric_limits<float>::min();
  return 1.0f / (magnitude < kSmallest ? kSmallest : magnitude);
}

template <class T>
float magnitude(const T* weights, int64_t count) {
  constexpr int64_t kWide = sizeof(F) / sizeof(float);
  F a = zero(), b = zero();
  int64_t i = 0;
  for (; i + 2 * kWide <= count; i += 2 * kWide) {
    a = max_magnitude(a, load(weights + i));
    b = max_magnitude(b, load(weights + i + kWide));
  }
  if (i < count) {
    float rest[2 * kWide] = {0};
    to_floats(weights + i, count - i, rest);
    a = max_magnitude(a, loadu(rest)), b = max_magnitude(b, loadu(rest + kWide));
  }
  return largest(max_magnitude(a, b));
}

// Less than 64 weights, the last ones: nothing past them is read or written.
template <class T>
void encode_rest(const T* weights, int64_t count, float r0, float r1, uint8_t* codes) {
  T staged[64];
  uint8_t whole[32];
  std::memset(staged, 0, sizeof staged);
  std::memcpy(staged, weights, size_t(count) * sizeof(T));
  encode64(staged, r0, r1, whole);
  if (count % 2) whole[count / 2] = uint8_t((whole[count / 2] & 0xf0) | 7);
  std::memcpy(codes, whole, size_t(count + 1) / 2);
}

// `count` weights from the start of a block; no more than kStretch, or than one block.
template <class T>
void quantize_stretch(const T* weights, int64_t count, int shift, uint8_t* codes, uint8_t* absmax) {
  float reciprocals[kStretch / 32];
  const int64_t block = int64_t(1) << shift;
  for (int64_t start = 0; start < count; start += block) {
    const float found = magnitude(weights + start, min64(block, count - start));
    store_magnitude(absmax + 4 * (start >> shift), found);
    reciprocals[start >> shift] = reciprocal(found);
  }
  int64_t i = 0;
  for (; i + 64 <= count; i += 64)
    encode64(weights + i, reciprocals[i >> shift], reciprocals[(i + 32) >> shift], codes + i / 2);
  if (i < count) {
    const int64_t second = i + 32 < count ? i + 32 : i;
    encode_rest(weights + i, count - i, reciprocals[i >> shift], reciprocals[second >> shift], codes + i / 2);
  }
}

template <class T>
void quantize(int64_t numel, int block_size, const T* weight, uint8_t* codes, uint8_t* absmax,
              const Parallel& parallel) {
  const int shift = __builtin_ctz(unsigned(block_size));
  const int64_t stretch = block_size > kStretch ? block_size : kStretch;
  const int64_t task = block_size > kTask ? block_size : kTask;
  for_ranges(parallel, ceil_div(numel, task), [&](int64_t begin, int64_t end) {
    for (int64_t start = begin * task; start < min64(end * task, numel); start += stretch)
      quantize_stretch(weight + start, min64(stretch, numel - start), shift, codes + start / 2,
                       absmax + 4 * (start >> shift));
  });
}

// Midpoints of the 8-bit levels. As with kNf4Thresholds, a level is the number of thresholds that are not at or above.
struct DynamicThresholds {
  float value[255];
};
constexpr DynamicThresholds make_dynamic_thresholds() {
  DynamicThresholds made = {};
  for (int i = 0; i < 255; ++i) made.value[i] = (kDynamic.value[i + 1] + kDynamic.value[i]) / 2;
  return made;
}
constexpr DynamicThresholds kDynamicThresholds = make_dynamic_thresholds();

// One nested block. The search takes the same eight steps for every value, and so many of them at a time.
void quantize_scales(const uint8_t* absmax, int64_t count, float offset, uint8_t* codes, uint8_t* nested_absmax) {
  float centred[kNestedBlock] = {0};
  uint32_t level[kNestedBlock] = {0};
  to_floats(reinterpret_cast<const float*>(absmax), count, centred);
  for (int64_t i = 0; i < count; ++i) centred[i] -= offset;
  const float found = magnitude(centred, kNestedBlock), scale = reciprocal(found);
  store_magnitude(nested_absmax, found);
  for (int i = 0; i < kNestedBlock; ++i) centred[i] *= scale;
  for (int bit = 7; bit >= 0; --bit)
    for (int i = 0; i < kNestedBlock; ++i) {
      const float threshold = kDynamicThresholds.value[level[i] + (1u << bit) - 1];
      level[i] += uint32_t(!(threshold >= centred[i])) << bit;  // no branch: nothing would predict it
    }
  for (int64_t i = 0; i < count; ++i) codes[i] = uint8_t(level[i]);
}

}  // namespace

void nf4_quantize_scales(int64_t blocks, const uint8_t* absmax, float offset, uint8_t* codes, uint8_t* nested_absmax,
                         const Parallel& parallel) {
  for_ranges(parallel, ceil_div(blocks, kNestedBlock), [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t start = run * kNestedBlock;
      quantize_scales(absmax + 4 * start, min64(kNestedBlock, blocks - start), offset, codes + start,
                      nested_absmax + 4 * run);
    }
  });
}

void nf4_quantize(Dtype dtype, int64_t numel, int block_size, const void* weight, uint8_t* codes, uint8_t* absmax,
                  const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return quantize(numel, block_size, static_cast<const float*>(weight), codes, absmax, parallel);
    case Dtype::kBFloat16:
      return quantize(numel, block_size, static_cast<const bf16*>(weight), codes, absmax, parallel);
    case Dtype::kFloat16:
      return quantize(numel, block_size, static_cast<const fp16*>(weight), codes, absmax, parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
