// The CPU functions as torch sees them, in namespace peftrt_cpu: checks, pointers, and nothing else.
//
// Built on torch's stable ABI. All tensors are contiguous; `out` is allocated by the caller and written whole. Python
// checks its arguments with better words; what stands here keeps a bad call from reading or writing out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <string>

#include "cpu/kernels.h"
#include "nf4.h"

namespace {

using peftrt::cpu::Dtype;
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

// torch's own threads, so that torch.set_num_threads is obeyed and no second pool competes with them.
Parallel parallel() {
  const auto run = [](int64_t tasks, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {int(torch::stable::get_num_threads()), run};
}

void nf4_dequantize(Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_offset, int64_t block_size, Tensor out) {
  const char* op = "nf4_dequantize";
  check_dense(out, op, "out");
  const Dtype dtype = dtype_of(out, op, "out");
  const Weight weight = weight_of(op, codes, absmax, nested_absmax, nested_offset, block_size, 1, out.numel());
  peftrt::cpu::kernels().nf4_dequantize(weight, dtype, out.mutable_data_ptr(), parallel());
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
                                      static_cast<uint8_t*>(absmax.mutable_data_ptr()), parallel());
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
                                             static_cast<uint8_t*>(nested_absmax.mutable_data_ptr()), parallel());
}

// a [m, a_width] times the weight -> out [m, out_width], both contiguous and of one dtype.
Dtype check_product(const char* op, const char* argument, const Tensor& a, const Tensor& out) {
  check_dense(a, op, argument);
  check_dense(out, op, "out");
  check(a.dim() == 2, op, argument, "two-dimensional");
  check(out.dim() == 2 && out.size(0) == a.size(0), op, "out", "two-dimensional, with as many rows as the input");
  check(out.scalar_type() == a.scalar_type(), op, "out", "of the input's dtype");
  return dtype_of(a, op, argument);
}

void nf4_linear(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                std::optional<Tensor> nested_offset, int64_t block_size, std::optional<Tensor> bias, Tensor out) {
  const char* op = "nf4_linear";
  const Dtype dtype = check_product(op, "x", x, out);
  const int64_t n = out.size(1), k = x.size(1);
  const Weight weight = weight_of(op, codes, absmax, nested_absmax, nested_offset, block_size, n, k);
  if (bias) {
    check_dense(*bias, op, "bias");
    check(bias->numel() == n && bias->scalar_type() == x.scalar_type(), op, "bias", "[N], of x's dtype");
  }
  peftrt::cpu::kernels().nf4_linear(weight, dtype, x.size(0), x.const_data_ptr(),
                                    bias ? bias->const_data_ptr() : nullptr, out.mutable_data_ptr(), parallel());
}

void nf4_linear_dx(Tensor dy, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                   std::optional<Tensor> nested_offset, int64_t block_size, Tensor out) {
  const char* op = "nf4_linear_dx";
  const Dtype dtype = check_product(op, "dy", dy, out);
  const Weight weight = weight_of(op, codes, absmax, nested_absmax, nested_offset, block_size, dy.size(1), out.size(1));
  peftrt::cpu::kernels().nf4_linear_dx(weight, dtype, dy.size(0), dy.const_data_ptr(), out.mutable_data_ptr(),
                                       parallel());
}

void dropout(Tensor x, int64_t seed, double p, Tensor out) {
  const char* op = "dropout";
  check_dense(x, op, "x");
  check_dense(out, op, "out");
  check(out.numel() == x.numel() && out.scalar_type() == x.scalar_type(), op, "out", "of x's size and dtype");
  check(p >= 0.0 && p < 1.0, op, "p", "in [0, 1)");
  const double threshold = std::nearbyint(p * 4294967296.0);
  check(threshold < 4294967296.0, op, "p", "at most 1 - 2^-32");
  peftrt::cpu::kernels().dropout(dtype_of(x, op, "x"), x.numel(), uint64_t(seed), uint32_t(threshold), float(1.0 - p),
                                 x.const_data_ptr(), out.mutable_data_ptr(), parallel());
}

std::string isa() { return peftrt::cpu::kernels().isa; }

}  // namespace

#define PEFTRT_WEIGHT "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int block_size"

STABLE_TORCH_LIBRARY(peftrt_cpu, m) {
  m.def("nf4_dequantize(" PEFTRT_WEIGHT ", Tensor(a!) out) -> ()");
  m.def("nf4_quantize(Tensor weight, int block_size, Tensor(a!) codes, Tensor(b!) absmax) -> ()");
  m.def("nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor(a!) codes, Tensor(b!) nested_absmax) -> ()");
  m.def("nf4_linear(Tensor x, " PEFTRT_WEIGHT ", Tensor? bias, Tensor(a!) out) -> ()");
  m.def("nf4_linear_dx(Tensor dy, " PEFTRT_WEIGHT ", Tensor(a!) out) -> ()");
  m.def("dropout(Tensor x, int seed, float p, Tensor(a!) out) -> ()");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cpu, CPU, m) {
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_quantize_scales", TORCH_BOX(&nf4_quantize_scales));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear));
  m.impl("nf4_linear_dx", TORCH_BOX(&nf4_linear_dx));
  m.impl("dropout", TORCH_BOX(&dropout));
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
