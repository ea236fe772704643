// What multi_lora_linear does with the base's sums: adds each row's own adapter's share, the slot's factors and biases,
// and writes y. A block does so when it has no more steps, for the tiles that are its own to finish: then the registers
// that its steps had are free, and all rows of all these tiles are under way at a time. A warp has a row and 128
// columns; a lane 8 columns, and every other page of 8 ranks: the lane 16 apart has the others.
//
// Counted, not measured on a device (an H200: 4.8 TB/s, 132 multiprocessors). The floor is the base's bytes and each
// distinct adapter's, 2 R (K + N) of 16 bits: at 28672 x 4096 and 8 adapters of rank 16, 60.6 MB and 8.4 MB, 12.6 us
// and 1.75 us. What is not bytes: the first launch, some 2 us of latency; and here two latencies of the L2 for every 16
// pairs of a row and a tile (sums and x A^T, where B's pages begin; then B, which is in the L2 by then, since the block
// that begins with a tile has asked for it before its first step): 1.7 tiles a block and 8 rows are 1 to 2 times some
// 600 clocks, 0.35 to 0.7 us. That is 17.1 us, where 1.2 times the base and the adapters' bytes are 16.9; a base is
// measured with its own launch, and so are these. A rank has 8 products, 8 conversions and a sixteenth of the rest for
// 8 columns: 64 rows of rank 16 are 3600 clocks a tile of 4 a clock, 2 us.
#pragma once

#include "cuda/adapters.h"
#include "cuda/linear_layout.h"

namespace peftrt::cuda {

// Of shared memory: the rows' slots, their ranks in each part, and whether a block's first and last tile are its own to
// finish.
constexpr int adapter_bytes(int tiles) { return (8 * tiles * (4 + 2 * kMaxParts) + 8 + 127) / 128 * 128; }

template <class T, int kTiles>
class AdapterShare {
 public:
  static constexpr bool kAny = true;
  static constexpr int kBytes = adapter_bytes(kTiles);

  PEFTRT_DEVICE AdapterShare(const Product& product, const AdapterRows& rows) : p(product), r(rows), of(rows.of) {}

  // Before the first step: the rows' slots, and B's bytes of the tiles that begin in this block.
  PEFTRT_DEVICE void start(uint8_t* shared, int begin, int end) {
    const int thread = thread_index();
    if (thread < p.m * of.parts) {
      const int m = thread / of.parts, part = thread % of.parts, slot = slot_of(of, r.first_row + m);
      if (part == 0) slots(shared)[m] = slot;
      ranks(shared)[m * kMaxParts + part] = uint16_t(slot < 0 ? 0 : rank_of(of, slot, part));
    }
    if (thread < 2) owns(shared)[thread] = 0;
    constexpr int kMost = 4;  // later ones might have left the L2 again
    const int tile = (begin + p.schedule.steps - 1) / p.schedule.steps;
    for (int i = tile; i < tile + kMost && i * p.schedule.steps < end; ++i) prefetch_tile(i);
  }

  // Where the sums of a tile go that this block has all steps of.
  PEFTRT_DEVICE float* sums_of(int tile) const { return r.base + int64_t(tile) * p.m * kTileRows; }
  // This block is the last of those that have parts of its first tile, or of its last.
  PEFTRT_DEVICE static void has(uint8_t* shared, bool first) {
    if (thread_index() == 0) owns(shared)[!first] = 1;
  }

  // All tiles of the steps begin ... end - 1 that are this block's to finish; part(tile, block) is where a block's part
  // of one is. `room`: of kRoom bytes a warp.
  template <class Part>
  PEFTRT_DEVICE void finish(uint8_t* shared, float* room, int begin, int end, const Part& part) const {
    const int steps = p.schedule.steps, first = begin / steps, count = (end - 1) / steps - first + 1;
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    float* const factors = room + kRoom / 4 * warp;
#pragma unroll 1
    for (int i = warp; i < count * p.m; i += kLinearThreads / 32) {
      const int tile = first + i / p.m, m = i % p.m;
      const bool whole = tile * steps >= begin && (tile + 1) * steps <= end;
      if (!whole && owns(shared)[tile != first] == 0) continue;
      const int at = m * kTileRows + lane % 16 * kLaneColumns + lane / 16 * 4;
      float share[kLaneColumns], sum[4] = {};
      if (whole) {
        load_sums(sums_of(tile) + at, [](float, float value) { return value; }, sum);
      } else {
        const int last = p.schedule.last_owner(tile);
        for (int from = p.schedule.first_owner(tile); from <= last; ++from) load_sums(part(tile, from) + at, add, sum);
      }
      const int slot = slots(shared)[m];
      share_of(m, slot, ranks(shared) + m * kMaxParts, tile, lane, factors, share);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float mine = lane < 16 ? share[j] : share[4 + j], other = lane < 16 ? share[4 + j] : share[j];
        sum[j] = add(sum[j], add(mine, shuffle_xor(other, 16)));
      }
      write(m, slot, tile * kTileRows + lane % 16 * kLaneColumns + lane / 16 * 4, sum);
    }
  }

