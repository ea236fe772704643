// What a product's kernels share: their operands, how its steps are dealt out to the blocks of a grid, and how blocks
// that have parts of one result come to its sum.
#pragma once

#include "cuda/decode.h"

namespace peftrt::cuda {

// Which steps are whose. The result is cut into tiles, the sum of a tile into steps; the steps of all tiles, in order,
// are dealt out to one block a multiprocessor in runs as even as they can be, so that a block takes the end of one
// tile, whole tiles, and the start of another. 32-bit: 2^31 steps are 2^45 weights.
struct Schedule {
  int steps;                 // of one tile
  int blocks, share, extra;  // blocks take `share` steps, the first `extra` of them one more

  static PEFTRT_BOTH Schedule of(int64_t tiles, int64_t steps, int multiprocessors) {
    const int64_t total = tiles * steps;
    const int blocks = total < multiprocessors ? int(total) : multiprocessors;
    return {int(steps), blocks, int(total / blocks), int(total % blocks)};
  }
  PEFTRT_BOTH int start(int block) const { return block * share + (block < extra ? block : extra); }
  PEFTRT_BOTH int owner(int step) const {
    const int longer = extra * (share + 1);
    return step < longer ? step / (share + 1) : extra + (step - longer) / share;
  }
  PEFTRT_BOTH int first_owner(int tile) const { return owner(tile * steps); }
  PEFTRT_BOTH int last_owner(int tile) const { return owner((tile + 1) * steps - 1); }
  // A block has two parts at most: of the tile it starts in, and of the one it ends in.
  PEFTRT_BOTH int part_slot(int block, int tile) const { return 2 * block + (start(block) < tile * steps); }
};

// The workspace: words that count who is done with a part of a result, then the parts.
PEFTRT_BOTH int64_t words_bytes(int64_t words) { return (words + 1) / 2 * 16; }

struct Product {
  const uint8_t* codes;
  Scales scales;
  const uint8_t* x;
  const void* bias;
  void* y;
  float* parts;
  uint64_t* words;
  uint64_t ticket;
  Schedule schedule;
  int64_t n, k;
  int m;
};

inline Product product_of(const Linear& linear, const Schedule& schedule, int64_t words, uint64_t ticket,
                          void* workspace) {
  Product product = {};
  product.codes = linear.codes;
  product.scales = linear.scales;
  product.x = static_cast<const uint8_t*>(linear.x);
  product.bias = linear.bias;
  product.y = linear.y;
  product.n = linear.n;
  product.k = linear.k;
  product.m = int(linear.m);
  product.schedule = schedule;
  product.words = static_cast<uint64_t*>(workspace);
  product.parts = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + words_bytes(words));
  product.ticket = ticket & 0xffffffffffff;  // the other bits of a word count
  return product;
}

// Rows of whole pieces of 16 bytes, whose 32 columns have one scale, since blocks are of 32 at least.
inline bool straight(const Linear& linear) {
  return linear.k % 32 == 0 && reinterpret_cast<uintptr_t>(linear.codes) % 16 == 0;
}

// Counts who is done with a result of `parts` parts; true for the last. Until the first of them the word holds any
// bytes: a count is one only under this call's ticket. The last wipes it out, since a captured graph repeats a call
// with its ticket.
PEFTRT_DEVICE bool last_to_arrive(uint64_t* word, uint64_t ticket, uint64_t parts) {
  uint64_t seen = load_of_blocks(word);
  while (true) {
    const uint64_t done = (seen >> 16 == ticket ? seen & 0xffff : 0) + 1;
    const uint64_t before = compare_and_swap(word, seen, done == parts ? 0 : ticket << 16 | done);
    if (before == seen) return done == parts;
    seen = before;
  }
}

}  // namespace peftrt::cuda
