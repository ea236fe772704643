// out[i] = round(kNf4[code[i]] * scale[i / G]) over the flat tensor: one rounding, bitsandbytes' bits, one launch.
//
// Bound by memory. A weight is 0.516 bytes read (nested scales) and 2 written in 16 bits: at 4.8 TB/s, 132
// multiprocessors of 1.755 GHz move 20.7 bytes a clock each, 8.2 weights. They issue 128 lanes a clock, 15.6 for a
// weight: the loop has 9.8 instructions a weight (nvcc 13.0 for sm_90a, 2026-11-21), for fp32 15.4 of 28. Not measured
// on a device.
//
// A lane writes 16 bytes at a time and so reads 4 (2 for fp32): a warp's stores fill whole lines, where 16 bytes of
// codes a lane would scatter four stores over 2 KB or cost a shuffle a word. What is in flight comes from kUnroll
// groups a lane, all loads before the first use.
#include "cuda/decode.h"

namespace peftrt::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// How many weights make 16 bytes of T.
template <class T>
constexpr int kGroup = 16 / int(sizeof(T));

struct Shared {
  float dynamic[256];
  float level[16];  // sixteen words in sixteen banks: a warp reads any of them at once
};

struct Problem {
  const uint8_t* codes;
  Scales scales;
  int64_t numel;
};

PEFTRT_DEVICE float level_of(const Shared& shared, uint32_t codes, int i) {
  // element 2 j is the high nibble of byte j
  return shared.level[codes >> (i % 2 ? 4 * i - 4 : 4 * i + 4) & 15];
}

// kGroup levels times a scale, rounded, as they lie in memory.
template <class T>
PEFTRT_DEVICE Vector scaled(const Shared& shared, uint32_t codes, float scale) {
  Vector out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float first = multiply(level_of(shared, codes, 2 * i), scale);
    out.word[i] = pack<T>(first, multiply(level_of(shared, codes, 2 * i + 1), scale));
  }
  return out;
}
template <>
PEFTRT_DEVICE Vector scaled<float>(const Shared& shared, uint32_t codes, float scale) {
  Vector out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.word[i] = float_bits(multiply(level_of(shared, codes, i), scale));
  return out;
}

// One by one, where a vector would not do.
template <class T>
PEFTRT_DEVICE void dequantize_slowly(const Shared& shared, const Problem& p, int64_t start, float scale, T* out) {
#pragma unroll 1
  for (int64_t i = start; i < start + kGroup<T> && i < p.numel; ++i) {
    const float value = multiply(shared.level[nibble(p.codes, i)], scale);
    if constexpr (sizeof(T) == 4) {
      out[i] = value;
    } else {
      out[i] = {uint16_t(pack<T>(value, 0.0f))};
    }
  }
}

// All whole groups of aligned pointers: codes to 4 bytes and out to 16. A group never leaves its block, whose size is a
// multiple of it.
template <class T>
PEFTRT_DEVICE void dequantize_groups(const Shared& shared, const Problem& p, float offset, T* out) {
  const Policy once = read_once();
  const int64_t groups = p.numel / kGroup<T>, stride = block_count() * kThreads * kUnroll;
  for (int64_t first = block_index() * kThreads * kUnroll + thread_index(); first < groups; first += stride) {
    uint32_t codes[kUnroll];
    StoredScale stored[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      // Past the end the last group is loaded again, which costs less than a branch a load.
      const int64_t group = first + j * kThreads < groups ? first + j * kThreads : groups - 1;
      const uint8_t* from = p.codes + group * (kGroup<T> / 2);
      codes[j] = sizeof(T) == 4 ? load_half_word(from, once) : load_word(from, once);
      stored[j] = load_scale(p.scales, group * kGroup<T> >> p.scales.shift);
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const float scale = decode_scale(p.scales, stored[j], offset, shared.dynamic);
      const Vector vector = scaled<T>(shared, codes[j], scale);
      if (first + j * kThreads < groups) store_streaming(reinterpret_cast<Vector*>(out) + first + j * kThreads, vector);
    }
  }
}

template <class T, bool kAligned>
PEFTRT_KERNEL void PEFTRT_BOUNDS(kThreads, 4) dequantize(Problem p, T* out) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int thread = thread_index();
  shared.dynamic[thread] = kDeviceDynamic.value[thread];
  if (thread < 16) shared.level[thread] = kDeviceNf4.value[thread];
  const float offset = load_offset(p.scales);
  sync_block();
  int64_t group = block_index() * kThreads + thread;
  if constexpr (kAligned) {
    dequantize_groups(shared, p, offset, out);
    group += p.numel / kGroup<T>;  // the last one, where it is not whole
  }
  for (; group * kGroup<T> < p.numel; group += block_count() * kThreads) {
    const StoredScale stored = load_scale(p.scales, group * kGroup<T> >> p.scales.shift);
    dequantize_slowly(shared, p, group * kGroup<T>, decode_scale(p.scales, stored, offset, shared.dynamic), out);
  }
}

template <class T>
const char* run(const Problem& p, T* out, void* stream) {
  int count = 0;
  if (const char* error = multiprocessors(&count)) return error;
  const int64_t groups = (p.numel + kGroup<T> - 1) / kGroup<T>, a_block = kThreads * kUnroll;
  // Four blocks a multiprocessor run at a time: more would only fill tables again.
  const int64_t wanted = (groups + a_block - 1) / a_block, most = int64_t(count) * 4;
  const bool aligned = reinterpret_cast<uintptr_t>(p.codes) % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const auto kernel = aligned ? dequantize<T, true> : dequantize<T, false>;
  return launch(kernel, wanted < most ? wanted : most, kThreads, sizeof(Shared), stream, p, out);
}

}  // namespace

const char* nf4_dequantize(const uint8_t* codes, const Scales& scales, int64_t numel, Dtype dtype, void* out,
                           void* stream) {
  if (numel == 0) return nullptr;
  const Problem p = {codes, scales, numel};
  switch (dtype) {
    case Dtype::kFloat32:
      return run(p, static_cast<float*>(out), stream);
    case Dtype::kBFloat16:
      return run(p, static_cast<Bf16*>(out), stream);
    default:
      return run(p, static_cast<Fp16*>(out), stream);
  }
}

}  // namespace peftrt::cuda
