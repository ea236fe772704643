// out[n] = sum_m dy[m, n] * (y[m, n] - bias[n]) / row_scale[n], 0 where row_scale[n] is: of y = row_scale * z + bias.
//
// One pass over dy and y. Threads split N, and a column's sum has one order: chains of kChain rows, one after the
// other.
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kColumns = 128;  // a task
constexpr int64_t kChain = 64;     // rows in one chain of additions, for accuracy

// sums[columns] += dy * (y - bias) of one row.
template <class T>
inline void add_row(const T* dy, const T* y, const float* minus_bias, int64_t columns, float* sums) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes)
    storeu(sums + j, fma(load(dy + j), add(load(y + j), loadu(minus_bias + j)), loadu(sums + j)));
  for (int64_t j = whole; j < columns; ++j) sums[j] += load_one(dy + j) * (load_one(y + j) + minus_bias[j]);
}

template <class T>
void gradient(int64_t m, int64_t n, const void* dy_bytes, const void* y_bytes, const void* bias_bytes,
              const float* row_scale, float* out, const Parallel& parallel) {
  const T *dy = static_cast<const T*>(dy_bytes), *y = static_cast<const T*>(y_bytes);
  const T* bias = static_cast<const T*>(bias_bytes);
  for_ranges(parallel, ceil_div(n, kColumns), [&](int64_t begin, int64_t end) {
    alignas(sizeof(F)) float minus_bias[kColumns], chain[kColumns], sums[kColumns];
    for (int64_t column = begin * kColumns; column < min64(end * kColumns, n); column += kColumns) {
      const int64_t columns = min64(kColumns, n - column);
      for (int64_t j = 0; j < columns; ++j) minus_bias[j] = bias == nullptr ? 0.0f : -load_one(bias + column + j);
      std::memset(sums, 0, sizeof sums);
      for (int64_t row = 0; row < m; row += kChain) {
        std::memset(chain, 0, sizeof chain);
        for (int64_t i = row; i < min64(row + kChain, m); ++i)
          add_row(dy + i * n + column, y + i * n + column, minus_bias, columns, chain);
        for (int64_t j = 0; j < columns; ++j) sums[j] += chain[j];
      }
      for (int64_t j = 0; j < columns; ++j) {
        const float scale = load_one(row_scale + column + j);
        store_one(out + column + j, scale == 0.0f ? 0.0f : sums[j] / scale);
      }
    }
  });
}

}  // namespace

void row_scale_gradient(Dtype dtype, int64_t m, int64_t n, const void* dy, const void* y, const void* bias,
                        const float* row_scale, float* out, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return gradient<float>(m, n, dy, y, bias, row_scale, out, parallel);
    case Dtype::kBFloat16:
      return gradient<bf16>(m, n, dy, y, bias, row_scale, out, parallel);
    case Dtype::kFloat16:
      return gradient<fp16>(m, n, dy, y, bias, row_scale, out, parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
