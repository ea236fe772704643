// What the functions of both bindings check their arguments with.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "dtype.h"

namespace {

using peftrt::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

extern const char kLibrary[];  // what errors begin with: each binding's own

void check(bool condition, const char* op, const char* argument, const char* expected) {
  STD_TORCH_CHECK(condition, kLibrary, op, ": ", argument, " must be ", expected);
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

void check_block_size(int64_t block_size, const char* op) {
  check(block_size >= 32 && block_size <= 65536 && (block_size & (block_size - 1)) == 0, op, "block_size",
        "a power of two from 32 to 65536");
}

}  // namespace
