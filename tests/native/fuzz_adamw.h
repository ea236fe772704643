// The optimizer's kernels against a scalar answer to the bit: parameters, gradients and pages of state of random sizes
// at odd addresses, some of the values any bits at all.
#pragma once

#include "adamw_state.h"
#include "fuzz_values.h"

namespace {

using peftrt::kStateBlock;
using peftrt::StateAt;
using peftrt::cpu::AdamwStep;
using peftrt::cpu::Kernels;

struct Tensors {
  Dtype dtype;
  int bits;
  int64_t page_bytes;
  std::vector<int64_t> sizes, addresses, chunks, chunks_of_norm;  // chunks as the kernels take them
  std::vector<Bytes> params, grads;
  std::vector<float> hyper;
  int64_t pages = 0;

  // Tensors one behind the other, each from a block on, cut where pages and chunks end.
  void lay_out(int64_t most) {
    const int64_t room = peftrt::state_capacity(page_bytes, bits);
    int64_t used = room;
    for (size_t t = 0; t < sizes.size(); ++t)
      for (int64_t first = 0; first < sizes[t];) {
        if (used == room) ++pages, used = 0;
        const int64_t count = std::min({most, sizes[t] - first, room - used});
        for (const int64_t value : {int64_t(t), first, count, (pages - 1) * page_bytes, used}) chunks.push_back(value);
        for (const int64_t value : {int64_t(t), first, count}) chunks_of_norm.push_back(value);
        first += count, used += (count + kStateBlock - 1) / kStateBlock * kStateBlock;
      }
  }
};

float get_float(const uint8_t* from) {
  float value;
  std::memcpy(&value, from, 4);
  return value;
}
void put_float(uint8_t* to, float value) { std::memcpy(to, &value, 4); }

void fill(const Bytes& bytes, Dtype dtype, uint64_t wild) {
  for (int64_t i = 0; i < int64_t(bytes.size() / width(dtype)); ++i) {
    write_small(bytes, dtype, i);
    const uint64_t any = generator();
    if (wild != 0 && any % wild == 0) std::memcpy(bytes.get() + size_t(i) * width(dtype), &any, width(dtype));
  }
}

Tensors random_tensors(uint64_t wild) {
  Tensors made;
  made.dtype = Dtype(generator() % 3), made.bits = generator() % 2 ? 32 : 8;
  const int64_t blocks = pick({1, 2, 3, 7, 20}), waste = 16 * pick({0, 0, 1, 3});
  made.page_bytes = (blocks * (made.bits == 32 ? 2048 : 520) + 15) / 16 * 16 + waste;
  for (int64_t t = pick({0, 1, 2, 5}); t > 0; --t) {
    const int64_t size = pick({1, 2, 7, 8, 9, 16, 31, 33, 255, 256, 257, 300, 511, 513, 1000, 4096, 4500});
    made.sizes.push_back(size);
    made.params.emplace_back(size_t(size) * width(made.dtype)), fill(made.params.back(), made.dtype, wild);
    made.grads.emplace_back(size_t(size) * width(made.dtype)), fill(made.grads.back(), made.dtype, wild);
    const bool absent = generator() % 5 == 0;
    made.addresses.push_back(reinterpret_cast<int64_t>(made.params.back().get()));
    made.addresses.push_back(absent ? 0 : reinterpret_cast<int64_t>(made.grads.back().get()));
    made.addresses.push_back(int64_t(made.dtype));
    const float beta1 = float(pick({0, 25, 90})) / 100, beta2 = float(pick({0, 50, 99})) / 100;
    for (const float value : {1 - beta1, 1 - beta2, 0.0625f, 1.75f, generator() % 4 ? 1e-8f : 0.0f, 1e-3f})
      made.hyper.push_back(value);
  }
  made.lay_out(kStateBlock * pick({1, 2, 5, 16}));
  return made;
}

// How many of a map's midpoints are below a value, which for a NaN all are not above.
template <class Level>
uint8_t nearest(float scaled, const Level& level) {
  int found = 255;
  for (int j = 0; j < 255; ++j) found -= scaled <= (level(j) + level(j + 1)) / 2;
  return uint8_t(found);
}

float signed_level(int code) { return peftrt::dynamic_code(code); }
float unsigned_level(int code) { return peftrt::kDynamicUnsigned[code]; }

// What a block of a moment is stored as.
template <class Level>
void put_block(const std::vector<float>& values, const Level& level, uint8_t* codes, uint8_t* scale_at) {
  float scale = 0;
  for (const float value : values)
    scale = std::isnan(value) || std::isnan(scale) ? NAN : std::max(scale, std::fabs(value));
  put_float(scale_at, scale);
  for (size_t i = 0; i < values.size(); ++i) codes[i] = nearest(scale == 0 ? 0.0f : values[i] / scale, level);
}

// The same bits, or NaN both.
bool equal(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b)); }

