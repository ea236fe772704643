// How a product is cut up, and what lies where in shared memory: known to the kernel and to its launcher alike.
//
// The weight is cut into tiles of 128 rows, a tile into steps of 256 columns, which product.h deals out to the blocks
// of the grid. Neither M nor what else runs has a say in it: a row of y is summed in an order that N, K and the device
// alone decide.
#pragma once

#include "cuda/product.h"

namespace peftrt::cuda {

constexpr int kLinearThreads = 512;
constexpr int kTileRows = 128, kStepColumns = 256;
constexpr int kCodeRow = kStepColumns / 2;    // bytes that a step has of a row of codes
constexpr int kInputRow = 2 * kStepColumns;   // and of a row of x
constexpr int kSumPitch = kTileRows + 4;      // a warp's sums fall into 32 banks
constexpr int kMaxUnits = kStepColumns / 32;  // scales that a step has of a row, at most
constexpr int kMaxTiles = 8;                  // of 8 rows of x
constexpr int64_t kSmallRows = 8 * kMaxTiles;

// What a block may have of an architecture's shared memory.
constexpr int shared_limit(int arch) {
  return arch >= 90 && arch < 120 ? 227 * 1024 : arch == 80 || arch == 87 ? 163 * 1024 : 99 * 1024;
}

// In bytes, behind the table, which is at its fixed address. `stages` steps are in shared memory at a time; below 2 the
// product does not fit the architecture.
struct LinearLayout {
  int table_stride;  // of one byte's pair of levels, which 32 lanes have a copy of
  int dynamic, flag, more, sums, scales, codes;
  int stage, input, stages, size;  // `input`: from the start of a stage
};

// `more`: bytes, a multiple of 128, for what is done with sums beside (linear_kernel.h).
constexpr LinearLayout linear_layout(int arch, int tiles, int more = 0) {
  LinearLayout layout = {};
  const int limit = shared_limit(arch);
  // A stride of 256 bytes makes an address of a byte of codes in one instruction, and wastes half of the table.
  layout.table_stride = limit > 128 * 1024 ? 256 : 128;
  layout.dynamic = kFixedAddress + 256 * layout.table_stride;
  layout.flag = layout.dynamic + 256 * 4;
  layout.more = layout.flag + 128;
  layout.sums = layout.more + more;
  layout.scales = layout.sums + 8 * tiles * kSumPitch * 4;
  layout.codes = layout.scales + 2 * kMaxUnits * kTileRows * 4;
  layout.input = kTileRows * kCodeRow;
  layout.stage = layout.input + 8 * tiles * kInputRow;
  const int stages = (limit - layout.codes) / layout.stage;
  layout.stages = stages < 4 ? stages : 4;
  layout.size = layout.codes + layout.stages * layout.stage;
  return layout;
}

// The most tiles of 8 rows of x that one launch takes: 8, 4, 2 or 1.
constexpr int most_tiles(int arch) {
  int tiles = kMaxTiles;
  while (tiles > 1 && linear_layout(arch, tiles).stages < 2) tiles /= 2;
  return tiles;
}

constexpr int64_t tiles_of(int64_t n) { return (n + kTileRows - 1) / kTileRows; }
inline Schedule linear_schedule(int64_t n, int64_t k, int multiprocessors) {
  return Schedule::of(tiles_of(n), (k + kStepColumns - 1) / kStepColumns, multiprocessors);
}

}  // namespace peftrt::cuda
