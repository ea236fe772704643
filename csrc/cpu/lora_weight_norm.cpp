// out[n] = || W[n] + scaling * sum_r B[n, r] A[r] ||_2 over a base of any kind, W in fp32; the sum is never stored.
//
// A block of rows of W is decoded into L1, the outer-product micro-kernel adds the adapter's share to it in place
// (scalars: rows of B; lanes: columns of A, packed once in panels), and its squares are summed. Threads split N.
// Squares are summed lane by lane over a block, then block by block: an order that depends on nothing but K.
#include <cmath>
#include <optional>

#include "cpu/decode.h"
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kPanel = 2 * kLanes;      // the lanes of the micro-kernel
constexpr int64_t kRows = 2 * kMicroRows2;  // rows of W a block, and a task
constexpr int64_t kWidth = 256;             // columns of a block: 12 KB of floats by 12 rows
constexpr int64_t kStride = kWidth + 16;    // its rows do not fall on the same cache sets

// A -> packed[panels][width][kPanel] as floats; what is behind the last column is not set.
void pack_a(const LowRank& adapter, int64_t k, float* packed, const Parallel& parallel) {
  for_ranges(parallel, ceil_div(k, kPanel), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, lanes = min64(kPanel, k - first);
      float* to = packed + first * adapter.width();
      for (int64_t r = 0; r < adapter.width(); ++r)
        read_floats(adapter.a_dtype, adapter.a, r * k + first, lanes, to + r * kPanel);
    }
  });
}

// Columns [k0, k0 + width) of rows that lie column by column, each `stride` elements behind the one before.
template <class T>
void read_transposed(const T* dense, int64_t stride, int64_t n0, int64_t rows, int64_t k0, int64_t width,
                     float* block) {
  alignas(sizeof(F)) float tile[kRows * kPanel];
  for (int64_t column = 0; column < width; column += kPanel) {
    const int64_t lanes = min64(kPanel, width - column);
    pack_transposed(dense + (k0 + column) * stride + n0, stride, lanes, rows, int(kPanel), tile);
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(block + i * kStride + column, tile + i * kPanel, size_t(lanes) * sizeof(float));
  }
}

void read_transposed(const Base& base, int64_t n0, int64_t rows, int64_t k0, int64_t width, float* block) {
  switch (base.dtype) {
    case Dtype::kFloat32:
      return read_transposed(static_cast<const float*>(base.dense), base.stride, n0, rows, k0, width, block);
    case Dtype::kBFloat16:
      return read_transposed(static_cast<const bf16*>(base.dense), base.stride, n0, rows, k0, width, block);
    case Dtype::kFloat16:
      return read_transposed(static_cast<const fp16*>(base.dense), base.stride, n0, rows, k0, width, block);
  }
}

// A task's rows of W, of which columns are asked for in turn.
class Rows {
 public:
  Rows(const Base& base, int64_t n0, int64_t rows, Scales* decoder, float* units)
      : base_(base), n0_(n0), rows_(rows), units_(units) {
    if (base.nf4 == nullptr) return;
    const Units range = units_of(*base.nf4, n0 * base.k, rows * base.k);
    decoder->decode(range.first, range.count, units);
    first_unit_ = range.first;
  }

  // Columns [k0, k0 + width) into block[rows][kStride].
  void read(int64_t k0, int64_t width, float* block) const {
    if (base_.nf4 == nullptr && base_.transposed) return read_transposed(base_, n0_, rows_, k0, width, block);
    for (int64_t i = 0; i < rows_; ++i) {
      float* line = block + i * kStride;
      if (base_.nf4 == nullptr) {
        read_floats(base_.dtype, base_.dense, (n0_ + i) * base_.stride + k0, width, line);
      } else {
        const int64_t start = (n0_ + i) * base_.k + k0;
        fetch_ahead(start);
        decode_span<float>(*base_.nf4, start, width, units_ + (start / kGroup * 2 - first_unit_), line);
      }
    }
  }