// A chunk's elements, a block at a time: `params` as they are to be, in fp32 before they are rounded, and the state.
void step_by_scalars(const Tensors& tensors, const int64_t* chunk, float coefficient, uint8_t* state,
                     std::vector<float>& params) {
  const int64_t tensor = chunk[0], first = chunk[1], count = chunk[2];
  const float* h = tensors.hyper.data() + 6 * tensor;
  for (int64_t start = 0; start < count; start += kStateBlock) {
    const StateAt at(state + chunk[3], tensors.page_bytes, tensors.bits, chunk[4] + start);
    std::vector<float> moments[2];
    for (int64_t i = 0; i < std::min(kStateBlock, count - start); ++i) {
      const bool wide = tensors.bits == 32;
      float m = wide ? get_float(at.exp_avg + 4 * i) : signed_level(at.exp_avg[i]) * get_float(at.exp_avg_scale);
      float v =
          wide ? get_float(at.exp_avg_sq + 4 * i) : unsigned_level(at.exp_avg_sq[i]) * get_float(at.exp_avg_sq_scale);
      const float p = float(read(tensors.params[size_t(tensor)], tensors.dtype, first + start + i));
      const float g = float(read(tensors.grads[size_t(tensor)], tensors.dtype, first + start + i)) * coefficient;
      m = m + h[0] * (g - m), v = v + h[1] * (g * g - v);
      params[size_t(first + start + i)] = p - (h[5] * p + h[2] * (m / (std::sqrt(v) * h[3] + h[4])));
      if (wide) put_float(at.exp_avg + 4 * i, m), put_float(at.exp_avg_sq + 4 * i, v);
      moments[0].push_back(m), moments[1].push_back(v);
    }
    if (tensors.bits == 32) continue;
    put_block(moments[0], signed_level, at.exp_avg, at.exp_avg_scale);
    put_block(moments[1], unsigned_level, at.exp_avg_sq, at.exp_avg_sq_scale);
  }
}

int fail(const char* what, const Tensors& tensors, int64_t i, double got, double want) {
  std::printf("adamw_step, %s: dtype %d bits %d tensors %ld page %ld: element %ld is %.9g, expected %.9g\n", what,
              int(tensors.dtype), tensors.bits, long(tensors.sizes.size()), long(tensors.page_bytes), long(i), got,
              want);
  return 1;
}

// Every byte of the state is looked at: what no chunk names must be as it was.
int compare_state(const Tensors& tensors, const Bytes& got, const std::vector<uint8_t>& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (got.get()[i] == want[i]) continue;
    const size_t page = size_t(tensors.page_bytes), codes = size_t(2 * peftrt::state_capacity(tensors.page_bytes, 8));
    const size_t word = i - i % page % 4;  // pages, and what lies in front of floats, are of 4 bytes
    const bool is_float = tensors.bits == 32 || i % page >= codes;
    if (is_float && equal(get_float(got.get() + word), get_float(want.data() + word))) continue;
    return fail("state", tensors, int64_t(i), got.get()[i], want[i]);
  }
  return 0;
}

