// The CUDA functions as torch sees them, in namespace peftrt_cuda, with the schemas of peftrt_cpu: checks, pointers,
// and nothing else.
//
// Built on torch's stable ABI. Every launch is on the current stream of its tensors' device; nothing waits, memory
// comes from torch, and so all of it can be captured in a graph. Python checks its arguments with better words; what
// stands here keeps a bad call from reading or writing out of bounds.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "binding.h"
#include "cuda/kernels.h"
#include "nf4.h"

namespace {

using peftrt::cuda::Linear;
using peftrt::cuda::Scales;

const char kLibrary[] = "peftrt_cuda::";

void check_launch(const char* error, const char* op) { STD_TORCH_CHECK(error == nullptr, kLibrary, op, ": ", error); }

// Of a call: the device of its first tensor, which becomes the current one, and what is to lie on it.
class Call {
 public:
  Call(const char* op, const Tensor& first) : op_(op), device_(device_of(op, first)), guard_(device_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }

  const char* op() const { return op_; }
  void* stream() const { return stream_; }

  void check_here(const Tensor& tensor, const char* argument) const {
    check(tensor.is_cuda() && tensor.get_device_index() == device_, op_, argument, "on the device of the others");
  }
  void check_dense(const Tensor& tensor, const char* argument) const {
    check_here(tensor, argument);
    check(tensor.is_contiguous(), op_, argument, "contiguous");
  }

  // The tensor, or a copy of it that is contiguous and starts at a multiple of `alignment` bytes.
  Tensor dense(const Tensor& tensor, const char* argument, size_t alignment) const {
    check_here(tensor, argument);
    const Tensor whole = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    const bool aligned = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % alignment == 0;
    return aligned ? whole : torch::stable::clone(whole);
  }

  // uint8 of `count` elements.
  Tensor bytes(const Tensor& tensor, int64_t count, const char* argument, size_t alignment = 1) const {
    check(tensor.scalar_type() == ScalarType::Byte, op_, argument, "uint8");
    STD_TORCH_CHECK(tensor.numel() == count, kLibrary, op_, ": ", argument, " must have ", count, " bytes, got ",
                    tensor.numel());
    return dense(tensor, argument, alignment);
  }
  uint8_t* bytes_out(const Tensor& tensor, int64_t count, const char* argument, size_t alignment = 1) const {
    check_dense(tensor, argument);
    check(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment == 0, op_, argument, "aligned to 4 bytes");
    bytes(tensor, count, argument);
    return static_cast<uint8_t*>(tensor.mutable_data_ptr());
  }

