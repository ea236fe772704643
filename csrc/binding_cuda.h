// What the functions of binding_cuda.cpp share: the call's device and stream, and a weight's tensors as pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "binding.h"
#include "cuda/kernels.h"
#include "nf4.h"

namespace {

using peftrt::cuda::Adapters;
using peftrt::cuda::Linear;
using peftrt::cuda::Scales;
using torch::headeronly::IntHeaderOnlyArrayRef;

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

}  // namespace
