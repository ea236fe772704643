// out[m, k] = sum_n dy[m, n] * W[n, k], W decoded to dy's dtype, products summed in fp32.
//
// From the same bytes as the forward, without a transposed copy: W is row-major in n, so its k run along the lanes.
// More than a few rows of dy: threads split K. dy is packed once, [N / depth][M][depth]; then, for so many columns at a
// time, `depth` rows of W are decoded into panels [depth][kPanel] (128 KB in all, in L2) and every tile of kRows rows
// of dy is multiplied with every panel. An output's sum has the same order whatever the thread count; it differs
// between the ranges of M.
#include "cpu/decode.h"
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kPanel = 2 * kLanes;  // columns a panel, the lanes of the micro-kernel
constexpr int64_t kRows = kMicroRows2;  // rows of dy a tile
constexpr int64_t kMaxColumns = 256;    // of a block
constexpr int64_t kMaxRowsOfDy = 516;   // rows of dy at a time: a multiple of kRows, their sums stay in L2
constexpr int64_t kBlock = 256 * 128;   // weights decoded at a time: 128 KB of floats
constexpr int64_t kMaxDepth = 256;      // rows of W a panel, which is then half an L1
constexpr int64_t kMaxChunks = 16;      // of N, where its parts are summed on their own
constexpr int64_t kChain = 256;         // rows of W in one chain of additions, where sums are kept in registers
constexpr int64_t kTogether = 2;        // rows of W that are added to a group before it is stored

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
inline Block block_for(int64_t m, int64_t piece) {
  const int64_t columns = min64(piece, m <= 32 ? kMaxColumns : 128);
  return {min64(kBlock / columns, kMaxDepth), columns};
}

// dy[rows, N] -> packed[slice][row][depth] as floats; a tile is kRows neighbouring rows.
template <class T>
void pack_dy(int64_t n, int64_t rows, int64_t depth, const T* dy, float* packed, const Parallel& parallel) {
  for_ranges(parallel, ceil_div(n, depth) * rows, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / rows, row = task % rows, n0 = slice * depth;
      to_floats(dy + row * n + n0, min64(depth, n - n0), packed + task * depth);
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

// Columns [k0, k1) of dx. Rows of W are outermost, so that each page of W is visited once: to look one up that is in no
// cache takes longer than to decode it, and W by columns had the few rows of dy wait three times as long as they
// worked.
template <class T>
void dx_columns(const Weight& w, int64_t m, const Block& block, const float* packed, int64_t k0, int64_t k1,
                Scales& decoder, float* panels, float* acc, T* out) {
  const int64_t ld = ceil_div(k1 - k0, kPanel) * kPanel, stride = block.stride(),
                share = ceil_div(block.depth, ceil_div(m, kRows));
  for (int64_t n0 = 0; n0 < w.n; n0 += block.depth) {
    const int64_t depth = min64(block.depth, w.n - n0);
    const float* dy = packed + n0 * m;
    for (int64_t k = k0; k < k1; k += block.columns) {
      const int64_t width = min64(block.columns, k1 - k);
      decode_panels<T>(w, n0, depth, k, width, decoder, stride, panels);
      // Every tile of dy passes over all panels, which so stay in L2: to decode into lines that have left it costs
      // three times the decoding. Meanwhile what is decoded next comes near.
      const bool last = k + block.columns >= k1;
      const int64_t next = last ? n0 + block.depth : n0, next_k = last ? k0 : k + block.columns;
      for (int64_t row = 0; row < m; row += kRows) {
        const int64_t from = row / kRows * share;
        fetch_rows(w, next + from, next + min64(from + share, block.depth), next_k, block.columns);
        for (int64_t column = 0; column < width; column += kPanel)
          micro_rows<kRows, 2>(min64(kRows, m - row), depth, dy + row * block.depth, block.depth,
                               panels + column / kPanel * stride, acc + row * ld + (k - k0) + column, ld, n0 > 0);
      }
    }
  }
  for (int64_t row = 0; row < m; ++row) from_floats(acc + row * ld, k1 - k0, out + row * w.k + k0);
}

// sums[g][m][64] += R rows of W, a whole row of W apart, times their factors[r][m]; units[r]: a scale a 32 weights.
// The sums of a group stay in registers while its R rows are added: for M > 1, one half of the group after the other.
template <class T, int M, int R, bool Halves>
void add_rows(const uint8_t* codes, int64_t row_bytes, const float* units, int64_t row_units, const float* factors,
              int64_t groups, int64_t ahead, float* sums) {
  constexpr int kParts = M == 1 ? 1 : 2, kWidth = int(kGroup) / kLanes / kParts;
  for (int64_t g = 0; g < groups; ++g, codes += kGroup / 2, units += 2, sums += M * kGroup) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      F acc[M][kWidth];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) acc[m][j] = loadu(sums + m * kGroup + kLanes * (part * kWidth + j));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (part == 0) __builtin_prefetch(codes + r * row_bytes + ahead);
        const float* unit = units + r * row_units;
        const F scale = Halves ? set_halves(unit[0], unit[1]) : set1(unit[0]);
        F scaled[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const F factor = set1(factors[r * M + m]);
          scaled[m] = kIsFloat<T> ? mul(factor, scale) : factor;
        }
        lookup64(codes + r * row_bytes, [&](int j, F code) {
          if (j / kWidth != part) return;
          const F weight = kIsFloat<T> ? code : round_to<T>(mul(code, scale));
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) acc[m][j % kWidth] = fma(weight, scaled[m], acc[m][j % kWidth]);
        });
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) storeu(sums + m * kGroup + kLanes * (part * kWidth + j), acc[m][j]);
    }
  }
}

