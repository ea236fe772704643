// The CPU kernels as the binding sees them: raw pointers, no torch.
//
// Every function is safe for any n, k >= 0, any alignment, and reads and writes nothing outside the sizes given.
// One table of functions an instruction set; `kernels()` picks by CPUID.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace peftrt::cpu {

// An NF4 weight [n, k] in bitsandbytes' layout (nf4.h). absmax: one byte a block when nested, else fp32 bytes.
struct Weight {
  const uint8_t* codes;
  const uint8_t* absmax;
  const uint8_t* nested_absmax;  // fp32 bytes, one a 256 blocks; null when the statistics are not nested
  float nested_offset;
  int64_t n;
  int64_t k;
  int block_size;  // a power of two, at least 32
};

// A base weight [n, k] of either kind, for what reads its rows in fp32.
struct Base {
  const Weight* nf4;  // null: dense
  Dtype dtype;
  const void* dense;
  int64_t n, k;
  int64_t stride;   // of a dense one: elements from row to row, or from column to column where it is transposed
  bool transposed;  // columns lie together, as Conv1D stores them
};

// Linear maps of one x that stand one below the other in W, such as q, k and v, each with an A of its own: the outputs
// of part p are those before end[p], from the end of the part before it on.
struct Parts {
  int count;
  const int64_t* end;  // [count], the last one is n

  int of(int64_t output) const {
    int part = 0;
    while (output >= end[part]) ++part;
    return part;
  }
  int64_t begin(int part) const { return part == 0 ? 0 : end[part - 1]; }
  int64_t size(int part) const { return end[part] - begin(part); }
};

// An adapter of a linear map, which adds scaling * xa B^T with xa = x A^T: outputs of part p, the columns of xa from p
// * rank on. A and B are in their own dtype.
struct LowRank {
  int64_t rank;  // of a part
  Parts parts;
  Dtype a_dtype, b_dtype;
  const void* a;         // [width, k]
  const void* b;         // [n, rank]
  const float* dropped;  // [m, k], what it sees of x after dropout; null: x itself
  float scaling;
  const float* row_scale;  // [n], what base and adapter together are multiplied with, before the bias; null: nothing
  float* xa;               // [m, width], written

  int64_t width() const { return parts.count * rank; }
};

// Which elements are zeroed, and what the others are divided by; dropout.h.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // p * 2^32
  float keep_share;    // 1 - p
};

// The way back through an adapter: dA = g^T drop(x), dB = scaling * dy^T xa, and drop'(g A) in dx, with
// g = scaling * dy B.
struct LowRankGradient {
  int64_t rank;  // of a part
  Parts parts;
  Dtype a_dtype, b_dtype;
  const void* a;           // [width, k]
  const void* b;           // [n, rank]
  const Dropout* dropout;  // of the adapter's x; null: none
  float scaling;
  const float* row_scale;  // [n], what dy is multiplied with wherever it is read; null: nothing
  float* g;                // [m, width]: low_rank_gradient writes it, nf4_linear_dx reads it

  int64_t width() const { return parts.count * rank; }
};

// How a kernel spreads over threads: run(tasks, body, context) calls body(begin, end, context) over [0, tasks) in
// disjoint ranges, at most `threads` of them at a time.
struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  int threads;
  void (*run)(int64_t tasks, Body body, void* context);
};

struct Kernels {
  const char* isa;
  // out[i] = round(kNf4[code[i]] * scale[i / G]), n * k elements
  void (*nf4_dequantize)(const Weight& w, Dtype dtype, void* out, const Parallel& parallel);
  // The inverse, of `numel` floats: codes (ceil(numel / 2) bytes; a last half byte is the level of zero) and the fp32
  // bytes of every block's largest magnitude. The weight's blocks are of `block_size`, as in Weight.
  void (*nf4_quantize)(Dtype dtype, int64_t numel, int block_size, const void* weight, uint8_t* codes, uint8_t* absmax,
                       const Parallel& parallel);
  // Nested statistics: the fp32 bytes of all blocks' magnitudes -> 8-bit codes of their differences from `offset`, and
  // the fp32 bytes of the largest difference in every 256
  void (*nf4_quantize_scales)(int64_t blocks, const uint8_t* absmax, float offset, uint8_t* codes,
                              uint8_t* nested_absmax, const Parallel& parallel);
  // out[m, n] = row_scale[n] * (sum_k x[m, k] * W[n, k] + scaling * sum_r xa[m, r] * B[n, r]) + bias[n], the
  // columns r of n's part; W rounded to
  // dtype, sums in fp32, one rounding at the end; bias and adapter may be null
  void (*nf4_linear)(const Weight& w, Dtype dtype, int64_t m, const void* x, const void* bias, const LowRank* adapter,
                     void* out, const Parallel& parallel);
  // out[m, k] = sum_n row_scale[n] * dy[m, n] * W[n, k] + drop'(sum_r g[m, r] * A[r, k]); W rounded to dtype, sums in
  // fp32, one rounding at the end; the adapter may be null
  void (*nf4_linear_dx)(const Weight& w, Dtype dtype, int64_t m, const void* dy, const LowRankGradient* adapter,
                        void* out, const Parallel& parallel);
  // g, dA [width, k] and dB [n, rank] of an adapter over any base, summed in fp32, from dy [m, n] and x [m, k] of dtype
  // and xa [m, width]; da and db may be null
  void (*low_rank_gradient)(Dtype dtype, int64_t m, int64_t n, int64_t k, const void* dy, const void* x,
                            const float* xa, const LowRankGradient& adapter, float* da, float* db,
                            const Parallel& parallel);
  // out[n] = || W[n] + scaling * sum_r B[n, r] * A[r] ||_2, W in fp32, squares summed in fp32
  void (*lora_weight_norm)(const Base& base, const LowRank& adapter, float* out, const Parallel& parallel);
  // out[n] = sum_m dy[m, n] * (y[m, n] - bias[n]) / row_scale[n], 0 where row_scale[n] is; the bias may be null
  void (*row_scale_gradient)(Dtype dtype, int64_t m, int64_t n, const void* dy, const void* y, const void* bias,
                             const float* row_scale, float* out, const Parallel& parallel);
  // out[j] = x[j] / keep_share where the word hashed from seed and j is >= threshold, else 0
  void (*dropout)(Dtype dtype, int64_t numel, const Dropout& dropout, const void* x, void* out,
                  const Parallel& parallel);
};

// The best variant this CPU runs. PEFTRT_CPU_ISA in the environment, read once, names another that it runs.
const Kernels& kernels();

// A named variant, or null when it is not compiled in or this CPU cannot run it.
const Kernels* kernels_for(const char* isa);

}  // namespace peftrt::cpu
