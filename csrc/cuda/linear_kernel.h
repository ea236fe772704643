// y = x W^T + b for a few rows of x, on tensor cores: m16n8k16 with the weight as the 16 rows.
//
// A byte of codes is two weights of one row. Their levels, as a pair of 16-bit floats, are one look-up in a table of
// 256 pairs in shared memory that every lane has its own bank of. Levels go into the tensor cores as they are; a
// block's scale multiplies the fp32 sums of 32 columns afterwards. So a weight is rounded once, as one that was decoded
// to 16 bits first.
//
// Counted, not measured on a device (nvcc 13.0 for sm_90a, 2026-11-21). For 2048 weights and 8 rows of x, shared memory
// has 32 wavefronts of look-ups, 8 of codes in, 8 of codes out, 8 of x and 2 of scales, 58; a warp has 108
// instructions, 1.7 a weight of a lane, and what loads, decodes scales and waits once a step. 4.8 TB/s of codes and
// scales need 56 clocks for so many. So for 8 rows and fewer one word of codes in four goes without look-ups, by
// permutations of bytes: 50 wavefronts, and 140 instructions, of which 72 are of the pipe that permutes, two a clock.
//
// Of the 16 columns that an instruction sums, which is which is free, as long as x agrees: what ldmatrix hands a lane
// of a row of codes, 4 bytes of 16, are 8 neighbouring columns, and 16 bytes of x are the same columns.
#pragma once

#include "cuda/linear_layout.h"

namespace peftrt::cuda {

// What is done with a tile's sums but for the bias: nothing. adapter_share.h has another.
struct NothingMore {
  static constexpr bool kAny = false;
  static constexpr int kBytes = 0;  // of shared memory
};

// One block of the grid. kTiles: rows of x by 8. kUnit: columns that surely have one scale, 32 or 64. Where more is
// done with sums, it is done when the block has no more steps: it needs the registers that steps have.
template <class T, int kTiles, int kUnit, class More = NothingMore>
class LinearBlock {
 public:
  PEFTRT_DEVICE explicit LinearBlock(const Product& product, const More& added = {})
      : p(product),
        more(added),
        shared(shared_memory()),
        thread(thread_index()),
        lane(thread % 32),
        block(int(block_index())),
        once(read_once()) {
    end = p.schedule.start(block + 1);
    loading = at(p.schedule.start(block));
    computing = loading;
  }

  PEFTRT_DEVICE void run() {
    const int begin = p.schedule.start(block);
#pragma unroll 1
    for (int i = 0; i + 1 < kStages; ++i) load_stage();
    load_scales(computing);
    if constexpr (More::kAny) more.start(shared + kLayout.more, begin, end);
    fill_tables();
    sync_block();
    int part_begin = computing.step;
    for (int i = begin; i < end; ++i) {
      store_scales(i % 2);
      wait_copies<kStages - 2>();
      // This step's bytes are there for all, and all are done with the step before, whose stage is loaded next.
      sync_block();
      load_stage();
      const Cursor next = after(computing);
      if (i + 1 < end) load_scales(next);
      compute(i % 2);
      if (next.step == 0 || i + 1 == end) {
        finish(computing.tile, part_begin == 0 && next.step == 0);
        part_begin = 0;
      }
      computing = next;
    }
    if constexpr (More::kAny) {
      sync_block();
      more.finish(shared + kLayout.more, sums(), begin, end, [&](int tile, int of) { return part(of, tile); });
    }
  }

 private:
  static constexpr LinearLayout kLayout = linear_layout(kArchitecture, kTiles, More::kBytes);
  static constexpr int kStages = kLayout.stages;
  // Where little is multiplied, look-ups are the bound: a quarter of the weights goes without.
  static constexpr bool kMixed = kTiles == 1;
  static constexpr int kUnits = kStepColumns / kUnit;
  static constexpr int kScales = kUnits * kTileRows / kLinearThreads;  // that a thread decodes for a step
  static constexpr int kInputPieces = 8 * kTiles * kInputRow / 16;
  // Four by four warps share a step; a warp's rows are two instructions high.
  static constexpr int kWarpRows = 32, kWarpColumns = 64;

  struct Cursor {
    int tile, step;
  };
  PEFTRT_DEVICE Cursor at(int step) const { return {step / p.schedule.steps, step % p.schedule.steps}; }
  PEFTRT_DEVICE Cursor after(Cursor c) const {
    return c.step + 1 < p.schedule.steps ? Cursor{c.tile, c.step + 1} : Cursor{c.tile + 1, 0};
  }

  static PEFTRT_DEVICE int following(int stage) { return stage + 1 < kStages ? stage + 1 : 0; }
  PEFTRT_DEVICE uint8_t* stage(int i) const { return shared + kLayout.codes + i * kLayout.stage; }
  PEFTRT_DEVICE float* sums() const { return reinterpret_cast<float*>(shared + kLayout.sums); }
  PEFTRT_DEVICE float* dynamic() const { return reinterpret_cast<float*>(shared + kLayout.dynamic); }

