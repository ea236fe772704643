// Random shapes through every kernel of one instruction set, against a scalar double-precision answer.
//
//   fuzz_kernels ISA SEED COUNT
//
// Every buffer is a heap block of exactly its size at an odd address. tests/test_native_sanitizers.py builds with
// AddressSanitizer and UndefinedBehaviorSanitizer, where one byte read or written outside is an error;
// tests/test_native_emulated.py for another CPU than this one.
#include "cpu/kernels.h"
#include "fuzz_adamw.h"
#include "fuzz_bottleneck.h"
#include "fuzz_multi_lora.h"
#include "fuzz_values.h"
#include "nf4.h"

namespace {

using peftrt::cpu::Dropout;
using peftrt::cpu::LowRank;
using peftrt::cpu::LowRankGradient;
using peftrt::cpu::Weight;

uint32_t mix(uint32_t word) {
  word = (word ^ word >> 16) * 0x85ebca6bu;
  word = (word ^ word >> 13) * 0xc2b2ae35u;
  return word ^ word >> 16;
}

// What is kept of the element j of a flat tensor of fewer than 2^32.
bool kept(const Dropout& dropout, int64_t j) {
  const uint32_t low = uint32_t(dropout.seed), key = mix(mix(low ^ 0x9e3779b9u) ^ uint32_t(dropout.seed >> 32));
  return mix(mix(uint32_t(j) ^ low) ^ mix(0) ^ key) >= dropout.threshold;
}

Dropout random_dropout() { return {generator(), uint32_t(generator()), 0.7f}; }

int run_dropout(const Kernels& kernels, const Case& c, const Parallel& parallel) {
  const int64_t numel = c.m * c.k;
  const Dropout dropout = random_dropout();
  Bytes x(size_t(numel) * width(c.dtype)), out(size_t(numel) * width(c.dtype));
  for (int64_t i = 0; i < numel; ++i) write_small(x, c.dtype, i);
  kernels.dropout(c.dtype, numel, dropout, x.get(), out.get(), parallel);
  for (int64_t i = 0; i < numel; ++i) {
    const double want = kept(dropout, i) ? rounded(float(read(x, c.dtype, i)) / 0.7f, c.dtype) : 0.0;
    if (read(out, c.dtype, i) != want) return fail("dropout", c, i, read(out, c.dtype, i), want);
  }
  return 0;
}

// Any bits at all go through both conversions: where nothing is dropped they come out again, but for a NaN's.
int run_conversions(const Kernels& kernels, const Case& c) {
  const int64_t numel = c.m * c.k;
  Bytes x(size_t(numel) * width(c.dtype)), out(x.size());
  for (size_t i = 0; i < x.size(); ++i) x.get()[i] = uint8_t(generator());
  kernels.dropout(c.dtype, numel, {generator(), 0, 1.0f}, x.get(), out.get(), {1, run_threads});
  for (int64_t i = 0; i < numel; ++i) {
    const double got = read(out, c.dtype, i), want = read(x, c.dtype, i);
    if (!(got == want || (std::isnan(got) && std::isnan(want)))) return fail("conversions", c, i, got, want);
  }
  return 0;
}

// Factors of the rows of W, some of them 0 or negative.
Bytes random_row_scale(int64_t n) {
  Bytes scale(size_t(n) * 4);
  for (int64_t i = 0; i < n; ++i) write_small(scale, Dtype::kFloat32, i);
  return scale;
}

// Up to four parts of n outputs, some of them empty.
struct RandomParts {
  std::vector<int64_t> ends;

