// xa[i, p, r] = sum_k x'[i, k] * A[p, r, k] over the pages of row i's slot, in chunks of K that the second kernel adds
// up; and x' itself, where slots have factors of x.
//
// A block has one row, one chunk of 2048 columns and every eighth page of one part; a warp 256 columns, a lane 8 of
// them. Each adapter's bytes come from memory once, however many rows have it, if they come at about the same time:
// rows are next to each other in the grid. Beyond a slot's rank nothing is loaded, and a block without a page ends.
//
// Counted, not measured on a device: the floor is 2 R K bytes for each distinct adapter of 16 bits. 8 adapters of rank
// 16 at K = 4096 are 1 MB, 0.22 us at 4.8 TB/s; 32 blocks with all of their 32 KB each in flight at once take a launch
// and three latencies, id -> rank, page and x -> values, some 2 us, and bytes are nothing beside it. A lane has 8 loads
// of 16 bytes, 64 conversions and 64 products for 256 columns of a page, some 250 instructions: 256 such warps are 120
// clocks of 132 multiprocessors.
#include "cuda/adapters.h"

namespace peftrt::cuda {

namespace {

constexpr int kWarps = kShrinkThreads / 32;
constexpr int kGroups = 8;  // blocks that share a part's pages, where it has so many
constexpr int kMaxPages = 32;
constexpr int kMaxRounds = (kMaxPages + kGroups - 1) / kGroups;

struct Shrink {
  AdapterRows rows;
  const void* x;
  void* x_out;  // or null
  int groups;
};

// 8 neighbouring elements.
template <class V>
union Eight {
  Vector vector[sizeof(V) / 2];
  V value[kLaneColumns];
};

// Up to `left` elements, zeros behind them; 16 bytes at a time where all are there and `straight`.
template <class V>
PEFTRT_DEVICE void load_eight(const V* from, int64_t left, bool straight, Eight<V>& to) {
  if (straight && left >= kLaneColumns) {
#pragma unroll
    for (int i = 0; i < int(sizeof(V) / 2); ++i) to.vector[i] = reinterpret_cast<const Vector*>(from)[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) to.value[i] = i < left ? from[i] : V{};
}

// This lane's columns of row i, by the slot's factors; written to x_out where `writes`.
template <class T>
PEFTRT_DEVICE void load_input(const Shrink& p, int64_t row, int slot, int64_t first, bool writes,
                              float (&x)[kLaneColumns]) {
  const int64_t left = p.rows.k - first;
  if (left <= 0) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) x[i] = 0.0f;
    return;
  }
  const T* from = static_cast<const T*>(p.x) + row * p.rows.k + first;
  Eight<T> loaded;
  load_eight(from, left, aligned(from), loaded);
  if (const float* factor = vector_of(p.rows.of, slot, 0)) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (i < left) loaded.value[i] = {uint16_t(pack<T>(multiply(to_float(loaded.value[i]), factor[first + i]), 0.0f))};
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) x[i] = to_float(loaded.value[i]);
  if (!writes) return;
  T* to = static_cast<T*>(p.x_out) + row * p.rows.k + first;
  if (aligned(to) && left >= kLaneColumns) {
    *reinterpret_cast<Vector*>(to) = loaded.vector[0];
  } else {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (i < left) to[i] = loaded.value[i];
  }
}

// The warp's sums of `ranks` ranks of a page: a lane returns that of rank lane / 4.
template <class V>
PEFTRT_DEVICE float sum_page(const V* page, int64_t k, int64_t first, int ranks, const float (&x)[kLaneColumns],
                             int lane) {
  const int64_t left = k - first;
  const bool straight = aligned(page) && k * int64_t(sizeof(V)) % 16 == 0;
  float sum[kPageRanks];
  // as many ranks at a time as fit into 32 registers
  constexpr int kAtOnce = int(16 / sizeof(V));
#pragma unroll
  for (int begin = 0; begin < kPageRanks; begin += kAtOnce) {
    Eight<V> a[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
      load_eight(page + (begin + r) * k + first, begin + r < ranks ? left : 0, straight, a[r]);
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      sum[begin + r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
        sum[begin + r] = fused_multiply_add(x[i], to_float(a[r].value[i]), sum[begin + r]);
    }
  }
  // Lanes 16 apart halve the ranks between them, then those 8 and 4 apart.
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & 4 * half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float mine = upper ? sum[half + i] : sum[i], other = upper ? sum[i] : sum[half + i];
      sum[i] = add(mine, shuffle_xor(other, 4 * half));
    }
  }
  sum[0] = add(sum[0], shuffle_xor(sum[0], 2));
  return add(sum[0], shuffle_xor(sum[0], 1));
}

