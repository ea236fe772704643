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
      } else if (run == run_ || (units >> shift_) >= 64) {
        load_run(run);
        expand(first, run_end, out, [&](int64_t block) { return table_[w_.absmax[block]]; });
      } else {
        const float nested = load_float(w_.nested_absmax, run), offset = w_.nested_offset;
        expand(first, run_end, out, [&](int64_t block) {
          return canonical(nested_scale(kDynamic.value[w_.absmax[block]], nested, offset));
        });
      }
      out += units;
      first = run_end;
    }
  }

 private:
  template <class At>
  PEFTRT_INLINE void expand(int64_t first, int64_t end, float* out, const At& at) {
    if (shift_ == 1 && (first & 1) == 0) {  // blocks of 64, the usual case
      int64_t unit = first;
      for (; unit + 2 <= end; unit += 2, out += 2) out[0] = out[1] = at(unit >> 1);
      if (unit < end) out[0] = at(unit >> 1);
      return;
    }
    for (int64_t unit = first; unit < end;) {
      const int64_t block = unit >> shift_, stop = (block + 1) << shift_;
      const float scale = at(block);
      for (; unit < stop && unit < end; ++unit) *out++ = scale;
    }
  }

  void load_run(int64_t run) {
    if (run == run_) return;
    const F nested = set1(load_float(w_.nested_absmax, run)), offset = set1(w_.nested_offset);
    for (int i = 0; i < 256; i += 8) storeu(table_ + i, add(mul(loadu(kDynamic.value + i), nested), offset));
    if (table_[0] != table_[0] || table_[127] != table_[127] || table_[255] != table_[255])
      for (float& value : table_) value = canonical(value);
    run_ = run;
  }

  const Weight& w_;
  const int shift_;  // log2 of the units a block
  int64_t run_ = -1;
  alignas(32) float table_[256];
};

}  // namespace peftrt::cpu::PEFTRT_ISA
