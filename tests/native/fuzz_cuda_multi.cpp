// multi_lora_linear on the emulator: random tables, ranks and rows against a double-precision answer. Whatever no
// result may depend on is NaN, or an address of nothing: padding of pages, pages behind a rank, y between its rows.
#include "fuzz_cuda.h"

namespace fuzz {

namespace {

struct Table {
  Dtype dtype;  // of the values
  int64_t slots, pages;
  std::vector<int64_t> splits;
  std::vector<int32_t> ranks;
  std::vector<int64_t> A_pages, B_pages, starts;
  std::vector<float> scaling, vectors;
  std::unique_ptr<Bytes> values;

  int64_t parts() const { return int64_t(splits.size()); }
  Case as_case() const { return {dtype, 0, 0, 0, 5, false, false, 0, 0}; }
  float value(int64_t i) const { return read(as_case(), values->get(), i); }
};

// Pages in a random order, with NaN between them and behind ranks.
Table make_table(const Case& c) {
  Table t = {};
  t.dtype = Dtype(generator() % 3);
  t.slots = 1 + int64_t(generator() % 5);
  const int64_t parts = std::min<int64_t>(1 + int64_t(generator() % 3), c.n);
  for (int64_t p = 0, left = c.n; p < parts; ++p) {
    const int64_t size = p + 1 == parts ? left : 1 + int64_t(generator() % uint64_t(left - (parts - p) + 1));
    t.splits.push_back(generator() % 2 && size > 16 && p + 1 < parts ? size / 8 * 8 : size);
    left -= t.splits.back();
  }
  const int64_t most = pick({1, 8, 16, 16, 40, 256});
  for (int64_t i = 0; i < t.slots * parts; ++i) {
    t.ranks.push_back(int32_t(generator() % 4 == 0 ? 0 : generator() % 3 ? generator() % uint64_t(most + 1) : most));
    t.scaling.push_back(normal());
  }
  t.pages = std::max<int64_t>(1, (*std::max_element(t.ranks.begin(), t.ranks.end()) + 7) / 8);
  const bool straight = generator() % 2;
  int64_t size = 0;
  const auto place = [&](int64_t width) {
    const int64_t at = straight ? (size + 31) / 32 * 32 : size + int64_t(generator() % 3);
    size = at + 8 * width;
    return at;
  };
  for (int64_t i = 0; i < t.slots * parts; ++i) {
    for (int64_t page = 0; page < t.pages; ++page) {
      const bool used = 8 * page < t.ranks[size_t(i)];
      t.A_pages.push_back(used ? place(c.k) : int64_t(1) << 50);
      t.B_pages.push_back(used ? place(t.splits[size_t(i % parts)]) : int64_t(1) << 50);
    }
  }
  t.values = std::make_unique<Bytes>(std::max<int64_t>(size, 1) * width(t.as_case()));
  for (int64_t i = 0; i < size; ++i) write(t.as_case(), *t.values, i, NAN);
  for (int64_t i = 0; i < t.slots * parts; ++i) {
    for (int64_t r = 0; r < t.ranks[size_t(i)]; ++r) {
      const size_t page = size_t(i * t.pages + r / 8);
      const int64_t width = t.splits[size_t(i % parts)];
      for (int64_t k = 0; k < c.k; ++k) write(t.as_case(), *t.values, t.A_pages[page] + r % 8 * c.k + k, normal() / 8);
      for (int64_t n = 0; n < width; ++n) write(t.as_case(), *t.values, t.B_pages[page] + r % 8 * width + n, normal());
    }
  }
  if (generator() % 2) {
    for (int64_t slot = 0; slot < t.slots; ++slot) {
      for (const int64_t length : {c.k, c.n, c.n}) {
        t.starts.push_back(generator() % 3 ? int64_t(t.vectors.size()) : -1);
        for (int64_t i = 0; i < length && t.starts.back() >= 0; ++i) t.vectors.push_back(normal());
      }
    }
  }
  return t;
}

// Buffers of exactly their size.
template <class T>
struct Exact {
  Bytes bytes;
  explicit Exact(const std::vector<T>& from) : bytes(int64_t(from.size() * sizeof(T))) {
    if (!from.empty()) std::memcpy(bytes.get(), from.data(), from.size() * sizeof(T));
  }
  const T* get() const { return bytes.as<T>(); }
};

struct Call {
  const Case& c;
  const Weight& weight;
  const Table& t;
  const Bytes& bias;
  int64_t stride;  // between rows of y

