// One step of AdamW over chunks of many tensors, state and parameters in place; peftrt/ops/_adamw_step.py.
//
// Each operation is rounded to fp32 by itself in the reference's order. 8-bit moments are updated a block at a time in
// L1: decoded, updated, their largest magnitudes found, encoded.
#include "adamw_state.h"
#include "cpu/dynamic_levels.h"
#include "cpu/micro.h"
#include "cpu/parallel.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

// What a tensor is updated with, in every lane.
struct Hyper {
  F one_minus_beta1, one_minus_beta2, step_size, correction, eps, decay, coefficient;

  Hyper(const float* of_tensor, float coefficient)
      : one_minus_beta1(set1(of_tensor[0])),
        one_minus_beta2(set1(of_tensor[1])),
        step_size(set1(of_tensor[2])),
        correction(set1(of_tensor[3])),
        eps(set1(of_tensor[4])),
        decay(set1(of_tensor[5])),
        coefficient(set1(coefficient)) {}
};

PEFTRT_INLINE void update(const Hyper& h, F g, F& p, F& m, F& v) {
  g = mul(g, h.coefficient);
  m = add(m, mul(h.one_minus_beta1, sub(g, m)));
  v = add(v, mul(h.one_minus_beta2, sub(mul(g, g), v)));
  const F change = mul(h.step_size, div(m, add(mul(sqrt(v), h.correction), h.eps)));
  p = sub(p, add(mul(h.decay, p), change));
}

template <class T>
PEFTRT_INLINE void update_lanes(const Hyper& h, T* parameter, const T* grad, float* exp_avg, float* exp_avg_sq) {
  F p = load(parameter), m = loadu(exp_avg), v = loadu(exp_avg_sq);
  update(h, load(grad), p, m, v);
  store(parameter, p), storeu(exp_avg, m), storeu(exp_avg_sq, v);
}

template <class T>
void step_32(const Hyper& hyper, T* parameter, const T* grad, const StateAt& state, int64_t count) {
  const Hyper h = hyper;
  auto *exp_avg = reinterpret_cast<float*>(state.exp_avg), *exp_avg_sq = reinterpret_cast<float*>(state.exp_avg_sq);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) update_lanes(h, parameter + i, grad + i, exp_avg + i, exp_avg_sq + i);
  if (i == count) return;
  T p[kLanes] = {}, g[kLanes] = {};
  float m[kLanes] = {}, v[kLanes] = {};
  const size_t rest = size_t(count - i), bytes = rest * sizeof(T), wide = rest * sizeof(float);
  std::memcpy(p, parameter + i, bytes), std::memcpy(g, grad + i, bytes);
  std::memcpy(m, exp_avg + i, wide), std::memcpy(v, exp_avg_sq + i, wide);
  update_lanes(h, p, g, m, v);
  std::memcpy(parameter + i, p, bytes);
  std::memcpy(exp_avg + i, m, wide), std::memcpy(exp_avg_sq + i, v, wide);
}

// A block of a moment in fp32, on its way from codes to codes.
struct Block {
  alignas(sizeof(F)) float value[kStateBlock];

  void decode(const float* map, const uint8_t* codes, const uint8_t* scale_bytes) {
    const float scale = load_one(reinterpret_cast<const float*>(scale_bytes));
    for (int i = 0; i < kStateBlock; ++i) value[i] = map[codes[i]] * scale;
  }

  // `count` of its elements, and its scale.
  template <class Bins>
  void encode(const Bins& bins, int64_t count, uint8_t* codes, uint8_t* scale_bytes) {
    for (int64_t i = count; i < kStateBlock; ++i) value[i] = 0.0f;  // what stands there is no part of the scale
    F most = zero();
    for (int i = 0; i < kStateBlock; i += kLanes) most = max_magnitude(most, loadu(value + i));
    float scale = largest(most);
    if (scale != scale) scale = __builtin_nanf("");
    store_one(reinterpret_cast<float*>(scale_bytes), scale);
    uint8_t found[kStateBlock];
    nearest_dynamic<kStateBlock>(bins, value, scale == 0.0f ? 1.0f : scale, found);
    std::memcpy(codes, found, size_t(count));
  }
};

// `count` elements from the start of a block, at most the block.
template <class T>
void step_block(const Hyper& hyper, T* parameter, const T* grad, const StateAt& state, int64_t count) {
  const Hyper h = hyper;
  Block m, v;
  m.decode(kDynamic.value, state.exp_avg, state.exp_avg_scale);
  v.decode(kDynamicUnsigned, state.exp_avg_sq, state.exp_avg_sq_scale);
  const size_t bytes = size_t(count) * sizeof(T);
  T p[kStateBlock], g[kStateBlock];
  T* to = parameter;
  if (count < kStateBlock) {
    std::memset(p, 0, sizeof p), std::memset(g, 0, sizeof g);
    std::memcpy(p, parameter, bytes), std::memcpy(g, grad, bytes);
    to = p, grad = g;
  }
  for (int i = 0; i < kStateBlock; i += kLanes) update_lanes(h, to + i, grad + i, m.value + i, v.value + i);
  if (to == p) std::memcpy(parameter, p, bytes);
  m.encode(kSignedBins, count, state.exp_avg, state.exp_avg_scale);
  v.encode(kUnsignedBins, count, state.exp_avg_sq, state.exp_avg_sq_scale);
}

template <class T>
void step_chunks(const AdamwStep& step, int64_t begin, int64_t end) {
  for (const int64_t* chunk = step.chunks + 5 * begin; chunk < step.chunks + 5 * end; chunk += 5) {
    const int64_t tensor = chunk[0], first = chunk[1], count = chunk[2], page = chunk[3], start = chunk[4];
    const int64_t* address = step.addresses + 3 * tensor;
    if (address[1] == 0) continue;
    const Hyper h(step.hyper + 6 * tensor, step.coefficient);
    T* parameter = reinterpret_cast<T*>(address[0]) + first;
    const T* grad = reinterpret_cast<const T*>(address[1]) + first;
    if (step.bits == 32) {
      step_32(h, parameter, grad, StateAt(step.state + page, step.page_bytes, 32, start), count);
      continue;
    }
    for (int64_t i = 0; i < count; i += kStateBlock)
      step_block(h, parameter + i, grad + i, StateAt(step.state + page, step.page_bytes, 8, start + i),
                 min64(kStateBlock, count - i));
  }
}

}  // namespace

void adamw_step(const AdamwStep& step, const Parallel& parallel) {
  for_ranges(parallel, step.count, [&](int64_t begin, int64_t end) {
    switch (step.dtype) {
      case Dtype::kFloat32:
        return step_chunks<float>(step, begin, end);
      case Dtype::kBFloat16:
        return step_chunks<bf16>(step, begin, end);
      case Dtype::kFloat16:
        return step_chunks<fp16>(step, begin, end);
    }
  });
}

}  // namespace peftrt::cpu::PEFTRT_ISA