// partial[g][m][64], in the order that lookup64 yields codes in: the rows [n0, n1) of W times their factors. A slice of
// it is summed at a time, in L1; a chain of additions is no longer than kChain, for accuracy.
template <class T, int M>
void add_chunk(const Weight& w, int64_t n0, int64_t n1, const T* dy, Scales& decoder, float* partial) {
  constexpr int64_t kSlice = 4096 / M / kGroup;  // groups: 16 KB of sums
  const int64_t groups = w.k / kGroup, row_bytes = w.k / 2;
  const auto add_one = w.block_size == 32 ? add_rows<T, M, 1, true> : add_rows<T, M, 1, false>;
  const auto add_some = w.block_size == 32 ? add_rows<T, M, kTogether, true> : add_rows<T, M, kTogether, false>;
  alignas(sizeof(F)) float sums[kSlice * kGroup * M];
  float units[kTogether][kSlice * 2], factors[kTogether * M];
  for (int64_t first = 0; first < groups; first += kSlice) {
    const int64_t count = min64(kSlice, groups - first), lanes = count * kGroup * M;
    float* total = partial + first * kGroup * M;
    std::memset(total, 0, size_t(lanes) * sizeof(float));
    for (int64_t start = n0; start < n1; start += kChain) {
      std::memset(sums, 0, size_t(lanes) * sizeof(float));
      const int64_t stop = min64(start + kChain, n1);
      for (int64_t n = start; n < stop;) {
        const int64_t rows = n + kTogether <= stop ? kTogether : 1;
        for (int64_t r = 0; r < rows; ++r) {
          decoder.decode(((n + r) * groups + first) * 2, count * 2, units[r]);
          for (int m = 0; m < M; ++m) factors[r * M + m] = load_one(dy + m * w.n + n + r);
        }
        const int64_t ahead = n + 2 * rows <= w.n ? rows * row_bytes : 0;
        const uint8_t* codes = w.codes + (n * groups + first) * (kGroup / 2);
        (rows == 1 ? add_one : add_some)(codes, row_bytes, units[0], kSlice * 2, factors, count, ahead, sums);
        n += rows;
      }
      for (int64_t i = 0; i < lanes; i += kLanes) storeu(total + i, add(loadu(total + i), loadu(sums + i)));
    }
  }
}

