// The CPU functions as torch sees them, in namespace peftrt_cpu: checks, pointers, and nothing else.
//
// Built on torch's stable ABI. Where a function takes `out`, all its tensors are contiguous and `out` is written whole.
// Python checks its arguments with better words; what stands here keeps a bad call from reading or writing out of
// bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "nf4.h"

namespace {

using peftrt::cpu::Dropout;
using peftrt::cpu::Dtype;
using peftrt::cpu::LowRank;
using peftrt::cpu::LowRankGradient;
using peftrt::cpu::Parallel;
using peftrt::cpu::Weight;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool condition, const char* op, const char* argument, const char* expected) {
  STD_TORCH_CHECK(condition, "peftrt_cpu::", op, ": ", argument, " must be ", expected);
}

Dtype dtype_of(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      check(false, op, argument, "float32, bfloat16 or float16");
  }
  return Dtype::kFloat32;
}

void check_dense(const Tensor& tensor, const char* op, const char* argument) {
  check(tensor.is_cpu() && tensor.is_contiguous(), op, argument, "a contiguous CPU tensor");
}

void check_block_size(int64_t block_size, const char* op) {
  check(block_size >= 32 && block_size <= 65536 && (block_size & (block_size - 1)) == 0, op, "block_size",
        "a power of two from 32 to 65536");
}

