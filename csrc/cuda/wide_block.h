// What the threads of a block of wide_kernel.h share: where things lie in shared memory, and which steps are the
// block's.
#pragma once

#include "cuda/wide_layout.h"

namespace peftrt::cuda {

// What both kinds of threads of a block know. kUnit: columns that surely have one scale, 32 or 64.
template <int kTokens_, int kUnit_>
struct WideBlock {
  static constexpr int kTokens = kTokens_, kUnit = kUnit_;
  static constexpr WideLayout kLayout = wide_layout(kTokens);
  static constexpr int kUnits = kWideColumns / kUnit;

  PEFTRT_DEVICE explicit WideBlock(const Product& product)
      : p(product),
        shared(shared_memory()),
        table(shared + fixed_offset()),
        token_tiles((product.m + kTokens - 1) / kTokens),
        begin(product.schedule.start(int(block_index()))),
        end(product.schedule.start(int(block_index()) + 1)) {}

  PEFTRT_DEVICE uint8_t* input(int stage) const {
    return shared + kFixedAddress + 256 * kPairStride + stage * kLayout.stage;
  }
  PEFTRT_DEVICE uint8_t* codes(int stage) const { return input(stage) + kLayout.codes; }
  PEFTRT_DEVICE float* dynamic() const { return reinterpret_cast<float*>(shared + kLayout.dynamic); }
  // Of a unit and 16 rows: {row g, row g + 8} for each g.
  PEFTRT_DEVICE float* scales(int stage, int warp, int unit) const {
    const int left_over = (stage * kLayout.warps + warp) * (kUnits / 2) + unit / 2;
    return reinterpret_cast<float*>(table + left_over * kPairStride + 128) + unit % 2 * 16;
  }
  static_assert(kLayout.stages * kLayout.warps * (kUnits / 2) <= 256, "scales have no room beside the table");
  // Of a stage: over when its bytes are there, and when they have been used.
  PEFTRT_DEVICE Barrier* full(int stage) const { return reinterpret_cast<Barrier*>(shared + kLayout.barriers) + stage; }
  PEFTRT_DEVICE Barrier* empty(int stage) const { return full(stage) + kLayout.stages; }

  const Product& p;
  uint8_t *const shared, *const table;
  const int token_tiles, begin, end;  // steps of this block, of all
};

// A step of a tile, the stage it lies in, and the parity of that stage's barriers. Tiles of one range of the weight's
// rows follow one another: its codes are then in the L2.
template <class Block>
struct WideCursor {
  PEFTRT_DEVICE WideCursor(const Block& block, int at)
      : tile(at / block.p.schedule.steps),
        step(at % block.p.schedule.steps),
        rows(tile / block.token_tiles),
        tokens(tile % block.token_tiles) {}
  PEFTRT_DEVICE void advance(const Block& block) {
    if (++stage == Block::kLayout.stages) stage = 0, parity ^= 1;
    if (++step < block.p.schedule.steps) return;
    step = 0, ++tile;
    if (++tokens == block.token_tiles) tokens = 0, ++rows;
  }
  PEFTRT_DEVICE int64_t first_row() const { return int64_t(rows) * Block::kLayout.rows; }
  PEFTRT_DEVICE int first_token() const { return tokens * Block::kTokens; }

  int tile, step;
  int rows, tokens;  // which range of the weight's rows, and of tokens
  int stage = 0;
  uint32_t parity = 0;
};

}  // namespace peftrt::cuda
