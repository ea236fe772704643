// What flows back into an adapter: g = scaling * dy B, dA = g^T drop(x), dB = scaling * dy^T xa, all summed in fp32,
// where dy is times the row scale, and dy B times the slope, if there is one.
//
// Each is a matrix multiplication with a side of no more than `rank`, bound by reading dy and x: both are packed as
// they are read, into panels [depth][kPanel] that stay in L1 while every row of the narrow side passes over them. First
// g, threads splitting M and the rank; then dA and dB together, threads splitting K and N. No order of summation
// depends on the threads.
#include "cpu/dropout.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kPanel = 2 * kLanes;         // the lanes of the micro-kernel
constexpr int64_t kRows = kMicroRows2;         // its rows of scalars
constexpr int64_t kDepth = 256;                // rows of a panel: 16 KB of 16 lanes, half an L1
constexpr int64_t kMostRowsOfDy = 16 * kRows;  // of a task: so many share a copy of B's panels
constexpr int64_t kRanks = 8 * kPanel;         // columns of g, of a task: so many share dy's floats
constexpr int64_t kWide = 64;                  // columns of x or dy a task: of a page, what is read of it at once

// The part of g that a task computes: rows [row, row + rows), columns [first, first + ranks) of those of `part`.
struct TileOfG {
  int part;
  int64_t row, rows, first, ranks;
};

// How g is cut into tiles: every thread shall have some, and B, which each row of tiles copies, be read as seldom as
// that allows.
class TilesOfG {
 public:
  TilesOfG(int64_t m, const LowRankGradient& adapter, int threads)
      : m_(m), rank_(adapter.rank), parts_(adapter.parts.count) {
    const int64_t wanted = 2 * threads;
    rows_ = min64(kMostRowsOfDy, ceil_div(ceil_div(m * parts_, wanted), kRows) * kRows);
    blocks_ = ceil_div(m, max64(rows_, kRows));
    const int64_t panels = ceil_div(rank_, kPanel), split = ceil_div(wanted, max64(1, blocks_ * parts_));
    ranks_ = min64(kRanks, ceil_div(panels, min64(panels, split)) * kPanel);
    groups_ = ceil_div(rank_, ranks_);
  }

  int64_t count() const { return blocks_ * parts_ * groups_; }
  int64_t rows() const { return rows_; }
  int64_t ranks() const { return ranks_; }
  TileOfG at(int64_t task) const {
    const int64_t first = task % groups_ * ranks_, piece = task / groups_, row = piece / parts_ * rows_;
    return {int(piece % parts_), row, min64(rows_, m_ - row), first, min64(ranks_, rank_ - first)};
  }

 private:
  int64_t m_, rank_, parts_, rows_, blocks_, ranks_, groups_;
};

// Rows [p, p + depth) of B, columns [first, first + ranks), in panels [kDepth][kPanel]: as they lie where they are one.
inline const float* panels_of_b(const LowRankGradient& adapter, int64_t p, int64_t depth, int64_t first, int64_t ranks,
                                float* panels) {
  const int64_t rank = adapter.rank;
  if (rank == kPanel && adapter.b_dtype == Dtype::kFloat32) return static_cast<const float*>(adapter.b) + p * rank;
  for (int64_t i = 0; i < depth; ++i)
    for (int64_t r = 0; r < ranks; r += kPanel) {
      const int64_t lanes = min64(kPanel, ranks - r);
      float* to = panels + r * kDepth + i * kPanel;
      read_floats(adapter.b_dtype, adapter.b, (p + i) * rank + first + r, lanes, to);
      if (lanes < kPanel) std::memset(to + lanes, 0, size_t(kPanel - lanes) * sizeof(float));
    }
  return panels;
}