  // y, `stride` elements a row, with what lies between rows as it was.
  int run(const std::vector<float>& x, const std::vector<int32_t>& ids, const Bytes& y, int32_t* flag) const {
    const int64_t m = int64_t(ids.size());
    const Bytes input(m * c.k * 2);
    for (int64_t i = 0; i < m * c.k; ++i) write(c, input, i, x[size_t(i)]);
    const Exact<int32_t> ranks(t.ranks), slot_ids(ids);
    const Exact<int64_t> A_pages(t.A_pages), B_pages(t.B_pages), starts(t.starts);
    const Exact<float> scaling(t.scaling), vectors(t.vectors);
    cuda::Adapters a = {};
    a.A_dtype = a.B_dtype = t.dtype;
    a.A = a.B = t.values->get();
    a.ranks = ranks.get(), a.A_pages = A_pages.get(), a.B_pages = B_pages.get(), a.scaling = scaling.get();
    if (!t.starts.empty()) a.vectors = vectors.get(), a.vector_starts = starts.get();
    a.slot_ids = slot_ids.get(), a.error_flag = flag;
    a.slots = t.slots, a.parts = int(t.parts()), a.pages = int(t.pages);
    for (int64_t p = 0; p < t.parts(); ++p) a.part_start[p + 1] = a.part_start[p] + int(t.splits[size_t(p)]);
    return launch(m, input, a, y);
  }

