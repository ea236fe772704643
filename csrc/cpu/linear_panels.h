// y = x W^T for more than a few rows of x: decoding W, or converting it where it is dense, is the packing step of an
// outer-product matrix multiplication.
//
// x is packed transposed, [tiles of kTile rows][K][kTile]. Rows of W are read a panel [rows][kDepth] at a time into
// L1 or L2 and are the scalars of the micro-kernel (micro.h); its outputs, transposed, gather in [tiles][rows][kTile]
// over K and are written with the bias at the end. Neither W nor a transpose of it is ever stored whole. Threads split
// N. An adapter is more K: columns of B behind those of W, and x A^T, packed like x, behind x.
#pragma once

#include "cpu/linear_rows.h"

namespace peftrt::cpu::PEFTRT_ISA {

constexpr int kTile = 2 * kLanes;              // rows of x a tile: two vectors
constexpr int64_t kDepth = 4096 / kTile;       // k of a panel: a tile of x is then 16 KB, half an L1
constexpr int64_t kDepthStride = kDepth + 16;  // and its rows do not fall on the same cache sets
constexpr int64_t kMaxRowsOfX = 512;           // rows of x packed at a time: a panel's outputs stay in L2

// A tile is kTile rows of x, or half as many when no more are left. Tiles lie one after the other in the packed x.
struct Tile {
  int64_t first;
  int lanes;
};
inline Tile tile_at(int64_t tile, int64_t m) { return {tile * kTile, m - tile * kTile <= kLanes ? kLanes : kTile}; }

template <class T>
void pack_x(int64_t width, int64_t m, const T* x, float* packed, const Parallel& parallel) {
  constexpr int64_t kSlice = 512;
  const int64_t slices = ceil_div(width, kSlice);
  for_ranges(parallel, ceil_div(m, kTile) * slices, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Tile tile = tile_at(task / slices, m);
      const int64_t k = task % slices * kSlice;
      pack_transposed(x + tile.first * width + k, width, m - tile.first, min64(kSlice, width - k), tile.lanes,
                      packed + tile.first * width + k * tile.lanes);
    }
  });
}

// ct[i][lanes] of one tile for `rows` rows of W from n0, finished: times the row scale, plus bias, transposed, rounded;
// where rows are finished each in its own way, after they are transposed.
template <class T>
void write_tile(const Tile& tile, int64_t m, const float* ct, int64_t rows, int64_t n0, const float* row_scale,
                const T* bias, const Finish& finish, T* out) {
  const auto at = [&](const float* sums, int64_t column) {
    if (finish.rows != nullptr) return loadu(sums);
    const F scaled = row_scale == nullptr ? loadu(sums) : mul(loadu(sums), set1(load_one(row_scale + column)));
    return add(scaled, set1(bias_at(bias, column)));
  };
  for (int first = 0; first < tile.lanes; first += kLanes) {
    const int64_t present = min64(kLanes, m - tile.first - first);
    for (int64_t i = 0; i < rows; i += kLanes) {
      const int64_t width = min64(kLanes, rows - i);
      F r[kLanes];
      for (int j = 0; j < kLanes; ++j) r[j] = j < width ? at(ct + (i + j) * tile.lanes + first, n0 + i + j) : zero();
      transpose(r);
      alignas(sizeof(F)) float of_call[kLanes] = {};
      if (finish.rows != nullptr && bias != nullptr) to_floats(bias + n0 + i, width, of_call);
      for (int64_t j = 0; j < present; ++j) {
        const int64_t row = tile.first + first + j;
        if (finish.rows != nullptr) r[j] = finished(r[j], finish.rows[row], loadu(of_call), n0 + i, width);
        T* to = out + row * finish.stride + n0 + i;
        if (width == kLanes) {
          store(to, r[j]);
        } else {
          alignas(sizeof(F)) float line[kLanes];
          storeu(line, r[j]);
          from_floats(line, width, to);
        }
      }
    }
  }
}