// A tile of g, and of g^T and xa^T, whose rows are `ld` apart.
template <class T>
void tile_of_g(const TileOfG& tile, int64_t n, const T* dy, const float* xa, const LowRankGradient& adapter,
               float* scalars, float* panels, float* sums, float* g_transposed, float* xa_transposed, int64_t ld) {
  const int64_t begin = adapter.parts.begin(tile.part), end = adapter.parts.end[tile.part];
  const int64_t width = ceil_div(tile.ranks, kPanel) * kPanel;
  std::memset(sums, 0, size_t(tile.rows * width) * sizeof(float));
  for (int64_t p = begin; p < end; p += kDepth) {
    const int64_t depth = min64(kDepth, end - p);
    for (int64_t i = 0; i < tile.rows; ++i) {
      to_floats(dy + (tile.row + i) * n + p, depth, scalars + i * kDepth);
      if (adapter.row_scale != nullptr) scale_floats(adapter.row_scale + p, depth, scalars + i * kDepth);
    }
    const float* b = panels_of_b(adapter, p, depth, tile.first, tile.ranks, panels);
    for (int64_t r = 0; r < width; r += kPanel)
      for (int64_t i = 0; i < tile.rows; i += kRows)
        micro_rows<kRows, 2>(min64(kRows, tile.rows - i), depth, scalars + i * kDepth, kDepth, b + r * kDepth,
                             sums + i * width + r, width, true);
  }
  for (int64_t i = 0; i < tile.rows; ++i)
    for (int64_t r = 0; r < tile.ranks; ++r) {
      const int64_t row = tile.row + i, column = tile.part * adapter.rank + tile.first + r;
      const int64_t at = row * adapter.width() + column;
      const float slope = adapter.slope == nullptr ? 1.0f : load_one(adapter.slope + at);
      const float value = adapter.scaling * sums[i * width + r] * slope;
      store_one(adapter.g + at, value);
      g_transposed[column * ld + row] = value;
      xa_transposed[column * ld + row] = load_one(xa + at);
    }
}

// sums[rank][kWide] = sum_m narrow[r, m] * wide[m, column + j], j < columns, of a matrix [m, width], dropped first
// where asked.
template <class T>
void columns_of(int64_t m, int64_t rank, const float* narrow, int64_t ld, const T* wide, int64_t width, int64_t column,
                int64_t columns, const Dropout* dropout, float* panels, float* sums) {
  alignas(sizeof(F)) float line[kWide] = {};
  for (int64_t row = 0; row < m; row += kDepth) {
    const int64_t depth = min64(kDepth, m - row);
    for (int64_t p = 0; p < depth; ++p) {
      const int64_t start = (row + p) * width + column;
      float* to = panels + p * kPanel;
      if (dropout == nullptr && columns == kWide) {
        for (int64_t j = 0; j < kWide; j += kLanes)
          storeu(to + j / kPanel * kPanel * kDepth + j % kPanel, load(wide + start + j));
        continue;
      }
      to_floats(wide + start, columns, line);
      if (dropout != nullptr) drop(*dropout, start, columns, line);
      for (int64_t j = 0; j < kWide; j += kPanel) std::memcpy(to + j * kDepth, line + j, kPanel * sizeof(float));
    }
    for (int64_t j = 0; j < columns; j += kPanel)
      for (int64_t r = 0; r < rank; r += kRows)
        micro_rows<kRows, 2>(min64(kRows, rank - r), depth, narrow + r * ld + row, ld, panels + j * kDepth,
                             sums + r * kWide + j, kWide, row > 0);
  }
}

// out[columns][rank] = sums^T times a factor a column, of sums [rank, in whole vectors][kWide].
inline void write_transposed(int64_t rank, int64_t columns, const float* sums, const float* factors, float* out) {
  for (int64_t r = 0; r < rank; r += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      F block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) block[i] = mul(loadu(sums + (r + i) * kWide + j), loadu(factors + j));
      transpose(block);
      for (int64_t i = 0; i < min64(kLanes, columns - j); ++i) {
        alignas(sizeof(F)) float line[kLanes];
        storeu(line, block[i]);
        std::memcpy(out + (j + i) * rank + r, line, size_t(min64(kLanes, rank - r)) * sizeof(float));
      }
    }
}

