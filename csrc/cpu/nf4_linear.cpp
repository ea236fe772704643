// out[m, n] = sum_k x[m, k] * W[n, k] + bias[n], W decoded to x's dtype, products summed in fp32.
//
// Threads split N. Two paths, by M:
//   rows    M <= 4   a row of W is decoded a span at a time into L1 and multiplied with every row of x
//   panels  above    x is packed transposed, [K][16 rows of x]; rows of W are decoded a panel [rows][256] at a time and
//                    are the scalars of the outer-product micro-kernel. Neither W nor a transposed W is ever stored.
// An output's sum has the same order whatever the thread count; it differs between the two paths.
#include "cpu/decode.h"
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kSmallM = 4;
constexpr int64_t kDepth = 256;        // k of a panel: 16 lanes of x are then 16 KB, half an L1
constexpr int64_t kDepthStride = 272;  // and its rows do not fall on the same cache sets
constexpr int64_t kMaxRowsOfX = 512;   // rows of x packed at a time: the panel's outputs stay in L2

template <class T>
float bias_at(const T* bias, int64_t n) {
  float value = 0.0f;
  if (bias != nullptr) to_floats(bias + n, 1, &value);
  return value;
}

// ---- rows

template <int M>
void dot_span(const float* weights, const float* x, int64_t ld, int64_t count, float* sums) {
  F acc[M][2];
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = zero();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const F w0 = loadu(weights + i), w1 = loadu(weights + i + 8);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      acc[m][0] = fma(w0, loadu(x + m * ld + i), acc[m][0]);
      acc[m][1] = fma(w1, loadu(x + m * ld + i + 8), acc[m][1]);
    }
  }
  for (int m = 0; m < M; ++m) {
    float rest = 0.0f;
    for (int64_t j = i; j < count; ++j) rest += weights[j] * x[m * ld + j];
    sums[m] += sum(add(acc[m][0], acc[m][1])) + rest;
  }
}

template <class T, int M>
void linear_rows(const Weight& w, const T* x, const T* bias, T* out, const Parallel& parallel) {
  Scratch<float> floats(M * w.k);
  to_floats(x, M * w.k, floats.get());
  for_ranges(parallel, w.n, [&](int64_t begin, int64_t end) {
    alignas(32) float weights[kMaxSpan];
    for (int64_t n = begin; n < end; ++n) {
      float sums[M] = {0.0f};
      for (int64_t k = 0; k < w.k; k += kMaxSpan) {
        const int64_t count = min64(kMaxSpan, w.k - k);
        decode_span<T>(w, n * w.k + k, count, weights);
        dot_span<M>(weights, floats.get() + k, w.k, count, sums);
      }
      for (int m = 0; m < M; ++m) {
        const float y = sums[m] + bias_at(bias, n);
        from_floats(&y, 1, out + m * w.n + n);
      }
    }
  });
}

// ---- panels

// A tile is 16 rows of x, or 8 when no more than 8 are left. Tiles lie one after the other in the packed x.
struct Tile {
  int64_t first;
  int lanes;
};

inline Tile tile_at(int64_t tile, int64_t m) { return {tile * 16, m - tile * 16 <= 8 ? 8 : 16}; }

// Ct[i][lanes] of one tile for `rows` rows of W from n0, finished: transposed, plus bias, rounded.
template <class T>
void write_tile(const Tile& tile, int64_t m, const float* ct, int64_t rows, int64_t n0, int64_t n, const T* bias,
                T* out) {
  for (int first = 0; first < tile.lanes; first += 8) {
    const int64_t present = min64(8, m - tile.first - first);
    for (int64_t i = 0; i < rows; i += 8) {
      const int64_t width = min64(8, rows - i);
      F r[8];
      for (int j = 0; j < 8; ++j)
        r[j] = j < width ? add(loadu(ct + (i + j) * tile.lanes + first), set1(bias_at(bias, n0 + i + j))) : zero();
      transpose8(r);
      for (int64_t j = 0; j < present; ++j) {
        T* to = out + (tile.first + first + j) * n + n0 + i;
        if (width == 8) {
          store(to, r[j]);
        } else {
          alignas(32) float line[8];
          storeu(line, r[j]);
          from_floats(line, width, to);
        }
      }
    }
  }
}

