// The codebooks where a GPU can index them, and a block's scale.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "nf4.h"

namespace peftrt::cuda {

struct Nf4Levels {
  float value[16];
};
static constexpr Nf4Levels make_nf4_levels() {
  Nf4Levels made = {};
  for (int i = 0; i < 16; ++i) made.value[i] = kNf4[i];
  return made;
}
static PEFTRT_TABLE Nf4Levels kDeviceNf4 = make_nf4_levels();
static PEFTRT_TABLE DynamicCodebook kDeviceDynamic = make_dynamic_codebook();

PEFTRT_DEVICE float load_float(const uint8_t* bytes, int64_t index) {
  return reinterpret_cast<const float*>(bytes)[index];
}

// A scale as it is stored, so that it can be asked for long before it is needed.
struct StoredScale {
  uint32_t absmax;      // the code, or the bits of the scale
  float nested_absmax;  // unused where not nested
};
PEFTRT_DEVICE StoredScale load_scale(const Scales& scales, int64_t block) {
  if (scales.nested_absmax == nullptr) return {float_bits(load_float(scales.absmax, block)), 0.0f};
  return {scales.absmax[block], load_float(scales.nested_absmax, int64_t(uint64_t(block) / kNestedBlock))};
}

// `dynamic`: the 256 levels of the 8-bit map. Two roundings, never one.
PEFTRT_DEVICE float decode_scale(const Scales& scales, StoredScale stored, float offset, const float* dynamic) {
  if (scales.nested_absmax == nullptr) return bits_float(stored.absmax);
  return add(multiply(dynamic[stored.absmax], stored.nested_absmax), offset);
}

PEFTRT_DEVICE float load_offset(const Scales& scales) {
  return scales.nested_absmax == nullptr ? 0.0f : load_float(scales.nested_offset, 0);
}

// The pair of levels of each byte of codes, rounded to T, for every lane in a bank of its own: a byte's are the 128
// bytes at byte * stride. kThreads of them call it, each with its index.
template <class T, int kThreads>
PEFTRT_DEVICE void fill_pairs(uint8_t* table, int stride, int thread) {
  constexpr int kVectors = 256 * 8;
#pragma unroll
  for (int j = 0; j < (kVectors + kThreads - 1) / kThreads; ++j) {
    const int i = thread + j * kThreads, byte = i / 8;
    if (kVectors % kThreads != 0 && i >= kVectors) break;
    const uint32_t pair = pack<T>(kDeviceNf4.value[byte / 16], kDeviceNf4.value[byte % 16]);
    *reinterpret_cast<Vector*>(table + byte * stride + i % 8 * 16) = {{pair, pair, pair, pair}};
  }
}

// The same without memory: the levels' bytes in registers, chosen by permutations. 8 codes take 16 of them and 5 other
// instructions, where look-ups take 4 and 4 wavefronts of shared memory.
template <class T>
class PairsInRegisters {
 public:
  PEFTRT_DEVICE PairsInRegisters() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* level = kDeviceNf4.value + 4 * i;
      const uint32_t first = pack<T>(level[0], level[1]), second = pack<T>(level[2], level[3]);
      low[i] = permute_bytes(first, second, 0x6420);
      high[i] = permute_bytes(first, second, 0x7531);
    }
  }

  // pair[i]: of byte i of a word of codes.
  PEFTRT_DEVICE void expand(uint32_t codes, uint32_t (&pair)[4]) const {
    // A code's three lower bits choose one of eight levels, its highest bit which eight.
    const uint32_t within = codes & 0x77777777, eight = (codes >> 1 & 0x44444444) | 0x32103210;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t bytes = choose(low, within >> 16 * half, eight >> 16 * half),
                     upper_bytes = choose(high, within >> 16 * half, eight >> 16 * half);
      // the first level of a byte is of its upper half
      pair[2 * half] = permute_bytes(bytes, upper_bytes, 0x4051);
      pair[2 * half + 1] = permute_bytes(bytes, upper_bytes, 0x6273);
    }
  }

 private:
  static PEFTRT_DEVICE uint32_t choose(const uint32_t (&of)[4], uint32_t within, uint32_t eight) {
    return permute_bytes(permute_bytes(of[0], of[1], within), permute_bytes(of[2], of[3], within), eight);
  }

  uint32_t low[4], high[4];  // bytes of four levels each
};

}  // namespace peftrt::cuda
