// How a product of many rows of x is cut up for warpgroups, and what lies where in shared memory: known to the kernel
// and to its launcher alike.
//
// A tile of y is `groups` times 64 rows of the weight against 64 or 128 rows of x ("tokens", to tell them apart); its
// sum is cut into steps of 128 columns, dealt out by product.h. So the order in which a row of y is summed depends on
// N, K, the device, the size of a tile and how many tiles of tokens there are, not on what the tokens hold.
#pragma once

#include "cuda/product.h"

namespace peftrt::cuda {

constexpr int64_t kWideRows = 512;              // of x that it is for
constexpr int kWideColumns = 128;               // of a step
constexpr int kWideCodeRow = kWideColumns / 2;  // bytes that a step has of a row of codes
constexpr int kSwizzledColumns = 64;            // of x that are 128 bytes: a step's lie in two parts
constexpr int kPairStride = 256;                // of the table: an address is one instruction; half of it is left over
constexpr int kProducers = 128;                 // threads that load, a warpgroup of their own

// In bytes. `stages` steps are in shared memory at a time. Scales lie in what the table leaves over: 128 bytes, the
// scales of 16 rows of two units, after each byte's pair.
struct WideLayout {
  int tokens, groups;
  int rows, warps, threads;  // of the weight; that compute; all
  int dynamic, barriers;
  int stage, codes, stages, size;              // `codes`: from the start of a stage, behind x
  int producer_registers, consumer_registers;  // of a thread
};

constexpr WideLayout wide_layout(int tokens) {
  WideLayout layout = {};
  layout.tokens = tokens;
  // As many rows as sums leave registers for: the more, the less often x is copied.
  layout.groups = tokens == 64 ? 3 : 2;
  layout.rows = 64 * layout.groups;
  layout.warps = 4 * layout.groups;
  layout.threads = 128 * layout.groups + kProducers;
  const int first = kFixedAddress + 256 * kPairStride;
  layout.codes = 2 * tokens * kWideColumns;
  layout.stage = layout.codes + layout.rows * kWideCodeRow;
  const int tables = 256 * 4 + 128;
  layout.stages = (227 * 1024 - first - tables) / layout.stage;
  layout.dynamic = first + layout.stages * layout.stage;
  layout.barriers = layout.dynamic + 256 * 4;
  layout.size = first + layout.stages * layout.stage + tables;
  // A block gets 65536 registers in even shares of 8; then they change hands in eights.
  const int share = 65536 / layout.threads / 8 * 8;
  layout.producer_registers = 56;
  layout.consumer_registers =
      (share * layout.threads - layout.producer_registers * kProducers) / (layout.threads - kProducers) / 8 * 8;
  return layout;
}

// Rows of x in a tile of a product with m of them.
constexpr int wide_tokens(int64_t m) { return m <= 64 ? 64 : 128; }

// nf4_linear_wide.cu: whether the current device has the kernel, how large its workspace is, and the product, for
// operands that are `straight`.
const char* wide_exists(bool* exists);
const char* wide_workspace(const Linear& linear, int64_t* bytes);
const char* wide_linear(const Linear& linear, uint64_t ticket, void* workspace, void* stream);

}  // namespace peftrt::cuda