 private:
  // Asks for the codes that the next task will decode here: rows are read a piece at a time, which no prefetcher
  // follows. Cold, with R = 16 on one core, N = 2048, K = 4096 takes 4.7 ms where it took 5.1 (Zen 3, November 2026).
  void fetch_ahead(int64_t start) const {
    const int64_t next = start + kRows * base_.k;
    if (next + kWidth > base_.n * base_.k) return;
    __builtin_prefetch(base_.nf4->codes + next / 2);
    __builtin_prefetch(base_.nf4->codes + next / 2 + 64);
  }

  const Base& base_;
  const int64_t n0_, rows_;
  const float* units_;
  int64_t first_unit_ = 0;
};

// sums[i][kLanes] += the squares of block[i][width].
inline void add_squares(const float* block, int64_t rows, int64_t width, float* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    F even = zero(), odd = zero();
    for (int64_t j = 0; j < width; j += kPanel) {
      const F a = loadu(block + i * kStride + j), b = loadu(block + i * kStride + j + kLanes);
      even = fma(a, a, even), odd = fma(b, b, odd);
    }
    storeu(sums + i * kLanes, add(loadu(sums + i * kLanes), add(even, odd)));
  }
}

// The norms of `rows` rows of one part; b: theirs of B, scaled, [rows][rank]; packed_a: from the part's first row of A
// on, the next panel's `stride` behind.
void norms_of(const Rows& from, int64_t rows, int64_t k, int64_t rank, const float* packed_a, int64_t stride,
              const float* b, float* out) {
  alignas(sizeof(F)) float block[kRows * kStride] = {0.0f}, sums[kRows * kLanes] = {0.0f};
  for (int64_t k0 = 0; k0 < k; k0 += kWidth) {
    const int64_t width = min64(kWidth, k - k0), padded = ceil_div(width, kPanel) * kPanel;
    from.read(k0, width, block);
    for (int64_t column = 0; rank > 0 && column < padded; column += kPanel)
      for (int64_t i = 0; i < rows; i += kMicroRows2)
        micro_rows<kMicroRows2, 2>(min64(kMicroRows2, rows - i), rank, b + i * rank, rank,
                                   packed_a + (k0 + column) / kPanel * stride, block + i * kStride + column, kStride,
                                   true);
    // what stands behind the last column is no part of the norm
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = width; j < padded; ++j) block[i * kStride + j] = 0.0f;
    add_squares(block, rows, padded, sums);
  }
  for (int64_t i = 0; i < rows; ++i) store_one(out + i, std::sqrt(sum(loadu(sums + i * kLanes))));
}

}  // namespace

void lora_weight_norm(const Base& base, const LowRank& adapter, float* out, const Parallel& parallel) {
  const int64_t rank = adapter.rank, n = base.n, k = base.k, stride = adapter.width() * kPanel;
  Scratch<float> packed_a(ceil_div(k, kPanel) * stride);
  pack_a(adapter, k, packed_a.get(), parallel);
  for_ranges(parallel, ceil_div(n, kRows), [&](int64_t begin, int64_t end) {
    std::optional<Scales> decoder;
    if (base.nf4 != nullptr) decoder.emplace(*base.nf4);
    Scratch<float> b(kRows * rank), units(base.nf4 == nullptr ? 0 : kRows * k / 32 + 4);
    for (int64_t n0 = begin * kRows, rows; n0 < min64(end * kRows, n); n0 += rows) {
      const int part = adapter.parts.of(n0);
      rows = min64(min64((n0 / kRows + 1) * kRows, n), adapter.parts.end[part]) - n0;
      read_floats(adapter.b_dtype, adapter.b, n0 * rank, rows * rank, b.get());
      for (int64_t i = 0; i < rows * rank; ++i) b.get()[i] *= adapter.scaling;
      norms_of(Rows(base, n0, rows, decoder ? &*decoder : nullptr, units.get()), rows, k, rank,
               packed_a.get() + part * rank * kPanel, stride, b.get(), out + n0);
    }
  });
}

}  // namespace peftrt::cpu::PEFTRT_ISA