  int launch(int64_t m, const Bytes& input, const cuda::Adapters& a, const Bytes& y) const {
    const cuda::Linear linear = {
        c.dtype, weight.codes.get(), weight.scales(c), input.get(), c.bias ? bias.get() : nullptr, y.get(), m, c.n,
        c.k};
    int64_t size = 0;
    if (failed("multi_lora_workspace", cuda::multi_lora_workspace(linear, a, &size))) return 1;
    const Bytes workspace(size);
    workspace.randomise();
    return failed("multi_lora_linear",
                  cuda::multi_lora_linear(linear, a, stride, generator(), workspace.get(), nullptr));
  }
};

bool straight(const Case& c) { return c.k > 0 && c.k % 32 == 0 && c.skip_codes == 0; }

// The weight as the kernels multiply it.
std::vector<double> terms_of(const Case& c, const Weight& weight) {
  std::vector<float> exact(size_t(c.n * c.k));
  std::vector<double> terms(exact.size());
  weight.decode(c, Dtype::kFloat32, exact.data());
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    const float value = exact[size_t(i)], level = peftrt::kNf4[peftrt::nibble(weight.codes.get(), i)];
    terms[size_t(i)] = !straight(c) ? rounded(c, value) : level == 0 ? 0 : value / level * rounded(c, level);
  }
  return terms;
}

struct Answer {
  double value, size;
};
void add_term(Answer& to, double term) { to.value += term, to.size += std::fabs(term); }

// Row i of y, by the definition.
std::vector<Answer> row_of(const Call& call, const std::vector<double>& terms, const float* x, int32_t id) {
  const Case& c = call.c;
  const Table& t = call.t;
  const int64_t slot = id >= 0 && id < t.slots ? id : -1;
  const auto vector = [&](int64_t which) -> const float* {
    const int64_t start = slot < 0 || t.starts.empty() ? -1 : t.starts[size_t(3 * slot + which)];
    return start < 0 ? nullptr : t.vectors.data() + start;
  };
  std::vector<double> in(size_t(c.k));
  for (int64_t k = 0; k < c.k; ++k) in[size_t(k)] = vector(0) ? rounded(c, x[k] * vector(0)[k]) : x[k];
  std::vector<Answer> y(size_t(c.n));
  for (int64_t n = 0; n < c.n; ++n)
    for (int64_t k = 0; k < c.k; ++k) add_term(y[size_t(n)], terms[size_t(n * c.k + k)] * in[size_t(k)]);
  for (int64_t p = 0, begin = 0; p < t.parts() && slot >= 0; begin += t.splits[size_t(p++)]) {
    const size_t at = size_t(slot * t.parts() + p);
    for (int64_t r = 0; r < t.ranks[at]; ++r) {
      Answer xa = {};
      const size_t page = at * size_t(t.pages) + size_t(r / 8);
      const int64_t width = t.splits[size_t(p)];
      for (int64_t k = 0; k < c.k; ++k) add_term(xa, t.value(t.A_pages[page] + r % 8 * c.k + k) * in[size_t(k)]);
      for (int64_t n = 0; n < width; ++n) {
        const double b = double(t.value(t.B_pages[page] + r % 8 * width + n)) * t.scaling[at];
        y[size_t(begin + n)].value += xa.value * b, y[size_t(begin + n)].size += std::fabs(xa.size * b);
      }
    }
  }
  for (int64_t n = 0; n < c.n; ++n) {
    Answer& of = y[size_t(n)];
    if (vector(1)) of.value *= vector(1)[n], of.size *= std::fabs(vector(1)[n]);
    if (c.bias) add_term(of, read(c, call.bias.get(), n));
    if (vector(2)) add_term(of, vector(2)[n]);
  }
  return y;
}

int check_values(const Call& call, const std::vector<float>& x, const std::vector<int32_t>& ids, const Bytes& y) {
  const Case& c = call.c;
  const std::vector<double> terms = terms_of(c, call.weight);
  for (int64_t m = 0; m < c.m; ++m) {
    const std::vector<Answer> want = row_of(call, terms, x.data() + m * c.k, ids[size_t(m)]);
    for (int64_t n = 0; n < c.n; ++n) {
      const double got = read(c, y.get(), m * call.stride + n), unit = c.dtype == Dtype::kBFloat16 ? 0x1p-8 : 0x1p-11;
      const Answer& of = want[size_t(n)];
      // what overflows fp16 is infinite
      const bool large = c.dtype == Dtype::kFloat16 && std::fabs(of.value) > 65000;
      if (!large && !(std::fabs(got - of.value) <= 1.02 * unit * std::fabs(of.value) + 2e-6 * of.size + 1e-7))
        return fail("multi_lora_linear", c, m * c.n + n, got, of.value);
    }
    for (int64_t n = c.n; n < call.stride && m + 1 < c.m; ++n)
      if (y.as<uint16_t>()[m * call.stride + n] != 0xffff) return fail("multi_lora_linear, between rows", c, n, 0, 0);
  }
  return 0;
}

int same_row(const char* what, const Call& call, const Bytes& a, int64_t i, const Bytes& b, int64_t j) {
  for (int64_t n = 0; n < call.c.n; ++n)
    if (a.as<uint16_t>()[i * call.stride + n] != b.as<uint16_t>()[j * call.stride + n])
      return fail(what, call.c, i * call.c.n + n, read(call.c, a.get(), i * call.stride + n),
                  read(call.c, b.get(), j * call.stride + n));
  return 0;
}

int64_t size_of(const Call& call, int64_t m) { return ((m - 1) * call.stride + call.c.n) * 2; }

// Some of the rows in another order among others, one of which is NaN: the bits are theirs alone.
int check_mix(const Call& call, const std::vector<float>& x, const std::vector<int32_t>& ids, const Bytes& y) {
  const Case& c = call.c;
  const int64_t count = 1 + int64_t(generator() % 64);
  std::vector<int64_t> from;
  std::vector<float> other;
  std::vector<int32_t> other_ids;
  for (int64_t i = 0; i < count; ++i) {
    from.push_back(i % 5 == 4 ? -1 : int64_t(generator() % uint64_t(c.m)));
    other_ids.push_back(from.back() < 0 ? int32_t(generator() % uint64_t(call.t.slots)) : ids[size_t(from.back())]);
    for (int64_t k = 0; k < c.k; ++k) other.push_back(from.back() < 0 ? NAN : x[size_t(from.back() * c.k + k)]);
  }
  const Bytes mixed(size_of(call, count));
  if (call.run(other, other_ids, mixed, nullptr)) return 1;
  for (int64_t i = 0; i < count; ++i)
    if (from[size_t(i)] >= 0 && same_row("multi_lora_linear, among others", call, mixed, i, y, from[size_t(i)]))
      return 1;
  return 0;
}

// Rows without an adapter have nf4_linear's bits, where that has the same kernel for them.
int check_base(const Call& call, const std::vector<float>& x, const std::vector<int32_t>& ids, const Bytes& y) {
  const Case& c = call.c;
  const Bytes input(c.k * 2), base(c.n * 2);
  for (int64_t m = 0; m < c.m; ++m) {
    if (ids[size_t(m)] >= 0 && ids[size_t(m)] < call.t.slots) continue;
    for (int64_t k = 0; k < c.k; ++k) write(c, input, k, x[size_t(m * c.k + k)]);
    const cuda::Linear linear = {c.dtype,
                                 call.weight.codes.get(),
                                 call.weight.scales(c),
                                 input.get(),
                                 c.bias ? call.bias.get() : nullptr,
                                 base.get(),
                                 1,
                                 c.n,
                                 c.k};
    int64_t size = 0;
    if (failed("nf4_linear_workspace", cuda::nf4_linear_workspace(linear, &size))) return 1;
    const Bytes workspace(size);
    if (failed("nf4_linear", cuda::nf4_linear(linear, generator(), workspace.get(), nullptr))) return 1;
    return same_row("multi_lora_linear, no adapter", call, base, 0, y, m);
  }
  return 0;
}

// One adapter for all rows, from A [P R, K] and B [N, R] themselves, with factors of y: as a table of one slot.
int check_single(const Call& call, const std::vector<float>& x) {
  const Case& c = call.c;
  const int64_t rank = pick({1, 3, 8, 16, 33}), parts = call.t.parts();
  Table one = {};
  one.dtype = Dtype(generator() % 3), one.slots = 1, one.splits = call.t.splits, one.pages = (rank + 7) / 8;
  const int64_t wide = width(one.as_case());
  const Bytes A(parts * rank * c.k * wide), B(c.n * rank * wide), xa(c.m * parts * rank * 4);
  for (int64_t i = 0; i < parts * rank * c.k; ++i) write(one.as_case(), A, i, normal() / 8);
  for (int64_t i = 0; i < c.n * rank; ++i) write(one.as_case(), B, i, normal());
  const float scale = normal();
  int64_t size = 0;
  for (int64_t p = 0; p < parts; ++p) {
    one.ranks.push_back(int32_t(rank)), one.scaling.push_back(scale);
    for (int64_t page = 0; page < one.pages; ++page) {
      one.A_pages.push_back(size), one.B_pages.push_back(size + 8 * c.k);
      size += 8 * (c.k + one.splits[size_t(p)]);
    }
  }
  one.values = std::make_unique<Bytes>(size * wide);
  for (int64_t p = 0, begin = 0; p < parts; begin += one.splits[size_t(p++)]) {
    for (int64_t r = 0; r < rank; ++r) {
      const int64_t a = one.A_pages[size_t(p * one.pages + r / 8)] + r % 8 * c.k;
      const int64_t width = one.splits[size_t(p)], b = one.B_pages[size_t(p * one.pages + r / 8)] + r % 8 * width;
      for (int64_t k = 0; k < c.k; ++k)
        write(one.as_case(), *one.values, a + k, read(one.as_case(), A.get(), (p * rank + r) * c.k + k));
      for (int64_t n = 0; n < width; ++n)
        write(one.as_case(), *one.values, b + n, read(one.as_case(), B.get(), (begin + n) * rank + r));
    }
  }
  one.starts = {-1, 0, -1};
  for (int64_t n = 0; n < c.n; ++n) one.vectors.push_back(normal());
  const Exact<float> factors(one.vectors);
  const Call table = {c, call.weight, one, call.bias, call.stride};
  const Bytes want(size_of(call, c.m)), got(size_of(call, c.m)), input(c.m * c.k * 2);
  if (table.run(x, std::vector<int32_t>(size_t(c.m), 0), want, nullptr)) return 1;
  cuda::Adapters a = {};
  a.A_dtype = a.B_dtype = one.dtype;
  a.A = A.get(), a.B = B.get(), a.slots = 1, a.parts = int(parts), a.pages = int(one.pages);
  for (int64_t p = 0; p < parts; ++p) a.part_start[p + 1] = a.part_start[p] + int(one.splits[size_t(p)]);
  a.rank = int(rank), a.scale = scale, a.y_scale = factors.get(), a.xa = xa.as<float>();
  for (int64_t i = 0; i < c.m * c.k; ++i) write(c, input, i, x[size_t(i)]);
  if (call.launch(c.m, input, a, got)) return 1;
  for (int64_t m = 0; m < c.m; ++m) {
    if (same_row("multi_lora_linear, one adapter", call, got, m, want, m)) return 1;
    for (int64_t i = 0; i < parts * rank; ++i) {
      Answer sum = {};
      for (int64_t k = 0; k < c.k; ++k)
        add_term(sum, double(x[size_t(m * c.k + k)]) * read(one.as_case(), A.get(), i * c.k + k));
      const float value = xa.as<float>()[m * parts * rank + i];
      if (!(std::fabs(value - sum.value) <= 2e-6 * sum.size + 1e-7))
        return fail("multi_lora_linear, xa", c, m * parts * rank + i, value, sum.value);
    }
  }
  return 0;
}

}  // namespace

