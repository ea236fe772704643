// A bottleneck adapter and its gradients against a scalar answer, of every activation.
#pragma once

#include "fuzz_values.h"

namespace {

using peftrt::cpu::Activation;
using peftrt::cpu::Bottleneck;
using peftrt::cpu::BottleneckGradient;
using peftrt::cpu::Kernels;
using peftrt::cpu::Values;

double logistic(double v) { return 1 / (1 + std::exp(-v)); }
double share_of_gelu_new(double v) { return logistic(2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)); }

double activated(Activation activation, double v) {
  switch (activation) {
    case Activation::kRelu:
      return std::max(v, 0.0);
    case Activation::kGelu:
      return v * std::erfc(-v / std::sqrt(2.0)) / 2;
    case Activation::kGeluNew:
      return v * share_of_gelu_new(v);
    case Activation::kSilu:
      return v * logistic(v);
    case Activation::kTanh:
      return std::tanh(v);
    case Activation::kSigmoid:
      return logistic(v);
    case Activation::kLeakyRelu:
      return v > 0 ? v : 0.01 * v;
  }
  return NAN;
}

// By differences, but where there is a bend: on its lower side.
double slope(Activation activation, double v) {
  if (activation == Activation::kRelu) return v > 0;
  if (activation == Activation::kLeakyRelu) return v > 0 ? 1 : 0.01;
  const double step = 1e-5;
  return (activated(activation, v + step) - activated(activation, v - step)) / (2 * step);
}

Bytes random_values(int64_t size, Dtype dtype) {
  Bytes values(size_t(size) * width(dtype));
  for (int64_t i = 0; i < size; ++i) write_small(values, dtype, i);
  return values;
}

// Of an adapter whose `inner` is what the forward wrote. `wide`: of what is in fp32.
int run_bottleneck_gradient(const Kernels& kernels, const Case& c, const Bytes& x, Bottleneck adapter,
                            const Bytes& inner, const Bytes& up, const Parallel& parallel) {
  const int64_t rank = adapter.rank;
  const Bytes dy = random_values(c.m * c.k, c.dtype);
  Case wide = c;
  wide.dtype = Dtype::kFloat32, wide.n = rank;
  const auto room = [](int64_t size) { return Bytes(size_t(size) * 4); };
  const Bytes g = room(c.m * rank), down = room(rank * c.k), down_bias = room(rank), d_up = room(c.k * rank),
              up_bias = room(c.k);
  BottleneckGradient gradient = {floats(g), floats(down), floats(down_bias), floats(d_up), floats(up_bias)};
  const bool needs_down = generator() % 4, needs_up = generator() % 4;
  if (!needs_down) gradient.down = gradient.down_bias = nullptr;
  if (!needs_up) gradient.up = gradient.up_bias = nullptr;
  kernels.bottleneck_gradient(c.dtype, c.m, dy.get(), x.get(), adapter, gradient, parallel);

  const auto at_inner = [&](int64_t m, int64_t r) { return read(inner, Dtype::kFloat32, m * rank + r); };
  const auto at_dy = [&](int64_t m, int64_t k) { return read(dy, c.dtype, m * c.k + k); };
  Sums g_want = product(c.m, c.k, rank, adapter.scaling, at_dy,
                        [&](int64_t k, int64_t r) { return read(up, adapter.up.dtype, k * rank + r); });
  for (int64_t i = 0; i < c.m * rank; ++i) {
    g_want.value[size_t(i)] *= slope(adapter.activation, read(inner, Dtype::kFloat32, i));
    g_want.magnitude[size_t(i)] *= 1.2;  // no slope is larger
  }
  if (compare("bottleneck, g", wide, g, g_want.value, g_want.magnitude)) return 1;
  // from here on with g as it is: its own error is not the next product's
  const auto transposed_g = [&](int64_t r, int64_t m) { return read(g, Dtype::kFloat32, m * rank + r); };
  const auto one = [](int64_t, int64_t) { return 1.0; };
  const Sums down_want =
      product(rank, c.m, c.k, 1.0, transposed_g, [&](int64_t m, int64_t k) { return read(x, c.dtype, m * c.k + k); });
  if (needs_down && compare("bottleneck, dD", wide, down, down_want.value, down_want.magnitude)) return 1;
  const Sums down_bias_want = product(rank, c.m, 1, 1.0, transposed_g, one);
  if (needs_down && compare("bottleneck, db_d", wide, down_bias, down_bias_want.value, down_bias_want.magnitude))
    return 1;
  const auto transposed_dy = [&](int64_t k, int64_t m) { return at_dy(m, k); };
  const Sums up_want = product(c.k, c.m, rank, adapter.scaling, transposed_dy,
                               [&](int64_t m, int64_t r) { return activated(adapter.activation, at_inner(m, r)); });
  if (needs_up && compare("bottleneck, dU", wide, d_up, up_want.value, up_want.magnitude)) return 1;
  const Sums up_bias_want = product(c.k, c.m, 1, adapter.scaling, transposed_dy, one);
  return needs_up ? compare("bottleneck, db_u", wide, up_bias, up_bias_want.value, up_bias_want.magnitude) : 0;
}