// Of a page of A; of none, anything.
PEFTRT_DEVICE int64_t page_start(const Shrink& p, int slot, int part, int page) {
  const Adapters& of = p.rows.of;
  if (of.ranks == nullptr) return (int64_t(part) * of.rank + kPageRanks * page) * p.rows.k;
  if (slot < 0 || page >= of.pages) return 0;
  return int64_t(load_of_blocks(reinterpret_cast<const uint64_t*>(of.A_pages) + page_index(of, slot, part, page)));
}

template <class T, class V>
PEFTRT_KERNEL void PEFTRT_BOUNDS(kShrinkThreads, 2) shrink(Shrink p) {
  const Adapters& of = p.rows.of;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  // divided in 32 bits, in a quarter of the time
  const uint32_t rows = uint32_t(p.rows.rows), groups = uint32_t(p.groups), parts = uint32_t(of.parts);
  const uint32_t block = uint32_t(block_index()) / rows;
  const int64_t row = uint32_t(block_index()) - block * rows;
  const int group = int(block % groups), part = int(block / groups % parts), chunk = int(block / groups / parts);
  const int slot = slot_of(of, row);
  if (slot < 0 && thread == 0 && block == 0 && of.error_flag != nullptr && of.slot_ids[row] != -1) *of.error_flag = 1;
  // Where the first page begins is asked for before its rank says whether it is one, and so is x: one latency less.
  int64_t start = page_start(p, slot, part, group);
  const int64_t first = int64_t(chunk) * kChunk + thread * kLaneColumns;
  float x[kLaneColumns];
  load_input<T>(p, row, slot, first, p.x_out != nullptr && part == 0 && group == 0, x);
  const int rank = slot < 0 ? 0 : rank_of(of, slot, part);
  if (kPageRanks * group >= rank) return;

  float* const sums = reinterpret_cast<float*>(shared_memory());
  int rounds = 0;
  for (int page = group; kPageRanks * page < rank; page += p.groups, ++rounds) {
    const int64_t next = page_start(p, slot, part, page + p.groups);
    const float sum = sum_page(static_cast<const V*>(of.A) + start, p.rows.k, first, rank - kPageRanks * page, x, lane);
    start = next;
    if (lane % 4 == 0) sums[(rounds * kWarps + warp) * kPageRanks + lane / 4] = sum;
  }
  sync_block();
  for (int i = thread; i < rounds * kPageRanks; i += kShrinkThreads) {
    const int r = kPageRanks * (group + i / kPageRanks * p.groups) + i % kPageRanks;
    if (r >= rank) continue;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum = add(sum, sums[(i / kPageRanks * kWarps + w) * kPageRanks + i % kPageRanks]);
    p.rows.sums[sums_index(p.rows, chunk, row, part) + r] = sum;
  }
}

template <class T>
const char* run(const Shrink& p, void* stream) {
  const int64_t blocks = p.rows.rows * p.groups * p.rows.of.parts * p.rows.chunks;
  const int shared = kMaxRounds * kWarps * kPageRanks * int(sizeof(float));
  switch (p.rows.of.A_dtype) {
    case Dtype::kFloat32:
      return launch(shrink<T, float>, blocks, kShrinkThreads, shared, stream, p);
    case Dtype::kBFloat16:
      return launch(shrink<T, Bf16>, blocks, kShrinkThreads, shared, stream, p);
    default:
      return launch(shrink<T, Fp16>, blocks, kShrinkThreads, shared, stream, p);
  }
}

}  // namespace

const char* multi_lora_shrink(Dtype dtype, const void* x, void* x_out, const AdapterRows& rows, void* stream) {
  const int pages = rows.of.pages < 1 ? 1 : rows.of.pages;
  if (pages > kMaxPages) return "an adapter of more than 256 ranks";
  const Shrink p = {rows, x, x_out, pages < kGroups ? pages : kGroups};
  return dtype == Dtype::kBFloat16 ? run<Bf16>(p, stream) : run<Fp16>(p, stream);
}

}  // namespace peftrt::cuda
