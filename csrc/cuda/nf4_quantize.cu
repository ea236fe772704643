// code[i] = the nearest level of w[i] * (1 / max(absmax[i / G], FLT_MIN)), absmax[b] = max |w[i]| of block b; and the
// same for nested statistics. In fp32 throughout; the bytes are those of csrc/cpu/nf4_quantize.cpp.
//
// A lane takes 8 weights and writes their 4 bytes of codes, a warp 256 weights at a time: blocks of up to 256 lie side
// by side in a warp, a larger one is walked twice, the second time out of the L1.
#include "cuda/decode.h"

namespace peftrt::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kLaneWeights = 8;
constexpr int kWarpWeights = 32 * kLaneWeights;
constexpr float kSmallestScale = 0x1p-126f;  // its reciprocal is finite, so that zeros stay zeros
constexpr uint32_t kInfinity = 0x7f800000u, kNan = 0x7fc00000u;

// A tie goes to the lower level: thresholds are the midpoints, and a level is the number of those that a value is
// above.
template <int kLevels>
struct Thresholds {
  float value[kLevels];  // the last is no threshold
};
static constexpr Thresholds<16> make_thresholds() {
  Thresholds<16> made = {};
  for (int i = 0; i < 16; ++i) made.value[i] = kNf4Thresholds.value[i];
  return made;
}
static constexpr Thresholds<256> make_dynamic_thresholds() {
  Thresholds<256> made = {};
  for (int i = 0; i < 255; ++i) made.value[i] = (kDynamic.value[i + 1] + kDynamic.value[i]) / 2;
  return made;
}
static PEFTRT_TABLE Thresholds<16> kDeviceThresholds = make_thresholds();
static PEFTRT_TABLE Thresholds<256> kDeviceDynamicThresholds = make_dynamic_thresholds();

// A NaN, which no threshold is at or above, gets the highest level.
template <int kLevels>
PEFTRT_DEVICE uint32_t level_of(float value, const float* thresholds) {
  uint32_t level = 0;
#pragma unroll
  for (uint32_t half = kLevels / 2; half > 0; half /= 2) level += thresholds[level + half - 1] >= value ? 0 : half;
  return level;
}

// Magnitudes compare as their bits do, and a NaN is beyond infinity: no NaN is lost in a maximum.
PEFTRT_DEVICE uint32_t magnitude(float value) { return float_bits(value) & 0x7fffffffu; }
PEFTRT_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
// One NaN for all, whatever the block's was.
PEFTRT_DEVICE float canonical(uint32_t found) { return bits_float(found > kInfinity ? kNan : found); }
PEFTRT_DEVICE float reciprocal_of(float absmax) {
  return reciprocal(absmax < kSmallestScale ? kSmallestScale : absmax);
}

// Up to 8 weights from `start`; zeros past the end.
template <class T>
PEFTRT_DEVICE void load_weights(const T* weight, int64_t start, int64_t numel, bool aligned, float (&value)[8]) {
  if (aligned && start + kLaneWeights <= numel) {
    constexpr int kVectors = kLaneWeights * int(sizeof(T)) / 16;
    union {
      Vector vector[kVectors];
      T weight[kLaneWeights];
    } loaded;
    for (int i = 0; i < kVectors; ++i) loaded.vector[i] = reinterpret_cast<const Vector*>(weight + start)[i];
#pragma unroll
    for (int i = 0; i < kLaneWeights; ++i) value[i] = to_float(loaded.weight[i]);
    return;
  }
  for (int i = 0; i < kLaneWeights; ++i) value[i] = start + i < numel ? to_float(weight[start + i]) : 0.0f;
}

// Their codes; the half byte that an odd count leaves is the level of zero, which zero has.
PEFTRT_DEVICE void store_codes(uint8_t* codes, int64_t start, int64_t numel, uint32_t packed) {
  if (start + kLaneWeights <= numel && reinterpret_cast<uintptr_t>(codes) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(codes + start / 2) = packed;
    return;
  }
  for (int i = 0; i < kLaneWeights / 2 && start + 2 * i < numel; ++i) codes[start / 2 + i] = uint8_t(packed >> 8 * i);
}

template <class T>
struct Quantize {
  const T* weight;
  int64_t numel;
  int shift;
  uint8_t* codes;
  float* absmax;
  bool aligned;  // weight to 16 bytes
};

template <class T>
PEFTRT_DEVICE uint32_t encode(const float (&value)[8], float scale, const float* thresholds, int64_t left) {
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kLaneWeights; ++i) {
    const uint32_t level = i < left ? level_of<16>(multiply(value[i], scale), thresholds) : 7;
    packed |= level << (i % 2 ? 4 * i - 4 : 4 * i + 4);
  }
  return packed;
}

