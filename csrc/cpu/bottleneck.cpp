// out = residual + scaling * (act(x down^T + down_bias) up^T + up_bias), all sums in fp32, one rounding at the end.
//
// Two products with little between them: act(...) is [rows, rank], and never leaves the cache. Three paths, by M:
//
//   a few rows  both weights are read once, as they lie, threads splitting first R, then K (lines.h)
//   some rows   x is packed transposed, in tiles of rows; rows of the weights are the scalars of the micro-kernel
//               (linear_panels.h). The first product, transposed as it comes out, is what the second one takes packed;
//               threads share each of the two
//   many rows   the weights are packed transposed, once; rows of x, then of act(...), are the scalars as they lie. Each
//               thread takes groups of rows from x to out by itself
//
// An output's sum has one order in the first path and another in the other two, whatever the threads and the other
// rows: an invariant call takes no part in the first.
#include "cpu/activations.h"
#include "cpu/linear_dense.h"
#include "cpu/linear_panels.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kFewRows = 8;
constexpr int64_t kTilesTogether = 4;             // of x, that share a panel of weights
constexpr int64_t kGroupRows = 11 * kMicroRows2;  // that a thread takes from x to out
constexpr int64_t kPanelsTogether = 4;            // of the second weight: of a page, what is read and written at once
constexpr int64_t kChunk = 24;  // rows of a panel of weights: in L1, as linear_panels.h has it for few tiles

// A call's arguments, and the biases as floats.
template <class T>
struct Call {
  const T *x, *residual;
  const Bottleneck& adapter;
  T* out;
  const float *down_bias, *up_bias;

  int64_t rank() const { return adapter.rank; }
  int64_t k() const { return adapter.k; }
  float finished(float sum, int64_t row, int64_t column) const {
    return load_one(residual + row * k() + column) + adapter.scaling * (sum + up_bias[column]);
  }
};

// [m, rank] of act(x down^T + down_bias), then out, of a few rows.
template <class T>
void few_rows(const Call<T>& call, int64_t m, const Parallel& parallel) {
  const int64_t k = call.k(), rank = call.rank();
  const FloatRows<T> lines(call.x, m, k);
  Scratch<float> activated(m * rank);
  Scratch<const float*> inner_lines(m);
  for (int64_t i = 0; i < m; ++i) inner_lines.get()[i] = activated.get() + i * rank;
  with_type(call.adapter.down.dtype, call.adapter.down.data, [&](const auto* down) {
    for_ranges(parallel, ceil_div(rank, kTogetherRows), [&](int64_t begin, int64_t end) {
      float sums[kFewRows * kTogetherRows];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t r0 = block * kTogetherRows, rows = min64(kTogetherRows, rank - r0);
        dots(lines.get(), m, 0, k, down + r0 * k, k, rows, sums);
        for (int64_t i = 0; i < m; ++i) {
          float* inner = sums + i * kTogetherRows;
          for (int64_t r = 0; r < rows; ++r) inner[r] += call.down_bias[r0 + r];
          std::memcpy(call.adapter.inner + i * rank + r0, inner, size_t(rows) * sizeof(float));
          activate(call.adapter.activation, inner, rows, activated.get() + i * rank + r0);
        }
      }
    });
  });
  with_type(call.adapter.up.dtype, call.adapter.up.data, [&](const auto* up) {
    for_ranges(parallel, ceil_div(k, kTogetherRows), [&](int64_t begin, int64_t end) {
      float sums[kFewRows * kTogetherRows];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t column = block * kTogetherRows, columns = min64(kTogetherRows, k - column);
        dots(inner_lines.get(), m, 0, rank, up + column * rank, rank, columns, sums);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t c = 0; c < columns; ++c)
            store_one(call.out + i * k + column + c, call.finished(sums[i * kTogetherRows + c], i, column + c));
      }
    });
  });
}

