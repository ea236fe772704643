// What flows back into the layers of a bottleneck: g = scaling * act'(inner) * dy up, and the gradients of its weights
// and biases, all summed in fp32.
//
// The products are those of an adapter (low_rank_gradient.cpp), of which act(inner) is what B multiplies and the slope
// a factor of g. act and its slope are computed again: that is cheaper than to keep them. No order of summation depends
// on the threads.
#include "cpu/activations.h"
#include "cpu/lines.h"

namespace peftrt::cpu::PEFTRT_ISA {

void low_rank_gradient(Dtype dtype, int64_t m, int64_t n, int64_t k, const void* dy, const void* x, const float* xa,
                       const LowRankGradient& adapter, float* da, float* db, const Parallel& parallel);

namespace {

constexpr int64_t kColumns = 128;  // a task
constexpr int64_t kChain = 64;     // rows in one chain of additions, for accuracy

// out[width] = factor * the sum over rows of a matrix [m, width].
template <class T>
void sum_rows(int64_t m, int64_t width, const T* values, float factor, float* out, const Parallel& parallel) {
  for_ranges(parallel, ceil_div(width, kColumns), [&](int64_t begin, int64_t end) {
    alignas(sizeof(F)) float line[kColumns], chain[kColumns], sums[kColumns];
    for (int64_t column = begin * kColumns; column < min64(end * kColumns, width); column += kColumns) {
      const int64_t columns = min64(kColumns, width - column);
      std::memset(sums, 0, sizeof sums);
      for (int64_t row = 0; row < m; row += kChain) {
        std::memset(chain, 0, sizeof chain);
        for (int64_t i = row; i < min64(row + kChain, m); ++i) {
          to_floats(values + i * width + column, columns, line);
          for (int64_t j = 0; j < columns; ++j) chain[j] += line[j];
        }
        for (int64_t j = 0; j < columns; ++j) sums[j] += chain[j];
      }
      for (int64_t j = 0; j < columns; ++j) store_one(out + column + j, factor * sums[j]);
    }
  });
}

}  // namespace

void bottleneck_gradient(Dtype dtype, int64_t m, const void* dy, const void* x, const Bottleneck& adapter,
                         const BottleneckGradient& gradient, const Parallel& parallel) {
  constexpr int64_t kPiece = 4096;
  const int64_t rank = adapter.rank, k = adapter.k, size = m * rank;
  Scratch<float> activated(size), slopes(size);
  for_ranges(parallel, ceil_div(size, kPiece), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, count = min64(end * kPiece, size) - first;
    float *values = activated.get() + first, *factors = slopes.get() + first;
    std::memcpy(values, adapter.inner + first, size_t(count) * sizeof(float));
    slope(adapter.activation, values, count, factors);
    activate(adapter.activation, values, count, values);
  });
  LowRankGradient products = {};
  products.rank = rank;
  products.parts = {1, &k};
  products.b_dtype = adapter.up.dtype, products.b = adapter.up.data;
  products.scaling = adapter.scaling;
  products.slope = slopes.get();
  products.g = gradient.g;
  low_rank_gradient(dtype, m, k, k, dy, x, activated.get(), products, gradient.down, gradient.up, parallel);
  if (gradient.down_bias != nullptr) sum_rows(m, rank, gradient.g, 1.0f, gradient.down_bias, parallel);
  if (gradient.up_bias == nullptr) return;
  with_type(dtype, dy, [&](const auto* rows) { sum_rows(m, k, rows, adapter.scaling, gradient.up_bias, parallel); });
}

}  // namespace peftrt::cpu::PEFTRT_ISA