  explicit RandomParts(int64_t n) : ends(size_t(pick({1, 1, 2, 3, 4})), n) {
    for (size_t i = 0; i + 1 < ends.size(); ++i) ends[i] = int64_t(generator() % uint64_t(n + 1));
    std::sort(ends.begin(), ends.end());
  }
  Parts get() const { return {int(ends.size()), ends.data()}; }
};

// nf4_linear with an adapter of its own, beside a base whose exact results are `want`.
int run_adapter(const Kernels& kernels, const Case& c, const Base& base, const Bytes& x, const Bytes* bias,
                std::vector<double> want, std::vector<double> magnitude, const Parallel& parallel) {
  const int64_t rank = pick({0, 1, 2, 3, 7, 8, 9, 12, 13, 16, 17, 40, 64, 65, 130, 300});
  const Dtype a_dtype = Dtype(generator() % 3), b_dtype = Dtype(generator() % 3);
  const bool drops = generator() % 2;
  const RandomParts random(c.n);
  const Parts parts = random.get();
  const int64_t columns = rank * parts.count;  // of x A^T
  Case wide = c;                               // of x A^T, and of what the adapter sees of x
  wide.dtype = Dtype::kFloat32, wide.n = columns;
  Bytes a(size_t(columns * c.k) * width(a_dtype)), b(size_t(c.n * rank) * width(b_dtype)),
      xa(size_t(c.m * columns) * 4), dropped(size_t(c.m * c.k) * 4), y(size_t(c.m * c.n) * width(c.dtype));
  for (int64_t i = 0; i < columns * c.k; ++i) write_small(a, a_dtype, i);
  for (int64_t i = 0; i < c.n * rank; ++i) write_small(b, b_dtype, i);
  for (int64_t i = 0; i < c.m * c.k; ++i) write_small(dropped, wide.dtype, i);
  const bool scales = generator() % 2;
  const Bytes row_scale = random_row_scale(c.n);
  const LowRank adapter = {rank,
                           parts,
                           a_dtype,
                           b_dtype,
                           a.get(),
                           b.get(),
                           drops ? floats(dropped) : nullptr,
                           0.375f,
                           scales ? floats(row_scale) : nullptr,
                           floats(xa)};
  kernels.linear(base, c.dtype, c.m, x.get(), bias == nullptr ? nullptr : bias->get(), &adapter, generator() % 2,
                 y.get(), parallel);

  std::vector<double> xa_want(size_t(c.m * columns)), xa_magnitude(xa_want);
  for (int64_t i = 0; i < c.m * columns; ++i)
    for (int64_t k = 0; k < c.k; ++k) {
      const int64_t at = i / columns * c.k + k;
      const double seen = drops ? read(dropped, wide.dtype, at) : read(x, c.dtype, at);
      const double product = seen * read(a, a_dtype, i % columns * c.k + k);
      xa_want[size_t(i)] += product, xa_magnitude[size_t(i)] += std::fabs(product);
    }
  if (compare("linear, x A^T", wide, xa, xa_want, xa_magnitude)) return 1;
  for (int64_t i = 0; i < c.m * c.n; ++i)
    for (int64_t r = 0; r < rank; ++r) {
      const size_t at = size_t(i / c.n * columns + parts.of(i % c.n) * rank + r);
      const double factor = 0.375 * read(b, b_dtype, i % c.n * rank + r);
      want[size_t(i)] += xa_want[at] * factor, magnitude[size_t(i)] += xa_magnitude[at] * std::fabs(factor);
    }
  for (int64_t i = 0; scales && i < c.m * c.n; ++i) {
    // what `want` has of the bias is not multiplied
    const double factor = read(row_scale, wide.dtype, i % c.n);
    const double added = bias == nullptr ? 0 : read(*bias, c.dtype, i % c.n);
    want[size_t(i)] = factor * (want[size_t(i)] - added) + added;
    magnitude[size_t(i)] = std::fabs(factor) * (magnitude[size_t(i)] - std::fabs(added)) + std::fabs(added);
  }
  return compare("linear, adapter", c, y, want, magnitude);
}

// What flows back into an adapter, and through it into dx, over a base whose values are `w`.
int run_gradient(const Kernels& kernels, const Case& c, const Base& base, const std::vector<double>& w, const Bytes& x,
                 const Bytes& dy, const Parallel& parallel) {
  const int64_t rank = pick({0, 1, 2, 5, 6, 7, 8, 15, 16, 17, 40, 64, 130, 300});
  const Dtype a_dtype = Dtype(generator() % 3), b_dtype = Dtype(generator() % 3);
  const Dropout dropout = random_dropout();
  const bool drops = generator() % 2;
  const RandomParts random(c.n);
  const Parts parts = random.get();
  const int64_t columns = rank * parts.count;  // of x A^T and of g
  Bytes a(size_t(columns * c.k) * width(a_dtype)), b(size_t(c.n * rank) * width(b_dtype)),
      xa(size_t(c.m * columns) * 4), g(size_t(c.m * columns) * 4), da(size_t(columns * c.k) * 4),
      db(size_t(c.n * rank) * 4), dx(size_t(c.m * c.k) * width(c.dtype));
  Case wide = c;  // of what is in fp32
  wide.dtype = Dtype::kFloat32, wide.n = columns;
  for (int64_t i = 0; i < columns * c.k; ++i) write_small(a, a_dtype, i);
  for (int64_t i = 0; i < c.n * rank; ++i) write_small(b, b_dtype, i);
  for (int64_t i = 0; i < c.m * columns; ++i) write_small(xa, wide.dtype, i);
  const bool scales = generator() % 2;
  const Bytes row_scale = random_row_scale(c.n);
  const LowRankGradient adapter = {rank,
                                   parts,
                                   a_dtype,
                                   b_dtype,
                                   a.get(),
                                   b.get(),
                                   drops ? &dropout : nullptr,
                                   0.375f,
                                   scales ? floats(row_scale) : nullptr,
                                   nullptr,
                                   floats(g)};
  const bool needs_da = generator() % 4, needs_db = generator() % 4;
  kernels.low_rank_gradient(c.dtype, c.m, c.n, c.k, dy.get(), x.get(), floats(xa), adapter,
                            needs_da ? floats(da) : nullptr, needs_db ? floats(db) : nullptr, parallel);
  kernels.linear_dx(base, c.dtype, c.m, dy.get(), &adapter, generator() % 2, dx.get(), parallel);

  const auto at_dy = [&](int64_t m, int64_t n) {
    return read(dy, c.dtype, m * c.n + n) * (scales ? read(row_scale, wide.dtype, n) : 1.0);
  };
  const auto at_b = [&](int64_t n, int64_t r) {
    return r / rank == parts.of(n) ? read(b, b_dtype, n * rank + r % rank) : 0.0;
  };
  const auto at_a = [&](int64_t r, int64_t k) { return read(a, a_dtype, r * c.k + k); };
  const auto share = [&](int64_t m, int64_t k) { return !drops ? 1.0 : kept(dropout, m * c.k + k) ? 1 / 0.7f : 0.0; };
  const Sums g_want = product(c.m, c.n, columns, 0.375, at_dy, at_b);
  if (compare("g", wide, g, g_want.value, g_want.magnitude)) return 1;
  // from here on with g as it is: its own error is not the next product's
  const auto at_g = [&](int64_t m, int64_t r) { return read(g, wide.dtype, m * columns + r); };
  const Sums da_want = product(
      columns, c.m, c.k, 1.0, [&](int64_t r, int64_t m) { return at_g(m, r); },
      [&](int64_t m, int64_t k) { return share(m, k) * read(x, c.dtype, m * c.k + k); });
  if (needs_da && compare("dA", wide, da, da_want.value, da_want.magnitude)) return 1;
  const Sums all = product(
      c.n, c.m, columns, 0.375, [&](int64_t n, int64_t m) { return at_dy(m, n); },
      [&](int64_t m, int64_t r) { return read(xa, wide.dtype, m * columns + r); });
  Sums db_want;
  for (int64_t i = 0; i < c.n * rank; ++i) {
    const size_t at = size_t(i / rank * columns + parts.of(i / rank) * rank + i % rank);
    db_want.value.push_back(all.value[at]), db_want.magnitude.push_back(all.magnitude[at]);
  }
  if (needs_db && compare("dB", wide, db, db_want.value, db_want.magnitude)) return 1;
  Sums sums = product(c.m, c.n, c.k, 1.0, at_dy, [&](int64_t n, int64_t k) { return w[size_t(n * c.k + k)]; });
  const Sums through = product(c.m, columns, c.k, 1.0, at_g, at_a);
  for (int64_t i = 0; i < c.m * c.k; ++i) {
    const double factor = share(i / c.k, i % c.k);
    sums.value[size_t(i)] += factor * through.value[size_t(i)];
    sums.magnitude[size_t(i)] += factor * through.magnitude[size_t(i)];
  }
  return compare("linear_dx, adapter", c, dx, sums.value, sums.magnitude);
}

// The norms of the rows of an NF4 weight, of its values in `dense` (of c.dtype) and of those column by column.
int run_weight_norm(const Kernels& kernels, const Case& c, const Weight& weight, const Bytes& dense,
                    const Parallel& parallel) {
  const int64_t rank = pick({0, 1, 3, 8, 16, 17, 70}), numel = c.n * c.k;
  const Dtype a_dtype = Dtype(generator() % 3), b_dtype = Dtype(generator() % 3);
  const RandomParts random(c.n);
  const Parts parts = random.get();
  const int64_t rows = rank * parts.count;  // of A
  Bytes a(size_t(rows * c.k) * width(a_dtype)), b(size_t(c.n * rank) * width(b_dtype)), norms(size_t(c.n) * 4),
      columns(dense.size()), exact(size_t(numel) * 4);
  for (int64_t i = 0; i < rows * c.k; ++i) write_small(a, a_dtype, i);
  for (int64_t i = 0; i < c.n * rank; ++i) write_small(b, b_dtype, i);
  for (int64_t i = 0; i < numel; ++i)
    std::memcpy(columns.get() + size_t(i % c.k * c.n + i / c.k) * width(c.dtype),
                dense.get() + size_t(i) * width(c.dtype), width(c.dtype));
  kernels.nf4_dequantize(weight, Dtype::kFloat32, exact.get(), parallel);
  LowRank adapter = {};
  adapter.rank = rank, adapter.parts = parts, adapter.a_dtype = a_dtype, adapter.b_dtype = b_dtype, adapter.a = a.get(),
  adapter.b = b.get();
  adapter.scaling = 0.375f;
  const Base bases[] = {{&weight, Dtype::kFloat32, nullptr, c.n, c.k, 0, false},
                        {nullptr, c.dtype, dense.get(), c.n, c.k, c.k, false},
                        {nullptr, c.dtype, columns.get(), c.n, c.k, c.n, true}};
  for (const Base& base : bases) {
    kernels.lora_weight_norm(base, adapter, floats(norms), parallel);
    for (int64_t n = 0; n < c.n; ++n) {
      double squares = 0, terms = 0;  // the terms whose roundings a norm has: its sums may cancel
      for (int64_t k = 0; k < c.k; ++k) {
        const double w = base.nf4 ? read(exact, Dtype::kFloat32, n * c.k + k) : read(dense, c.dtype, n * c.k + k);
        double sum = w, absolute = std::fabs(w);
        for (int64_t r = 0; r < rank; ++r) {
          const double term =
              0.375 * read(b, b_dtype, n * rank + r) * read(a, a_dtype, (parts.of(n) * rank + r) * c.k + k);
          sum += term, absolute += std::fabs(term);
        }
        squares += sum * sum, terms += absolute * absolute;
      }
      const double got = read(norms, Dtype::kFloat32, n), want = std::sqrt(squares);
      if (!(std::fabs(got - want) <= 2e-6 * std::sqrt(terms) + 1e-18)) return fail("lora_weight_norm", c, n, got, want);
    }
  }
  return 0;
}

int run_row_scale_gradient(const Kernels& kernels, const Case& c, const Bytes& dy, const Bytes& y, const Bytes* bias,
                           const Parallel& parallel) {
  Case wide = c;
  wide.dtype = Dtype::kFloat32;
  const Bytes row_scale = random_row_scale(c.n);
  Bytes out(size_t(c.n) * 4);
  kernels.row_scale_gradient(c.dtype, c.m, c.n, dy.get(), y.get(), bias == nullptr ? nullptr : bias->get(),
                             floats(row_scale), floats(out), parallel);
  std::vector<double> want(size_t(c.n)), magnitude(want);
  for (int64_t n = 0; n < c.n; ++n) {
    const double scale = read(row_scale, wide.dtype, n), added = bias == nullptr ? 0 : read(*bias, c.dtype, n);
    for (int64_t m = 0; scale != 0 && m < c.m; ++m) {
      const double factor = read(dy, c.dtype, m * c.n + n) / scale, value = read(y, c.dtype, m * c.n + n);
      want[size_t(n)] += factor * (value - added);
      magnitude[size_t(n)] += std::fabs(factor) * (std::fabs(value) + std::fabs(added));
    }
  }
  return compare("row_scale_gradient", wide, out, want, magnitude);
}

int run_case(const Kernels& kernels, const Case& c) {
  const int64_t numel = c.n * c.k, blocks = (numel + c.block_size - 1) / c.block_size;
  Bytes codes(size_t(numel + 1) / 2), absmax(size_t(c.nested ? blocks : 4 * blocks)),
      nested(size_t(blocks + 255) / 256 * 4);
  for (size_t i = 0; i < codes.size(); ++i) codes.get()[i] = uint8_t(generator());
  for (size_t i = 0; i < absmax.size(); ++i) absmax.get()[i] = uint8_t(generator());
  for (size_t i = 0; i < nested.size(); i += 4) {
    const float value = float(generator() % 16 + 1) / 16;
    std::memcpy(nested.get() + i, &value, 4);
  }
  if (!c.nested)
    for (int64_t i = 0; i < blocks; ++i) {
      // now and then a scale that gives subnormal weights in bf16 and fp16
      const float value = float(generator() % 256) / 64 * (generator() % 8 ? 1.0f : kTiny[int(c.dtype)]);
      std::memcpy(absmax.get() + 4 * i, &value, 4);
    }
  const Weight weight = {codes.get(), absmax.get(), c.nested ? nested.get() : nullptr, 0.75f, c.n, c.k, c.block_size};
  const Parallel parallel = {int(generator() % 2 + 1), run_threads};

  Bytes dense(size_t(numel) * width(c.dtype));
  kernels.nf4_dequantize(weight, c.dtype, dense.get(), parallel);
  std::vector<double> w(static_cast<size_t>(numel));
  for (int64_t i = 0; i < numel; ++i) {
    const int64_t block = i / c.block_size;
    float scale, run;
    if (c.nested) {
      std::memcpy(&run, nested.get() + block / 256 * 4, 4);
      scale = peftrt::nested_scale(peftrt::dynamic_code(absmax.get()[block]), run, 0.75f);
    } else {
      std::memcpy(&scale, absmax.get() + 4 * block, 4);
    }
    const double want = rounded(peftrt::kNf4[peftrt::nibble(codes.get(), i)] * scale, c.dtype);
    w[size_t(i)] = read(dense, c.dtype, i);
    if (w[size_t(i)] != want) return fail("nf4_dequantize", c, i, w[size_t(i)], want);
  }
  if (run_dropout(kernels, c, parallel)) return 1;

  Bytes x(size_t(c.m * c.k) * width(c.dtype)), bias(size_t(c.n) * width(c.dtype)),
      y(size_t(c.m * c.n) * width(c.dtype));
  for (int64_t i = 0; i < c.m * c.k; ++i) write_small(x, c.dtype, i);
  for (int64_t i = 0; i < c.n; ++i) write_small(bias, c.dtype, i);
  const Base nf4 = {&weight, c.dtype, nullptr, c.n, c.k, 0, false};
  const Base values = {nullptr, c.dtype, dense.get(), c.n, c.k, c.k, false};
  const Base& base = generator() % 2 ? nf4 : values;
  kernels.linear(base, c.dtype, c.m, x.get(), c.bias ? bias.get() : nullptr, nullptr, generator() % 2, y.get(),
                 parallel);
  std::vector<double> want(size_t(c.m * c.n)), magnitude(want);
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const int64_t m = i / c.n, n = i % c.n;
    double sum = c.bias ? read(bias, c.dtype, n) : 0, absolute = std::fabs(sum);
    for (int64_t k = 0; k < c.k; ++k) {
      const double product = read(x, c.dtype, m * c.k + k) * w[size_t(n * c.k + k)];
      sum += product, absolute += std::fabs(product);
    }
    want[size_t(i)] = sum, magnitude[size_t(i)] = absolute;
  }
  if (compare("linear", c, y, want, magnitude)) return 1;
  if (run_adapter(kernels, c, base, x, c.bias ? &bias : nullptr, want, magnitude, parallel)) return 1;