int run_multi_lora() {
  Case c = {};
  c.dtype = Dtype(1 + generator() % 2);
  c.m = pick({1, 2, 3, 8, 9, 16, 17, 33, 64});
  c.n = c.m > 16 ? pick({1, 40, 129, 200}) : pick({1, 5, 128, 129, 300, 385});
  c.k = c.m > 16 ? pick({31, 32, 96, 256}) : pick({0, 1, 33, 64, 160, 256, 520, 1024, 2080, 2055});
  c.shift = 5 + int(generator() % 5);
  c.nested = generator() % 2, c.bias = generator() % 2;
  c.skip_codes = generator() % 8 ? 0 : 1;
  const Weight weight(c);
  const Table table = make_table(c);
  const Bytes bias(c.n * 2);
  for (int64_t i = 0; i < c.n; ++i) write(c, bias, i, normal());
  const Call call = {c, weight, table, bias, c.n + pick({0, 0, 1, 8})};
  std::vector<float> x;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < c.m * c.k; ++i) x.push_back(rounded(c, normal()));
  const bool wrong = generator() % 4 == 0;
  bool bad = false;
  for (int64_t i = 0; i < c.m; ++i) {
    int32_t id = generator() % 4 ? int32_t(generator() % uint64_t(table.slots)) : -1;
    if (wrong && generator() % 3 == 0) id = int32_t(pick({-2, table.slots, 2147483647, -2147483647})), bad = true;
    ids.push_back(id);
  }
  const Bytes y(size_of(call, c.m)), again(size_of(call, c.m));
  const std::unique_ptr<int32_t> flag(new int32_t(0));
  if (call.run(x, ids, y, flag.get()) || check_values(call, x, ids, y)) return 1;
  if (*flag != int32_t(bad)) return fail("multi_lora_linear, the flag", c, 0, *flag, bad);
  if (call.run(x, ids, again, nullptr)) return 1;
  for (int64_t m = 0; m < c.m; ++m)
    if (same_row("multi_lora_linear, again", call, again, m, y, m)) return 1;
  const uint64_t which = generator() % 3;
  return which == 0 ? check_mix(call, x, ids, y) : which == 1 ? check_base(call, x, ids, y) : check_single(call, x);
}

}  // namespace fuzz
