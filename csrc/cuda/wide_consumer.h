// wide_kernel.h: the warpgroups that compute.
#pragma once

#include "cuda/wide_block.h"

namespace peftrt::cuda {

// The threads that compute. A warp's 16 rows are its own, from the codes to y: warps wait for loads, never for another.
template <class T, class Block>
class WideConsumer {
 public:
  PEFTRT_DEVICE explicit WideConsumer(const Block& block, int index)
      : b(block),
        p(block.p),
        lane(index % 32),
        warp(index / 32),
        input(rows_at(block.input(0))),
        at(block, block.begin) {
    // byte 1 of an address is byte t of a word of codes, byte 0 the lane's bank: see look_up
    selector = 0x5504u | uint32_t(lane % 4) << 4;
  }

  PEFTRT_DEVICE void run() {
    wait(b.full(0), 0);
    decode(0, 0, a[0]);
    bool whole = at.step == 0;
#pragma unroll 1
    for (int i = b.begin; i < b.end; ++i) {
      const Cursor now = at;
      at.advance(b);
      compute(now.stage, i + 1 < b.end);
      if (at.step == 0 || i + 1 == b.end) {
        finish(now, whole && at.step == 0);
        whole = true;
      }
    }
  }

 private:
  static constexpr WideLayout kLayout = Block::kLayout;
  static constexpr int kProducts = Block::kUnit / 16;  // of a unit
  static constexpr int kSums = Block::kTokens / 2;     // of a thread
  using Cursor = WideCursor<Block>;

  // A step of this warp's rows. The first unit is decoded already, and so is the next step's when it ends.
  PEFTRT_DEVICE void compute(int stage, bool more) {
#pragma unroll
    for (int unit = 0; unit < Block::kUnits; ++unit) {
      multiply(stage, unit, a[unit % 2]);
      const Pair scale = *reinterpret_cast<const Pair*>(b.scales(stage, warp, unit) + lane / 4 * 2);
      if (unit + 1 < Block::kUnits) {
        decode(stage, unit + 1, a[(unit + 1) % 2]);
      } else if (more) {
        wait(b.full(at.stage), at.parity);
        decode(at.stage, 0, a[0]);
      }
      wait_products<0>(sum);
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        total[i] = fused_multiply_add(sum[i], i / 2 % 2 == 0 ? scale.first : scale.second, total[i]);
    }
    sync_warp();
    if (lane == 0) arrive(b.empty(stage));
  }

  PEFTRT_DEVICE void multiply(int stage, int unit, const uint32_t (&of)[kProducts][4]) {
    const int from = stage * kLayout.stage + unit * Block::kUnit / kSwizzledColumns * (128 * Block::kTokens) +
                     unit * Block::kUnit % kSwizzledColumns * 2;
    start_products();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) multiply_rows<T>(sum, of[i], rows_after(input, from + 32 * i), i > 0);
    commit_products();
  }

  // The levels of byte t of a word of codes: at byte * stride + 4 * lane of the table.
  PEFTRT_DEVICE uint32_t look_up(uint32_t codes) const {
    static_assert(kPairStride == 256);
    return load_fixed(permute_bytes(codes, uint32_t(4 * lane), selector));
  }

  // A unit of this lane's two rows: 16 bytes of each are two products' operands.
  PEFTRT_DEVICE void decode(int stage, int unit, uint32_t (&to)[kProducts][4]) const {
    const int row = 16 * warp + lane / 4;
    const uint8_t* codes = b.codes(stage) + row * kWideCodeRow;
#pragma unroll
    for (int i = 0; i < kProducts / 2; ++i) {
      const int piece = ((unit * kProducts / 2 + i) ^ (row / 2 % 4)) * 16;
      const Vector upper = *reinterpret_cast<const Vector*>(codes + piece);
      const Vector lower = *reinterpret_cast<const Vector*>(codes + 8 * kWideCodeRow + piece);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        to[2 * i + j][0] = look_up(upper.word[2 * j]);
        to[2 * i + j][1] = look_up(lower.word[2 * j]);
        to[2 * i + j][2] = look_up(upper.word[2 * j + 1]);
        to[2 * i + j][3] = look_up(lower.word[2 * j + 1]);
      }
    }
  }

  // y, or a part of it: then the last warp to come with one adds up all, its own too, in the order of their columns.
  // Who comes last changes no bit, and nobody waits.
  PEFTRT_DEVICE void finish(const Cursor& of, bool whole) {
    const int tokens = p.m - of.first_token();
    if (whole || part_is_last(of.tile)) store(of, tokens);
#pragma unroll
    for (int i = 0; i < kSums; ++i) total[i] = 0.0f;
  }

  // This warp's sums of a block's part of a tile, four of a lane together.
  PEFTRT_DEVICE Vector* part(int of, int tile) const {
    const int64_t slot = int64_t(p.schedule.part_slot(of, tile)) * kLayout.warps + warp;
    return reinterpret_cast<Vector*>(p.parts) + slot * (kSums / 4) * 32 + lane;
  }

  PEFTRT_DEVICE bool part_is_last(int tile) {
    Vector* own = part(int(block_index()), tile);
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      own[32 * i] = {{float_bits(total[4 * i]), float_bits(total[4 * i + 1]), float_bits(total[4 * i + 2]),
                      float_bits(total[4 * i + 3])}};
    }
    const int first = p.schedule.first_owner(tile), last = p.schedule.last_owner(tile);
    bool is_last = false;
    sync_warp();
    if (lane == 0) {
      fence_device();
      is_last = last_to_arrive(p.words + int64_t(tile) * kLayout.warps + warp, p.ticket, uint64_t(last - first + 1));
      fence_device();
    }
    if (!any_lane(is_last)) return false;
    add_parts(first, last, tile);
    return true;
  }

  // The sum of all parts of a tile; this block's is still here.
  PEFTRT_DEVICE void add_parts(int first, int last, int tile) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = 0.0f;
#pragma unroll 1
    for (int from = first; from <= last; ++from) {
      if (from == int(block_index())) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] = add(sum[i], total[i]);
        continue;
      }
      const Vector* parts = part(from, tile);
      // All are asked for before the first is added.
      Vector other[kSums / 4];
#pragma unroll
      for (int i = 0; i < kSums / 4; ++i) other[i] = load_of_blocks(parts + 32 * i);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] = add(sum[i], bits_float(other[i / 4].word[i % 4]));
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) total[i] = sum[i];
  }

  PEFTRT_DEVICE void store(const Cursor& of, int tokens) const {
    T* y = static_cast<T*>(p.y) + of.first_token() * p.n;
    const int64_t n = of.first_row() + 16 * warp + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (n + 8 * half >= p.n) continue;
      const float bias = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[n + 8 * half]);
#pragma unroll
      for (int i = 0; i < kSums / 2; ++i) {
        const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
        const float value = total[i / 2 * 4 + half * 2 + i % 2];
        if (token < tokens)
          y[token * p.n + n + 8 * half] = {uint16_t(pack<T>(p.bias == nullptr ? value : add(value, bias), 0.0f))};
      }
    }
  }

  struct alignas(8) Pair {
    float first, second;
  };

  const Block& b;
  const Product& p;
  const int lane, warp;
  const Rows input;  // of the first stage
  uint32_t selector;
  Cursor at;
  uint32_t a[2][kProducts][4];
  float sum[kSums] = {}, total[kSums] = {};
};

}  // namespace peftrt::cuda
