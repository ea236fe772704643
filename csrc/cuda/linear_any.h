// Products of weights whose rows lie crookedly, weight by weight: any K, any alignment. A block is 8 warps; a warp has
// a row of W and kAnyRows rows of x, and the products of a lane are 32 columns apart.
#pragma once

#include "cuda/product.h"

namespace peftrt::cuda {

constexpr int kAnyRows = 8;

inline int64_t any_blocks(const Linear& linear) { return (linear.n + 7) / 8 * ((linear.m + kAnyRows - 1) / kAnyRows); }

// Which row of W this warp has, which may be behind the last, and the first of its rows of x.
struct AnyRows {
  int64_t n, first;

  PEFTRT_DEVICE explicit AnyRows(const Product& p) {
    const int64_t warp = block_index() * 8 + thread_index() / 32, groups = (p.n + 7) / 8;
    n = warp % (groups * 8), first = warp / (groups * 8) * kAnyRows;
  }
};

// sums[j] = x[first + j] . W[n], in every lane; 0 for rows that there are not.
template <class T>
PEFTRT_DEVICE void sum_any(const Product& p, const AnyRows& rows, float (&sums)[kAnyRows]) {
  const T* x = reinterpret_cast<const T*>(p.x) + rows.first * p.k;
  const float offset = load_offset(p.scales);
#pragma unroll
  for (int j = 0; j < kAnyRows; ++j) sums[j] = 0.0f;
  for (int64_t k = thread_index() % 32; k < p.k; k += 32) {
    const int64_t i = rows.n * p.k + k;
    const float scale = decode_scale(p.scales, load_scale(p.scales, i >> p.scales.shift), offset, kDeviceDynamic.value);
    const T weight = {uint16_t(pack<T>(multiply(kDeviceNf4.value[nibble(p.codes, i)], scale), 0.0f))};
#pragma unroll
    for (int j = 0; j < kAnyRows; ++j)
      if (rows.first + j < p.m) sums[j] = fused_multiply_add(to_float(weight), to_float(x[j * p.k + k]), sums[j]);
  }
#pragma unroll
  for (int j = 0; j < kAnyRows; ++j)
    for (int mask = 1; mask < 32; mask *= 2) sums[j] = add(sums[j], shuffle_xor(sums[j], mask));
}

}  // namespace peftrt::cuda
