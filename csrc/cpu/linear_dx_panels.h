// dx[m, k] = sum_n dy[m, n] * W[n, k] for more than a few rows of dy: decoded rows of W are what an outer-product
// matrix multiplication has in its lanes.
//
// Threads split K. dy is packed once, [N / depth][M][depth]; then, for so many columns at a time, `depth` rows of W are
// decoded into panels [depth][kPanel] (128 KB in all, in L2) and every tile of kRows rows of dy is multiplied with
// every panel. An adapter is more rows: those of A behind those of W, and g, like dy, behind dy.
#pragma once

#include "cpu/decode.h"
#include "cpu/dropout.h"
#include "cpu/finish.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

constexpr int64_t kPanel = 2 * kLanes;  // columns a panel, the lanes of the micro-kernel
constexpr int64_t kRows = kMicroRows2;  // rows of dy a tile
constexpr int64_t kMaxColumns = 256;    // of a block
constexpr int64_t kMaxRowsOfDy = 516;   // rows of dy at a time: a multiple of kRows, their sums stay in L2
constexpr int64_t kBlock = 256 * 128;   // weights decoded at a time: 128 KB of floats

// What is decoded before it is multiplied: `depth` rows of W by `columns`.
//
// Few rows of dy: long pieces of few rows of W, since a row or two of W is a page, and to look a page up costs as much
// as to decode a group. Many rows: short pieces, so that the sums [rows][columns] stay in L2 as well. With pages of 4
// KB, N = K = 4096, fp32, one core takes 4.6, 10.0 and 30.7 ms by 256 columns at M = 4, 16 and 64, and 5.1, 11.2
// and 28.7 by 128 (Zen 3, November 2026).
struct Block {
  int64_t depth;
  int64_t columns;
  int64_t stride() const { return kPanel * depth + 16; }  // of panels: they start on different cache sets
};
inline Block block_for(int64_t m, int64_t piece, bool invariant) {
  const int64_t columns = m <= 32 || invariant ? kMaxColumns : 128;
  return {kBlock / columns, min64(piece, columns)};  // the order of a sum goes by the depth: not by the threads
}

// dy[rows, N] -> packed[slice][row][depth] as floats, times the row scale; a tile is kRows neighbouring rows.
template <class T>
void pack_dy(int64_t n, int64_t rows, int64_t depth, const T* dy, const float* row_scale, float* packed,
             const Parallel& parallel) {
  for_ranges(parallel, ceil_div(n, depth) * rows, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / rows, row = task % rows, n0 = slice * depth;
      to_floats(dy + row * n + n0, min64(depth, n - n0), packed + task * depth);
      if (row_scale != nullptr) scale_floats(row_scale + n0, min64(depth, n - n0), packed + task * depth);
    }
  });
}

// Brings codes and scales of the rows of W in [n0, n1), columns [k0, k0 + width), near: pieces a whole row apart, which
// no prefetcher follows.
inline void fetch_rows(const Weight& w, int64_t n0, int64_t n1, int64_t k0, int64_t width) {
  const int shift = __builtin_ctz(unsigned(w.block_size)), bytes = w.nested_absmax == nullptr ? 4 : 1;
  for (int64_t n = n0; n < min64(n1, w.n); ++n) {
    const int64_t start = n * w.k + k0, end = start + min64(width, w.k - k0);
    for (int64_t at = start; at < end; at += 128) touch(w.codes + at / 2);
    touch(w.absmax + (start >> shift) * bytes);
  }
}

// W[n0 .. n0 + depth, k0 .. k0 + width) -> panels[width / kPanel][depth][kPanel]; columns past the width are zero.
template <class T>
void decode_panels(const Weight& w, int64_t n0, int64_t depth, int64_t k0, int64_t width, Scales& decoder,
                   int64_t stride, float* panels) {
  if (w.k % kGroup == 0) {
    const int shift = __builtin_ctz(unsigned(w.block_size));
    for (int64_t p = 0; p < depth; ++p) {
      for (int64_t column = 0; column < width; column += kGroup) {
        const int64_t start = (n0 + p) * w.k + k0 + column;
        const float s0 = decoder.of_block(start >> shift), s1 = shift == 5 ? decoder.of_block((start >> 5) + 1) : s0;
        float* to = panels + column / kPanel * stride + p * kPanel;
        decode64<T>(w.codes + start / 2, s0, s1, [&](int j, F v) { storeu(to + j / 2 * stride + j % 2 * kLanes, v); });
      }
    }
    return;
  }
  alignas(sizeof(F)) float line[kMaxColumns];
  float units[kMaxColumns / 32 + 4];
  for (int64_t i = width; i < kMaxColumns; ++i) line[i] = 0.0f;
  for (int64_t p = 0; p < depth; ++p) {
    const int64_t start = (n0 + p) * w.k + k0;
    const Units range = units_of(w, start, width);
    decoder.decode(range.first, range.count, units);
    decode_span<T>(w, start, width, units, line);
    for (int64_t column = 0; column < width; column += kPanel) {
      float* to = panels + column / kPanel * stride + p * kPanel;
      storeu(to, loadu(line + column));
      storeu(to + kLanes, loadu(line + column + kLanes));
    }
  }
}

