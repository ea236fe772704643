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

// Decodes scales, and keeps the 256 values that the codes of one nested run can take: a run of 256 blocks is decoded
// by look-up where most of it is wanted, and directly where only a few scales are. One object a thread.
class Scales {
 public:
  explicit Scales(const Weight& w) : w_(w), shift_(__builtin_ctz(unsigned(w.block_size)) - 5) {}

  // Scales of the units [first, first + count) of 32 weights each; every unit starts inside the tensor.
  void decode(int64_t first, int64_t count, float* out) {
    const int64_t end = first + count;
    const int64_t run_units = int64_t(kNestedBlock) << shift_;
    while (first < end) {
      const int64_t run = first / run_units;
      const int64_t run_end = (run + 1) * run_units < end ? (run + 1) * run_units : end;
      const int64_t units = run_end - first;
      if (w_.nested_absmax == nullptr) {
        expand(first, run_end, out, [&](int64_t block) { return canonical(load_float(w_.absmax, block)); });
      } else if (run == run_ || (units >> shift_) >= kTableBlocks) {
        load_run(run);
        if (shift_ == 1 && ((first | run_end) & 1) == 0)
          copy_pairs(w_.absmax + (first >> 1), units >> 1, out);
        else
          expand(first, run_end, out, [&](int64_t block) { return table_[w_.absmax[block]][0]; });
      } else {
        expand(first, run_end, out, [&](int64_t block) { return of_block(block); });
      }
      out += units;
      first = run_end;
    }
  }

  // The scale of one block, for where few are wanted in a row.
  PEFTRT_INLINE float of_block(int64_t block) const {
    if (w_.nested_absmax == nullptr) return canonical(load_float(w_.absmax, block));
    const float nested = load_float(w_.nested_absmax, block / kNestedBlock);
    return canonical(nested_scale(kDynamic.value[w_.absmax[block]], nested, w_.nested_offset));
  }

 private:
  static constexpr int64_t kTableBlocks = 24;  // from here on making the table of a run pays

  template <class At>
  PEFTRT_INLINE void expand(int64_t first, int64_t end, float* out, const At& at) {
    for (int64_t unit = first; unit < end;) {
      const int64_t block = unit >> shift_, stop = (block + 1) << shift_;
      const float scale = at(block);
      for (; unit < stop && unit < end; ++unit) *out++ = scale;
    }
  }

  // Blocks of 64, the usual case: both units of a block in one move. 0.7 cycles a block (Zen 3, November 2026).
  PEFTRT_INLINE void copy_pairs(const uint8_t* codes, int64_t blocks, float* out) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < blocks; ++i) std::memcpy(out + 2 * i, table_[codes[i]], 8);
  }

  void load_run(int64_t run) {
    if (run == run_) return;
    const F nested = set1(load_float(w_.nested_absmax, run)), offset = set1(w_.nested_offset);
    alignas(sizeof(F)) float values[256];
    for (int i = 0; i < 256; i += kLanes) storeu(values + i, add(mul(loadu(kDynamic.value + i), nested), offset));
    for (int i = 0; i < 256; ++i) table_[i][0] = table_[i][1] = canonical(values[i]);
    run_ = run;
  }

  const Weight& w_;
  const int shift_;  // log2 of the units a block
  int64_t run_ = -1;
  alignas(32) float table_[256][2];
};

}  // namespace peftrt::cpu::PEFTRT_ISA
