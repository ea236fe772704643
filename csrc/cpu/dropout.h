// Dropout's mask, a function of the seed and of an element's flat index alone, on floats in place.
//
//   keep(j) = mix(mix(lo(j) ^ lo(seed)) ^ mix(hi(j)) ^ key) >= p * 2^32, key = mix(mix(lo(seed) ^ 0x9e3779b9) ^
//   hi(seed))
//
// mix is the finaliser of MurmurHash3; lo and hi are halves of 32 bits. No mask is stored, a backward computes it
// again.
#pragma once

#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

PEFTRT_INLINE uint32_t mix(uint32_t word) {
  word ^= word >> 16;
  word *= 0x85ebca6bu;
  word ^= word >> 13;
  word *= 0xc2b2ae35u;
  return word ^ word >> 16;
}

// floats[i] = keep(start + i) ? floats[i] / (1 - p) : 0. Written for GCC to vectorise: the parameters by value, since a
// reference might be to the floats, and no choice among floats: a division that not all take part in might trap.
inline void drop(const Dropout dropout, int64_t start, int64_t count, float* floats) {
  const uint32_t low_seed = uint32_t(dropout.seed);
  const uint32_t key = mix(mix(low_seed ^ 0x9e3779b9u) ^ uint32_t(dropout.seed >> 32));
  while (count > 0) {
    // up to the next multiple of 2^32: hi(j) is then one value
    const int64_t span = min64(count, (int64_t(1) << 32) - int64_t(uint32_t(start)));
    const uint32_t first = uint32_t(start), high = mix(uint32_t(uint64_t(start) >> 32)) ^ key;
    for (int64_t i = 0; i < span; ++i) {
      const uint32_t word = mix(mix((first + uint32_t(i)) ^ low_seed) ^ high);
      const uint32_t mask = word >= dropout.threshold ? 0xffffffffu : 0u;
      floats[i] = bits_float(float_bits(floats[i] / dropout.keep_share) & mask);
    }
    start += span, count -= span, floats += span;
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