 private:
  static constexpr int kSector = 32;
  static constexpr int kPages = 32 / kPageRanks;     // at a time
  static constexpr int kRoom = 32 * 4 + kPages * 8;  // bytes: factors of B's ranks, and where its pages begin

  PEFTRT_DEVICE static int* owns(uint8_t* shared) { return reinterpret_cast<int*>(shared); }
  PEFTRT_DEVICE static int* slots(uint8_t* shared) { return owns(shared) + 2; }
  PEFTRT_DEVICE static uint16_t* ranks(uint8_t* shared) {
    return reinterpret_cast<uint16_t*>(slots(shared) + 8 * kTiles);
  }

  PEFTRT_DEVICE static int size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

  // Every sector of the ranks' columns of the tile, of all parts that it has some of.
  PEFTRT_DEVICE void prefetch_tile(int tile) const {
    const int64_t low = int64_t(tile) * kTileRows, high = low + kTileRows < p.n ? low + kTileRows : p.n;
    const int size = size_of(of.B_dtype);
    const uint8_t* const B = static_cast<const uint8_t*>(of.B);
    if (of.ranks == nullptr) {
      const int64_t bytes = (high - low) * of.rank * size;
#pragma unroll 1
      for (int64_t i = int64_t(thread_index()) * kSector; i < bytes; i += kLinearThreads * kSector)
        prefetch(B + low * of.rank * size + i);
      return;
    }
    for (int m = thread_index() / 32; m < p.m; m += kLinearThreads / 32) {
      const int slot = slot_of(of, r.first_row + m);
      for (int part = 0; part < of.parts && slot >= 0; ++part) {
        const int64_t begin = of.part_start[part], end = of.part_start[part + 1];
        const int64_t from = begin > low ? begin : low, to = end < high ? end : high;
        const int rank = from < to ? rank_of(of, slot, part) : 0;
        for (int i = thread_index() % 32 / 8; i < rank; i += 4) {
          const int64_t page = of.B_pages[page_index(of, slot, part, i / kPageRanks)];
          const uint8_t* const start = B + (page + i % kPageRanks * (end - begin) + from - begin) * size;
#pragma unroll 1
          for (int64_t byte = thread_index() % 8 * kSector; byte < (to - from) * size; byte += 8 * kSector)
            prefetch(start + byte);
        }
      }
    }
  }

