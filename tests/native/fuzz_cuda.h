// What the programs that check the CUDA kernels share: memory, cases, weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "cuda_emulator/cuda/device.h"
#include "nf4.h"

namespace fuzz {

namespace cpu = peftrt::cpu;
namespace cuda = peftrt::cuda;
using peftrt::Dtype;

extern std::mt19937_64 generator;

inline int64_t pick(std::initializer_list<int64_t> values) { return values.begin()[generator() % values.size()]; }

// `size` bytes behind `skip` others, at the end of a heap block that starts at a multiple of 16.
class Bytes {
 public:
  explicit Bytes(int64_t size, int64_t skip = 0) : block_(new uint8_t[size_t(size + skip)]), size_(size), skip_(skip) {
    std::memset(block_.get(), 0xff, size_t(size + skip));
  }
  uint8_t* get() const { return block_.get() + skip_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(get());
  }
  int64_t size() const { return size_; }
  void randomise() const {
    for (int64_t i = 0; i < size_; ++i) get()[i] = uint8_t(generator());
  }

 private:
  std::unique_ptr<uint8_t[]> block_;
  int64_t size_, skip_;
};

struct Case {
  Dtype dtype;
  int64_t m, n, k;
  int shift;
  bool nested, bias;
  int64_t skip_codes, skip_floats;  // bytes, and elements, by which addresses are crooked
};

inline int64_t width(const Case& c) { return c.dtype == Dtype::kFloat32 ? 4 : 2; }

inline float read(const Case& c, const uint8_t* bytes, int64_t i) {
  if (c.dtype == Dtype::kFloat32) return reinterpret_cast<const float*>(bytes)[i];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(bytes)[i];
  return c.dtype == Dtype::kBFloat16 ? emulator::bf16_to_float(bits) : emulator::fp16_to_float(bits);
}

inline void write(const Case& c, const Bytes& bytes, int64_t i, float value) {
  if (c.dtype == Dtype::kFloat32) bytes.as<float>()[i] = value;
  if (c.dtype != Dtype::kFloat32)
    bytes.as<uint16_t>()[i] =
        c.dtype == Dtype::kBFloat16 ? emulator::float_to_bf16(value) : emulator::float_to_fp16(value);
}

inline float rounded(const Case& c, float value) {
  const Bytes one(4);
  write(c, one, 0, value);
  return read(c, one.get(), 0);
}

inline float normal() { return std::normal_distribution<float>()(generator); }

inline int fail(const char* what, const Case& c, int64_t i, double got, double want) {
  std::printf(
      "%s: dtype %d M %ld N %ld K %ld G %d nested %d bias %d skip %ld %ld on %d: element %ld is %.9g, not %.9g\n", what,
      int(c.dtype), long(c.m), long(c.n), long(c.k), 1 << c.shift, c.nested, c.bias, long(c.skip_codes),
      long(c.skip_floats), emulator::multiprocessors, long(i), got, want);
  return 1;
}

inline int failed(const char* what, const char* error) { return error ? (std::printf("%s: %s\n", what, error), 1) : 0; }

inline void run_serially(int64_t tasks, cpu::Parallel::Body body, void* context) { body(0, tasks, context); }
inline const cpu::Parallel kSerial = {1, run_serially};

// A weight of random codes and scales of either sign.
struct Weight {
  Bytes codes, absmax, nested, offset;
  explicit Weight(const Case& c)
      : codes((c.n * c.k + 1) / 2, c.skip_codes),
        absmax(blocks(c) * (c.nested ? 1 : 4)),
        nested((blocks(c) + 255) / 256 * 4),
        offset(4) {
    codes.randomise();
    absmax.randomise();
    for (int64_t i = 0; !c.nested && i < blocks(c); ++i) absmax.as<float>()[i] = normal();
    for (int64_t i = 0; i < nested.size() / 4; ++i) nested.as<float>()[i] = normal();
    *offset.as<float>() = normal();
  }
  static int64_t blocks(const Case& c) { return (c.n * c.k + (int64_t(1) << c.shift) - 1) >> c.shift; }
  cuda::Scales scales(const Case& c) const {
    return {absmax.get(), c.nested ? nested.get() : nullptr, offset.get(), c.shift};
  }
  // As the CPU decodes it.
  void decode(const Case& c, Dtype dtype, void* out) const {
    const cpu::Weight weight = {codes.get(), absmax.get(), c.nested ? nested.get() : nullptr, *offset.as<float>(), c.n,
                                c.k,         1 << c.shift};
    cpu::kernels_for("portable")->nf4_dequantize(weight, dtype, out, kSerial);
  }
};

// A random call of multi_lora_linear, checked; 1 where something is wrong.
int run_multi_lora();

}  // namespace fuzz
