// What the functions of binding_cpu.cpp check and convert their arguments with.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "binding.h"
#include "cpu/kernels.h"
#include "nf4.h"

namespace {

using peftrt::cpu::Dropout;
using peftrt::cpu::LowRank;
using peftrt::cpu::Parallel;
using peftrt::cpu::Weight;
using torch::headeronly::IntHeaderOnlyArrayRef;

const char kLibrary[] = "peftrt_cpu::";

void check_dense(const Tensor& tensor, const char* op, const char* argument) {
  check(tensor.is_cpu() && tensor.is_contiguous(), op, argument, "a contiguous CPU tensor");
}

const uint8_t* bytes_of(const Tensor& tensor, int64_t count, const char* op, const char* argument) {
  check_dense(tensor, op, argument);
  check(tensor.scalar_type() == ScalarType::Byte, op, argument, "uint8");
  STD_TORCH_CHECK(tensor.numel() == count, kLibrary, op, ": ", argument, " must have ", count, " bytes, got ",
                  tensor.numel());
  return static_cast<const uint8_t*>(tensor.const_data_ptr());
}

Weight weight_of(const char* op, const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                 const std::optional<Tensor>& nested_offset, int64_t block_size, int64_t n, int64_t k) {
  check_block_size(block_size, op);
  check(nested_absmax.has_value() == nested_offset.has_value(), op, "nested_offset",
        "given exactly when nested_absmax is");
  const int64_t numel = n * k, blocks = (numel + block_size - 1) / block_size;
  Weight weight = {};
  weight.codes = bytes_of(codes, (numel + 1) / 2, op, "codes");
  weight.absmax = bytes_of(absmax, nested_absmax ? blocks : 4 * blocks, op, "absmax");
  if (nested_absmax) {
    const int64_t runs = (blocks + peftrt::kNestedBlock - 1) / peftrt::kNestedBlock;
    weight.nested_absmax = bytes_of(*nested_absmax, 4 * runs, op, "nested_absmax");
    std::memcpy(&weight.nested_offset, bytes_of(*nested_offset, 4, op, "nested_offset"), 4);
  }
  weight.n = n;
  weight.k = k;
  weight.block_size = int(block_size);
  return weight;
}

// A call of less work than this stays on the caller's thread. Work is counted in multiplications, of which a core does
// 30 in a nanosecond; to decode a weight counts as four. To wake a second thread takes 5 to 10 µs if it spins and 25 to
// 50 if it sleeps (OMP_WAIT_POLICY), so that two threads first win at 30 µs of work and at some 100 (Zen 3, November
// 2026).
constexpr int64_t kAlone = 1 << 20;

// torch's own threads, so that torch.set_num_threads is obeyed and no second pool competes with them.
Parallel parallel(int64_t work) {
  const auto run = [](int64_t tasks, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {work < kAlone ? 1 : int(torch::stable::get_num_threads()), run};
}

// a [..., a_width] times the weight -> out [..., out_width], both contiguous and of one dtype; their dtype and rows.
struct Product {
  Dtype dtype;
  int64_t rows;
};
Product check_product(const char* op, const char* argument, const Tensor& a, const Tensor& out) {
  check_dense(a, op, argument);
  check_dense(out, op, "out");
  check(a.dim() >= 1, op, argument, "[..., features]");
  check(out.scalar_type() == a.scalar_type() && out.dim() == a.dim(), op, "out", "of the input's dtype and dimensions");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < a.dim(); ++i) {
    check(out.size(i) == a.size(i), op, "out", "of the input's shape but for the last dimension");
    rows *= a.size(i);
  }
  return {dtype_of(a, op, argument), rows};
}

void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t n, const Tensor& x) {
  if (!bias) return;
  check_dense(*bias, op, "bias");
  check(bias->dim() == 1 && bias->numel() == n && bias->scalar_type() == x.scalar_type(), op, "bias",
        "[N], of x's dtype");
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

// An empty [..., width] for a product of `a` [..., a_width], of a's dtype unless another is named.
Tensor empty_product(const char* op, const char* argument, const Tensor& a, int64_t a_width, int64_t width,
                     std::optional<ScalarType> dtype = std::nullopt) {
  check(a.is_cpu() && a.dim() >= 1 && a.size(-1) == a_width, op, argument, "[..., features] on the CPU");
  std::vector<int64_t> sizes(size_t(a.dim()), width);
  for (int64_t i = 0; i + 1 < a.dim(); ++i) sizes[size_t(i)] = a.size(i);
  return torch::stable::new_empty(a, sizes, dtype);
}

// Where each part of the outputs ends, of their sizes; one part where none are given.
std::vector<int64_t> ends_of(const char* op, IntHeaderOnlyArrayRef splits, int64_t n) {
  if (splits.empty()) return {n};
  std::vector<int64_t> ends;
  for (const int64_t size : splits) {
    check(size >= 0, op, "splits", "of sizes");
    ends.push_back((ends.empty() ? 0 : ends.back()) + size);
  }
  check(ends.back() == n, op, "splits", "sizes that sum to N");
  return ends;
}

// The rank of a part of an A that has `width` rows.
int64_t rank_of(const char* op, int64_t width, const std::vector<int64_t>& ends) {
  check(width % int64_t(ends.size()) == 0, op, "lora_A", "of as many rows for each part");
  return width / int64_t(ends.size());
}

// An adapter of a base [n, k] as the kernels take it; A and B are contiguous and, as the ends, outlive it.
LowRank low_rank_of(const char* op, const Tensor& a, const Tensor& b, int64_t k, double scaling,
                    const std::vector<int64_t>& ends) {
  check(a.is_cpu() && a.dim() == 2 && a.size(1) == k, op, "lora_A", "[R, K] on the CPU");
  LowRank adapter = {};
  adapter.rank = rank_of(op, a.size(0), ends);
  adapter.parts = {int(ends.size()), ends.data()};
  check(b.is_cpu() && b.dim() == 2 && b.size(0) == ends.back() && b.size(1) == adapter.rank, op, "lora_B",
        "[N, R] on the CPU");
  adapter.a_dtype = dtype_of(a, op, "lora_A");
  adapter.b_dtype = dtype_of(b, op, "lora_B");
  adapter.a = a.const_data_ptr();
  adapter.b = b.const_data_ptr();
  adapter.scaling = float(scaling);
  return adapter;
}

// The values of a contiguous row scale [n], which outlives them; null where there is none.
const float* row_scale_of(const char* op, const std::optional<Tensor>& row_scale, int64_t n) {
  if (!row_scale) return nullptr;
  check_dense(*row_scale, op, "row_scale");
  check(row_scale->dim() == 1 && row_scale->numel() == n && row_scale->scalar_type() == ScalarType::Float, op,
        "row_scale", "float32 [N]");
  return static_cast<const float*>(row_scale->const_data_ptr());
}

Dropout dropout_of(const char* op, int64_t seed, double p) {
  check(p >= 0.0 && p < 1.0, op, "p", "in [0, 1)");
  const double threshold = std::nearbyint(p * 4294967296.0);
  check(threshold < 4294967296.0, op, "p", "at most 1 - 2^-32");
  return {uint64_t(seed), uint32_t(threshold), float(1.0 - p)};
}

}  // namespace
