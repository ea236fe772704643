// out[i] = round(kNf4[code[i]] * scale[i / G]) over the flat tensor: one rounding, bitsandbytes' bits, one launch.
//
// Bound by memory. A weight is 0.516 bytes read (nested scales) and 2 written in 16 bits: at 4.8 TB/s, 132
// multiprocessors of 1.755 GHz move 20.7 bytes a clock each, 8.2 weights. They issue 128 lanes a clock: the roof is
// reached below 15.6 instructions a weight, where 16-bit outputs take under 6 (tests/test_cuda_code.py counts them).
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

// One by one: a last group that is not whole, or pointers that are not aligned.
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

// Aligned: codes to 4 bytes and out to 16. A group never leaves its block, whose size is a multiple of it.
template <class T, bool kAligned>
PEFTRT_KERNEL void PEFTRT_BOUNDS(kThreads, 4) dequantize(Problem p, T* out) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int thread = thread_index();
  shared.dynamic[thread] = kDeviceDynamic.value[thread];
  if (thread < 16) shared.level[thread] = kDeviceNf4.value[thread];
  const float offset = load_offset(p.scales);
  const Policy once = read_once();
  const int64_t groups = (p.numel + kGroup<T> - 1) / kGroup<T>;
  sync_block();
  for (int64_t first = block_index() * kThreads * kUnroll; first < groups; first += block_count() * kThreads * kUnroll) {
    uint32_t codes[kUnroll];
    StoredScale stored[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t start = (first + j * kThreads + thread) * kGroup<T>;
      if (start >= p.numel) continue;
      stored[j] = load_scale(p.scales, start >> p.scales.shift);
      if (!kAligned || start + kGroup<T> > p.numel) continue;
      codes[j] = sizeof(T) == 4 ? load_half_word(p.codes + start / 2, once) : load_word(p.codes + start / 2, once);
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t start = (first + j * kThreads + thread) * kGroup<T>;
      if (start >= p.numel) continue;
      const float scale = decode_scale(p.scales, stored[j], offset, shared.dynamic);
      if (kAligned && start + kGroup<T> <= p.numel) {
        store_streaming(reinterpret_cast<Vector*>(out + start), scaled<T>(shared, codes[j], scale));
      } else {
        dequantize_slowly(shared, p, start, scale, out);
      }
    }
  }
}

template <class T>
const char* run(const Problem& p, T* out, void* stream) {
  int count = 0;
  if (const char* error = multiprocessors(&count)) return error;
  const int64_t groups = (p.numel + kGroup<T> - 1) / kGroup<T>, a_block = kThreads * kUnroll;
  // Eight blocks a multiprocessor are all that run at a time: more would only fill tables again.
  const int64_t wanted = (groups + a_block - 1) / a_block, most = int64_t(count) * 8;
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