  // Asks for the next step's codes and columns of x; a group is committed even where there is none, so that groups
  // count steps. Pieces of 16 bytes lie so that ldmatrix (eight rows of codes) and 16-byte loads (two rows of x) find
  // every bank once. Columns past K become zeros in x, whatever the codes: they add nothing.
  PEFTRT_DEVICE void load_stage() {
    if (loading.tile * p.schedule.steps + loading.step < end) {
      uint8_t* to = stage(loading_stage);
#pragma unroll
      for (int j = 0; j < kTileRows * kCodeRow / 16 / kLinearThreads; ++j) {
        const int i = thread + j * kLinearThreads, row = i / (kCodeRow / 16), piece = i % (kCodeRow / 16);
        const int64_t n = int64_t(loading.tile) * kTileRows + row, byte = int64_t(loading.step) * kCodeRow + 16 * piece;
        const bool there = n < p.n && byte < p.k / 2;
        copy_async(to + row * kCodeRow + (piece ^ row % 8) * 16, p.codes + (there ? n * (p.k / 2) + byte : 0), there,
                   once);
      }
#pragma unroll 1
      for (int i = thread; i < kInputPieces; i += kLinearThreads) {
        const int row = i / (kInputRow / 16), piece = i % (kInputRow / 16);
        const int64_t byte = int64_t(loading.step) * kInputRow + 16 * piece;
        const bool there = row < p.m && byte < 2 * p.k;
        copy_async(to + kLayout.input + row * kInputRow + (piece ^ row % 2 * 4) * 16,
                   p.x + (there ? row * 2 * p.k + byte : 0), there);
      }
      loading = after(loading);
      loading_stage = following(loading_stage);
    }
    commit_copies();
  }

  // Scales pass through registers, asked for a step ahead. Where there is none, any finite one does: see load_stage.
  PEFTRT_DEVICE void load_scales(Cursor c) {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int at = thread + i * kLinearThreads;
      const int64_t n = int64_t(c.tile) * kTileRows + at / kUnits,
                    k = int64_t(c.step) * kStepColumns + at % kUnits * kUnit;
      stored[i] = n < p.n && k < p.k ? load_scale(p.scales, (n * p.k + k) >> p.scales.shift) : StoredScale{0, 0.0f};
    }
  }

