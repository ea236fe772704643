// multi_lora_linear for 64 rows and fewer: the first launch is multi_lora_shrink.cu's, the second is nf4_linear's
// kernel, which adds the adapters' share to its sums (adapter_share.h).
#include <algorithm>

#include "cuda/adapter_share.h"
#include "cuda/linear_any.h"
#include "cuda/linear_kernel.h"

namespace peftrt::cuda {

namespace {

constexpr LinearLayout layout_of(int arch, int tiles) { return linear_layout(arch, tiles, adapter_bytes(tiles)); }
// What does not fit an architecture is not launched there, and need not be compiled.
template <int kTiles>
constexpr bool kFitsMore = layout_of(kArchitecture, kTiles).stages >= 2;
constexpr int most_rows(int arch) {
  int tiles = kMaxTiles;
  while (tiles > 1 && layout_of(arch, tiles).stages < 2) tiles /= 2;
  return 8 * tiles;
}

template <class T, int kTiles, int kUnit>
PEFTRT_KERNEL void PEFTRT_BOUNDS(kLinearThreads, 1)
    multi_linear_kernel(PEFTRT_CONSTANT Product product, PEFTRT_CONSTANT AdapterRows rows) {
  if constexpr (kFitsMore<kTiles>)
    LinearBlock<T, kTiles, kUnit, AdapterShare<T, kTiles>>(product, AdapterShare<T, kTiles>(product, rows)).run();
}

// The share of a row in one output: one lane's.
template <class V>
PEFTRT_DEVICE float share_of(const AdapterRows& r, int64_t row, int slot, int part, int64_t column, bool keeps) {
  const Adapters& of = r.of;
  const int rank = rank_of(of, slot, part);
  const float scaling = scaling_of(of, slot, part);
  const int64_t width = of.part_start[part + 1] - of.part_start[part];
  const V* const B = static_cast<const V*>(of.B);
  float share = -0.0f;
  for (int i = 0; i < rank; ++i) {
    float own = 0.0f;
    for (int chunk = 0; chunk < r.chunks; ++chunk) own = add(own, r.sums[sums_index(r, chunk, row, part) + i]);
    if (keeps) of.xa[(row * of.parts + part) * of.rank + i] = own;
    const int64_t at = of.ranks == nullptr
                           ? (of.part_start[part] + column) * of.rank + i
                           : of.B_pages[page_index(of, slot, part, i / kPageRanks)] + i % kPageRanks * width + column;
    share = fused_multiply_add(multiply(own, scaling), to_float(B[at]), share);
  }
  return share;
}

// For weights whose rows lie crookedly, as linear_any of nf4_linear.cu; the first kAnyRows lanes have a row of x each
// at the end.
template <class T>
PEFTRT_KERNEL void PEFTRT_BOUNDS(256, 2) multi_linear_any(PEFTRT_CONSTANT Product p, PEFTRT_CONSTANT AdapterRows r) {
  const AnyRows rows(p);
  const int lane = thread_index() % 32;
  const int64_t n = rows.n, row = rows.first + lane;
  if (n >= p.n) return;
  float sums[kAnyRows], sum = 0.0f;
  sum_any<T>(p, rows, sums);
#pragma unroll
  for (int j = 0; j < kAnyRows; ++j) sum = lane == j ? sums[j] : sum;
  if (lane >= kAnyRows || row >= p.m) return;
  const int slot = slot_of(r.of, row);
  int part = 0;
  while (r.of.part_start[part + 1] <= n) ++part;
  if (slot >= 0) {
    const int64_t column = n - r.of.part_start[part];
    const bool keeps = r.of.xa != nullptr && column == 0;
    const Dtype dtype = r.of.B_dtype;
    const float share = dtype == Dtype::kFloat32    ? share_of<float>(r, row, slot, part, column, keeps)
                        : dtype == Dtype::kBFloat16 ? share_of<Bf16>(r, row, slot, part, column, keeps)
                                                    : share_of<Fp16>(r, row, slot, part, column, keeps);
    sum = add(sum, share);
  }
  sum = result_of<T>(sum, vector_of(r.of, slot, 1), static_cast<const T*>(p.bias), vector_of(r.of, slot, 2), n);
  static_cast<T*>(p.y)[row * r.y_stride + n] = {uint16_t(pack<T>(sum, 0.0f))};
}

template <class T, int kTiles, int kUnit>
const char* run_instance(const Product& product, const AdapterRows& rows, int arch, void* stream) {
  const int shared = layout_of(arch, kTiles).size;
  return launch(multi_linear_kernel<T, kTiles, kUnit>, product.schedule.blocks, kLinearThreads, shared, stream, product,
                rows);
}

template <class T, int kUnit>
const char* run_tiles(const Product& product, const AdapterRows& rows, int arch, void* stream) {
  if (product.m <= 8) return run_instance<T, 1, kUnit>(product, rows, arch, stream);
  if (product.m <= 16) return run_instance<T, 2, kUnit>(product, rows, arch, stream);
  if (product.m <= 32) return run_instance<T, 4, kUnit>(product, rows, arch, stream);
  return run_instance<T, 8, 32>(product, rows, arch, stream);
}

// Where what lies in the workspace: parts of the base's product, whole tiles of it, the adapters' sums, x with factors.
struct Workspace {
  int64_t base, sums, x, size;
  bool scales_x;
};
const char* cut(const Linear& linear, const Adapters& adapters, Workspace* made) {
  Workspace space = {};
  if (linear.k > 0 && straight(linear)) {
    int count = 0;
    if (const char* error = multiprocessors(&count)) return error;
    const int64_t parts = 2 * int64_t(linear_schedule(linear.n, linear.k, count).blocks);
    const int64_t tile = kTileRows * linear.m * int64_t(sizeof(float));
    space.base = words_bytes(tiles_of(linear.n)) + parts * tile;
    space.sums = space.base + tiles_of(linear.n) * tile;
  }
  const int64_t ranks = int64_t(adapters.parts) * kPageRanks * adapters.pages;
  space.x = space.sums + (chunks_of(linear.k) * linear.m * ranks * int64_t(sizeof(float)) + 15) / 16 * 16;
  space.scales_x = adapters.vector_starts != nullptr;
  space.size = space.x + (space.scales_x ? linear.m * linear.k * 2 : 0);
  *made = space;
  return nullptr;
}

// The base with the adapters' share, for all rows; x is as the base multiplies it.
template <class T>
const char* run(const Linear& linear, const AdapterRows& rows, uint64_t ticket, void* workspace, void* stream) {
  if (linear.k == 0 || !straight(linear)) {
    const Product product = product_of(linear, {}, 0, 0, nullptr);
    return launch(multi_linear_any<T>, any_blocks(linear), 256, 0, stream, product, rows);
  }
  int count = 0, arch = 0;
  if (const char* error = multiprocessors(&count)) return error;
  if (const char* error = architecture(multi_linear_kernel<T, 1, 64>, &arch)) return error;
  const Schedule schedule = linear_schedule(linear.n, linear.k, count);
  const bool whole = linear.k % 64 == 0 && linear.scales.shift >= 6;
  const int64_t most = most_rows(arch);
  for (int64_t m = 0; m < linear.m; m += most) {
    Linear part = linear;
    AdapterRows some = rows;
    part.m = std::min(most, linear.m - m);
    part.x = static_cast<const T*>(linear.x) + m * linear.k;
    part.y = static_cast<T*>(linear.y) + m * rows.y_stride;
    some.first_row = m;
    const Product product = product_of(part, schedule, tiles_of(linear.n), ticket, workspace);
    const char* error =
        whole ? run_tiles<T, 64>(product, some, arch, stream) : run_tiles<T, 32>(product, some, arch, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace

const char* multi_lora_workspace(const Linear& linear, const Adapters& adapters, int64_t* bytes) {
  Workspace space = {};
  const char* error = cut(linear, adapters, &space);
  *bytes = space.size;
  return error;
}

const char* multi_lora_linear(const Linear& linear, const Adapters& adapters, int64_t y_stride, uint64_t ticket,
                              void* workspace, void* stream) {
  if (linear.m == 0 || linear.n == 0) return nullptr;
  if (linear.m > kSmallRows) return "more than 64 rows";
  Workspace space = {};
  if (const char* error = cut(linear, adapters, &space)) return error;
  uint8_t* const bytes = static_cast<uint8_t*>(workspace);
  AdapterRows rows = {};
  rows.of = adapters;
  rows.sums = reinterpret_cast<float*>(bytes + space.sums);
  rows.base = reinterpret_cast<float*>(bytes + space.base);
  rows.rows = linear.m, rows.k = linear.k;
  rows.chunks = chunks_of(linear.k);
  rows.y_stride = y_stride;
  void* const x_out = space.scales_x ? bytes + space.x : nullptr;
  if (const char* error = multi_lora_shrink(linear.dtype, linear.x, x_out, rows, stream)) return error;
  Linear base = linear;
  if (space.scales_x) base.x = x_out;
  return linear.dtype == Dtype::kBFloat16 ? run<Bf16>(base, rows, ticket, workspace, stream)
                                          : run<Fp16>(base, rows, ticket, workspace, stream);
}

}  // namespace peftrt::cuda