int run_bottleneck(const Kernels& kernels, Case c, const Parallel& parallel) {
  int64_t rank = pick({0, 1, 2, 5, 8, 15, 16, 17, 40, 130, 300});
  if (generator() % 8 == 0) {  // so many rows that a thread takes groups of them
    c.m = 320 + int64_t(generator() % 100), c.k = std::min<int64_t>(c.k, 70);
    rank = std::min<int64_t>(rank, 40);
  }
  const Bytes x = random_values(c.m * c.k, c.dtype);
  const auto dtype = [] { return Dtype(generator() % 3); };
  const Dtype of_down = dtype(), of_down_bias = dtype(), of_up = dtype(), of_up_bias = dtype();
  const Bytes residual = random_values(c.m * c.k, c.dtype), down = random_values(rank * c.k, of_down),
              down_bias = random_values(rank, of_down_bias), up = random_values(c.k * rank, of_up),
              up_bias = random_values(c.k, of_up_bias);
  const Bytes inner(size_t(c.m * rank) * 4), out(size_t(c.m * c.k) * width(c.dtype));
  Bottleneck adapter = {};
  adapter.rank = rank, adapter.k = c.k;
  adapter.down = {of_down, down.get()}, adapter.down_bias = {of_down_bias, down_bias.get()};
  adapter.up = {of_up, up.get()}, adapter.up_bias = {of_up_bias, up_bias.get()};
  adapter.scaling = 0.375f;
  adapter.activation = Activation(generator() % 7);
  adapter.inner = floats(inner);
  kernels.bottleneck(c.dtype, c.m, x.get(), residual.get(), adapter, generator() % 2, out.get(), parallel);

  Case wide = c;
  wide.dtype = Dtype::kFloat32, wide.n = rank;
  Sums inner_want = product(
      c.m, c.k, rank, 1.0, [&](int64_t m, int64_t k) { return read(x, c.dtype, m * c.k + k); },
      [&](int64_t k, int64_t r) { return read(down, of_down, r * c.k + k); });
  for (int64_t i = 0; i < c.m * rank; ++i) {
    const double bias = read(down_bias, of_down_bias, i % rank);
    inner_want.value[size_t(i)] += bias, inner_want.magnitude[size_t(i)] += std::fabs(bias);
  }
  if (compare("bottleneck, inner", wide, inner, inner_want.value, inner_want.magnitude)) return 1;
  // with inner as it is
  Sums want = product(
      c.m, rank, c.k, adapter.scaling,
      [&](int64_t m, int64_t r) { return activated(adapter.activation, read(inner, wide.dtype, m * rank + r)); },
      [&](int64_t r, int64_t k) { return read(up, of_up, k * rank + r); });
  for (int64_t i = 0; i < c.m * c.k; ++i) {
    const double bias = adapter.scaling * read(up_bias, of_up_bias, i % c.k), added = read(residual, c.dtype, i);
    want.value[size_t(i)] += bias + added;
    want.magnitude[size_t(i)] += std::fabs(bias) + std::fabs(added);
  }
  if (compare("bottleneck", c, out, want.value, want.magnitude)) return 1;
  return run_bottleneck_gradient(kernels, c, x, adapter, inner, up, parallel);
}

}  // namespace
