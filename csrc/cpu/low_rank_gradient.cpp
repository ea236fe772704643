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

constexpr int64_t kPanel = 2 * kLanes;    // the lanes of the micro-kernel
constexpr int64_t kRows = kMicroRows2;    // its rows of scalars
constexpr int64_t kDepth = 256;           // rows of a panel: 16 KB of 16 lanes, half an L1
constexpr int64_t kRowsOfDy = 4 * kRows;  // rows of dy a task
constexpr int64_t kRanks = 8 * kPanel;    // columns of g a task has at most: dy is made floats of once for all of them
constexpr int64_t kWide = 64;             // columns of x or dy a task: of a page, what is read of it at once

// Rows [p, p + depth) of B, kPanel columns from r on: as they lie where they are a panel, else copied.
inline const float* panel_of_b(const LowRankGradient& adapter, int64_t p, int64_t depth, int64_t r, float* panel) {
  const int64_t rank = adapter.rank, lanes = min64(kPanel, rank - r);
  if (rank == kPanel && adapter.b_dtype == Dtype::kFloat32) return static_cast<const float*>(adapter.b) + p * rank;
  if (lanes < kPanel) std::memset(panel, 0, kDepth * kPanel * sizeof(float));
  for (int64_t i = 0; i < depth; ++i)
    read_floats(adapter.b_dtype, adapter.b, (p + i) * rank + r, lanes, panel + i * kPanel);
  return panel;
}

// What a part has of rows [row, row + kRowsOfDy) and columns [begin, end) of g, and of g^T and xa^T, whose rows are
// `ld` apart.
template <class T>
void tile_of_g(int part, int64_t row, int64_t begin, int64_t end, int64_t m, int64_t n, const T* dy, const float* xa,
               const LowRankGradient& adapter, float* g_transposed, float* xa_transposed, int64_t ld) {
  const int64_t rows = min64(kRowsOfDy, m - row), first = part * adapter.rank;
  alignas(sizeof(F)) float scalars[kRowsOfDy * kDepth], panel[kDepth * kPanel], sums[kRowsOfDy * kRanks];
  std::memset(sums, 0, sizeof sums);
  for (int64_t p = adapter.parts.begin(part); p < adapter.parts.end[part]; p += kDepth) {
    const int64_t depth = min64(kDepth, adapter.parts.end[part] - p);
    for (int64_t i = 0; i < rows; ++i) {
      to_floats(dy + (row + i) * n + p, depth, scalars + i * kDepth);
      if (adapter.row_scale != nullptr) scale_floats(adapter.row_scale + p, depth, scalars + i * kDepth);
    }
    for (int64_t r = begin; r < end; r += kPanel) {
      const float* b = panel_of_b(adapter, p, depth, r, panel);
      for (int64_t i = 0; i < rows; i += kRows)
        micro_rows<kRows, 2>(min64(kRows, rows - i), depth, scalars + i * kDepth, kDepth, b,
                             sums + i * kRanks + r - begin, kRanks, true);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = begin; r < end; ++r) {
      const int64_t column = first + r, at = (row + i) * adapter.width() + column;
      const float slope = adapter.slope == nullptr ? 1.0f : load_one(adapter.slope + at);
      const float value = adapter.scaling * sums[i * kRanks + r - begin] * slope;
      store_one(adapter.g + at, value);
      g_transposed[column * ld + row + i] = value;
      xa_transposed[column * ld + row + i] = load_one(xa + at);
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
  // a part's columns in so many groups that every thread has some
  const int64_t rank = adapter.rank, panels = ceil_div(rank, kPanel);
  const int64_t pieces = ceil_div(m, kRowsOfDy) * parts.count;
  const int64_t split = min64(panels, ceil_div(2 * int64_t(parallel.threads), max64(1, pieces)));
  const int64_t ranks = min64(kRanks, ceil_div(panels, split) * kPanel), groups = ceil_div(rank, ranks);
  for_ranges(parallel, pieces * groups, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t piece = task / groups, r = task % groups * ranks;
      tile_of_g(int(piece % parts.count), piece / parts.count * kRowsOfDy, r, min64(r + ranks, rank), m, n, dy, xa,
                adapter, g_transposed.get(), xa_transposed.get(), ld);
    }
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
