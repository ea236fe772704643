// A table of adapters as the two kernels of multi_lora_linear read it, and what lies between them.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace peftrt::cuda {

// The adapter's input is summed in chunks of K: a block's 8 warps have 256 columns each. Where a chunk begins is a
// function of K alone, and so is the order in which their sums are added.
constexpr int kShrinkThreads = 256;
constexpr int kLaneColumns = 8;
constexpr int kChunk = kShrinkThreads * kLaneColumns;
PEFTRT_BOTH int chunks_of(int64_t k) { return k <= kChunk ? 1 : int((k + kChunk - 1) / kChunk); }

// Adapters, for some rows of x from `first_row` of `rows` on.
struct AdapterRows {
  Adapters of;
  float* sums;  // [chunks, rows, parts, 8 * pages]: of x A^T, by chunks; nothing is written past a rank
  float* base;  // of whole tiles of the base's product: [tiles, rows of a launch, 128]
  int64_t rows, first_row;
  int chunks;
  int64_t k, y_stride;
};

// -1 where a row has no adapter.
PEFTRT_DEVICE int slot_of(const Adapters& adapters, int64_t row) {
  if (adapters.slot_ids == nullptr) return 0;
  const int id = adapters.slot_ids[row];
  return id >= 0 && id < adapters.slots ? id : -1;
}
PEFTRT_DEVICE int rank_of(const Adapters& adapters, int slot, int part) {
  if (adapters.ranks == nullptr) return adapters.rank;
  const int rank = adapters.ranks[int64_t(slot) * adapters.parts + part], most = kPageRanks * adapters.pages;
  // What a table holds is the caller's word; where it is wrong, no page is read that the table has no place for.
  return rank < 0 ? 0 : rank < most ? rank : most;
}
PEFTRT_DEVICE int64_t page_index(const Adapters& adapters, int slot, int part, int page) {
  return (int64_t(slot) * adapters.parts + part) * adapters.pages + page;
}
PEFTRT_DEVICE float scaling_of(const Adapters& adapters, int slot, int part) {
  return adapters.scaling == nullptr ? adapters.scale : adapters.scaling[int64_t(slot) * adapters.parts + part];
}
// The slot's factors of x (0), of y (1) or bias (2); null where it has none.
PEFTRT_DEVICE const float* vector_of(const Adapters& adapters, int slot, int which) {
  if (slot < 0) return nullptr;
  if (adapters.ranks == nullptr) return which == 1 ? adapters.y_scale : nullptr;
  if (adapters.vector_starts == nullptr) return nullptr;
  const int64_t start = adapters.vector_starts[int64_t(slot) * 3 + which];
  return start < 0 ? nullptr : adapters.vectors + start;
}
PEFTRT_DEVICE int64_t sums_index(const AdapterRows& rows, int chunk, int64_t row, int part) {
  return ((int64_t(chunk) * rows.rows + row) * rows.of.parts + part) * (kPageRanks * rows.of.pages);
}

// A result of its sum: factor and biases may be null.
template <class T>
PEFTRT_DEVICE float result_of(float sum, const float* factor, const T* bias, const float* slot_bias, int64_t n) {
  if (factor != nullptr) sum = multiply(sum, factor[n]);
  if (bias != nullptr) sum = add(sum, to_float(bias[n]));
  return slot_bias == nullptr ? sum : add(sum, slot_bias[n]);
}

PEFTRT_DEVICE bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Launches the first kernel: the sums, and x with the slots' factors where there is an x_out for it.
const char* multi_lora_shrink(Dtype dtype, const void* x, void* x_out, const AdapterRows& rows, void* stream);

}  // namespace peftrt::cuda