// ct[tiles][chunk][lanes] = `rows` rows of a weight from `row` on times tiles [first, last) of a packed matrix [m,
// width].
inline void multiply_rows(const Values& weight, int64_t width, int64_t m, const float* packed, int64_t first,
                          int64_t last, int64_t row, int64_t rows, float* panel, float* ct) {
  if (width == 0) std::memset(ct, 0, size_t((last - first) * kChunk * kTile) * sizeof(float));
  for (int64_t k = 0; k < width; k += kDepth) {
    const int64_t depth = min64(kDepth, width - k);
    for (int64_t i = 0; i < rows; ++i)
      read_floats(weight.dtype, weight.data, (row + i) * width + k, depth, panel + i * kDepthStride);
    for (int64_t t = first; t < last; ++t) {
      const Tile tile = tile_at(t, m);
      multiply_tile(tile, rows, depth, panel, packed + tile.first * width + k * tile.lanes,
                    ct + (t - first) * kChunk * kTile, k > 0);
    }
  }
}

// sink(row of the tile, column, vector, count) of ct [columns][lanes], transposed: kLanes columns of a row at a time.
template <class Sink>
inline void transposed(const Tile& tile, int64_t m, int64_t columns, const float* ct, const Sink& sink) {
  for (int lane = 0; lane < tile.lanes; lane += kLanes)
    for (int64_t i = 0; i < columns; i += kLanes) {
      F block[kLanes];
      for (int64_t j = 0; j < kLanes; ++j)
        block[j] = i + j < columns ? loadu(ct + (i + j) * tile.lanes + lane) : zero();
      transpose(block);
      for (int64_t j = 0; j < min64(kLanes, m - tile.first - lane); ++j)
        sink(lane + j, i, block[j], min64(kLanes, columns - i));
    }
}

// Columns [r0, r0 + count) of x down^T + down_bias for the rows of one tile: into `inner` as they are, and activated,
// packed as ct is, into what the second product takes.
template <class T>
void write_inner(const Call<T>& call, int64_t row, int64_t m, const Tile& tile, int64_t r0, int64_t count, float* ct,
                 float* packed) {
  const int64_t rank = call.rank(), lanes = tile.lanes;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      storeu(ct + i * lanes + lane, add(loadu(ct + i * lanes + lane), set1(call.down_bias[r0 + i])));
  activate(call.adapter.activation, ct, count * lanes, packed + tile.first * rank + r0 * lanes);
  transposed(tile, m, count, ct, [&](int64_t of_tile, int64_t i, F values, int64_t width) {
    alignas(sizeof(F)) float line[kLanes];
    storeu(line, values);
    std::memcpy(call.adapter.inner + (row + tile.first + of_tile) * rank + r0 + i, line, size_t(width) * sizeof(float));
  });
}

// Columns [column, column + count) of out for the rows of one tile.
template <class T>
void write_out(const Call<T>& call, int64_t row, int64_t m, const Tile& tile, int64_t column, int64_t count,
               const float* ct) {
  const F scaling = set1(call.adapter.scaling);
  transposed(tile, m, count, ct, [&](int64_t of_tile, int64_t i, F sums, int64_t width) {
    const int64_t at = (row + tile.first + of_tile) * call.k() + column + i;
    const F outer = add(sums, loadu(call.up_bias + column + i));  // which has room for whole vectors
    if (width == kLanes) return store(call.out + at, fma(scaling, outer, load(call.residual + at)));
    alignas(sizeof(F)) float line[kLanes] = {};
    to_floats(call.residual + at, width, line);
    storeu(line, fma(scaling, outer, loadu(line)));
    from_floats(line, width, call.out + at);
  });
}