// ct (+)= decoded rows of W times one tile of x, over one depth of K.
inline void multiply_tile(const Tile& tile, int64_t rows, int64_t depth, const float* weights, const float* x,
                          float* ct, bool add_to_ct) {
  const int step = tile.lanes == kLanes ? kMicroRows1 : kMicroRows2;
  for (int64_t i = 0; i < rows; i += step) {
    const float* s = weights + i * kDepthStride;
    float* c = ct + i * tile.lanes;
    if (tile.lanes == kLanes)
      micro_rows<kMicroRows1, 1>(min64(kMicroRows1, rows - i), depth, s, kDepthStride, x, c, kLanes, add_to_ct);
    else
      micro_rows<kMicroRows2, 2>(min64(kMicroRows2, rows - i), depth, s, kDepthStride, x, c, kTile, add_to_ct);
  }
}

// The adapter's x A^T for m rows from m0 on: as it is in adapter.xa, and scaled in [tiles][width][kTile]. A task is a
// few rows of A and one tile of x.
inline void multiply_a_tiles(const LowRank& adapter, int64_t k, int64_t m0, int64_t m, const float* packed,
                             float* packed_xa, const Parallel& parallel) {
  constexpr int64_t kRowsOfA = 12;
  const int64_t width = adapter.width(), blocks = ceil_div(width, kRowsOfA);
  for_ranges(parallel, ceil_div(m, kTile) * blocks, [&](int64_t begin, int64_t end) {
    Scratch<float> rows_of_a(kRowsOfA * kDepthStride);
    for (int64_t task = begin; task < end; ++task) {
      const Tile tile = tile_at(task / blocks, m);
      const int64_t r0 = task % blocks * kRowsOfA, rows = min64(kRowsOfA, width - r0);
      float* ct = packed_xa + tile.first * width + r0 * tile.lanes;
      for (int64_t first = 0; first < k; first += kDepth) {
        const int64_t depth = min64(kDepth, k - first);
        for (int64_t i = 0; i < rows; ++i)
          read_floats(adapter.a_dtype, adapter.a, (r0 + i) * k + first, depth, rows_of_a.get() + i * kDepthStride);
        multiply_tile(tile, rows, depth, rows_of_a.get(), packed + tile.first * k + first * tile.lanes, ct, first > 0);
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t lane = 0; lane < tile.lanes; ++lane) {
          float* value = ct + i * tile.lanes + lane;
          if (tile.first + lane < m) store_one(adapter.xa + (m0 + tile.first + lane) * width + r0 + i, *value);
          *value *= adapter.scaling;
        }
    }
  });
}

// Asks for the codes that the panel after this one will decode: of the same row, or of a row of the next chunk. Rows
// are read a piece at a time, which no prefetcher follows; cold, it saves a tenth at M = 16.
inline void fetch_next_panel(const Weight& w, int64_t row, int64_t k, int64_t next_row) {
  const bool last = k + kDepth >= w.k;
  if (last && next_row >= w.n) return;
  const uint8_t* codes = w.codes + (last ? next_row * w.k : row * w.k + k + kDepth) / 2;
  __builtin_prefetch(codes);
  __builtin_prefetch(codes + 64);
}

// Rows of W for panels, in floats: begin(n0, rows) of a chunk, then read(n, k, depth) of each, in any order; `next` is
// the row that follows on row n once the chunk is over.
template <class T>
class Nf4Rows {
 public:
  Nf4Rows(const Base& base, int64_t chunk) : w_(*base.nf4), decoder_(w_), units_(chunk * w_.k / 32 + 4) {}

  void begin(int64_t n0, int64_t rows) {
    const Units range = units_of(w_, n0 * w_.k, rows * w_.k);
    decoder_.decode(range.first, range.count, units_.get());
    first_unit_ = range.first;
  }
  void read(int64_t n, int64_t k, int64_t depth, int64_t next, float* to) const {
    const int64_t start = n * w_.k + k;
    fetch_next_panel(w_, n, k, next);
    decode_span<T>(w_, start, depth, units_.get() + (start / kGroup * 2 - first_unit_), to);
  }