// What a part of dB has of columns [column, column + columns) of dy.
template <class T>
void columns_of_db(int part, int64_t m, int64_t n, int64_t column, int64_t columns, const T* dy,
                   const LowRankGradient& adapter, const float* xa_transposed, int64_t ld, float* panels, float* sums,
                   float* db) {
  const int64_t rank = adapter.rank;
  columns_of(m, rank, xa_transposed + part * rank * ld, ld, dy, n, column, columns, nullptr, panels, sums);
  // dy's row scale is a factor of all that a column sums: it is left out of the sum
  alignas(sizeof(F)) float factors[kWide];
  for (float& factor : factors) factor = adapter.scaling;
  if (adapter.row_scale != nullptr) scale_floats(adapter.row_scale + column, columns, factors);
  write_transposed(rank, columns, sums, factors, db + column * rank);
}

template <class T>
void gradient(int64_t m, int64_t n, int64_t k, const void* dy_bytes, const void* x_bytes, const float* xa,
              const LowRankGradient& adapter, float* da, float* db, const Parallel& parallel) {
  const T *dy = static_cast<const T*>(dy_bytes), *x = static_cast<const T*>(x_bytes);
  const Parts& parts = adapter.parts;
  const int64_t width = adapter.width(), ld = m + 16;  // rows of the transposed do not fall on the same cache sets
  if (width == 0) return;
  Scratch<float> g_transposed(width * ld), xa_transposed(width * ld);
  const TilesOfG tiles(m, adapter, parallel.threads);
  for_ranges(parallel, tiles.count(), [&](int64_t begin, int64_t end) {
    const int64_t rows = tiles.rows(), ranks = tiles.ranks();
    Scratch<float> scalars(rows * kDepth), panels(ranks * kDepth), sums(rows * ranks);
    for (int64_t task = begin; task < end; ++task)
      tile_of_g(tiles.at(task), n, dy, xa, adapter, scalars.get(), panels.get(), sums.get(), g_transposed.get(),
                xa_transposed.get(), ld);
  });
  const int64_t of_x = da == nullptr ? 0 : ceil_div(k, kWide);
  int64_t tasks = of_x;
  for (int part = 0; db != nullptr && part < parts.count; ++part) tasks += ceil_div(parts.size(part), kWide);
  for_ranges(parallel, tasks, [&](int64_t begin, int64_t end) {
    const int64_t size = ceil_div(width, kLanes) * kLanes * kWide;
    Scratch<float> panels(kDepth * kWide), sums(size);
    std::memset(sums.get(), 0, size_t(size) * sizeof(float));  // they stay zero where there are no rows
    for (int64_t task = begin; task < end; ++task) {
      if (task < of_x) {
        const int64_t column = task * kWide, columns = min64(kWide, k - column);
        columns_of(m, width, g_transposed.get(), ld, x, k, column, columns, adapter.dropout, panels.get(), sums.get());
        for (int64_t r = 0; r < width; ++r)
          std::memcpy(da + r * k + column, sums.get() + r * kWide, size_t(columns) * sizeof(float));
        continue;
      }
      int part = 0;
      int64_t piece = task - of_x;
      for (; piece >= ceil_div(parts.size(part), kWide); ++part) piece -= ceil_div(parts.size(part), kWide);
      const int64_t column = parts.begin(part) + piece * kWide, columns = min64(kWide, parts.end[part] - column);
      columns_of_db(part, m, n, column, columns, dy, adapter, xa_transposed.get(), ld, panels.get(), sums.get(), db);
    }
  });
}

}  // namespace

void low_rank_gradient(Dtype dtype, int64_t m, int64_t n, int64_t k, const void* dy, const void* x, const float* xa,
                       const LowRankGradient& adapter, float* da, float* db, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return gradient<float>(m, n, k, dy, x, xa, adapter, da, db, parallel);
    case Dtype::kBFloat16:
      return gradient<bf16>(m, n, k, dy, x, xa, adapter, da, db, parallel);
    case Dtype::kFloat16:
      return gradient<fp16>(m, n, k, dy, x, xa, adapter, da, db, parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
