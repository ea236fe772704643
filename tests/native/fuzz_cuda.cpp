// Random shapes through the CUDA kernels on the emulator: decoding and quantising to the CPU kernels' bytes, the
// product to a double-precision answer.
//
//   fuzz_cuda SEED COUNT
//
// Every buffer is a heap block of exactly its size. tests/test_cuda_emulated.py builds with AddressSanitizer and
// UndefinedBehaviorSanitizer.
#include "fuzz_cuda.h"

namespace emulator {
extern std::mt19937_64 random_order;
}

std::mt19937_64 fuzz::generator;

namespace {

using namespace fuzz;

// But for the bits of a NaN, which are the device's.
int compare_values(const char* what, const Case& c, const Bytes& got, const Bytes& want) {
  for (int64_t i = 0; i < want.size() / width(c); ++i) {
    const float value = read(c, got.get(), i), other = read(c, want.get(), i);
    const bool same = std::memcmp(got.get() + i * width(c), want.get() + i * width(c), size_t(width(c))) == 0;
    if (!same && !(std::isnan(value) && std::isnan(other))) return fail(what, c, i, value, other);
  }
  return 0;
}

int compare_bytes(const char* what, const Case& c, const Bytes& got, const Bytes& want) {
  for (int64_t i = 0; i < want.size(); ++i)
    if (got.get()[i] != want.get()[i]) return fail(what, c, i, got.get()[i], want.get()[i]);
  return 0;
}

// A scale that is any bits at all: infinite scales, of which a level of zero makes NaN, and NaN are among them.
void make_wild(const Bytes& scales) {
  for (int64_t i = 0; i < scales.size() / 4; ++i) {
    const float values[] = {normal(), INFINITY, -INFINITY, NAN, 3e38f, 1e-40f};
    scales.as<float>()[i] = values[generator() % 6];
  }
}

int run_dequantize(const Case& c) {
  const int64_t numel = c.n * c.k;
  const Weight weight(c);
  const bool wild = generator() % 4 == 0;
  if (wild) make_wild(c.nested ? weight.nested : weight.absmax);
  const Bytes want(numel * width(c)), got(numel * width(c), c.skip_floats * width(c));
  weight.decode(c, c.dtype, want.get());
  const char* error = cuda::nf4_dequantize(weight.codes.get(), weight.scales(c), numel, c.dtype, got.get(), nullptr);
  if (failed("nf4_dequantize", error)) return 1;
  return wild ? compare_values("nf4_dequantize, wild", c, got, want) : compare_bytes("nf4_dequantize", c, got, want);
}

// Weights of which some, in some cases, are any bits at all.
int run_quantize(const Case& c) {
  const int64_t numel = c.n * c.k, blocks = Weight::blocks(c), runs = (blocks + 255) / 256;
  const Bytes weight(numel * width(c), c.skip_floats * width(c)), offset(4);
  const uint64_t wild = generator() % 3 == 0 ? 50 : 0;
  for (int64_t i = 0; i < numel; ++i) {
    write(c, weight, i, generator() % 8 ? normal() : float(generator() % 5) - 2);
    const uint64_t bits = generator();
    if (wild && bits % wild == 0) std::memcpy(weight.get() + i * width(c), &bits, size_t(width(c)));
  }
  const Bytes codes((numel + 1) / 2, c.skip_codes), absmax(4 * blocks), nested_codes(blocks), nested(4 * runs);
  const Bytes want_codes(codes.size()), want_absmax(absmax.size()), want_nested_codes(blocks), want_nested(4 * runs);
  *offset.as<float>() = 0.75f;
  const cpu::Kernels& kernels = *cpu::kernels_for("portable");
  kernels.nf4_quantize(c.dtype, numel, 1 << c.shift, weight.get(), want_codes.get(), want_absmax.get(), kSerial);
  kernels.nf4_quantize_scales(blocks, want_absmax.get(), 0.75f, want_nested_codes.get(), want_nested.get(), kSerial);
  if (failed("nf4_quantize",
             cuda::nf4_quantize(c.dtype, weight.get(), numel, c.shift, codes.get(), absmax.as<float>(), nullptr)) ||
      failed("nf4_quantize_scales", cuda::nf4_quantize_scales(absmax.as<float>(), blocks, offset.as<float>(),
                                                              nested_codes.get(), nested.as<float>(), nullptr)))
    return 1;
  return compare_bytes("nf4_quantize, scales", c, absmax, want_absmax) ||
         compare_bytes("nf4_quantize", c, codes, want_codes) ||
         compare_bytes("nf4_quantize_scales, nested", c, nested, want_nested) ||
         compare_bytes("nf4_quantize_scales", c, nested_codes, want_nested_codes);
}

// Whether a product takes the kernel for warpgroups, and whether its sums are scaled, not its weights.
bool straight(const Case& c) { return c.k > 0 && c.k % 32 == 0 && c.skip_codes == 0; }
bool is_wide(const Case& c) { return cuda::kHasWarpgroups && c.m > 32 && straight(c); }

// Squared errors of all products of all cases, by their results' size: the kernel's, and those of a product with the
// weight decoded to 16 bits.
struct Errors {
  double kernel = 0, decoded = 0;
  double ratio() const { return decoded == 0 ? 0 : std::sqrt(kernel / decoded); }
};
Errors errors[2];  // of few rows, and wide

struct Linear {
  const Case& c;
  const Weight& weight;
  const Bytes& x;
  const Bytes& bias;

