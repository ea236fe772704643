// out[j] = keep(j) ? x[j] / (1 - p) : 0 over the flat tensor; dropout.h says what keep is.
#include "cpu/dropout.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kChunk = 4096;  // elements a task: the fp32 of a chunk stay in L1

template <class T>
void dropout_typed(int64_t numel, const Dropout& dropout, const T* x, T* out, const Parallel& parallel) {
  for_ranges(parallel, ceil_div(numel, kChunk), [&](int64_t begin, int64_t end) {
    alignas(sizeof(F)) float floats[kChunk];
    for (int64_t start = begin * kChunk; start < min64(end * kChunk, numel); start += kChunk) {
      const int64_t count = min64(kChunk, numel - start);
      to_floats(x + start, count, floats);
      drop(dropout, start, count, floats);
      from_floats(floats, count, out + start);
    }
  });
}

}  // namespace

void dropout(Dtype dtype, int64_t numel, const Dropout& dropout, const void* x, void* out, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return dropout_typed(numel, dropout, static_cast<const float*>(x), static_cast<float*>(out), parallel);
    case Dtype::kBFloat16:
      return dropout_typed(numel, dropout, static_cast<const bf16*>(x), static_cast<bf16*>(out), parallel);
    case Dtype::kFloat16:
      return dropout_typed(numel, dropout, static_cast<const fp16*>(x), static_cast<fp16*>(out), parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