template <class T>
PEFTRT_KERNEL void PEFTRT_BOUNDS(kThreads, 4) quantize(Quantize<T> p) {
  float* thresholds = reinterpret_cast<float*>(shared_memory());
  const int lane = thread_index() % 32;
  if (thread_index() < 16) thresholds[thread_index()] = kDeviceThresholds.value[thread_index()];
  sync_block();
  const int64_t block = int64_t(1) << p.shift, span = block < kWarpWeights ? int64_t(kWarpWeights) : block;
  const int64_t warps = block_count() * (kThreads / 32);
  for (int64_t warp = block_index() * (kThreads / 32) + thread_index() / 32; warp * span < p.numel; warp += warps) {
    float value[kLaneWeights];
    uint32_t found = 0;
    const int64_t first = warp * span + lane * kLaneWeights, end = warp * span + span;
    for (int64_t start = first; start < end; start += kWarpWeights) {
      load_weights(p.weight, start, p.numel, p.aligned, value);
      for (int i = 0; i < kLaneWeights; ++i) found = larger(found, magnitude(value[i]));
    }
    for (int mask = 1; mask < 32 && mask * kLaneWeights < block; mask *= 2)
      found = larger(found, shuffle_xor(found, mask));
    const float absmax = canonical(found), scale = reciprocal_of(absmax);
    for (int64_t start = first; start < end && start < p.numel; start += kWarpWeights) {
      if (span > kWarpWeights) load_weights(p.weight, start, p.numel, p.aligned, value);
      store_codes(p.codes, start, p.numel, encode<T>(value, scale, thresholds, p.numel - start));
    }
    if (first % block == 0 && first < p.numel) p.absmax[first >> p.shift] = absmax;
  }
}

// A thread block takes one nested block, a thread one scale.
PEFTRT_KERNEL void PEFTRT_BOUNDS(kNestedBlock, 4)
    quantize_scales(const float* absmax, int64_t blocks, const float* offset, uint8_t* codes, float* nested_absmax) {
  struct Shared {
    float threshold[kNestedBlock];
    uint32_t magnitude[kNestedBlock / 32];
  };
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int thread = thread_index();
  const int64_t i = block_index() * kNestedBlock + thread;
  shared.threshold[thread] = kDeviceDynamicThresholds.value[thread];
  const float centred = i < blocks ? add(absmax[i], -*offset) : 0.0f;
  uint32_t found = magnitude(centred);
  for (int mask = 1; mask < 32; mask *= 2) found = larger(found, shuffle_xor(found, mask));
  if (thread % 32 == 0) shared.magnitude[thread / 32] = found;
  sync_block();
  for (const uint32_t other : shared.magnitude) found = larger(found, other);
  const float largest = canonical(found);
  if (i < blocks) codes[i] = uint8_t(level_of<256>(multiply(centred, reciprocal_of(largest)), shared.threshold));
  if (thread == 0) nested_absmax[block_index()] = largest;
}

template <class T>
const char* run(const void* weight, int64_t numel, int shift, uint8_t* codes, float* absmax, void* stream) {
  int count = 0;
  if (const char* error = multiprocessors(&count)) return error;
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  const Quantize<T> p = {static_cast<const T*>(weight), numel, shift, codes, absmax, aligned};
  const int64_t span = (int64_t(1) << shift) < kWarpWeights ? int64_t(kWarpWeights) : int64_t(1) << shift;
  const int64_t a_block = span * (kThreads / 32), wanted = (numel + a_block - 1) / a_block, most = int64_t(count) * 8;
  return launch(quantize<T>, wanted < most ? wanted : most, kThreads, 64, stream, p);
}

}  // namespace

const char* nf4_quantize(Dtype dtype, const void* weight, int64_t numel, int shift, uint8_t* codes, float* absmax,
                         void* stream) {
  if (numel == 0) return nullptr;
  switch (dtype) {
    case Dtype::kFloat32:
      return run<float>(weight, numel, shift, codes, absmax, stream);
    case Dtype::kBFloat16:
      return run<Bf16>(weight, numel, shift, codes, absmax, stream);
    default:
      return run<Fp16>(weight, numel, shift, codes, absmax, stream);
  }
}

const char* nf4_quantize_scales(const float* absmax, int64_t blocks, const float* offset, uint8_t* codes,
                                float* nested_absmax, void* stream) {
  if (blocks == 0) return nullptr;
  const int64_t runs = (blocks + kNestedBlock - 1) / kNestedBlock;
  return launch(quantize_scales, runs, kNestedBlock, 2048, stream, absmax, blocks, offset, codes, nested_absmax);
}

}  // namespace peftrt::cuda