  Bytes dy(size_t(c.m * c.n) * width(c.dtype)), dx(size_t(c.m * c.k) * width(c.dtype));
  for (int64_t i = 0; i < c.m * c.n; ++i) write_small(dy, c.dtype, i);
  kernels.linear_dx(base, c.dtype, c.m, dy.get(), nullptr, generator() % 2, dx.get(), parallel);
  const Sums dx_want = product(
      c.m, c.n, c.k, 1.0, [&](int64_t m, int64_t n) { return read(dy, c.dtype, m * c.n + n); },
      [&](int64_t n, int64_t k) { return w[size_t(n * c.k + k)]; });
  if (compare("linear_dx", c, dx, dx_want.value, dx_want.magnitude)) return 1;
  if (run_gradient(kernels, c, base, w, x, dy, parallel)) return 1;
  if (run_weight_norm(kernels, c, weight, dense, parallel)) return 1;
  if (run_row_scale_gradient(kernels, c, dy, y, c.bias ? &bias : nullptr, parallel)) return 1;
  if (run_bottleneck(kernels, c, parallel)) return 1;
  const RandomParts random(c.n);
  if (run_multi(kernels, c, {&nf4, &values, nullptr}, w, x, dy, c.bias ? &bias : nullptr, random.get(), parallel))
    return 1;
  return run_conversions(kernels, c);
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// The larger of a and |b|; NaN if either is.
float larger(float a, float b) { return std::isnan(a) || std::fabs(b) <= a ? a : std::fabs(b); }

// The nested codes of a weight's scales, some of them not finite, to the bit.
int check_scales(const Kernels& kernels, const Case& c, const Bytes& absmax, const Parallel& parallel) {
  const int64_t blocks = int64_t(absmax.size()) / 4, runs = (blocks + 255) / 256;
  const float offset = 0.75f;
  Bytes codes(static_cast<size_t>(blocks)), nested(size_t(4 * runs));
  kernels.nf4_quantize_scales(blocks, absmax.get(), offset, codes.get(), nested.get(), parallel);
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t end = std::min(256 * run + 256, blocks);
    float largest = 0, got;
    for (int64_t i = 256 * run; i < end; ++i)
      largest = larger(largest, float(read(absmax, Dtype::kFloat32, i)) - offset);
    std::memcpy(&got, nested.get() + 4 * run, 4);
    if (!same(got, largest)) return fail("nf4_quantize_scales, nested", c, run, got, largest);
    for (int64_t i = 256 * run; i < end; ++i) {
      const float scaled = (float(read(absmax, Dtype::kFloat32, i)) - offset) * (1 / std::max(largest, 0x1p-126f));
      int level = 255;
      for (int j = 0; j < 255; ++j) level -= scaled <= (peftrt::dynamic_code(j) + peftrt::dynamic_code(j + 1)) / 2;
      if (codes.get()[i] != level) return fail("nf4_quantize_scales", c, i, codes.get()[i], level);
    }
  }
  return 0;
}

