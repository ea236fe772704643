// nf4_linear: which kernel, how that for a few rows of x is cut, and the one for weights whose rows lie crookedly.
#include <algorithm>

#include "cuda/linear_any.h"
#include "cuda/linear_kernel.h"
#include "cuda/wide_layout.h"

namespace peftrt::cuda {

namespace {

template <class T>
PEFTRT_KERNEL void PEFTRT_BOUNDS(256, 4) linear_any(Product p) {
  const AnyRows rows(p);
  if (rows.n >= p.n) return;
  float sums[kAnyRows];
  sum_any<T>(p, rows, sums);
  const float bias = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[rows.n]);
#pragma unroll
  for (int j = 0; j < kAnyRows; ++j)
    if (thread_index() % 32 == 0 && rows.first + j < p.m)
      static_cast<T*>(p.y)[(rows.first + j) * p.n + rows.n] = {uint16_t(pack<T>(add(sums[j], bias), 0.0f))};
}

template <class T, int kTiles, int kUnit>
const char* run_instance(const Product& product, int arch, void* stream) {
  const int shared = linear_layout(arch, kTiles).size;
  return launch(linear_kernel<T, kTiles, kUnit>, product.schedule.blocks, kLinearThreads, shared, stream, product);
}

template <class T, int kUnit>
const char* run_tiles(const Product& product, int arch, void* stream) {
  if (product.m <= 8) return run_instance<T, 1, kUnit>(product, arch, stream);
  if (product.m <= 16) return run_instance<T, 2, kUnit>(product, arch, stream);
  if (product.m <= 32) return run_instance<T, 4, kUnit>(product, arch, stream);
  // With 64 sums a lane, the other instance spills registers; scales are nothing beside its products.
  return run_instance<T, 8, 32>(product, arch, stream);
}

template <class T>
const char* run_any(const Linear& linear, void* stream) {
  return launch(linear_any<T>, any_blocks(linear), 256, 0, stream, product_of(linear, {}, 0, 0, nullptr));
}

template <class T>
const char* run_straight(const Linear& linear, uint64_t ticket, void* workspace, void* stream) {
  int count = 0, arch = 0;
  if (const char* error = multiprocessors(&count)) return error;
  if (const char* error = architecture(linear_kernel<T, 1, 64>, &arch)) return error;
  const Schedule schedule = linear_schedule(linear.n, linear.k, count);
  const bool whole = linear.k % 64 == 0 && linear.scales.shift >= 6;
  // A device of little shared memory takes the rows a few at a time, and reads the weight as often.
  const int64_t most = 8 * most_tiles(arch);
  for (int64_t m = 0; m < linear.m; m += most) {
    Linear part = linear;
    part.m = std::min(most, linear.m - m);
    part.x = static_cast<const T*>(linear.x) + m * linear.k;
    part.y = static_cast<T*>(linear.y) + m * linear.n;
    const Product product = product_of(part, schedule, tiles_of(linear.n), ticket, workspace);
    const char* error = whole ? run_tiles<T, 64>(product, arch, stream) : run_tiles<T, 32>(product, arch, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

template <class T>
const char* run(const Linear& linear, uint64_t ticket, void* workspace, void* stream) {
  // No column at all: the straight kernel would have no step, and y is the bias.
  if (linear.k == 0 || !straight(linear)) return run_any<T>(linear, stream);
  return run_straight<T>(linear, ticket, workspace, stream);
}

// Whether the kernel of nf4_linear_wide.cu takes a product. At 32 rows and fewer the other has fewer wavefronts of
// shared memory: 176 for 64 x 64 weights and 32 rows, to 197.
const char* goes_wide(const Linear& linear, bool* wide) {
  *wide = false;
  return linear.m > 32 && linear.k > 0 && straight(linear) ? wide_exists(wide) : nullptr;
}

}  // namespace

const char* nf4_linear_rows(int64_t* rows) {
  bool wide = false;
  const char* error = wide_exists(&wide);
  *rows = wide ? kWideRows : kSmallRows;
  return error;
}

const char* nf4_linear_workspace(const Linear& linear, int64_t* bytes) {
  *bytes = 0;
  if (linear.m == 0 || linear.n == 0 || linear.k == 0 || !straight(linear)) return nullptr;
  bool wide = false;
  if (const char* error = goes_wide(linear, &wide)) return error;
  if (wide) return wide_workspace(linear, bytes);
  int count = 0;
  if (const char* error = multiprocessors(&count)) return error;
  const int64_t parts = 2 * int64_t(linear_schedule(linear.n, linear.k, count).blocks);
  *bytes = words_bytes(tiles_of(linear.n)) + parts * kTileRows * linear.m * int64_t(sizeof(float));
  return nullptr;
}

const char* nf4_linear(const Linear& linear, uint64_t ticket, void* workspace, void* stream) {
  if (linear.m == 0 || linear.n == 0) return nullptr;
  bool wide = false;
  if (const char* error = goes_wide(linear, &wide)) return error;
  if (wide) return wide_linear(linear, ticket, workspace, stream);
  return linear.dtype == Dtype::kBFloat16 ? run<Bf16>(linear, ticket, workspace, stream)
                                          : run<Fp16>(linear, ticket, workspace, stream);
}

}  // namespace peftrt::cuda