// Rows of W for panels, in floats: decode() rows [n0, n0 + depth) of columns [k0, k0 + width), zeros behind them, and
// fetch() brings rows [n0, n1) near.
template <class T>
class Nf4Columns {
 public:
  explicit Nf4Columns(const Base& base) : w_(*base.nf4), decoder_(w_) {}
  void decode(int64_t n0, int64_t depth, int64_t k0, int64_t width, int64_t stride, float* panels) {
    decode_panels<T>(w_, n0, depth, k0, width, decoder_, stride, panels);
  }
  void fetch(int64_t n0, int64_t n1, int64_t k0, int64_t width) const { fetch_rows(w_, n0, n1, k0, width); }

 private:
  const Weight& w_;
  Scales decoder_;
};

template <class T>
class DenseColumns {
 public:
  explicit DenseColumns(const Base& base) : base_(base), dense_(static_cast<const T*>(base.dense)) {}
  void decode(int64_t n0, int64_t depth, int64_t k0, int64_t width, int64_t stride, float* panels) const {
    alignas(sizeof(F)) float line[kPanel];
    for (int64_t p = 0; p < depth; ++p) {
      const T* row = dense_ + (n0 + p) * base_.stride + k0;
      for (int64_t column = 0; column < width; column += kPanel) {
        float* to = panels + column / kPanel * stride + p * kPanel;
        if (column + kPanel <= width) {
          storeu(to, load(row + column)), storeu(to + kLanes, load(row + column + kLanes));
          continue;
        }
        std::memset(line, 0, sizeof line);
        to_floats(row + column, width - column, line);
        std::memcpy(to, line, sizeof line);
      }
    }
  }
  void fetch(int64_t n0, int64_t n1, int64_t k0, int64_t width) const {
    for (int64_t n = n0; n < min64(n1, base_.n); ++n) {
      const T* row = dense_ + n * base_.stride;
      for (int64_t k = k0; k < min64(k0 + width, base_.k); k += 64 / int64_t(sizeof(T)))
        touch(reinterpret_cast<const uint8_t*>(row + k));
    }
  }

 private:
  const Base& base_;
  const T* dense_;
};

// panels[width / kPanel][depth][kPanel] times every tile of dy, whose rows are `ld_dy` apart. The panels so stay in L2:
// to decode into lines that have left it costs three times the decoding.
template <class Before>
void multiply_panels(int64_t m, int64_t depth, const float* dy, int64_t ld_dy, const float* panels, int64_t stride,
                     int64_t width, float* acc, int64_t ld, bool add_to_acc, const Before& before) {
  for (int64_t row = 0; row < m; row += kRows) {
    before(row / kRows);
    for (int64_t column = 0; column < width; column += kPanel)
      micro_rows<kRows, 2>(min64(kRows, m - row), depth, dy + row * ld_dy, ld_dy, panels + column / kPanel * stride,
                           acc + row * ld + column, ld, add_to_acc);
  }
}

// acc[m][ld] += the adapter's share of columns [k0, k1); `first`: which row of the whole acc begins with.
inline void add_adapter_to_columns(const LowRankGradient& adapter, int64_t first, int64_t m, int64_t columns,
                                   const Block& block, int64_t k0, int64_t k1, const float* g, float* panels,
                                   float* acc, int64_t ld) {
  const bool drops = adapter.dropout != nullptr;
  Scratch<float> apart(drops ? m * ld : 0);
  float* sums = drops ? apart.get() : acc;
  for (int64_t k = k0; k < k1; k += block.columns) {
    const int64_t width = min64(block.columns, k1 - k);
    for (int64_t r = 0; r < adapter.width(); r += block.depth) {
      const int64_t depth = min64(block.depth, adapter.width() - r);
      alignas(sizeof(F)) float line[kMaxColumns] = {};
      for (int64_t p = 0; p < depth; ++p) {
        read_floats(adapter.a_dtype, adapter.a, (r + p) * columns + k, width, line);
        for (int64_t column = 0; column < width; column += kPanel)
          std::memcpy(panels + column / kPanel * block.stride() + p * kPanel, line + column, kPanel * sizeof(float));
      }
      multiply_panels(m, depth, g + r, adapter.width(), panels, block.stride(), width, sums + (k - k0), ld,
                      !drops || r > 0, [](int64_t) {});
    }
  }
  for (int64_t row = 0; drops && row < m; ++row) {
    float *from = sums + row * ld, *to = acc + row * ld;
    drop(*adapter.dropout, (first + row) * columns + k0, k1 - k0, from);
    for (int64_t i = 0; i < k1 - k0; ++i) to[i] += from[i];
  }
}