 private:
  static int32_t device_of(const char* op, const Tensor& first) {
    STD_TORCH_CHECK(first.is_cuda(), kLibrary, op, ": every tensor must be on one CUDA device");
    return first.get_device_index();
  }

  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

const uint8_t* pointer(const Tensor& tensor) { return static_cast<const uint8_t*>(tensor.const_data_ptr()); }

int shift_of(int64_t block_size, const char* op) {
  check_block_size(block_size, op);
  return __builtin_ctz(unsigned(block_size));
}

// A weight's tensors, kept while its kernels are launched (the allocator keeps their memory for the stream's work).
struct Weight {
  std::vector<Tensor> kept;
  const uint8_t* codes;
  Scales scales;
};
Weight weight_of(const Call& call, const Tensor& codes, const Tensor& absmax,
                 const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_offset,
                 int64_t block_size, int64_t numel, size_t alignment = 1) {
  const int shift = shift_of(block_size, call.op());
  check(nested_absmax.has_value() == nested_offset.has_value(), call.op(), "nested_offset",
        "given exactly when nested_absmax is");
  const int64_t blocks = (numel + block_size - 1) / block_size;
  Weight weight = {};
  weight.kept.push_back(call.bytes(codes, (numel + 1) / 2, "codes", alignment));
  weight.kept.push_back(call.bytes(absmax, nested_absmax ? blocks : 4 * blocks, "absmax", nested_absmax ? 1 : 4));
  if (nested_absmax) {
    const int64_t runs = (blocks + peftrt::kNestedBlock - 1) / peftrt::kNestedBlock;
    weight.kept.push_back(call.bytes(*nested_absmax, 4 * runs, "nested_absmax", 4));
    weight.kept.push_back(call.bytes(*nested_offset, 4, "nested_offset", 4));
    weight.scales.nested_absmax = pointer(weight.kept[2]);
    weight.scales.nested_offset = pointer(weight.kept[3]);
  }
  weight.codes = pointer(weight.kept[0]);
  weight.scales.absmax = pointer(weight.kept[1]);
  weight.scales.shift = shift;
  return weight;
}

void nf4_dequantize(Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_offset, int64_t block_size, Tensor out) {
  const Call call("nf4_dequantize", out);
  call.check_dense(out, "out");
  const Dtype dtype = dtype_of(out, call.op(), "out");
  const Weight weight = weight_of(call, codes, absmax, nested_absmax, nested_offset, block_size, out.numel());
  check_launch(peftrt::cuda::nf4_dequantize(weight.codes, weight.scales, out.numel(), dtype, out.mutable_data_ptr(),
                                            call.stream()),
               call.op());
}

void nf4_quantize(Tensor weight, int64_t block_size, Tensor codes, Tensor absmax) {
  const Call call("nf4_quantize", weight);
  call.check_dense(weight, "weight");
  const int shift = shift_of(block_size, call.op());
  const int64_t numel = weight.numel(), blocks = (numel + block_size - 1) / block_size;
  uint8_t* packed = call.bytes_out(codes, (numel + 1) / 2, "codes");
  uint8_t* scales = call.bytes_out(absmax, 4 * blocks, "absmax", 4);
  check_launch(peftrt::cuda::nf4_quantize(dtype_of(weight, call.op(), "weight"), weight.const_data_ptr(), numel, shift,
                                          packed, reinterpret_cast<float*>(scales), call.stream()),
               call.op());
}

void nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor codes, Tensor nested_absmax) {
  const Call call("nf4_quantize_scales", absmax);
  const int64_t blocks = codes.numel(), runs = (blocks + peftrt::kNestedBlock - 1) / peftrt::kNestedBlock;
  const Tensor scales = call.bytes(absmax, 4 * blocks, "absmax", 4), mean = call.bytes(offset, 4, "offset", 4);
  uint8_t* packed = call.bytes_out(codes, blocks, "codes");
  uint8_t* nested = call.bytes_out(nested_absmax, 4 * runs, "nested_absmax", 4);
  check_launch(peftrt::cuda::nf4_quantize_scales(reinterpret_cast<const float*>(pointer(scales)), blocks,
                                                 reinterpret_cast<const float*>(pointer(mean)), packed,
                                                 reinterpret_cast<float*>(nested), call.stream()),
               call.op());
}

// Never the same twice in a process, and seldom in two that use one device.
uint64_t next_ticket() {
  static std::atomic<uint64_t> last(uint64_t(std::random_device{}()) << 16);
  return ++last;
}

Tensor nf4_linear(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                  std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size,
                  std::optional<Tensor> bias) {
  const Call call("nf4_linear", x);
  check(x.dim() >= 1 && x.size(-1) == k, call.op(), "x", "[..., K]");
  check(n >= 0 && n < 1LL << 31 && k < 1LL << 31, call.op(), "weight", "of less than 2^31 rows and columns");
  std::vector<int64_t> sizes(size_t(x.dim()), n);
  Linear linear = {};
  linear.dtype = dtype_of(x, call.op(), "x");
  linear.m = 1, linear.n = n, linear.k = k;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) linear.m *= sizes[size_t(i)] = x.size(i);
  check(linear.dtype != Dtype::kFloat32, call.op(), "x", "bfloat16 or float16");
  int64_t most = 0;
  check_launch(peftrt::cuda::nf4_linear_rows(&most), call.op());
  STD_TORCH_CHECK(linear.m <= most, "peftrt_cuda::nf4_linear: x must be of at most ", most, " rows, got ", linear.m);
  const Tensor rows = call.dense(x, "x", 16);
  // Codes that lie crookedly are copied: that takes less time than the kernel for them, and keeps the bits.
  const Weight weight =
      weight_of(call, codes, absmax, nested_absmax, nested_offset, block_size, n * k, k % 32 == 0 ? 16 : 1);
  std::optional<Tensor> added;
  if (bias) {
    check(bias->dim() == 1 && bias->numel() == n && bias->scalar_type() == x.scalar_type(), call.op(), "bias",
          "[N], of x's dtype");
    added = call.dense(*bias, "bias", 2);
  }
  Tensor y = torch::stable::new_empty(x, sizes);
  linear.codes = weight.codes;
  linear.scales = weight.scales;
  linear.x = rows.const_data_ptr();
  linear.bias = added ? added->const_data_ptr() : nullptr;
  linear.y = y.mutable_data_ptr();
  int64_t bytes = 0;
  check_launch(peftrt::cuda::nf4_linear_workspace(linear, &bytes), call.op());
  // Given back when this returns: the allocator hands it to later work of the same stream only.
  Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  check_launch(peftrt::cuda::nf4_linear(linear, next_ticket(), workspace.mutable_data_ptr(), call.stream()), call.op());
  return y;
}

// How many rows of x nf4_linear takes on a device.
int64_t nf4_linear_rows(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  int64_t rows = 0;
  check_launch(peftrt::cuda::nf4_linear_rows(&rows), "nf4_linear_rows");
  return rows;
}

std::string sm() { return PEFTRT_CUDA_ARCHS; }

}  // namespace

#define PEFTRT_WEIGHT "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "

STABLE_TORCH_LIBRARY(peftrt_cuda, m) {
  m.def("nf4_dequantize(" PEFTRT_WEIGHT "int block_size, Tensor(a!) out) -> ()");
  m.def("nf4_quantize(Tensor weight, int block_size, Tensor(a!) codes, Tensor(b!) absmax) -> ()");
  m.def("nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor(a!) codes, Tensor(b!) nested_absmax) -> ()");
  m.def("nf4_linear(Tensor x, " PEFTRT_WEIGHT "int n, int k, int block_size, Tensor? bias) -> Tensor");
  m.def("nf4_linear_rows(int device) -> int");
  m.def("sm() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cuda, CUDA, m) {
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_quantize_scales", TORCH_BOX(&nf4_quantize_scales));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear));
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cuda, CompositeExplicitAutograd, m) {
  m.impl("nf4_linear_rows", TORCH_BOX(&nf4_linear_rows));
  m.impl("sm", TORCH_BOX(&sm));
}