int run_adamw_step(const Kernels& kernels, const Tensors& tensors, uint64_t wild, const Parallel& parallel) {
  Bytes state(size_t(tensors.pages * tensors.page_bytes));
  for (int64_t i = 0; i < int64_t(state.size() / 4); ++i) {
    put_float(state.get() + 4 * i, float(generator() % 1000) / 64);
    if (tensors.bits == 8 && i % (tensors.page_bytes / 4) < tensors.page_bytes / 8) {  // codes, most of them
      const uint64_t any = generator();
      std::memcpy(state.get() + 4 * i, &any, 4);
    }
    if (wild != 0 && generator() % wild == 0) put_float(state.get() + 4 * i, NAN);
  }
  std::vector<uint8_t> want(state.get(), state.get() + state.size());
  std::vector<std::vector<float>> params;
  for (size_t t = 0; t < tensors.sizes.size(); ++t) {
    params.emplace_back();
    for (int64_t i = 0; i < tensors.sizes[t]; ++i)
      params[t].push_back(float(read(tensors.params[t], tensors.dtype, i)));
  }
  const float coefficient = generator() % 2 ? 1.0f : 0.3f;
  const int64_t count = int64_t(tensors.chunks.size()) / 5;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* chunk = tensors.chunks.data() + 5 * i;
    if (tensors.addresses[size_t(3 * chunk[0] + 1)] != 0)
      step_by_scalars(tensors, chunk, coefficient, want.data(), params[size_t(chunk[0])]);
  }
  kernels.adamw_step({tensors.dtype, tensors.bits, tensors.page_bytes, state.get(), count, tensors.chunks.data(),
                      tensors.addresses.data(), tensors.hyper.data(), coefficient},
                     parallel);
  for (size_t t = 0; t < params.size(); ++t)
    for (int64_t i = 0; i < tensors.sizes[t]; ++i) {
      const double got = read(tensors.params[t], tensors.dtype, i);
      const float full = params[t][size_t(i)];
      // what overflows in fp16 is infinite
      double expected = std::isfinite(full) ? rounded(full, tensors.dtype) : full;
      if (tensors.dtype == Dtype::kFloat16 && std::fabs(expected) > 65504) expected = std::copysign(INFINITY, full);
      if (!equal(float(got), float(expected))) return fail("parameter", tensors, i, got, expected);
    }
  return compare_state(tensors, state, want);
}

int run_gradient_norm(const Kernels& kernels, const Tensors& tensors, const Parallel& parallel) {
  const auto fold = [](std::vector<double> lanes) {
    for (size_t half = lanes.size() / 2; half > 0; half /= 2)
      for (size_t l = 0; l < half; ++l) lanes[l] += lanes[half + l];
    return lanes[0];
  };
  const int64_t count = int64_t(tensors.chunks_of_norm.size()) / 3;
  std::vector<double> partials(size_t(count), -1.0), all(1024);
  float out[3] = {-1, -1, -1};
  kernels.gradient_norm(tensors.addresses.data(), tensors.chunks_of_norm.data(), count, partials.data(), 0.75, out,
                        parallel);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* chunk = tensors.chunks_of_norm.data() + 3 * i;
    std::vector<double> lanes(256);
    for (int64_t j = 0; j < chunk[2] && tensors.addresses[size_t(3 * chunk[0] + 1)] != 0; ++j) {
      const double value = read(tensors.grads[size_t(chunk[0])], tensors.dtype, chunk[1] + j);
      lanes[size_t(j % 256)] += value * value;
    }
    const double want = fold(lanes), got = partials[size_t(i)];
    if (!(got == want || (std::isnan(got) && std::isnan(want)))) return fail("norm of a chunk", tensors, i, got, want);
    all[size_t(i % 1024)] += want;
  }
  const double norm = std::sqrt(fold(all)), ratio = 1 / (norm + 1e-6) * 0.75;
  const float want[3] = {float(norm), ratio > 1 ? 1.0f : float(ratio), -1};
  for (int i = 0; i < 3; ++i)
    if (!equal(out[i], want[i])) return fail("norm", tensors, i, out[i], want[i]);
  return 0;
}

int run_optimizer(const Kernels& kernels) {
  const uint64_t wild = generator() % 3 == 0 ? 60 : 0;  // one in so many values is any bits at all
  const Tensors tensors = random_tensors(wild);
  const Parallel parallel = {int(generator() % 2 + 1), run_threads};
  return run_gradient_norm(kernels, tensors, parallel) || run_adamw_step(kernels, tensors, wild, parallel);
}

}  // namespace
