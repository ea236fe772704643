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

// Low-rank adapters, another one for each row of x: the tables of peftrt/ops/_adapter_table.py. A page is 8 ranks of
// one part: of A [8, k], of B [8, that part's outputs]; it begins anywhere. Behind a slot's rank nothing is read.
constexpr int kPageRanks = 8;
constexpr int kMaxParts = 8;
struct Adapters {
  Dtype A_dtype, B_dtype;
  const void *A, *B;                 // the values that pages are in
  const int32_t* ranks;              // [slots, parts]
  const int64_t *A_pages, *B_pages;  // [slots, parts, pages], in elements
  const float* scaling;              // [slots, parts]
  const float* vectors;              // or null
  const int64_t* vector_starts;      // [slots, 3], of a slot's factors of x [k] and of y [n] and its bias [n]; -1: none
  const int32_t* slot_ids;           // [m]; -1: no adapter
  int32_t* error_flag;               // or null: set to 1 where an id is no slot, which counts as -1
  int64_t slots;
  int parts, pages;
  int part_start[kMaxParts + 1];  // in the outputs, of fewer than 2^31; the last is n

  // One adapter for all rows, in the place of a table (ranks is null, and so are pages, scaling, vectors and ids): A is
  // [parts * rank, k], B is [n, rank].
  int rank;
  float scale;
  const float* y_scale;  // [n] or null
  float* xa;             // [m, parts * rank] or null: x A^T is written there
};

// y_i = y_scale_e * (x'_i W^T + scaling_e * (x'_i A_e^T) B_e^T) + bias + bias_e with e = slot_ids[i] and x'_i = x_i *
// x_scale_e, rounded; for 64 rows at most. Rows of y are `y_stride` elements apart. Two launches whatever the table
// holds. Sums are in fp32, one order of them for a row whatever the others are, and one rounding at the end.
const char* multi_lora_workspace(const Linear& linear, const Adapters& adapters, int64_t* bytes);
const char* multi_lora_linear(const Linear& linear, const Adapters& adapters, int64_t y_stride, uint64_t ticket,
                              void* workspace, void* stream);

}  // namespace peftrt::cuda
