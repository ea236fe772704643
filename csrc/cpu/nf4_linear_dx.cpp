// out[m, k] = sum_n dy[m, n] * W[n, k], W decoded to dy's dtype, products summed in fp32.
//
// From the same bytes as the forward, without a transposed copy: W is row-major in n, so its k run along the lanes.
// Threads split K. dy is packed once, [N / 256][tiles of up to 6 rows][256]; then, for each 128 columns, 256 rows of W
// are decoded into eight panels [256][16] (128 KB, in L2) and every tile of dy is multiplied with every panel. An
// output's sum has the same order whatever the thread count and M.
#include "cpu/decode.h"
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kDepth = 256;        // rows of W a panel
constexpr int64_t kColumns = 128;      // columns decoded together: a cache line of codes
constexpr int64_t kPanel = 16;         // columns a panel, the lanes of the micro-kernel
constexpr int64_t kRows = 6;           // rows of dy a tile
constexpr int64_t kMaxRowsOfDy = 504;  // rows of dy at a time: a multiple of 6, its outputs [rows][128] stay in L2

// dy[rows, N] -> packed[slice][row][kDepth] as floats; a tile is six neighbouring rows.
template <class T>
void pack_dy(int64_t n, int64_t rows, const T* dy, float* packed, const Parallel& parallel) {
  for_ranges(parallel, ceil_div(n, kDepth) * rows, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / rows, row = task % rows, n0 = slice * kDepth;
      to_floats(dy + row * n + n0, min64(kDepth, n - n0), packed + task * kDepth);
    }
  });
}

// W[n0 .. n0 + depth, k0 .. k0 + width) -> panels[width / 16][kDepth][16]; columns past the width are zero.
template <class T>
void decode_panels(const Weight& w, int64_t n0, int64_t depth, int64_t k0, int64_t width, Scales& decoder,
                   float* panels) {
  alignas(32) float line[kColumns];
  float units[kColumns / 32 + 4];
  for (int64_t i = width; i < kColumns; ++i) line[i] = 0.0f;
  for (int64_t p = 0; p < depth; ++p) {
    const int64_t start = (n0 + p) * w.k + k0;
    const Units range = units_of(w, start, width);
    decoder.decode(range.first, range.count, units);
    decode_span<T>(w, start, width, units, line);
    for (int64_t column = 0; column < width; column += kPanel) {
      float* to = panels + column * kDepth + p * kPanel;
      storeu(to, loadu(line + column));
      storeu(to + 8, loadu(line + column + 8));
    }
  }
}

template <class T>
void dx_columns(const Weight& w, int64_t m, const float* packed, int64_t k0, Scales& decoder, float* panels, float* acc,
                T* out) {
  const int64_t width = min64(kColumns, w.k - k0);
  for (int64_t n0 = 0; n0 < w.n; n0 += kDepth) {
    const int64_t depth = min64(kDepth, w.n - n0);
    decode_panels<T>(w, n0, depth, k0, width, decoder, panels);
    const float* dy = packed + n0 * m;
    for (int64_t row = 0; row < m; row += kRows)
      for (int64_t column = 0; column < width; column += kPanel)
        micro_rows<kRows, 2>(min64(kRows, m - row), depth, dy + row * kDepth, kDepth, panels + column * kDepth,
                             acc + row * kColumns + column, kColumns, n0 > 0);
  }
  for (int64_t row = 0; row < m; ++row) from_floats(acc + row * kColumns, width, out + row * w.k + k0);
}

template <class T>
void linear_dx(const Weight& w, int64_t m, const T* dy, T* out, const Parallel& parallel) {
  if (m == 0 || w.k == 0) return;
  if (w.n == 0) {
    std::memset(static_cast<void*>(out), 0, size_t(m * w.k) * sizeof(T));
    return;
  }
  Scratch<float> packed(min64(m, kMaxRowsOfDy) * ceil_div(w.n, kDepth) * kDepth);
  for (int64_t first = 0; first < m; first += kMaxRowsOfDy) {
    const int64_t rows = min64(kMaxRowsOfDy, m - first);
    pack_dy(w.n, rows, dy + first * w.n, packed.get(), parallel);
    for_ranges(parallel, ceil_div(w.k, kColumns), [&](int64_t begin, int64_t end) {
      Scales decoder(w);
      Scratch<float> panels(kDepth * kColumns), acc(rows * kColumns);
      for (int64_t column = begin; column < end; ++column)
        dx_columns(w, rows, packed.get(), column * kColumns, decoder, panels.get(), acc.get(), out + first * w.k);
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