 private:
  const Weight& w_;
  Scales decoder_;
  Scratch<float> units_;
  int64_t first_unit_ = 0;
};

template <class T>
class DenseRows {
 public:
  DenseRows(const Base& base, int64_t) : base_(base), dense_(static_cast<const T*>(base.dense)) {}

  void begin(int64_t, int64_t) const {}
  void read(int64_t n, int64_t k, int64_t depth, int64_t next, float* to) const {
    const bool last = k + kDepth >= base_.k;
    if (!last || next < base_.n) {
      const T* ahead = dense_ + (last ? next * base_.stride : n * base_.stride + k + kDepth);
      const int64_t count = min64(kDepth, last ? base_.k : base_.k - k - kDepth);
      for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(ahead + i);
    }
    to_floats(dense_ + n * base_.stride + k, depth, to);
  }

 private:
  const Base& base_;
  const T* dense_;
};

template <class T, class Rows>
void linear_panels(const Base& w, int64_t m, const float* packed, const T* bias, const LowRank* adapter,
                   const float* packed_xa, const Finish& finish, T* out, const Parallel& parallel) {
  const int64_t tiles = ceil_div(m, kTile);
  const int64_t chunk = m <= 32 ? 24 : 96;  // rows of W a panel, a multiple of 12: in L1 for few tiles, else in L2
  for_ranges(parallel, ceil_div(w.n, chunk), [&](int64_t begin, int64_t end) {
    Rows source(w, chunk);
    Scratch<float> weights(chunk * kDepthStride), ct(chunk * tiles * kTile);
    // a panel of weights, for the chunk's rows from `row` on, times every tile of x, or of x A^T,
    // [tiles][width][kTile], from k on
    const auto multiply_tiles = [&](int64_t width, int64_t k, int64_t depth, int64_t row, int64_t rows,
                                    const float* from, bool add_to_ct) {
      for (int64_t t = 0; t < tiles; ++t) {
        const Tile tile = tile_at(t, m);
        multiply_tile(tile, rows, depth, weights.get(), from + tile.first * width + k * tile.lanes,
                      ct.get() + t * kTile * chunk + row * tile.lanes, add_to_ct);
      }
    };
    const auto add_part = [&](int part, int64_t n0, int64_t row, int64_t rows) {
      const int64_t rank = adapter->rank;
      for (int64_t r = 0; r < rank; r += kDepth) {
        const int64_t depth = min64(kDepth, rank - r);
        for (int64_t i = 0; i < rows; ++i)
          read_floats(adapter->b_dtype, adapter->b, (n0 + row + i) * rank + r, depth, weights.get() + i * kDepthStride);
        multiply_tiles(adapter->width(), part * rank + r, depth, row, rows, packed_xa, true);
      }
    };
    for (int64_t n0 = begin * chunk; n0 < min64(end * chunk, w.n); n0 += chunk) {
      const int64_t rows = min64(chunk, w.n - n0);
      source.begin(n0, rows);
      for (int64_t k = 0; k < w.k; k += kDepth) {
        const int64_t depth = min64(kDepth, w.k - k);
        for (int64_t i = 0; i < rows; ++i)
          source.read(n0 + i, k, depth, n0 + i + chunk, weights.get() + i * kDepthStride);
        multiply_tiles(w.k, k, depth, 0, rows, packed, k > 0);
      }
      for (int64_t row = 0; adapter != nullptr && row < rows;) {
        const int part = adapter->parts.of(n0 + row);
        const int64_t end = min64(rows, adapter->parts.end[part] - n0);
        add_part(part, n0, row, end - row);
        row = end;
      }
      for (int64_t t = 0; t < tiles; ++t)
        write_tile(tile_at(t, m), m, ct.get() + t * kTile * chunk, rows, n0, row_scale_of(adapter), bias, finish, out);
    }
  });
}

}  // namespace peftrt::cpu::PEFTRT_ISA