// Columns [k0, k1) of dx. Rows of W are outermost, so that each page of W is visited once: to look one up that is in no
// cache takes longer than to decode it, and W by columns had the few rows of dy wait three times as long as they
// worked. acc: [m][columns, in whole panels].
template <class Columns>
void dx_columns(const Base& w, int64_t m, const Block& block, const float* packed, int64_t k0, int64_t k1,
                Columns& source, float* panels, float* acc) {
  const int64_t ld = ceil_div(k1 - k0, kPanel) * kPanel, stride = block.stride(),
                share = ceil_div(block.depth, ceil_div(m, kRows));
  for (int64_t n0 = 0; n0 < w.n; n0 += block.depth) {
    const int64_t depth = min64(block.depth, w.n - n0);
    const float* dy = packed + n0 * m;
    for (int64_t k = k0; k < k1; k += block.columns) {
      const int64_t width = min64(block.columns, k1 - k);
      source.decode(n0, depth, k, width, stride, panels);
      // Meanwhile what is decoded next comes near.
      const bool last = k + block.columns >= k1;
      const int64_t next = last ? n0 + block.depth : n0, next_k = last ? k0 : k + block.columns;
      multiply_panels(m, depth, dy, block.depth, panels, stride, width, acc + (k - k0), ld, n0 > 0, [&](int64_t tile) {
        const int64_t from = tile * share;
        source.fetch(next + from, next + min64(from + share, block.depth), next_k, block.columns);
      });
    }
  }
}

template <class T, class Columns>
void dx_panels(const Base& w, int64_t m, const T* dy, const LowRankGradient* adapter, const Finish& finish, T* out,
               const Parallel& parallel) {
  // At least two pieces of K a thread, whole groups.
  const int64_t piece = max64(w.k / (2 * parallel.threads) / kGroup, 1) * kGroup;
  const Block block = block_for(m, piece, finish.invariant);
  const int64_t most = ceil_div(ceil_div(m, ceil_div(m, kMaxRowsOfDy)), kRows) * kRows;
  const int64_t rank = adapter == nullptr ? 0 : adapter->width();
  const float* row_scale = adapter == nullptr ? nullptr : adapter->row_scale;
  Scratch<float> packed(min64(m, most) * ceil_div(w.n, block.depth) * block.depth), g(min64(m, most) * rank);
  for (int64_t first = 0; first < m; first += most) {
    const int64_t rows = min64(most, m - first);
    pack_dy(w.n, rows, block.depth, dy + first * w.n, row_scale, packed.get(), parallel);
    if (rank > 0) std::memcpy(g.get(), adapter->g + first * rank, size_t(rows * rank) * sizeof(float));
    for_ranges(parallel, ceil_div(w.k, piece), [&](int64_t begin, int64_t end) {
      Columns source(w);
      Scratch<float> panels(block.stride() * ceil_div(block.columns, kPanel)), acc(rows * piece);
      for (int64_t k0 = begin * piece; k0 < min64(end * piece, w.k); k0 += piece) {
        const int64_t k1 = min64(k0 + piece, w.k), ld = ceil_div(k1 - k0, kPanel) * kPanel;
        dx_columns(w, rows, block, packed.get(), k0, k1, source, panels.get(), acc.get());
        if (rank > 0)
          add_adapter_to_columns(*adapter, first, rows, w.k, block, k0, k1, g.get(), panels.get(), acc.get(), ld);
        for (int64_t row = 0; row < rows; ++row) {
          add_addend(finish.at(first + row), k0, k1 - k0, acc.get() + row * ld);
          from_floats(acc.get() + row * ld, k1 - k0, out + (first + row) * finish.stride + k0);
        }
      }
    });
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
