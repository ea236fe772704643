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

// Adapters of one linear map [n, k] in pages of flat memory, and which of them each row of a batch has, or none (-1).
//
// A page holds kPage ranks: of A they are [kPage, k], of B transposed [kPage, size of the part]. Rank r of slot e and
// part p is row r % kPage of page [e][p][r / kPage]; of the last page only the rows of ranks that there are are read.
struct AdapterTable {
  static constexpr int64_t kPage = 8;

  Dtype dtype;
  const void* values;
  Parts parts;
  int64_t k;
  int64_t slots, pages;     // E, and W: pages a slot and part at most
  const int32_t* ranks;     // [E, P]
  const int64_t* a_pages;   // [E, P, W]: elements of `values`
  const int64_t* b_pages;   // [E, P, W]
  const float* scaling;     // [E, P]
  const float* vectors;     // null: no slot has any
  const int64_t* starts;    // [E, 3]: where in `vectors` x_scale [k], y_scale [n] and bias [n] begin, or -1
  const int32_t* slot_ids;  // [m]

  int64_t n() const { return parts.end[parts.count - 1]; }
  int64_t rank(int64_t slot, int part) const { return ranks[slot * parts.count + part]; }
  int64_t page(bool of_b, int64_t slot, int part, int64_t page) const {
    return (of_b ? b_pages : a_pages)[(slot * parts.count + part) * pages + page];
  }
  // x_scale, y_scale or bias (0, 1, 2) of a slot, or null.
  const float* vector(int64_t slot, int which) const {
    return vectors == nullptr || starts[3 * slot + which] < 0 ? nullptr : vectors + starts[3 * slot + which];
  }
};

// Which elements are zeroed, and what the others are divided by; dropout.h.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // p * 2^32
  float keep_share;    // 1 - p
};

// The way back through an adapter: dA = g^T drop(x), dB = scaling * dy^T xa, and drop'(g A) in dx, with
// g = scaling * slope * dy B.
struct LowRankGradient {
  int64_t rank;  // of a part
  Parts parts;
  Dtype a_dtype, b_dtype;
  const void* a;           // [width, k]
  const void* b;           // [n, rank]
  const Dropout* dropout;  // of the adapter's x; null: none
  float scaling;
  const float* row_scale;  // [n], what dy is multiplied with wherever it is read; null: nothing
  const float* slope;      // [m, width], what dy B is multiplied with; null: nothing
  float* g;                // [m, width]: low_rank_gradient writes it, nf4_linear_dx reads it

  int64_t width() const { return parts.count * rank; }
};

// What stands between the two layers of a bottleneck, in the order of peftrt/reference/bottleneck.py.
enum class Activation { kRelu, kGelu, kGeluNew, kSilu, kTanh, kSigmoid, kLeakyRelu };

// A matrix or vector in a dtype of its own.
struct Values {
  Dtype dtype;
  const void* data;
};

// An adapter of two layers, which adds scaling * (act(inner) up^T + up_bias) with inner = x down^T + down_bias.
struct Bottleneck {
  int64_t rank, k;
  Values down;       // [rank, k]
  Values down_bias;  // [rank]
  Values up;         // [k, rank]
  Values up_bias;    // [k]
  float scaling;
  Activation activation;
  float* inner;  // [m, rank], written
};

// The way back through it, summed in fp32: g = scaling * act'(inner) * dy up, the gradient of inner, and those of the
// four parameters; a pair that is null is not wanted.
struct BottleneckGradient {
  float* g;          // [m, rank]
  float* down;       // [rank, k], g^T x
  float* down_bias;  // [rank], g's sum over rows
  float* up;         // [k, rank], scaling * dy^T act(inner)
  float* up_bias;    // [k], scaling times dy's sum over rows
};