const uint8_t* bytes_of(const Tensor& tensor, int64_t count, const char* op, const char* argument) {
  check_dense(tensor, op, argument);
  check(tensor.scalar_type() == ScalarType::Byte, op, argument, "uint8");
  STD_TORCH_CHECK(tensor.numel() == count, "peftrt_cpu::", op, ": ", argument, " must have ", count, " bytes, got ",
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

void nf4_dequantize(Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_offset, int64_t block_size, Tensor out) {
  const char* op = "nf4_dequantize";
  check_dense(out, op, "out");
  const Dtype dtype = dtype_of(out, op, "out");
  const Weight weight = weight_of(op, codes, absmax, nested_absmax, nested_offset, block_size, 1, out.numel());
  peftrt::cpu::kernels().nf4_dequantize(weight, dtype, out.mutable_data_ptr(), parallel(4 * out.numel()));
}

void nf4_quantize(Tensor weight, int64_t block_size, Tensor codes, Tensor absmax) {
  const char* op = "nf4_quantize";
  check_dense(weight, op, "weight");
  const Dtype dtype = dtype_of(weight, op, "weight");
  check_block_size(block_size, op);
  const int64_t numel = weight.numel(), blocks = (numel + block_size - 1) / block_size;
  bytes_of(codes, (numel + 1) / 2, op, "codes");
  bytes_of(absmax, 4 * blocks, op, "absmax");
  peftrt::cpu::kernels().nf4_quantize(dtype, numel, int(block_size), weight.const_data_ptr(),
                                      static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                      static_cast<uint8_t*>(absmax.mutable_data_ptr()), parallel(4 * numel));
}

void nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor codes, Tensor nested_absmax) {
  const char* op = "nf4_quantize_scales";
  const int64_t blocks = codes.numel(), runs = (blocks + peftrt::kNestedBlock - 1) / peftrt::kNestedBlock;
  float mean;
  std::memcpy(&mean, bytes_of(offset, 4, op, "offset"), 4);
  const uint8_t* scales = bytes_of(absmax, 4 * blocks, op, "absmax");
  bytes_of(codes, blocks, op, "codes");
  bytes_of(nested_absmax, 4 * runs, op, "nested_absmax");
  peftrt::cpu::kernels().nf4_quantize_scales(blocks, scales, mean, static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                             static_cast<uint8_t*>(nested_absmax.mutable_data_ptr()),
                                             parallel(4 * blocks));
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

void linear(const char* op, const Tensor& x, const Tensor& codes, const Tensor& absmax,
            const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_offset, int64_t block_size,
            const std::optional<Tensor>& bias, const LowRank* adapter, const Tensor& out) {
  const Product product = check_product(op, "x", x, out);
  const int64_t n = out.size(-1), k = x.size(-1);
  const Weight weight = weight_of(op, codes, absmax, nested_absmax, nested_offset, block_size, n, k);
  if (bias) {
    check_dense(*bias, op, "bias");
    check(bias->dim() == 1 && bias->numel() == n && bias->scalar_type() == x.scalar_type(), op, "bias",
          "[N], of x's dtype");
  }
  const int64_t rank = adapter == nullptr ? 0 : adapter->rank;
  const int64_t work = (4 + product.rows) * n * k + product.rows * (n + k) * rank;
  peftrt::cpu::kernels().nf4_linear(weight, product.dtype, product.rows, x.const_data_ptr(),
                                    bias ? bias->const_data_ptr() : nullptr, adapter, out.mutable_data_ptr(),
                                    parallel(work));
}

void nf4_linear_out(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_offset, int64_t block_size, std::optional<Tensor> bias, Tensor out) {
  linear("nf4_linear", x, codes, absmax, nested_absmax, nested_offset, block_size, bias, nullptr, out);
}

void linear_dx(const char* op, const Tensor& dy, const Tensor& codes, const Tensor& absmax,
               const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_offset,
               int64_t block_size, const LowRankGradient* adapter, const Tensor& out) {
  const Product product = check_product(op, "dy", dy, out);
  const int64_t n = dy.size(-1), k = out.size(-1);
  const Weight weight = weight_of(op, codes, absmax, nested_absmax, nested_offset, block_size, n, k);
  const int64_t rank = adapter == nullptr ? 0 : adapter->rank;
  const int64_t work = (4 + product.rows) * n * k + product.rows * k * rank;
  peftrt::cpu::kernels().nf4_linear_dx(weight, product.dtype, product.rows, dy.const_data_ptr(), adapter,
                                       out.mutable_data_ptr(), parallel(work));
}

void nf4_linear_dx_out(Tensor dy, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                       std::optional<Tensor> nested_offset, int64_t block_size, Tensor out) {
  linear_dx("nf4_linear_dx", dy, codes, absmax, nested_absmax, nested_offset, block_size, nullptr, out);
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

// The same with any strides and a result of their own: what the operations call.
Tensor nf4_linear(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                  std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size,
                  std::optional<Tensor> bias) {
  Tensor out = empty_product("nf4_linear", "x", x, k, n);
  nf4_linear_out(dense(x), dense(codes), dense(absmax), dense(nested_absmax), dense(nested_offset), block_size,
                 dense(bias), out);
  return out;
}

// Beside y, in fp32, x A^T (of `dropped`, which is what the adapter sees of x, where it is given).
std::tuple<Tensor, Tensor> nf4_lora_linear(Tensor x, std::optional<Tensor> dropped, Tensor codes, Tensor absmax,
                                           std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_offset,
                                           int64_t n, int64_t k, int64_t block_size, Tensor lora_A, Tensor lora_B,
                                           double scaling, std::optional<Tensor> bias) {
  const char* op = "nf4_lora_linear";
  check(lora_A.is_cpu() && lora_A.dim() == 2 && lora_A.size(1) == k, op, "lora_A", "[R, K] on the CPU");
  const int64_t rank = lora_A.size(0);
  check(lora_B.is_cpu() && lora_B.dim() == 2 && lora_B.size(0) == n && lora_B.size(1) == rank, op, "lora_B",
        "[N, R] on the CPU");
  Tensor out = empty_product(op, "x", x, k, n), xa = empty_product(op, "x", x, k, rank, ScalarType::Float);
  if (dropped) {
    check(dropped->is_cpu() && dropped->scalar_type() == ScalarType::Float && dropped->dim() == x.dim(), op, "dropped",
          "float32, of x's shape");
    for (int64_t i = 0; i < x.dim(); ++i) check(dropped->size(i) == x.size(i), op, "dropped", "float32, of x's shape");
  }
  const Tensor a = dense(lora_A), b = dense(lora_B);
  const std::optional<Tensor> seen = dense(dropped);
  LowRank adapter = {};
  adapter.rank = rank;
  adapter.a_dtype = dtype_of(a, op, "lora_A");
  adapter.b_dtype = dtype_of(b, op, "lora_B");
  adapter.a = a.const_data_ptr();
  adapter.b = b.const_data_ptr();
  adapter.dropped = seen ? static_cast<const float*>(seen->const_data_ptr()) : nullptr;
  adapter.scaling = float(scaling);
  adapter.xa = static_cast<float*>(xa.mutable_data_ptr());
  linear(op, dense(x), dense(codes), dense(absmax), dense(nested_absmax), dense(nested_offset), block_size, dense(bias),
         &adapter, out);
  return {out, xa};
}

Tensor nf4_linear_dx(Tensor dy, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                     std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size) {
  Tensor out = empty_product("nf4_linear_dx", "dy", dy, n, k);
  nf4_linear_dx_out(dense(dy), dense(codes), dense(absmax), dense(nested_absmax), dense(nested_offset), block_size,
                    out);
  return out;
}

Dropout dropout_of(const char* op, int64_t seed, double p) {
  check(p >= 0.0 && p < 1.0, op, "p", "in [0, 1)");
  const double threshold = std::nearbyint(p * 4294967296.0);
  check(threshold < 4294967296.0, op, "p", "at most 1 - 2^-32");
  return {uint64_t(seed), uint32_t(threshold), float(1.0 - p)};
}

void dropout(Tensor x, int64_t seed, double p, Tensor out) {
  const char* op = "dropout";
  check_dense(x, op, "x");
  check_dense(out, op, "out");
  check(out.numel() == x.numel() && out.scalar_type() == x.scalar_type(), op, "out", "of x's size and dtype");
  peftrt::cpu::kernels().dropout(dtype_of(x, op, "x"), x.numel(), dropout_of(op, seed, p), x.const_data_ptr(),
                                 out.mutable_data_ptr(), parallel(8 * x.numel()));
}

// g = scaling * dy B, dA = g^T drop(x) and dB = scaling * dy^T xa, in fp32; a seed where something was dropped. dA and
// dB are empty where they are not wanted.
std::tuple<Tensor, Tensor, Tensor> low_rank_gradient(Tensor dy, Tensor x, Tensor xa, Tensor lora_B, double scaling,
                                                     std::optional<int64_t> seed, double p, bool needs_da,
                                                     bool needs_db) {
  const char* op = "low_rank_gradient";
  check(lora_B.is_cpu() && lora_B.dim() == 2, op, "lora_B", "[N, R] on the CPU");
  const int64_t n = lora_B.size(0), rank = lora_B.size(1);
  check(x.is_cpu() && x.dim() >= 1, op, "x", "[..., K] on the CPU");
  const int64_t k = x.size(-1);
  check(dy.is_cpu() && dy.dim() == x.dim() && dy.size(-1) == n && dy.scalar_type() == x.scalar_type(), op, "dy",
        "[..., N], of x's dtype and dimensions");
  check(xa.is_cpu() && xa.dim() == x.dim() && xa.size(-1) == rank && xa.scalar_type() == ScalarType::Float, op, "xa",
        "float32 [..., R], of x's dimensions");
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    check(dy.size(i) == x.size(i) && xa.size(i) == x.size(i), op, "dy and xa", "of as many rows as x");
    m *= x.size(i);
  }
  const Tensor rows_dy = dense(dy), rows_x = dense(x), rows_xa = dense(xa), b = dense(lora_B);
  Tensor g = torch::stable::new_empty(xa, {m, rank}), da = torch::stable::new_empty(xa, {needs_da ? rank : 0, k}),
         db = torch::stable::new_empty(xa, {needs_db ? n : 0, rank});
  const Dropout dropout = seed ? dropout_of(op, *seed, p) : Dropout{};
  LowRankGradient adapter = {};
  adapter.rank = rank;
  adapter.b_dtype = dtype_of(b, op, "lora_B");
  adapter.b = b.const_data_ptr();
  adapter.dropout = seed ? &dropout : nullptr;
  adapter.scaling = float(scaling);
  adapter.g = static_cast<float*>(g.mutable_data_ptr());
  peftrt::cpu::kernels().low_rank_gradient(dtype_of(x, op, "x"), m, n, k, rows_dy.const_data_ptr(),
                                           rows_x.const_data_ptr(), static_cast<const float*>(rows_xa.const_data_ptr()),
                                           adapter, needs_da ? static_cast<float*>(da.mutable_data_ptr()) : nullptr,
                                           needs_db ? static_cast<float*>(db.mutable_data_ptr()) : nullptr,
                                           parallel(m * (n + needs_da * k + needs_db * n) * rank));
  return {g, da, db};
}

// dX of an NF4 base and an adapter whose g [M, R] the function above has computed.
Tensor nf4_lora_linear_dx(Tensor dy, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                          std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size, Tensor g,
                          Tensor lora_A, std::optional<int64_t> seed, double p) {
  const char* op = "nf4_lora_linear_dx";
  check(lora_A.is_cpu() && lora_A.dim() == 2 && lora_A.size(1) == k, op, "lora_A", "[R, K] on the CPU");
  const int64_t rank = lora_A.size(0);
  Tensor out = empty_product(op, "dy", dy, n, k);
  check_dense(g, op, "g");
  check(g.scalar_type() == ScalarType::Float && g.dim() == 2 && g.size(1) == rank && g.size(0) * k == out.numel(), op,
        "g", "float32 [M, R]");
  const Tensor a = dense(lora_A);
  const Dropout dropout = seed ? dropout_of(op, *seed, p) : Dropout{};
  LowRankGradient adapter = {};
  adapter.rank = rank;
  adapter.a_dtype = dtype_of(a, op, "lora_A");
  adapter.a = a.const_data_ptr();
  adapter.dropout = seed ? &dropout : nullptr;
  adapter.g = static_cast<float*>(g.mutable_data_ptr());
  linear_dx(op, dense(dy), dense(codes), dense(absmax), dense(nested_absmax), dense(nested_offset), block_size,
            &adapter, out);
  return out;
}

std::string isa() { return peftrt::cpu::kernels().isa; }

}  // namespace

#define PEFTRT_WEIGHT "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "

STABLE_TORCH_LIBRARY(peftrt_cpu, m) {
  m.def("nf4_dequantize(" PEFTRT_WEIGHT "int block_size, Tensor(a!) out) -> ()");
  m.def("nf4_quantize(Tensor weight, int block_size, Tensor(a!) codes, Tensor(b!) absmax) -> ()");
  m.def("nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor(a!) codes, Tensor(b!) nested_absmax) -> ()");
  m.def("nf4_linear(Tensor x, " PEFTRT_WEIGHT "int n, int k, int block_size, Tensor? bias) -> Tensor");
  m.def("nf4_linear.out(Tensor x, " PEFTRT_WEIGHT "int block_size, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("nf4_lora_linear(Tensor x, Tensor? dropped, " PEFTRT_WEIGHT
        "int n, int k, int block_size, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias) -> (Tensor, Tensor)");
  m.def("nf4_linear_dx(Tensor dy, " PEFTRT_WEIGHT "int n, int k, int block_size) -> Tensor");
  m.def("nf4_linear_dx.out(Tensor dy, " PEFTRT_WEIGHT "int block_size, Tensor(a!) out) -> ()");
  m.def(
      "low_rank_gradient(Tensor dy, Tensor x, Tensor xa, Tensor lora_B, float scaling, int? seed, float p, "
      "bool needs_da, bool needs_db) -> (Tensor, Tensor, Tensor)");
  m.def("nf4_lora_linear_dx(Tensor dy, " PEFTRT_WEIGHT
        "int n, int k, int block_size, Tensor g, Tensor lora_A, int? seed, float p) -> Tensor");
  m.def("dropout(Tensor x, int seed, float p, Tensor(a!) out) -> ()");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cpu, CPU, m) {
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_quantize_scales", TORCH_BOX(&nf4_quantize_scales));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear));
  m.impl("nf4_linear.out", TORCH_BOX(&nf4_linear_out));
  m.impl("nf4_lora_linear", TORCH_BOX(&nf4_lora_linear));
  m.impl("nf4_linear_dx", TORCH_BOX(&nf4_linear_dx));
  m.impl("nf4_linear_dx.out", TORCH_BOX(&nf4_linear_dx_out));
  m.impl("low_rank_gradient", TORCH_BOX(&low_rank_gradient));
  m.impl("nf4_lora_linear_dx", TORCH_BOX(&nf4_lora_linear_dx));
  m.impl("dropout", TORCH_BOX(&dropout));
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