// Codes and scales to the bit, of weights among which some are not finite.
int run_quantize(const Kernels& kernels, const Case& c) {
  const int64_t numel = c.n * c.k, blocks = (numel + c.block_size - 1) / c.block_size;
  Bytes weight(size_t(numel) * width(c.dtype)), codes(size_t(numel + 1) / 2), absmax(size_t(4 * blocks));
  const uint64_t wild = generator() % 4 == 0 ? 40 : 0;  // one in so many weights is any bits at all
  for (int64_t i = 0; i < numel; ++i) {
    write_small(weight, c.dtype, i);
    const uint64_t bits = generator();
    if (wild != 0 && bits % wild == 0) std::memcpy(weight.get() + size_t(i) * width(c.dtype), &bits, width(c.dtype));
  }
  const Parallel parallel = {int(generator() % 2 + 1), run_threads};
  kernels.nf4_quantize(c.dtype, numel, c.block_size, weight.get(), codes.get(), absmax.get(), parallel);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * c.block_size, end = std::min(start + c.block_size, numel);
    float largest = 0, got;
    for (int64_t i = start; i < end; ++i) largest = larger(largest, float(read(weight, c.dtype, i)));
    std::memcpy(&got, absmax.get() + 4 * block, 4);
    if (!same(got, largest)) return fail("nf4_quantize, scales", c, block, got, largest);
    const float reciprocal = 1 / std::max(largest, 0x1p-126f);  // NaN where largest is
    for (int64_t i = start; i < end; ++i) {
      const float scaled = float(read(weight, c.dtype, i)) * reciprocal;
      int level = 15;
      for (int j = 0; j < 15; ++j) level -= scaled <= (peftrt::kNf4[j] + peftrt::kNf4[j + 1]) / 2;
      const int code = peftrt::nibble(codes.get(), i);
      if (code != level) return fail("nf4_quantize", c, i, code, level);
    }
  }
  if (numel % 2 && peftrt::nibble(codes.get(), numel) != 7)
    return fail("nf4_quantize, the odd half", c, numel, peftrt::nibble(codes.get(), numel), 7);
  return check_scales(kernels, c, absmax, parallel);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const Kernels* kernels = peftrt::cpu::kernels_for(argv[1]);
  if (kernels == nullptr) return 3;
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10), count = std::strtoull(argv[3], nullptr, 10);
  for (uint64_t i = 0; i < count; ++i) {
    generator.seed(seed + i);
    Case c;
    c.dtype = Dtype(generator() % 3);
    c.m = pick({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, 23, 33});
    c.n = pick({0, 1, 2, 5, 8, 12, 23, 25, 40, 97});
    c.k = pick({0, 1, 2, 3, 31, 33, 63, 64, 65, 96, 127, 128, 130, 192, 255, 256, 257, 320, 512, 576});
    if (generator() % 16 == 0) (generator() % 2 ? c.n : c.k) = 521 + int64_t(generator() % 64);
    if (generator() % 16 == 0) {
      if (generator() % 2) {  // several tiles of rows, several chunks of N
        c.m = 34 + int64_t(generator() % 37), c.n = pick({25, 97, 130});
      } else {  // several slices and panels of K
        c.m = pick({1, 2, 3, 4, 8, 9, 17}), c.n = pick({1, 5, 17, 33});
        c.k = generator() % 2 ? 64 * pick({17, 33, 64, 65, 70}) : 577 + int64_t(generator() % 3924);
      }
    }
    c.block_size = 32 << generator() % 8;
    c.nested = generator() % 2;
    c.bias = generator() % 2;
    if (run_case(*kernels, c) || run_quantize(*kernels, c) || run_optimizer(*kernels))
      return std::printf("seed %lu\n", static_cast<unsigned long>(seed + i)), 1;
  }
  std::printf("%lu cases, %s\n", static_cast<unsigned long>(count), kernels->isa);
  return 0;
}