// One step of AdamW over chunks of many tensors, whose state lies in pages (adamw_state.h).
struct AdamwStep {
  Dtype dtype;  // of all tensors
  int bits;     // of all pages, 32 or 8
  int64_t page_bytes;
  uint8_t* state;
  int64_t count;
  const int64_t* chunks;     // [count, 5]: tensor, its first element, how many, bytes to the page, first element in it
  const int64_t* addresses;  // [T, 3]: of parameter and gradient, which may be null, and a dtype's number
  const float* hyper;        // [T, 6]: 1 - beta1, 1 - beta2, step size, correction, eps, lr * weight decay
  float coefficient;         // of the gradients
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
  // columns r of n's part; W, where it is NF4, rounded to
  // dtype, sums in fp32, one rounding at the end; bias and adapter may be null. Where `invariant`, here and below, a
  // row's bits do not depend on m
  void (*linear)(const Base& base, Dtype dtype, int64_t m, const void* x, const void* bias, const LowRank* adapter,
                 bool invariant, void* out, const Parallel& parallel);
  // out[m, k] = sum_n row_scale[n] * dy[m, n] * W[n, k] + drop'(sum_r g[m, r] * A[r, k]); W rounded to dtype, sums in
  // fp32, one rounding at the end; the adapter may be null
  void (*linear_dx)(const Base& base, Dtype dtype, int64_t m, const void* dy, const LowRankGradient* adapter,
                    bool invariant, void* out, const Parallel& parallel);
  // out[i, n] = y_scale[n] * (sum_k x'[i, k] * W[n, k] + scaling * sum_r (x' A^T)[i, r] * B[n, r]) + bias[n] +
  // row_bias[n]: A, B, scales and row_bias are those of row i's slot, x' = round_to_dtype(x_scale * x). Rows of out are
  // `stride` apart; without a base the first sum is 0; a dense one is of dtype
  void (*multi_lora_linear)(const Base* base, Dtype dtype, int64_t m, const void* x, const void* bias,
                            const AdapterTable& table, bool invariant, void* out, int64_t stride,
                            const Parallel& parallel);
  // From dz [m, n] and x' [m, k]: dx [m, k], of base and adapters, and the gradients of `values`, in fp32, added to
  // those in dvalues; either may be null
  void (*multi_lora_linear_backward)(const Base* base, Dtype dtype, int64_t m, const void* dz, const void* x,
                                     const AdapterTable& table, bool invariant, void* dx, float* dvalues,
                                     const Parallel& parallel);
  // g, dA [width, k] and dB [n, rank] of an adapter over any base, summed in fp32, from dy [m, n] and x [m, k] of dtype
  // and xa [m, width]; da and db may be null
  void (*low_rank_gradient)(Dtype dtype, int64_t m, int64_t n, int64_t k, const void* dy, const void* x,
                            const float* xa, const LowRankGradient& adapter, float* da, float* db,
                            const Parallel& parallel);
  // out = residual + scaling * (act(x down^T + down_bias) up^T + up_bias), all [m, k] of dtype but the adapter, summed
  // in fp32 with one rounding at the end; where `invariant` a row's bits do not depend on m
  void (*bottleneck)(Dtype dtype, int64_t m, const void* x, const void* residual, const Bottleneck& adapter,
                     bool invariant, void* out, const Parallel& parallel);
  // From dy and x [m, k] of dtype, and what the adapter's `inner` holds
  void (*bottleneck_gradient)(Dtype dtype, int64_t m, const void* dy, const void* x, const Bottleneck& adapter,
                              const BottleneckGradient& gradient, const Parallel& parallel);
  // out[n] = || W[n] + scaling * sum_r B[n, r] * A[r] ||_2, W in fp32, squares summed in fp32
  void (*lora_weight_norm)(const Base& base, const LowRank& adapter, float* out, const Parallel& parallel);
  // out[n] = sum_m dy[m, n] * (y[m, n] - bias[n]) / row_scale[n], 0 where row_scale[n] is; the bias may be null
  void (*row_scale_gradient)(Dtype dtype, int64_t m, int64_t n, const void* dy, const void* y, const void* bias,
                             const float* row_scale, float* out, const Parallel& parallel);
  // out[j] = x[j] / keep_share where the word hashed from seed and j is >= threshold, else 0
  void (*dropout)(Dtype dtype, int64_t numel, const Dropout& dropout, const void* x, void* out,
                  const Parallel& parallel);
  // m += (1 - beta1) (g - m), v += (1 - beta2) (g^2 - v), p -= decay p + step size (m / (sqrt(v) correction + eps))
  // with g = coefficient * gradient, each operation rounded to fp32 by itself; where there is no gradient nothing is
  // changed
  void (*adamw_step)(const AdamwStep& step, const Parallel& parallel);
  // out[2] = the norm over gradients and min(1, max_norm / (norm + 1e-6)), in fp64 until then; addresses as in
  // AdamwStep, chunks [count, 3] their first columns, partials [count] memory
  void (*gradient_norm)(const int64_t* addresses, const int64_t* chunks, int64_t count, double* partials,
                        double max_norm, float* out, const Parallel& parallel);
};

// The best variant this CPU runs. PEFTRT_CPU_ISA in the environment, read once, names another that it runs.
const Kernels& kernels();

// A named variant, or null when it is not compiled in or this CPU cannot run it.
const Kernels* kernels_for(const char* isa);

}  // namespace peftrt::cpu
