// out[i] = round_to_dtype(kNf4[code[i]] * scale[i / G]) over the flat tensor: one rounding, bitsandbytes' bits.
#include "cpu/decode.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kChunk = 16384;  // weights a task: a multiple of every block size, scales of at most 512 blocks

// [start, start + count): whole groups straight to out, a last partial one by way of the stack.
template <class T>
void dequantize_chunk(const Weight& w, int64_t start, int64_t count, T* out) {
  const int shift = block_shift(w);
  float scales[kChunk / 32];
  const int64_t first_block = start >> shift;
  decode_scales(w, first_block, ((start + count - 1) >> shift) - first_block + 1, scales);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const float s0 = scales[((start + i) >> shift) - first_block],
                s1 = scales[((start + i + 32) >> shift) - first_block];
    // Rounding is the store's.
    decode64<float>(w.codes + (start + i) / 2, s0, s1, [&](int j, F v) { store(out + start + i + 8 * j, v); });
  }
  if (i < count) {
    alignas(32) float last[64];
    decode_group<float>(w, start + i, scales, first_block, last);
    T rounded[64];
    for (int j = 0; j < 8; ++j) store(rounded + 8 * j, loadu(last + 8 * j));
    std::memcpy(out + start + i, rounded, size_t(count - i) * sizeof(T));
  }
}

template <class T>
void dequantize(const Weight& w, T* out, const Parallel& parallel) {
  const int64_t numel = w.n * w.k;
  for_ranges(parallel, ceil_div(numel, kChunk), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      dequantize_chunk(w, chunk * kChunk, min64(kChunk, numel - chunk * kChunk), out);
  });
}

}  // namespace

void nf4_dequantize(const Weight& w, Dtype dtype, void* out, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return dequantize(w, static_cast<float*>(out), parallel);
    case Dtype::kBFloat16:
      return dequantize(w, static_cast<bf16*>(out), parallel);
    case Dtype::kFloat16:
      return dequantize(w, static_cast<fp16*>(out), parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