  // `rows` rows of x from `first` on, with a workspace of any content; twice where a graph would repeat the call.
  int run(int64_t first, int64_t rows, const Bytes& y, bool twice) const {
    const cuda::Linear linear = {c.dtype,
                                 weight.codes.get(),
                                 weight.scales(c),
                                 x.get() + first * c.k * 2,
                                 c.bias ? bias.get() : nullptr,
                                 y.get(),
                                 rows,
                                 c.n,
                                 c.k};
    int64_t size = 0;
    if (failed("nf4_linear_workspace", cuda::nf4_linear_workspace(linear, &size))) return 1;
    const Bytes workspace(size);
    workspace.randomise();
    const uint64_t ticket = generator();
    const char* error = cuda::nf4_linear(linear, ticket, workspace.get(), nullptr);
    if (twice && error == nullptr) {
      std::memset(y.get(), 0xff, size_t(y.size()));
      error = cuda::nf4_linear(linear, ticket, workspace.get(), nullptr);
    }
    return failed("nf4_linear", error);
  }
};

// What the kernel is to compute, but for the order and the rounding of its sums; and what it may miss that by.
int check_linear(const Case& c, const Weight& weight, const Bytes& x, const Bytes& bias, const Bytes& y) {
  std::vector<float> exact(size_t(c.n * c.k)), terms(exact.size()), decoded(exact.size()), input(size_t(c.m * c.k));
  weight.decode(c, Dtype::kFloat32, exact.data());
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    const float value = exact[size_t(i)], level = peftrt::kNf4[peftrt::nibble(weight.codes.get(), i)];
    decoded[size_t(i)] = rounded(c, value);
    // levels are rounded before they are scaled, where the scale is the sums'
    terms[size_t(i)] = !straight(c) ? rounded(c, value) : level == 0 ? 0 : value / level * rounded(c, level);
  }
  for (int64_t i = 0; i < c.m * c.k; ++i) input[size_t(i)] = read(c, x.get(), i);
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const int64_t m = i / c.n, n = i % c.n;
    double want = c.bias ? read(c, bias.get(), n) : 0, size = std::fabs(want), truth = want, usual = want;
    for (int64_t k = 0; k < c.k; ++k) {
      const double factor = input[size_t(m * c.k + k)], whole = exact[size_t(n * c.k + k)] * factor;
      want += terms[size_t(n * c.k + k)] * factor, size += std::fabs(whole), truth += whole;
      usual += decoded[size_t(n * c.k + k)] * factor;
    }
    const double got = read(c, y.get(), i), unit = c.dtype == Dtype::kBFloat16 ? 0x1p-8 : 0x1p-11;
    if (!(std::fabs(got - want) <= 1.02 * unit * std::fabs(want) + 1e-6 * size + 1e-7))
      return fail("nf4_linear", c, i, got, want);
    Errors& of = errors[is_wide(c)];
    of.kernel += std::pow((got - truth) / (size + 1e-6), 2);
    of.decoded += std::pow((rounded(c, float(usual)) - truth) / (size + 1e-6), 2);
  }
  return 0;
}

// Row `m` of y, and row `other` of others.
int compare_row(const char* what, const Case& c, const Bytes& others, int64_t other, const Bytes& y, int64_t m) {
  for (int64_t i = 0; i < c.n; ++i)
    if (std::memcmp(others.get() + 2 * (other * c.n + i), y.get() + 2 * (m * c.n + i), 2) != 0)
      return fail(what, c, i, read(c, others.get(), other * c.n + i), read(c, y.get(), m * c.n + i));
  return 0;
}

// The fewest rows that are summed in the same order.
int64_t fewest_rows(const Case& c) {
  return !is_wide(c) ? 1 : c.m <= 64 ? 33 : std::max<int64_t>(65, (c.m - 1) / 128 * 128 + 1);
}