template <class T>
void linear_panels(const Weight& w, int64_t m, const float* packed, const T* bias, T* out, const Parallel& parallel) {
  const int64_t tiles = ceil_div(m, 16);
  const int64_t chunk = m <= 32 ? 24 : 96;  // rows of W a panel, a multiple of 12: in L1 for few tiles, else in L2
  for_ranges(parallel, ceil_div(w.n, chunk), [&](int64_t begin, int64_t end) {
    Scratch<float> weights(chunk * kDepthStride), ct(chunk * tiles * 16);
    for (int64_t n0 = begin * chunk; n0 < min64(end * chunk, w.n); n0 += chunk) {
      const int64_t rows = min64(chunk, w.n - n0);
      for (int64_t k = 0; k < w.k; k += kDepth) {
        const int64_t depth = min64(kDepth, w.k - k);
        for (int64_t i = 0; i < rows; ++i)
          decode_span<T>(w, (n0 + i) * w.k + k, depth, weights.get() + i * kDepthStride);
        for (int64_t t = 0; t < tiles; ++t) {
          const Tile tile = tile_at(t, m);
          const float* x = packed + tile.first * w.k + k * tile.lanes;
          float* c = ct.get() + t * 16 * chunk;
          const int step = tile.lanes == 8 ? 12 : 6;
          for (int64_t i = 0; i < rows; i += step) {
            const float* s = weights.get() + i * kDepthStride;
            if (tile.lanes == 8)
              micro_rows<12, 1>(min64(12, rows - i), depth, s, kDepthStride, x, c + i * 8, 8, k > 0);
            else
              micro_rows<6, 2>(min64(6, rows - i), depth, s, kDepthStride, x, c + i * 16, 16, k > 0);
          }
        }
      }
      for (int64_t t = 0; t < tiles; ++t)
        write_tile(tile_at(t, m), m, ct.get() + t * 16 * chunk, rows, n0, w.n, bias, out);
    }
  });
}

template <class T>
void pack_x(const Weight& w, int64_t m, const T* x, float* packed, const Parallel& parallel) {
  constexpr int64_t kSlice = 512;
  const int64_t slices = ceil_div(w.k, kSlice);
  for_ranges(parallel, ceil_div(m, 16) * slices, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Tile tile = tile_at(task / slices, m);
      const int64_t k = task % slices * kSlice;
      pack_transposed(x + tile.first * w.k + k, w.k, m - tile.first, min64(kSlice, w.k - k), tile.lanes,
                      packed + tile.first * w.k + k * tile.lanes);
    }
  });
}

template <class T>
void linear(const Weight& w, int64_t m, const T* x, const T* bias, T* out, const Parallel& parallel) {
  if (m == 0 || w.n == 0) return;
  switch (m) {
    case 1:
      return linear_rows<T, 1>(w, x, bias, out, parallel);
    case 2:
      return linear_rows<T, 2>(w, x, bias, out, parallel);
    case 3:
      return linear_rows<T, 3>(w, x, bias, out, parallel);
    case kSmallM:
      return linear_rows<T, 4>(w, x, bias, out, parallel);
  }
  if (w.k == 0) {
    for (int64_t row = 0; row < m; ++row)
      for (int64_t n = 0; n < w.n; ++n) {
        const float y = bias_at(bias, n);
        from_floats(&y, 1, out + row * w.n + n);
      }
    return;
  }
  Scratch<float> packed(ceil_div(min64(m, kMaxRowsOfX), 16) * 16 * w.k);
  for (int64_t first = 0; first < m; first += kMaxRowsOfX) {
    const int64_t rows = min64(kMaxRowsOfX, m - first);
    pack_x(w, rows, x + first * w.k, packed.get(), parallel);
    linear_panels(w, rows, packed.get(), bias, out + first * w.n, parallel);
  }
}

template <class T>
void linear_typed(const Weight& w, int64_t m, const void* x, const void* bias, void* out, const Parallel& parallel) {
  linear(w, m, static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(out), parallel);
}

}  // namespace

void nf4_linear(const Weight& w, Dtype dtype, int64_t m, const void* x, const void* bias, void* out,
                const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return linear_typed<float>(w, m, x, bias, out, parallel);
    case Dtype::kBFloat16:
      return linear_typed<bf16>(w, m, x, bias, out, parallel);
    case Dtype::kFloat16:
      return linear_typed<fp16>(w, m, x, bias, out, parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
