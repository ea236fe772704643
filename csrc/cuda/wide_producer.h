// wide_kernel.h: the warpgroup that loads.
#pragma once

#include "cuda/wide_block.h"

namespace peftrt::cuda {

// The threads that load. A step's copies are asked for as soon as its stage is free; its scales pass through registers,
// asked for a step ahead. A stage is handed over before the next free one is waited for.
template <class Block>
class WideProducer {
 public:
  PEFTRT_DEVICE explicit WideProducer(const Block& block, int index)
      : b(block),
        p(block.p),
        thread(index),
        policy(block.token_tiles == 1 ? read_once() : read_again()),
        loading(block, block.begin),
        showing(block, block.begin),
        left(block.end - block.begin) {}

  PEFTRT_DEVICE void run() {
#pragma unroll 1
    for (int i = b.begin - kAhead; i < b.end; ++i) {
      // The first copies are on their way when the tables are filled.
      if (i == b.begin) {
        offset = load_offset(p.scales);
        load_scales(showing);
        sync_block();
      }
      if (i >= b.begin) hand_over(i + 1 < b.end);
      load_stage();
    }
  }

 private:
  static constexpr WideLayout kLayout = Block::kLayout;
  static constexpr int kAhead = kLayout.stages - 1;
  static constexpr int kRowsApart = kProducers / Block::kUnits;
  static constexpr int kScales = kLayout.rows / kRowsApart;  // that a thread decodes for a step
  using Cursor = WideCursor<Block>;

  PEFTRT_DEVICE void hand_over(bool more) {
    const Cursor now = showing;
    store_scales(now.stage);
    showing.advance(b);
    if (more) load_scales(showing);
    wait_copies<kAhead - 1>();
    show_products();
    sync_warp();
    if (thread % 32 == 0) arrive(b.full(now.stage));
  }

  // A group is committed even where no step is left, so that groups count steps. Columns past K become zeros in x,
  // whatever the codes: they add nothing. Tokens past M are columns of the product that nobody looks at.
  PEFTRT_DEVICE void load_stage() {
    if (left > 0) {
      wait(b.empty(loading.stage), loading.parity ^ 1);
      load_input(b.input(loading.stage), loading.first_token());
      load_codes(b.codes(loading.stage), loading.first_row());
      loading.advance(b);
      --left;
    }
    commit_copies();
  }

  // Pieces of 16 bytes: 16 threads a token, 8 tokens at a time, placed as rows_at says. What is not there is not read,
  // whatever its address: a branch around a copy would cost more than the zeros that it writes.
  PEFTRT_DEVICE void load_input(uint8_t* to, int first) const {
    const int token = thread / 16, piece = thread % 16;
    const int64_t byte = int64_t(loading.step) * (2 * kWideColumns) + 16 * piece, pitch = 2 * p.k;
    const uint8_t* from = p.x + (first + token) * pitch + byte;
    const int tokens = byte < pitch ? p.m - first - token : 0;
    to += piece / 8 * (128 * Block::kTokens) + token * 128 + (piece % 8 ^ token) * 16;
#pragma unroll
    for (int i = 0; i < Block::kTokens; i += 8, from += 8 * pitch) copy_async(to + i * 128, from, i < tokens);
  }

  // 4 threads a row, 32 rows at a time; eight rows' pieces of one number lie in all banks.
  PEFTRT_DEVICE void load_codes(uint8_t* to, int64_t first) const {
    const int row = thread / 4, piece = thread % 4;
    const int64_t byte = int64_t(loading.step) * kWideCodeRow + 16 * piece, pitch = p.k / 2;
    const uint8_t* from = p.codes + (first + row) * pitch + byte;
    const int rows = byte < pitch ? rows_left(first) - row : 0;
    to += row * kWideCodeRow + (piece ^ row / 2 % 4) * 16;
#pragma unroll
    for (int i = 0; i < kLayout.rows; i += 32, from += 32 * pitch)
      copy_async(to + i * kWideCodeRow, from, i < rows, policy);
  }

  PEFTRT_DEVICE int rows_left(int64_t first) const {
    return p.n - first < kLayout.rows ? int(p.n - first) : kLayout.rows;
  }

  // Where there is no scale, any finite one does: see load_stage. A thread's are of one unit, kRowsApart rows apart.
  PEFTRT_DEVICE void load_scales(const Cursor& of) {
    const int64_t first = of.first_row(), row = thread / Block::kUnits;
    const int64_t k = int64_t(of.step) * kWideColumns + thread % Block::kUnits * Block::kUnit;
    const int rows = k < p.k ? rows_left(first) - int(row) : 0;
    int64_t at = (first + row) * p.k + k;
#pragma unroll
    for (int i = 0; i < kScales; ++i, at += kRowsApart * p.k) {
      const bool there = i * kRowsApart < rows;
      stored[i] = load_scale(p.scales, there ? at >> p.scales.shift : 0);
      if (!there) stored[i] = {};
    }
  }
  PEFTRT_DEVICE void store_scales(int stage) const {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int row = thread / Block::kUnits + i * kRowsApart;
      b.scales(stage, row / 16, thread % Block::kUnits)[row % 8 * 2 + row / 8 % 2] =
          decode_scale(p.scales, stored[i], offset, b.dynamic());
    }
  }

  const Block& b;
  const Product& p;
  const int thread;
  const Policy policy;
  Cursor loading, showing;
  int left;
  float offset = 0.0f;
  StoredScale stored[kScales];
};

}  // namespace peftrt::cuda