// Rows [row, row + m) from x to out; packed_x has room for whole tiles of x, packed_inner for those of [m, rank].
template <class T>
void rows_to_out(const Call<T>& call, int64_t row, int64_t m, float* packed_x, float* packed_inner,
                 const Parallel& parallel) {
  const int64_t tiles = ceil_div(m, kTile), groups = ceil_div(tiles, kTilesTogether);
  pack_x(call.k(), m, call.x + row * call.k(), packed_x, parallel);
  // write(tile, r0, count, ct) for chunks of `width` rows of a weight and every tile of a group
  const auto product = [&](const Values& weight, int64_t width, int64_t depth, const float* packed, const auto& write) {
    const int64_t chunks = ceil_div(width, kChunk);
    for_ranges(parallel, groups * chunks, [&](int64_t begin, int64_t end) {
      Scratch<float> panel(kChunk * kDepthStride), ct(kTilesTogether * kChunk * kTile);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / chunks * kTilesTogether, last = min64(first + kTilesTogether, tiles);
        const int64_t r0 = task % chunks * kChunk, count = min64(kChunk, width - r0);
        multiply_rows(weight, depth, m, packed, first, last, r0, count, panel.get(), ct.get());
        for (int64_t t = first; t < last; ++t) write(tile_at(t, m), r0, count, ct.get() + (t - first) * kChunk * kTile);
      }
    });
  };
  product(call.adapter.down, call.rank(), call.k(), packed_x,
          [&](const Tile& tile, int64_t r0, int64_t count, float* ct) {
            write_inner(call, row, m, tile, r0, count, ct, packed_inner);
          });
  product(call.adapter.up, call.k(), call.rank(), packed_inner,
          [&](const Tile& tile, int64_t column, int64_t count, const float* ct) {
            write_out(call, row, m, tile, column, count, ct);
          });
}

// A weight [rows, depth] as panels [rows / kTile][depth][kTile], zeros behind the last row.
inline void pack_weight(const Values& weight, int64_t rows, int64_t depth, float* packed, const Parallel& parallel) {
  constexpr int64_t kSlice = 512;
  const int64_t slices = ceil_div(depth, kSlice);
  with_type(weight.dtype, weight.data, [&](const auto* values) {
    for_ranges(parallel, ceil_div(rows, kTile) * slices, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / slices * kTile, k = task % slices * kSlice;
        pack_transposed(values + row * depth + k, depth, rows - row, min64(kSlice, depth - k), kTile,
                        packed + row * depth + k * kTile);
      }
    });
  });
}

// sums [m][width] = rows [row, row + m) of x down^T, in whole panels.
template <class T>
void down_of_group(const Call<T>& call, int64_t row, int64_t m, const float* packed, float* floats, int64_t width,
                   float* sums) {
  const int64_t k = call.k();
  if (k == 0) std::memset(sums, 0, size_t(m * width) * sizeof(float));
  for (int64_t first = 0; first < k; first += kDepth) {
    const int64_t depth = min64(kDepth, k - first);
    // floats as they lie, unless that is between addresses of floats
    const bool copies = !kIsFloat<T> || reinterpret_cast<uintptr_t>(call.x) % alignof(float) != 0;
    const float* scalars = copies ? floats : reinterpret_cast<const float*>(call.x + row * k + first);
    const int64_t ld = copies ? kDepthStride : k;
    for (int64_t i = 0; copies && i < m; ++i) to_floats(call.x + (row + i) * k + first, depth, floats + i * ld);
    for (int64_t r = 0; r < width; r += kTile)
      for (int64_t i = 0; i < m; i += kMicroRows2)
        micro_rows<kMicroRows2, 2>(min64(kMicroRows2, m - i), depth, scalars + i * ld, ld,
                                   packed + r * k + first * kTile, sums + i * width + r, width, first > 0);
  }
}

// Columns [column, column + kTile), as far as there are any, of one row of out.
template <class T>
PEFTRT_INLINE void finish_row(const Call<T>& call, int64_t row, int64_t column, const float* sums) {
  const int64_t at = row * call.k() + column, width = min64(kTile, call.k() - column);
  const F scaling = set1(call.adapter.scaling);
  if (width == kTile) {
    for (int64_t j = 0; j < kTile; j += kLanes)
      store(call.out + at + j,
            fma(scaling, add(loadu(sums + j), loadu(call.up_bias + column + j)), load(call.residual + at + j)));
    return;
  }
  alignas(sizeof(F)) float line[kTile] = {};
  to_floats(call.residual + at, width, line);
  for (int64_t j = 0; j < width; j += kLanes)
    storeu(line + j, fma(scaling, add(loadu(sums + j), loadu(call.up_bias + column + j)), loadu(line + j)));
  from_floats(line, width, call.out + at);
}