  // Of row m in this lane's 8 columns of a tile: of every other page, the lane 16 apart has the others.
  PEFTRT_DEVICE void share_of(int m, int slot, const uint16_t* ranks_of, int tile, int lane, float* factors,
                              float (&share)[kLaneColumns]) const {
    // -0 is what changes no sum; 0 is not
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) share[i] = -0.0f;
    const int low = tile * kTileRows, column = low + lane % 16 * kLaneColumns;
#pragma unroll 1
    for (int part = 0; part < of.parts; ++part) {
      if (of.part_start[part] - low >= kTileRows || of.part_start[part + 1] <= low) continue;
      const int rank = ranks_of[part];
#pragma unroll 1
      for (int begin = 0; begin < rank; begin += 32) {
        sync_warp();
        load_factors(m, slot, part, rank, begin, lane, of.part_start[part] >= low, factors);
        sync_warp();
#pragma unroll 1
        for (int i = lane / 16; i < kPages && begin + i * kPageRanks < rank; i += 2)
          add_page(part, rank - begin - i * kPageRanks, pages_of(factors)[i], column, factors + i * kPageRanks, share);
      }
    }
  }

  PEFTRT_DEVICE static int64_t* pages_of(float* factors) { return reinterpret_cast<int64_t*>(factors + 32); }

  // 32 ranks of x A^T, each of all chunks in their order; and where B's pages begin.
  PEFTRT_DEVICE void load_factors(int m, int slot, int part, int rank, int begin, int lane, bool keeps,
                                  float* factors) const {
    const int page = begin / kPageRanks + lane, i = begin + lane;
    if (lane < kPages && page * kPageRanks < rank)
      pages_of(factors)[lane] = of.ranks == nullptr ? int64_t(of.part_start[part]) * of.rank + kPageRanks * page
                                                    : of.B_pages[page_index(of, slot, part, page)];
    if (i >= rank) return;
    const int64_t row = r.first_row + m;
    float sum = 0.0f;
    for (int chunk = 0; chunk < r.chunks; ++chunk) sum = add(sum, r.sums[sums_index(r, chunk, row, part) + i]);
    if (keeps && of.xa != nullptr) of.xa[(row * of.parts + part) * of.rank + i] = sum;
    factors[lane] = multiply(sum, scaling_of(of, slot, part));
  }

  PEFTRT_DEVICE void add_page(int part, int left, int64_t start, int column, const float* factors,
                              float (&share)[kLaneColumns]) const {
    switch (of.B_dtype) {
      case Dtype::kFloat32:
        return add_page<float>(part, left, start, column, factors, share);
      case Dtype::kBFloat16:
        return add_page<Bf16>(part, left, start, column, factors, share);
      default:
        return add_page<Fp16>(part, left, start, column, factors, share);
    }
  }

  template <class V>
  PEFTRT_DEVICE void add_page(int part, int left, int64_t start, int column, const float* factors,
                              float (&share)[kLaneColumns]) const {
    const int begin = of.part_start[part], end = of.part_start[part + 1];
    if (column >= end || column + (kLaneColumns - 1) < begin) return;
    const bool by_ranks = of.ranks == nullptr;
    const int ranks = left < kPageRanks ? left : kPageRanks;
    int across = by_ranks ? 1 : end - begin, along = by_ranks ? of.rank : 1;
    // or all of their multiples would be kept in registers from before all loops
    forget(across), forget(along);
    const V* const b = static_cast<const V*>(of.B) + start + int64_t(column - begin) * along;
    // In pieces of 16 bytes where they all lie straight, and are all there.
    const bool pieces = aligned(b) && column >= begin && end - column >= kLaneColumns &&
                        (by_ranks ? along : across) % int(16 / sizeof(V)) == 0;
    if (pieces && by_ranks && ranks == kPageRanks) {
      add_pieces<V, true>(b, along, ranks, factors, share);
    } else if (pieces && !by_ranks) {
      add_pieces<V, false>(b, across, ranks, factors, share);
    } else {
#pragma unroll 1
      for (int i = 0; i < ranks; ++i) {
        const V* at = b + int64_t(i) * across;
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c, at += along) {
          if (column + c >= begin && column + c < end)
            share[c] = fused_multiply_add(factors[i], to_float(*at), share[c]);
        }
      }
    }
  }

  // A piece has neighbouring ranks of a column, or neighbouring columns of a rank.
  template <class V, bool kByRanks>
  PEFTRT_DEVICE static void add_pieces(const V* b, int stride, int ranks, const float* factors,
                                       float (&share)[kLaneColumns]) {
    constexpr int kInPiece = int(16 / sizeof(V)), kPieces = 8;  // at a time
#pragma unroll 1
    for (int first = 0; first < kPageRanks; first += kInPiece) {
      union {
        Vector piece[kPieces];
        V value[kPieces * kInPiece];
      } loaded;
      const V* at = kByRanks ? b + first : b;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        constexpr int kOfRank = kByRanks ? 1 : int(sizeof(V) / 2);
        const bool there = kByRanks || first + i / kOfRank < ranks;
        loaded.piece[i] = there ? reinterpret_cast<const Vector*>(at)[i % kOfRank] : Vector{};
        if ((i + 1) % kOfRank == 0) at += stride;
      }
      if (!kByRanks) b = at;
#pragma unroll
      for (int i = 0; i < kInPiece; ++i) {
        const float factor = factors[first + i];
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c)
          if (first + i < ranks)
            share[c] = fused_multiply_add(
                factor, to_float(loaded.value[kByRanks ? c * kInPiece + i : i * kLaneColumns + c]), share[c]);
      }
    }
  }

  template <class Combine>
  PEFTRT_DEVICE static void load_sums(const float* from, const Combine& combine, float (&sum)[4]) {
    const Vector loaded = load_of_blocks(reinterpret_cast<const Vector*>(from));
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = combine(sum[i], bits_float(loaded.word[i]));
  }

  PEFTRT_DEVICE void write(int m, int slot, int n, float (&total)[4]) const {
    const float *factor = vector_of(of, slot, 1), *bias = vector_of(of, slot, 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i >= p.n) continue;
      total[i] = result_of<T>(total[i], factor, static_cast<const T*>(p.bias), bias, n + i);
    }
    T* const to = static_cast<T*>(p.y) + m * r.y_stride + n;
    if (p.n - n >= 4 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
      *reinterpret_cast<Pair*>(to) = {{pack<T>(total[0], total[1]), pack<T>(total[2], total[3])}};
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < p.n) to[i] = {uint16_t(pack<T>(total[i], 0.0f))};
  }

  struct alignas(8) Pair {
    uint32_t word[2];
  };

  const Product& p;
  const AdapterRows& r;
  const Adapters& of;
};

}  // namespace peftrt::cuda
