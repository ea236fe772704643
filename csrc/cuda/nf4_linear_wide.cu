// nf4_linear for 33 to 512 rows of x where the device has warpgroups: which instance, and how it is cut.
#include "cuda/wide_kernel.h"

namespace peftrt::cuda {

namespace {

struct Cut {
  WideLayout layout;
  int64_t tiles;
  Schedule schedule;
  int64_t words() const { return tiles * layout.warps; }
};

const char* cut(const Linear& linear, Cut* made) {
  int count = 0;
  if (const char* error = multiprocessors(&count)) return error;
  const WideLayout layout = wide_layout(wide_tokens(linear.m));
  const int64_t tokens = (linear.m + layout.tokens - 1) / layout.tokens;
  const int64_t tiles = (linear.n + layout.rows - 1) / layout.rows * tokens;
  *made = {layout, tiles, Schedule::of(tiles, (linear.k + kWideColumns - 1) / kWideColumns, count)};
  return nullptr;
}

template <class T, int kTokens>
const char* run(const Product& product, const Cut& made, bool whole, void* stream) {
  const auto kernel = whole ? wide_kernel<T, kTokens, 64> : wide_kernel<T, kTokens, 32>;
  return launch(kernel, made.schedule.blocks, made.layout.threads, made.layout.size, stream, product);
}

template <class T>
const char* run(const Product& product, const Cut& made, bool whole, void* stream) {
  return made.layout.tokens == 64 ? run<T, 64>(product, made, whole, stream)
                                  : run<T, 128>(product, made, whole, stream);
}

}  // namespace

const char* wide_exists(bool* exists) {
  return takes_threads(wide_kernel<Bf16, 128, 64>, wide_layout(128).threads, exists);
}

const char* wide_workspace(const Linear& linear, int64_t* bytes) {
  Cut made = {};
  const char* error = cut(linear, &made);
  const int64_t parts = 2 * int64_t(made.schedule.blocks), sums = int64_t(made.layout.rows) * made.layout.tokens;
  *bytes = words_bytes(made.words()) + parts * sums * int64_t(sizeof(float));
  return error;
}

const char* wide_linear(const Linear& linear, uint64_t ticket, void* workspace, void* stream) {
  Cut made = {};
  if (const char* error = cut(linear, &made)) return error;
  const Product product = product_of(linear, made.schedule, made.words(), ticket, workspace);
  const bool whole = linear.k % 64 == 0 && linear.scales.shift >= 6;  // units of 64 columns have one scale
  return linear.dtype == Dtype::kBFloat16 ? run<Bf16>(product, made, whole, stream)
                                          : run<Fp16>(product, made, whole, stream);
}

}  // namespace peftrt::cuda
