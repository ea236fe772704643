// The functions of binding_cpu.cpp that are of bottleneck adapters, and their checks.
#pragma once

#include <tuple>

#include "binding_cpu.h"

namespace {

using peftrt::cpu::Activation;
using peftrt::cpu::Bottleneck;
using peftrt::cpu::BottleneckGradient;
using peftrt::cpu::Values;

Activation activation_of(const char* op, int64_t activation) {
  check(activation >= 0 && activation <= int64_t(Activation::kLeakyRelu), op, "activation", "the number of one");
  return Activation(activation);
}

// An adapter of two layers around an activation, and the tensors that it points to.
class BottleneckOf {
 public:
  BottleneckOf(const char* op, int64_t k, const Tensor& down_weight, const Tensor& down_bias, const Tensor& up_weight,
               const Tensor& up_bias, double scaling, int64_t activation)
      : down_(dense(down_weight)), down_bias_(dense(down_bias)), up_(dense(up_weight)), up_bias_(dense(up_bias)) {
    check(down_.is_cpu() && down_.dim() == 2 && down_.size(1) == k, op, "down_weight", "[R, K] on the CPU");
    const int64_t rank = down_.size(0);
    check(up_.is_cpu() && up_.dim() == 2 && up_.size(0) == k && up_.size(1) == rank, op, "up_weight",
          "[K, R] on the CPU");
    adapter_.rank = rank, adapter_.k = k;
    check(down_bias_.dim() == 1 && down_bias_.numel() == rank, op, "down_bias", "[R]");
    check(up_bias_.dim() == 1 && up_bias_.numel() == k, op, "up_bias", "[K]");
    adapter_.down = values_of(op, "down_weight", down_);
    adapter_.down_bias = values_of(op, "down_bias", down_bias_);
    adapter_.up = values_of(op, "up_weight", up_);
    adapter_.up_bias = values_of(op, "up_bias", up_bias_);
    adapter_.scaling = float(scaling);
    adapter_.activation = activation_of(op, activation);
  }
  BottleneckOf(const BottleneckOf&) = delete;
  BottleneckOf& operator=(const BottleneckOf&) = delete;

  const Bottleneck& get() const { return adapter_; }

 private:
  static Values values_of(const char* op, const char* argument, const Tensor& tensor) {
    check_dense(tensor, op, argument);
    return {dtype_of(tensor, op, argument), tensor.const_data_ptr()};
  }

  Tensor down_, down_bias_, up_, up_bias_;
  Bottleneck adapter_ = {};
};

// residual + s (act(x D^T + b_d) U^T + b_u), and in fp32 x D^T + b_d, which act is applied to.
std::tuple<Tensor, Tensor> bottleneck(Tensor x, Tensor residual, Tensor down_weight, Tensor down_bias, Tensor up_weight,
                                      Tensor up_bias, double scaling, int64_t activation, bool invariant) {
  const char* op = "bottleneck";
  check(x.is_cpu() && x.dim() >= 1, op, "x", "[..., K] on the CPU");
  const int64_t k = x.size(-1), m = check_rows(op, "x", x, k, "residual", residual, k);
  const BottleneckOf adapter(op, k, down_weight, down_bias, up_weight, up_bias, scaling, activation);
  const int64_t rank = adapter.get().rank;
  const Tensor rows = dense(x), added = dense(residual);
  Tensor out = empty_product(op, "x", x, k, k), inner = empty_product(op, "x", x, k, rank, ScalarType::Float);
  Bottleneck call = adapter.get();
  call.inner = static_cast<float*>(inner.mutable_data_ptr());
  peftrt::cpu::kernels().bottleneck(dtype_of(x, op, "x"), m, rows.const_data_ptr(), added.const_data_ptr(), call,
                                    invariant, out.mutable_data_ptr(), parallel(m * k * (2 * rank + 4)));
  return {out, inner};
}

// In fp32, of dy [..., K]: g [M, R], the gradient of `inner`, and those of D, b_d, U and b_u, of which two are empty
// where they are not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_gradient(Tensor dy, Tensor x, Tensor inner,
                                                                       Tensor up_weight, double scaling,
                                                                       int64_t activation, bool needs_down,
                                                                       bool needs_up) {
  const char* op = "bottleneck_gradient";
  check(x.is_cpu() && x.dim() >= 1, op, "x", "[..., K] on the CPU");
  const int64_t k = x.size(-1), m = check_rows(op, "x", x, k, "dy", dy, k);
  check(up_weight.is_cpu() && up_weight.dim() == 2 && up_weight.size(0) == k, op, "up_weight", "[K, R] on the CPU");
  const int64_t rank = up_weight.size(1);
  check(inner.is_cpu() && inner.scalar_type() == ScalarType::Float && inner.dim() >= 1 && inner.size(-1) == rank &&
            inner.numel() == m * rank,
        op, "inner", "float32 [..., R], of x's rows");
  const Tensor rows_dy = dense(dy), rows_x = dense(x), rows_inner = dense(inner), up = dense(up_weight);
  const auto of_size = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(rows_inner, sizes);
  };
  Tensor g = of_size({m, rank}), down = of_size({needs_down ? rank : 0, k}),
         down_bias = of_size({needs_down ? rank : 0}), d_up = of_size({needs_up ? k : 0, rank}),
         up_bias = of_size({needs_up ? k : 0});
  const auto floats = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  Bottleneck adapter = {};
  adapter.rank = rank, adapter.k = k;
  adapter.up = {dtype_of(up, op, "up_weight"), up.const_data_ptr()};
  adapter.scaling = float(scaling);
  adapter.activation = activation_of(op, activation);
  adapter.inner = floats(rows_inner);  // which is only read
  BottleneckGradient gradient = {};
  gradient.g = floats(g);
  if (needs_down) gradient.down = floats(down), gradient.down_bias = floats(down_bias);
  if (needs_up) gradient.up = floats(d_up), gradient.up_bias = floats(up_bias);
  peftrt::cpu::kernels().bottleneck_gradient(dtype_of(x, op, "x"), m, rows_dy.const_data_ptr(), rows_x.const_data_ptr(),
                                             adapter, gradient, parallel(m * k * rank * (1 + needs_down + needs_up)));
  return {g, down, down_bias, d_up, up_bias};
}

}  // namespace
