// The scales of an NF4 tensor, decoded: one float a 32 weights, whatever the block size, so that every kernel finds the
// two scales of a group of 64 at [2 g] and [2 g + 1].
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace peftrt::cpu::PEFTRT_ISA {

PEFTRT_INLINE float load_float(const uint8_t* bytes, int64_t index) {
  float value;
  std::memcpy(&value, bytes + 4 * index, sizeof value);
  return value;
}

// A NaN becomes the quiet one with a clear payload: round_to<bf16> relies on it, and all its NaNs then look alike.
PEFTRT_INLINE float canonical(float scale) { return scale == scale ? scale : __builtin_nanf(""); }

// Decodes scales, and keeps the 256 values that the codes of one nested run can take: a run of 256 blocks costs a few
// dozen cycles to load and a look-up a block after that. One object a thread.
class Scales {
 public:
  explicit Scales(const Weight& w) : w_(w), shift_(__builtin_ctz(unsigned(w.block_size)) - 5) {}

  // Scales of the units [first, first + count) of 32 weights each; every unit starts inside the tensor.
  void decode(int64_t first, int64_t count, float* out) {
    const int64_t end = first + count;
    while (first < end) {
      int64_t stop = end;
      if (w_.nested_absmax == nullptr) {
        expand(first, stop, out, [&](int64_t block) { return canonical(load_float(w_.absmax, block)); });
      } else {
        const int64_t run_end = ((first >> shift_) / kNestedBlock + 1) * kNestedBlock << shift_;
        stop = run_end < end ? run_end : end;
        if ((stop - first) >> shift_ >= kTableBlocks) {
          const float* table = of_run((first >> shift_) / kNestedBlock);
          expand(first, stop, out, [&](int64_t block) { return table[w_.absmax[block]]; });
        } else {
          expand(first, stop, out, [&](int64_t block) { return of_block(block); });
        }
      }
      out += stop - first;
      first = stop;
    }
  }

  // The scales that the 256 codes of a nested run stand for.
  const float* of_run(int64_t run) {
    if (run != run_) {
      const F nested = set1(load_float(w_.nested_absmax, run)), offset = set1(w_.nested_offset);
      for (int i = 0; i < 256; i += kLanes)
        storeu(table_ + i, canonical_nan(add(mul(loadu(kDynamic.value + i), nested), offset)));
      run_ = run;
    }
    return table_;
  }

  // The scale of one block, for where few are wanted in a row.
  PEFTRT_INLINE float of_block(int64_t block) const {
    if (w_.nested_absmax == nullptr) return canonical(load_float(w_.absmax, block));
    const float nested = load_float(w_.nested_absmax, block / kNestedBlock);
    return canonical(nested_scale(kDynamic.value[w_.absmax[block]], nested, w_.nested_offset));
  }

 private:
  static constexpr int64_t kTableBlocks = 16;  // from here on loading the table of a run pays

  template <class At>
  PEFTRT_INLINE void expand(int64_t first, int64_t end, float* out, const At& at) {
    if (shift_ == 1 && ((first | end) & 1) == 0) {  // blocks of 64, the usual case: two units each
#pragma GCC unroll 4
      for (int64_t block = first >> 1; block < end >> 1; ++block, out += 2) out[0] = out[1] = at(block);
      return;
    }
    for (int64_t unit = first; unit < end;) {
      const int64_t block = unit >> shift_, stop = (block + 1) << shift_;
      const float scale = at(block);
      for (; unit < stop && unit < end; ++unit) *out++ = scale;
    }
  }

  const Weight& w_;
  const int shift_;  // log2 of the units a block
  int64_t run_ = -1;
  alignas(sizeof(F)) float table_[256];
};

}  // namespace peftrt::cpu::PEFTRT_ISA