// Some rows alone have the bits that they have among others; a NaN does not leave its row.
int check_rows(const Case& c, const Linear& linear, const Bytes& x, const Bytes& y) {
  const int64_t least = fewest_rows(c);
  const int64_t count = generator() % 2 ? least : least + int64_t(generator() % uint64_t(c.m - least + 1));
  const int64_t first = int64_t(generator() % uint64_t(c.m - count + 1));
  // needs the alignment that the binding gives
  if (c.k == 0 || first * c.k * 2 % 16 != 0) return 0;
  const Bytes some(count * c.n * 2), again(c.m * c.n * 2);
  if (linear.run(first, count, some, false)) return 1;
  for (int64_t m = 0; m < count; ++m)
    if (compare_row("nf4_linear, fewer rows", c, some, m, y, first + m)) return 1;
  if (c.m == 1) return 0;
  write(c, x, (first + 1) % c.m * c.k, NAN);
  if (linear.run(0, c.m, again, false)) return 1;
  for (int64_t m = 0; m < c.m; ++m)
    if (m != (first + 1) % c.m && compare_row("nf4_linear, a row beside NaN", c, again, m, y, m)) return 1;
  return 0;
}

// Where a scale is infinite, no result that it is part of is finite, and the others are as they were.
int check_infinite_scale(const Case& c, const Linear& linear, const Weight& weight, const Bytes& y) {
  if (c.nested || c.k == 0) return 0;
  const int64_t block = int64_t(generator() % uint64_t(Weight::blocks(c)));
  const int64_t first = (block << c.shift) / c.k, last = (((block + 1) << c.shift) - 1) / c.k;
  weight.absmax.as<float>()[block] = INFINITY;
  const Bytes other(c.m * c.n * 2);
  if (linear.run(0, c.m, other, false)) return 1;
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const int64_t n = i % c.n;
    const float value = read(c, other.get(), i), before = read(c, y.get(), i);
    const bool right = n < first || n > last ? value == before : !std::isfinite(value);
    if (!right) return fail("nf4_linear, an infinite scale", c, i, value, before);
  }
  return 0;
}

int run_linear(const Case& c) {
  const Weight weight(c);
  const Bytes x(c.m * c.k * 2), bias(c.n * 2), y(c.m * c.n * 2), again(c.m * c.n * 2);
  for (int64_t i = 0; i < c.m * c.k; ++i) write(c, x, i, normal());
  for (int64_t i = 0; i < c.n; ++i) write(c, bias, i, normal());
  const Linear linear = {c, weight, x, bias};
  if (linear.run(0, c.m, y, false) || check_linear(c, weight, x, bias, y)) return 1;
  // In another order of blocks, and a second time in the same workspace: the same bits.
  if (linear.run(0, c.m, again, true) || compare_bytes("nf4_linear, again", c, again, y)) return 1;
  if (generator() % 2) return check_infinite_scale(c, linear, weight, y);
  return check_rows(c, linear, x, y);
}

int run_seed(uint64_t seed) {
  generator.seed(seed);
  emulator::random_order.seed(seed);
  emulator::multiprocessors = int(1 + generator() % 11);
  Case c = {};
  c.dtype = Dtype(generator() % 3);
  c.n = pick({1, 3, 16, 40, 97});
  c.k = pick({1, 2, 33, 64, 127, 130, 521, 1000});
  c.shift = 5 + int(generator() % 8);
  c.nested = generator() % 2, c.bias = generator() % 2;
  c.skip_codes = generator() % 4 ? 0 : 1;
  c.skip_floats = generator() % 4 ? 0 : 1;
  if (run_dequantize(c) || run_quantize(c)) return 1;
  c.dtype = Dtype(1 + generator() % 2);
  c.m = pick({1, 1, 2, 7, 8, 9, 16, 17, 32, 33, 64});
  c.n = c.m > 16 ? pick({1, 40, 129, 200}) : pick({1, 5, 127, 128, 129, 300, 385});
  c.k = c.m > 16 ? pick({31, 32, 96, 256, 320}) : pick({0, 1, 33, 64, 96, 160, 255, 256, 320, 512, 864, 1024});
  if (run_linear(c) || run_multi_lora()) return 1;
  if (!cuda::kHasWarpgroups) return 0;
  c.dtype = Dtype(1 + generator() % 2);
  c.m = pick({33, 48, 64, 65, 100, 128, 200, 512});
  // the more rows, the smaller the weight: every weight of a tile is a product of the emulator's
  c.n = c.m > 128 ? pick({1, 100, 129}) : pick({1, 40, 129, 192, 200, 300});
  c.k = c.m > 128 ? pick({32, 96, 160, 256}) : pick({32, 64, 96, 128, 256, 320, 608, 1024});
  c.skip_codes = 0;
  return run_linear(c);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10), count = std::strtoull(argv[2], nullptr, 10);
  for (uint64_t i = 0; i < count; ++i)
    if (run_seed(seed + i)) return std::printf("seed %lu\n", static_cast<unsigned long>(seed + i)), 1;
  std::printf("%lu cases; errors %.3f of those of a decoded weight, %.3f of many rows\n",
              static_cast<unsigned long>(count), errors[0].ratio(), errors[1].ratio());
  return std::max(errors[0].ratio(), errors[1].ratio()) <= 1.1 ? 0 : 1;
}
