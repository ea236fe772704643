// The CUDA kernels as the binding sees them: raw device pointers, no torch, no header of CUDA.
//
// Every function launches on `stream` (a cudaStream_t) of the current device, waits for nothing, allocates nothing, and
// returns null or what went wrong. Sizes are 64-bit; an empty one launches nothing.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace peftrt::cuda {

// An NF4 weight's scales, in bitsandbytes' layout (nf4.h); what holds fp32 is aligned to 4.
struct Scales {
  const uint8_t* absmax;         // one byte a block where nested, else fp32
  const uint8_t* nested_absmax;  // fp32, one a 256 blocks; null where not nested
  const uint8_t* nested_offset;  // fp32
  int shift;                     // a block has 1 << shift weights, at least 32
};

// out[i] = round(kNf4[code[i]] * scale[i / G]), `numel` elements: the bits that the CPU's kernels write, but for those
// of a NaN, which are the device's.
const char* nf4_dequantize(const uint8_t* codes, const Scales& scales, int64_t numel, Dtype dtype, void* out,
                           void* stream);

// The inverse: codes (ceil(numel / 2) bytes; a last half byte is the level of zero) and every block's largest
// magnitude. The bytes are the CPU kernels', also where values are not finite.
const char* nf4_quantize(Dtype dtype, const void* weight, int64_t numel, int shift, uint8_t* codes, float* absmax,
                         void* stream);

// Nested statistics: `blocks` magnitudes -> 8-bit codes of their differences from *offset, and the largest difference
// in every 256.
const char* nf4_quantize_scales(const float* absmax, int64_t blocks, const float* offset, uint8_t* codes,
                                float* nested_absmax, void* stream);

// y[m, n] = sum_k x[m, k] * W[n, k] + bias[n] for bf16 and fp16; sums in fp32, one rounding at the end.
struct Linear {
  Dtype dtype;
  const uint8_t* codes;
  Scales scales;
  const void* x;     // [m, k], aligned to 16
  const void* bias;  // [n] or null
  void* y;           // [m, n]
  int64_t m, n, k;
};

// How many rows of x the current device takes: 512 where it has warpgroups, else 64. A launch of more is no error, but
// reads the weight as often as there are 64.
const char* nf4_linear_rows(int64_t* rows);

// How much device memory a product works in, for `rows` of x at most: aligned to 16, of any content.
const char* nf4_linear_workspace(const Linear& linear, int64_t* bytes);

// `ticket` is a number that no call before had, by which the workspace is told from the bytes that were there before.
const char* nf4_linear(const Linear& linear, uint64_t ticket, void* workspace, void* stream);

}  // namespace peftrt::cuda