// A few rows of dy, whole groups. acc[m] += code * (dy[m, n] * scale); in bf16 and fp16 the weight is scaled and
// rounded first. Threads split N, so that each reads W as it lies: pieces of rows cost a third more. The chunks that
// they take depend on N alone, and are added in their order.
template <class T, int M>
void dx_few(const Weight& w, const T* dy, T* out, const Parallel& parallel) {
  const int64_t groups = w.k / kGroup, width = M * w.k;
  const int64_t rows = ceil_div(ceil_div(w.n, kMaxChunks), kChain) * kChain, chunks = ceil_div(w.n, rows);
  Scratch<float> partial(chunks * width);
  for_ranges(parallel, chunks, [&](int64_t begin, int64_t end) {
    Scales decoder(w);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      add_chunk<T, M>(w, chunk * rows, min64(chunk * rows + rows, w.n), dy, decoder, partial.get() + chunk * width);
  });
  for_ranges(parallel, groups, [&](int64_t begin, int64_t end) {
    alignas(sizeof(F)) float sums[kGroup], natural[kGroup];
    for (int64_t at = begin * M; at < end * M; ++at) {
      std::memcpy(sums, partial.get() + at * kGroup, sizeof sums);
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < kGroup; i += kLanes)
          storeu(sums + i, add(loadu(sums + i), loadu(partial.get() + chunk * width + at * kGroup + i)));
      from_lookup_order(sums, natural);
      from_floats(natural, kGroup, out + at % M * w.k + at / M * kGroup);
    }
  });
}

// At M = 4 both ways take 6.2 ms on one core, at M = 6 the sums of rows leave the registers: 14.8 ms against 6.2 by
// panels (N = K = 4096, fp32, W in no cache, Zen 3, November 2026).
constexpr int kFewRows = 3;

template <class T, int M>
void linear_dx_few(const Weight& w, int64_t m, const T* dy, T* out, const Parallel& parallel) {
  if constexpr (M > 1) {
    if (m < M) return linear_dx_few<T, M - 1>(w, m, dy, out, parallel);
  }
  dx_few<T, M>(w, dy, out, parallel);
}

template <class T>
void linear_dx(const Weight& w, int64_t m, const T* dy, T* out, const Parallel& parallel) {
  if (m == 0 || w.k == 0) return;
  if (w.n == 0) {
    std::memset(static_cast<void*>(out), 0, size_t(m * w.k) * sizeof(T));
    return;
  }
  if (m <= kFewRows && w.k % kGroup == 0) return linear_dx_few<T, kFewRows>(w, m, dy, out, parallel);
  // At least two pieces of K a thread, whole groups.
  const int64_t piece = max64(w.k / (2 * parallel.threads) / kGroup, 1) * kGroup;
  const Block block = block_for(m, piece);
  const int64_t most = ceil_div(ceil_div(m, ceil_div(m, kMaxRowsOfDy)), kRows) * kRows;
  Scratch<float> packed(min64(m, most) * ceil_div(w.n, block.depth) * block.depth);
  for (int64_t first = 0; first < m; first += most) {
    const int64_t rows = min64(most, m - first);
    pack_dy(w.n, rows, block.depth, dy + first * w.n, packed.get(), parallel);
    for_ranges(parallel, ceil_div(w.k, piece), [&](int64_t begin, int64_t end) {
      Scales decoder(w);
      Scratch<float> panels(block.stride() * (block.columns / kPanel)), acc(rows * piece);
      for (int64_t k = begin * piece; k < min64(end * piece, w.k); k += piece)
        dx_columns(w, rows, block, packed.get(), k, min64(k + piece, w.k), decoder, panels.get(), acc.get(),
                   out + first * w.k);
    });
  }
}

}  // namespace

void nf4_linear_dx(const Weight& w, Dtype dtype, int64_t m, const void* dy, void* out, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return linear_dx(w, m, static_cast<const float*>(dy), static_cast<float*>(out), parallel);
    case Dtype::kBFloat16:
      return linear_dx(w, m, static_cast<const bf16*>(dy), static_cast<bf16*>(out), parallel);
    case Dtype::kFloat16:
      return linear_dx(w, m, static_cast<const fp16*>(dy), static_cast<fp16*>(out), parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
