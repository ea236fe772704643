// out[i] = round_to_dtype(kNf4[code[i]] * scale[i / G]) over the flat tensor: one rounding, bitsandbytes' bits.
#include "cpu/decode.h"
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kChunk = 16384;  // weights a task: scales of at most 512 blocks, and 64 KB of fp32 written

// [start, start + count): whole groups straight to out, a last partial one by way of the stack.
template <class T>
void dequantize_chunk(const Weight& w, int64_t start, int64_t count, Scales& decoder, T* out) {
  float units[kChunk / 32];
  const Units range = units_of(w, start, count);
  decoder.decode(range.first, range.count, units);
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    // Rounding is the store's.
    decode64<float>(w.codes + (start + i) / 2, units[i / 32], units[i / 32 + 1],
                    [&](int j, F v) { store(out + start + i + kLanes * j, v); });
  }
  if (i < count) {
    alignas(sizeof(F)) float last[kGroup];
    decode_group<float>(w, start + i, units + i / 32, last);
    from_floats(last, count - i, out + start + i);
  }
}

template <class T>
void dequantize(const Weight& w, T* out, const Parallel& parallel) {
  const int64_t numel = w.n * w.k;
  for_ranges(parallel, ceil_div(numel, kChunk), [&](int64_t begin, int64_t end) {
    Scales decoder(w);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      dequantize_chunk(w, chunk * kChunk, min64(kChunk, numel - chunk * kChunk), decoder, out);
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