  // Four rows that a lane needs at a time, 8 apart, lie side by side.
  PEFTRT_DEVICE void store_scales(int buffer) const {
    float* to = reinterpret_cast<float*>(shared + kLayout.scales) + buffer * kMaxUnits * kTileRows;
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int at = thread + i * kLinearThreads, row = at / kUnits;
      to[at % kUnits * kTileRows + row / 32 * 32 + row % 8 * 4 + row % 32 / 8] =
          decode_scale(p.scales, stored[i], offset, dynamic());
    }
  }

  PEFTRT_DEVICE void fill_tables() {
    offset = load_offset(p.scales);
    if (thread < 256) dynamic()[thread] = kDeviceDynamic.value[thread];
    fill_pairs<T, kLinearThreads>(shared + fixed_offset(), kLayout.table_stride, thread);
  }

  // The levels of byte i of a word of codes, at byte * stride + 4 * lane.
  PEFTRT_DEVICE uint32_t look_up(uint32_t codes, int i) const {
    const uint32_t selector = 0x5504u | uint32_t(i) << 4;
    if constexpr (kLayout.table_stride == 256) return load_fixed(permute_bytes(codes, uint32_t(4 * lane), selector));
    return load_fixed(permute_bytes(codes, uint32_t(8 * lane), selector) >> 1);
  }

  // 32 rows and 64 columns of a step times all rows of x, 32 columns at a time: one piece of each row of codes.
  PEFTRT_DEVICE void compute(int buffer) {
    const int warp_row = thread / 32 % 4 * kWarpRows, warp_column = thread / 128 * kWarpColumns;
    const uint8_t* codes = stage(computing_stage);
    computing_stage = following(computing_stage);
    const float* scales = reinterpret_cast<const float*>(shared + kLayout.scales) + buffer * kMaxUnits * kTileRows;
    // Unrolled where registers allow two halves' levels at a time.
#pragma unroll(kTiles <= 2 ? 2 : 1)
    for (int half = 0; half < kWarpColumns / 32; ++half) {
      const int column = warp_column + 32 * half, row = warp_row + lane;
      uint32_t word[4], a[2][2][4];
      load_matrices(codes + row * kCodeRow + (column / 32 ^ row % 8) * 16, word);
      expand(word[0], word[1], a[0], false);
      expand(word[2], word[3], a[1], kMixed);
      const int at = column / kUnit * kTileRows + warp_row + lane / 4 * 4;
      const Vector scale = *reinterpret_cast<const Vector*>(scales + at);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) multiply_tile(codes + kLayout.input, tile, column, a, scale);
    }
  }

  // Two rows of 32 columns: two instructions' operands. `mixed`: the lower row's without look-ups.
  PEFTRT_DEVICE void expand(uint32_t upper, uint32_t lower, uint32_t (&a)[2][4], bool mixed) const {
    uint32_t pair[4];
    if (mixed) {
      pairs.expand(lower, pair);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) pair[i] = look_up(lower, i);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i][0] = look_up(upper, 2 * i);
      a[i][1] = pair[2 * i];
      a[i][2] = look_up(upper, 2 * i + 1);
      a[i][3] = pair[2 * i + 1];
    }
  }

  PEFTRT_DEVICE void multiply_tile(const uint8_t* input, int tile, int column, const uint32_t (&a)[2][2][4],
                                   const Vector& scale) {
    const int row = 8 * tile + lane / 4, piece = column / 8 + lane % 4;
    const Vector x = *reinterpret_cast<const Vector*>(input + row * kInputRow + (piece ^ row % 2 * 4) * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum[4] = {};
      multiply_matrices<T>(sum, a[i][0], x.word[0], x.word[1]);
      multiply_matrices<T>(sum, a[i][1], x.word[2], x.word[3]);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        total[i][tile][j] = fused_multiply_add(sum[j], bits_float(scale.word[2 * i + j / 2]), total[i][tile][j]);
    }
  }

  // The four warps that share rows add up, one after the other, in the order of their columns; then y or a part of it.
  PEFTRT_DEVICE void finish(int tile, bool whole) {
#pragma unroll 1
    for (int round = 0; round < 4; ++round) {
      if (thread / 128 == round) {
        for_totals([&](float& sum, float& total_) {
          sum = round == 0 ? total_ : add(sum, total_);
          total_ = 0.0f;
        });
      }
      sync_block();
    }
    if constexpr (More::kAny) {
      if (whole) {
        store_sums(more.sums_of(tile));
      } else if (part_is_last(tile)) {
        more.has(shared + kLayout.more, tile * p.schedule.steps <= p.schedule.start(block));
      }
    } else if (whole) {
      for_results(tile, [&](int m, int row) { return sums()[m * kSumPitch + row]; });
    } else if (part_is_last(tile)) {
      const int first = p.schedule.first_owner(tile), last = p.schedule.last_owner(tile);
      for_results(tile, [&](int m, int row) {
        float sum = 0.0f;
        for (int from = first; from <= last; ++from)
          sum = add(sum, load_of_blocks(part(from, tile) + m * kTileRows + row));
        return sum;
      });
    }
  }

  template <class Function>
  PEFTRT_DEVICE void for_totals(const Function& function) {
    const int warp_row = thread / 32 % 4 * kWarpRows;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int m = 8 * tile + lane % 4 * 2 + i % 2, row = warp_row + 16 * (i / 4) + i / 2 % 2 * 8 + lane / 4;
        function(sums()[m * kSumPitch + row], total[i / 4][tile][i % 4]);
      }
    }
  }

  template <class Function>
  PEFTRT_DEVICE void for_results(int tile, const Function& result) const {
    T* y = static_cast<T*>(p.y);
    for (int i = thread; i < p.m * kTileRows; i += kLinearThreads) {
      const int m = i / kTileRows, row = i % kTileRows;
      const int64_t n = int64_t(tile) * kTileRows + row;
      if (n >= p.n) continue;
      float value = result(m, row);
      if (p.bias != nullptr) value = add(value, to_float(static_cast<const T*>(p.bias)[n]));
      y[m * p.n + n] = {uint16_t(pack<T>(value, 0.0f))};
    }
  }

  PEFTRT_DEVICE float* part(int of, int tile) const {
    return p.parts + int64_t(p.schedule.part_slot(of, tile)) * p.m * kTileRows;
  }

  PEFTRT_DEVICE void store_sums(float* to) const {
    for (int i = thread; i < p.m * kTileRows; i += kLinearThreads)
      to[i] = sums()[i / kTileRows * kSumPitch + i % kTileRows];
  }

  // Writes this block's part of a tile; true for the block that comes last, which then adds up all parts, its own too,
  // in the order of their columns: who comes last changes no bit, and nobody waits.
  PEFTRT_DEVICE bool part_is_last(int tile) const {
    store_sums(part(block, tile));
    bool& last = *reinterpret_cast<bool*>(shared + kLayout.flag);
    sync_block();
    if (thread == 0) {
      fence_device();
      const int parts = p.schedule.last_owner(tile) - p.schedule.first_owner(tile) + 1;
      last = last_to_arrive(p.words + tile, p.ticket, uint64_t(parts));
      fence_device();
    }
    sync_block();
    return last;
  }

  const Product& p;
  More more;
  uint8_t* const shared;
  const int thread, lane, block;
  const Policy once;
  float offset = 0.0f;
  int end;
  Cursor loading, computing;
  int loading_stage = 0, computing_stage = 0;
  StoredScale stored[kScales];
  PairsInRegisters<T> pairs;
  float total[2][kTiles][4] = {};
};

// What does not fit an architecture is not launched there, and need not be compiled.
template <int kTiles>
constexpr bool kFits = linear_layout(kArchitecture, kTiles).stages >= 2;

template <class T, int kTiles, int kUnit>
PEFTRT_KERNEL void PEFTRT_BOUNDS(kLinearThreads, 1) linear_kernel(Product product) {
  if constexpr (kFits<kTiles>) LinearBlock<T, kTiles, kUnit>(product).run();
}

}  // namespace peftrt::cuda