// Rows [row, row + m) of out from act(inner) [m][width]: a few panels at a time, so that what is read and written of a
// row lies together.
template <class T>
void up_of_group(const Call<T>& call, int64_t row, int64_t m, const float* packed, const float* activated,
                 int64_t width) {
  constexpr int64_t kColumns = kPanelsTogether * kTile;
  const int64_t rank = call.rank();
  alignas(sizeof(F)) float sums[kMicroRows2 * kTile] = {};
  for (int64_t first = 0; first < call.k(); first += kColumns)
    for (int64_t i = 0; i < m; i += kMicroRows2) {
      const int64_t rows = min64(kMicroRows2, m - i);
      for (int64_t column = first; column < min64(first + kColumns, call.k()); column += kTile) {
        for (int64_t r = 0; r < rank; r += kDepth)
          micro_rows<kMicroRows2, 2>(rows, min64(kDepth, rank - r), activated + i * width + r, width,
                                     packed + column * rank + r * kTile, sums, kTile, r > 0);
        for (int64_t j = 0; j < rows; ++j) finish_row(call, row + i + j, column, sums + j * kTile);
      }
    }
}

template <class T>
void many_rows(const Call<T>& call, int64_t m, const Parallel& parallel) {
  const int64_t k = call.k(), rank = call.rank(), width = ceil_div(rank, kTile) * kTile;
  Scratch<float> down(width * k), up(ceil_div(k, kTile) * kTile * rank);
  pack_weight(call.adapter.down, rank, k, down.get(), parallel);
  pack_weight(call.adapter.up, k, rank, up.get(), parallel);
  for_ranges(parallel, ceil_div(m, kGroupRows), [&](int64_t begin, int64_t end) {
    Scratch<float> floats(kGroupRows * kDepthStride), sums(kGroupRows * width);
    for (int64_t row = begin * kGroupRows; row < min64(end * kGroupRows, m); row += kGroupRows) {
      const int64_t rows = min64(kGroupRows, m - row);
      down_of_group(call, row, rows, down.get(), floats.get(), width, sums.get());
      for (int64_t i = 0; i < rows; ++i) {
        float* inner = sums.get() + i * width;
        for (int64_t r = 0; r < rank; ++r) inner[r] += call.down_bias[r];
        std::memcpy(call.adapter.inner + (row + i) * rank, inner, size_t(rank) * sizeof(float));
        activate(call.adapter.activation, inner, rank, inner);
      }
      up_of_group(call, row, rows, up.get(), sums.get(), width);
    }
  });
}

template <class T>
void some_rows(const Call<T>& call, int64_t m, const Parallel& parallel) {
  const int64_t whole = ceil_div(min64(m, kMaxRowsOfX), kTile) * kTile;
  Scratch<float> packed_x(whole * call.k()), packed_inner(whole * call.rank());
  for (int64_t row = 0; row < m; row += kMaxRowsOfX)
    rows_to_out(call, row, min64(kMaxRowsOfX, m - row), packed_x.get(), packed_inner.get(), parallel);
}

template <class T>
void forward(int64_t m, const void* x, const void* residual, const Bottleneck& adapter, bool invariant, void* out,
             const Parallel& parallel) {
  if (m == 0) return;
  const int64_t k = adapter.k;
  Scratch<float> biases(adapter.rank + k + kTile);
  float *down_bias = biases.get(), *up_bias = down_bias + adapter.rank;
  read_floats(adapter.down_bias.dtype, adapter.down_bias.data, 0, adapter.rank, down_bias);
  read_floats(adapter.up_bias.dtype, adapter.up_bias.data, 0, k, up_bias);
  std::memset(up_bias + k, 0, kTile * sizeof(float));
  const Call<T> call = {
      static_cast<const T*>(x), static_cast<const T*>(residual), adapter, static_cast<T*>(out), down_bias, up_bias};
  if (m <= kFewRows && !invariant) return few_rows(call, m, parallel);
  if (m < 2 * kGroupRows * parallel.threads) return some_rows(call, m, parallel);
  many_rows(call, m, parallel);
}

}  // namespace

void bottleneck(Dtype dtype, int64_t m, const void* x, const void* residual, const Bottleneck& adapter, bool invariant,
                void* out, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return forward<float>(m, x, residual, adapter, invariant, out, parallel);
    case Dtype::kBFloat16:
      return forward<bf16>(m, x, residual, adapter, invariant, out, parallel);
    case Dtype::kFloat16:
      return forward<fp16>(m, x, residual, adapter, invariant, out, parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
