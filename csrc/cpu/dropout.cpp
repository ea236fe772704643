// out[j] = keep(j) ? x[j] / (1 - p) : 0 over the flat tensor, with keep a function of the seed and j alone.
//
//   keep(j) = mix(mix(lo(j) ^ lo(seed)) ^ mix(hi(j)) ^ key) >= p * 2^32, key = mix(mix(lo(seed) ^ 0x9e3779b9) ^
//   hi(seed))
//
// mix is the finaliser of MurmurHash3; lo and hi are halves of 32 bits. No mask is stored, the backward computes it
// again.
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kChunk = 4096;  // elements a task: the fp32 of a chunk stay in L1

PEFTRT_INLINE uint32_t mix(uint32_t word) {
  word ^= word >> 16;
  word *= 0x85ebca6bu;
  word ^= word >> 13;
  word *= 0xc2b2ae35u;
  return word ^ word >> 16;
}

// floats[i] of the elements start + i; a chunk never crosses a multiple of 2^32, so hi(j) is one value.
void drop_chunk(int64_t start, int64_t count, uint64_t seed, uint32_t threshold, float keep_share, float* floats) {
  const uint32_t low_seed = uint32_t(seed), first = uint32_t(start);
  const uint32_t key = mix(mix(low_seed ^ 0x9e3779b9u) ^ uint32_t(seed >> 32));
  const uint32_t high = mix(uint32_t(uint64_t(start) >> 32)) ^ key;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t word = mix(mix((first + uint32_t(i)) ^ low_seed) ^ high);
    floats[i] = word >= threshold ? floats[i] / keep_share : 0.0f;
  }
}

template <class T>
void dropout_typed(int64_t numel, uint64_t seed, uint32_t threshold, float keep_share, const T* x, T* out,
                   const Parallel& parallel) {
  for_ranges(parallel, ceil_div(numel, kChunk), [&](int64_t begin, int64_t end) {
    alignas(sizeof(F)) float floats[kChunk];
    for (int64_t start = begin * kChunk; start < min64(end * kChunk, numel); start += kChunk) {
      const int64_t count = min64(kChunk, numel - start);
      to_floats(x + start, count, floats);
      drop_chunk(start, count, seed, threshold, keep_share, floats);
      from_floats(floats, count, out + start);
    }
  });
}

}  // namespace

void dropout(Dtype dtype, int64_t numel, uint64_t seed, uint32_t threshold, float keep_share, const void* x, void* out,
             const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return dropout_typed(numel, seed, threshold, keep_share, static_cast<const float*>(x), static_cast<float*>(out),
                           parallel);
    case Dtype::kBFloat16:
      return dropout_typed(numel, seed, threshold, keep_share, static_cast<const bf16*>(x), static_cast<bf16*>(out),
                           parallel);
    case Dtype::kFloat16:
      return dropout_typed(numel, seed, threshold, keep_share, static_cast<const fp16*>(x), static_cast<fp16*>(out),
                           parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
