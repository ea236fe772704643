// The codebooks where a GPU can index them, and a block's scale.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "nf4.h"

namespace peftrt::cuda {

struct Nf4Levels {
  float value[16];
};
static constexpr Nf4Levels make_nf4_levels() {
  Nf4Levels made = {};
  for (int i = 0; i < 16; ++i) made.value[i] = kNf4[i];
  return made;
}
static PEFTRT_TABLE Nf4Levels kDeviceNf4 = make_nf4_levels();
static PEFTRT_TABLE DynamicCodebook kDeviceDynamic = make_dynamic_codebook();

PEFTRT_DEVICE float load_float(const uint8_t* bytes, int64_t index) {
  return reinterpret_cast<const float*>(bytes)[index];
}

// A scale as it is stored, so that it can be asked for long before it is needed.
struct StoredScale {
  uint32_t absmax;      // the code, or the bits of the scale
  float nested_absmax;  // unused where not nested
};
PEFTRT_DEVICE StoredScale load_scale(const Scales& scales, int64_t block) {
  if (scales.nested_absmax == nullptr) return {float_bits(load_float(scales.absmax, block)), 0.0f};
  return {scales.absmax[block], load_float(scales.nested_absmax, block / kNestedBlock)};
}

// `dynamic`: the 256 levels of the 8-bit map. Two roundings, never one.
PEFTRT_DEVICE float decode_scale(const Scales& scales, StoredScale stored, float offset, const float* dynamic) {
  if (scales.nested_absmax == nullptr) return bits_float(stored.absmax);
  return add(multiply(dynamic[stored.absmax], stored.nested_absmax), offset);
}

PEFTRT_DEVICE float load_offset(const Scales& scales) {
  return scales.nested_absmax == nullptr ? 0.0f : load_float(scales.nested_offset, 0);
}

}  // namespace peftrt::cuda
