// multi_lora_linear and its backward over each kind of base, against sums in doubles: pages of every rank in any order
// with NaN between them and behind their ranks, some of them shared, and entries of the table that no row reaches.
#pragma once

#include "cpu/kernels.h"
#include "fuzz_values.h"

namespace {

using peftrt::cpu::AdapterTable;
using peftrt::cpu::Base;
using peftrt::cpu::Kernels;
using peftrt::cpu::Parts;

// A table and the memory it points to.
struct RandomTable {
  static constexpr int64_t kPage = AdapterTable::kPage;

  RandomTable(const Case& c, const Parts& parts)
      : slots(pick({1, 2, 3, 5})), dtype(Dtype(generator() % 3)), ranks(size_t(slots * parts.count)) {
    for (int32_t& rank : ranks) rank = int32_t(pick({0, 0, 1, 2, 5, 7, 8, 9, 15, 16, 17, 24, 40}));
    if (generator() % 16 == 0) ranks[0] = int32_t(pick({64, 65, 255, 256}));
    int64_t most = 0;
    for (const int32_t rank : ranks) most = std::max(most, (rank + kPage - 1) / kPage);
    pages = most + int64_t(generator() % 2);
    a_pages.assign(size_t(slots * parts.count * pages), INT64_MIN);
    b_pages.assign(a_pages.size(), INT64_MAX);
    shared = slots > 1 && generator() % 3 == 0;
    if (shared) std::copy_n(ranks.begin(), parts.count, ranks.begin() + parts.count);
    int64_t size = 0;
    for (int64_t e = 0; e < slots; ++e)
      for (int part = 0; part < parts.count; ++part) lay_out(e, part, parts, c.k, size);
    values = std::make_unique<Bytes>(size_t(size) * width(dtype));
    values_count = size;
    write(parts, c.k);
    for (int64_t i = 0; i < slots * parts.count; ++i) scaling.push_back(float(generator() % 8) / 8);
    scaled = generator() % 2;
    const int64_t sizes[3] = {c.k, c.n, c.n};
    int64_t room = 0;
    for (int64_t i = 0; i < 3 * slots; ++i) {
      const bool has = generator() % 2;
      starts.push_back(has ? room : -1);
      if (has) room += sizes[i % 3];
    }
    vectors = std::make_unique<Bytes>(size_t(room) * 4);
    for (int64_t i = 0; i < room; ++i) write_small(*vectors, Dtype::kFloat32, i);
    const bool none = generator() % 8 == 0, one = generator() % 8 == 0;
    for (int64_t i = 0; i < c.m; ++i)
      slot_ids.push_back(none ? -1 : one ? 0 : int32_t(generator() % uint64_t(slots + 1)) - 1);
    forget_unreached(parts);
    table = {dtype,
             values->get(),
             parts,
             c.k,
             slots,
             pages,
             ranks.data(),
             a_pages.data(),
             b_pages.data(),
             scaling.data(),
             scaled ? floats(*vectors) : nullptr,
             starts.data(),
             slot_ids.data()};
  }

  int64_t place(bool of_b, int64_t slot, int part, int64_t rank, int64_t size) const {
    return table.page(of_b, slot, part, rank / kPage) + rank % kPage * size;
  }
  double at(bool of_b, int64_t slot, int part, int64_t rank, int64_t size, int64_t column) const {
    return read(*values, dtype, place(of_b, slot, part, rank, size) + column);
  }
  double scale(int64_t slot, int part) const { return scaling[size_t(slot * table.parts.count + part)]; }
  // An element of a slot's x_scale, y_scale or bias.
  double vector(int64_t slot, int which, int64_t i, double missing) const {
    const int64_t start = slot < 0 || !scaled ? -1 : starts[size_t(3 * slot + which)];
    return start < 0 ? missing : read(*vectors, Dtype::kFloat32, start + i);
  }

  int64_t slots, pages = 0, values_count = 0;
  Dtype dtype;
  std::vector<int32_t> ranks, slot_ids;
  std::vector<int64_t> a_pages, b_pages, starts;
  std::vector<float> scaling;
  std::unique_ptr<Bytes> values, vectors;
  bool shared = false, scaled = false;
  AdapterTable table = {};

 private:
  void lay_out(int64_t e, int part, const Parts& parts, int64_t k, int64_t& size) {
    const int64_t rank = ranks[size_t(e * parts.count + part)];
    for (int64_t r = 0; r < rank; r += kPage) {
      const size_t at = size_t((e * parts.count + part) * pages + r / kPage);
      const int64_t held = std::min(kPage, rank - r);
      if (shared && e == 1) {
        a_pages[at] = a_pages[at - size_t(parts.count * pages)],
        b_pages[at] = b_pages[at - size_t(parts.count * pages)];
        continue;
      }
      size += int64_t(generator() % 4);
      const bool b_first = generator() % 2;
      for (const bool of_b : {b_first, !b_first}) {
        (of_b ? b_pages : a_pages)[at] = size;
        size += held * (of_b ? parts.size(part) : k);
      }
    }
  }

  void write(const Parts& parts, int64_t k) {
    for (int64_t e = 0; e < slots; ++e)
      for (int part = 0; part < parts.count; ++part)
        for (int64_t r = 0; r < ranks[size_t(e * parts.count + part)]; ++r) {
          const size_t at = size_t((e * parts.count + part) * pages + r / kPage);
          for (int64_t i = 0; i < k; ++i) write_small(*values, dtype, a_pages[at] + r % kPage * k + i);
          for (int64_t i = 0; i < parts.size(part); ++i)
            write_small(*values, dtype, b_pages[at] + r % kPage * parts.size(part) + i);
        }
  }

  void forget_unreached(const Parts& parts) {
    for (int64_t e = 0; e < slots; ++e) {
      if (std::find(slot_ids.begin(), slot_ids.end(), int32_t(e)) != slot_ids.end()) continue;
      for (int part = 0; part < parts.count; ++part) ranks[size_t(e * parts.count + part)] = int32_t(generator());
      for (int64_t i = 0; i < 3; ++i) starts[size_t(3 * e + i)] = int64_t(generator());
    }
  }
};

// The sums of one row's products with pages: scaling * sum_i row[i] * page[rank, i], by part and rank.
struct Dots {
  std::vector<std::vector<double>> value, magnitude;

  template <class Row>
  Dots(const RandomTable& t, int64_t slot, bool of_b, const Row& row) {
    const Parts& parts = t.table.parts;
    for (int part = 0; part < parts.count; ++part) {
      value.emplace_back(), magnitude.emplace_back();
      const int64_t size = of_b ? parts.size(part) : t.table.k, first = of_b ? parts.begin(part) : 0;
      for (int64_t r = 0; slot >= 0 && r < t.table.rank(slot, part); ++r) {
        double sum = 0, absolute = 0;
        for (int64_t i = 0; i < size; ++i) {
          const double term = t.scale(slot, part) * row(first + i) * t.at(of_b, slot, part, r, size, i);
          sum += term, absolute += std::fabs(term);
        }
        value.back().push_back(sum), magnitude.back().push_back(absolute);
      }
    }
  }
};

struct Wanted {
  std::vector<double> value, magnitude;
  explicit Wanted(int64_t size) : value(size_t(size)), magnitude(size_t(size)) {}
  void add(int64_t at, double term, double absolute) {
    value[size_t(at)] += term, magnitude[size_t(at)] += std::fabs(absolute);
  }
};

// Rows of `width` that are `stride` apart, together; false where anything between them has been touched.
bool gathered(const Bytes& from, const Case& c, int64_t stride, const Bytes& to) {
  const size_t row = size_t(c.n) * width(c.dtype), step = size_t(stride) * width(c.dtype);
  for (int64_t m = 0; m < c.m; ++m) {
    if (row > 0) std::memcpy(to.get() + size_t(m) * row, from.get() + size_t(m) * step, row);
    for (size_t i = row; i < step && m + 1 < c.m; ++i)
      if (from.get()[size_t(m) * step + i] != 0xff) return false;
  }
  return true;
}

// `w`: the values of the base in c.dtype, for all but the last of the bases, which is none.
int run_multi_forward(const Kernels& kernels, const Case& c, const Base* base, const std::vector<double>& w,
                      const Bytes& x, const Bytes* bias, const RandomTable& t, const Parallel& parallel) {
  const Parts& parts = t.table.parts;
  const int64_t stride = c.n + int64_t(generator() % 3);
  const bool invariant = generator() % 2;
  Bytes out(size_t(c.m == 0 ? 0 : (c.m - 1) * stride + c.n) * width(c.dtype)), y(size_t(c.m * c.n) * width(c.dtype));
  kernels.multi_lora_linear(base, c.dtype, c.m, x.get(), bias == nullptr ? nullptr : bias->get(), t.table, invariant,
                            out.get(), stride, parallel);
  if (!gathered(out, c, stride, y)) return fail("multi_lora_linear, between rows", c, 0, 0, 0);
  Wanted want(c.m * c.n);
  for (int64_t m = 0; m < c.m; ++m) {
    const int64_t slot = t.slot_ids[size_t(m)];
    std::vector<double> seen;
    for (int64_t k = 0; k < c.k; ++k) {
      const double scale = t.vector(slot, 0, k, 1.0), value = read(x, c.dtype, m * c.k + k);
      seen.push_back(scale == 1.0 ? value : rounded(float(value) * float(scale), c.dtype));
    }
    const Dots xa(t, slot, false, [&](int64_t k) { return seen[size_t(k)]; });
    for (int64_t n = 0; n < c.n; ++n) {
      const int64_t at = m * c.n + n;
      for (int64_t k = 0; base != nullptr && k < c.k; ++k) {
        const double term = seen[size_t(k)] * w[size_t(n * c.k + k)];
        want.add(at, term, term);
      }
      const int part = parts.of(n);
      for (size_t r = 0; r < xa.value[size_t(part)].size(); ++r) {
        const double b = t.at(true, slot, part, int64_t(r), parts.size(part), n - parts.begin(part));
        want.add(at, xa.value[size_t(part)][r] * b, xa.magnitude[size_t(part)][r] * b);
      }
      const double scale = t.vector(slot, 1, n, 1.0), added = bias == nullptr ? 0 : read(*bias, c.dtype, n);
      want.value[size_t(at)] *= scale, want.magnitude[size_t(at)] *= std::fabs(scale);
      want.add(at, added, added);
      want.add(at, t.vector(slot, 2, n, 0.0), t.vector(slot, 2, n, 0.0));
    }
  }
  return compare("multi_lora_linear", c, y, want.value, want.magnitude);
}

int run_multi_backward(const Kernels& kernels, const Case& c, const Base* base, const std::vector<double>& w,
                       const Bytes& x, const Bytes& dz, const RandomTable& t, const Parallel& parallel) {
  const Parts& parts = t.table.parts;
  const bool needs_dx = generator() % 4, needs_dvalues = generator() % 4, invariant = generator() % 2;
  Bytes dx(size_t(c.m * c.k) * width(c.dtype)), dvalues(size_t(t.values_count) * 4);
  std::memset(dvalues.get(), 0, dvalues.size());
  kernels.multi_lora_linear_backward(base, c.dtype, c.m, dz.get(), x.get(), t.table, invariant,
                                     needs_dx ? dx.get() : nullptr, needs_dvalues ? floats(dvalues) : nullptr,
                                     parallel);
  Wanted dx_want(c.m * c.k), dvalues_want(t.values_count);
  for (int64_t m = 0; m < c.m; ++m) {
    const int64_t slot = t.slot_ids[size_t(m)];
    const auto at_dz = [&](int64_t n) { return read(dz, c.dtype, m * c.n + n); };
    const auto at_x = [&](int64_t k) { return read(x, c.dtype, m * c.k + k); };
    for (int64_t n = 0; base != nullptr && n < c.n; ++n)
      for (int64_t k = 0; k < c.k; ++k) {
        const double term = at_dz(n) * w[size_t(n * c.k + k)];
        dx_want.add(m * c.k + k, term, term);
      }
    const Dots g(t, slot, true, at_dz), xa(t, slot, false, at_x);
    for (int part = 0; part < parts.count; ++part)
      for (size_t r = 0; r < g.value[size_t(part)].size(); ++r) {
        const double value = g.value[size_t(part)][r], absolute = g.magnitude[size_t(part)][r];
        const int64_t a = t.place(false, slot, part, int64_t(r), c.k);
        for (int64_t k = 0; k < c.k; ++k) {
          const double element = read(*t.values, t.dtype, a + k);
          dx_want.add(m * c.k + k, value * element, absolute * element);
          dvalues_want.add(a + k, value * at_x(k), absolute * at_x(k));
        }
        const int64_t b = t.place(true, slot, part, int64_t(r), parts.size(part));
        for (int64_t i = 0; i < parts.size(part); ++i) {
          const double element = at_dz(parts.begin(part) + i);
          dvalues_want.add(b + i, xa.value[size_t(part)][r] * element, xa.magnitude[size_t(part)][r] * element);
        }
      }
  }
  if (needs_dx && compare("multi_lora_linear_backward, dx", c, dx, dx_want.value, dx_want.magnitude)) return 1;
  Case wide = c;
  wide.dtype = Dtype::kFloat32;
  if (!needs_dvalues) return 0;
  return compare("multi_lora_linear_backward, values", wide, dvalues, dvalues_want.value, dvalues_want.magnitude);
}

int run_multi(const Kernels& kernels, const Case& c, const std::vector<const Base*>& bases,
              const std::vector<double>& w, const Bytes& x, const Bytes& dz, const Bytes* bias, const Parts& parts,
              const Parallel& parallel) {
  const RandomTable t(c, parts);
  const Base* base = bases[generator() % bases.size()];
  return run_multi_forward(kernels, c, base, w, x, bias, t, parallel) ||
         run_multi_backward(kernels, c, base, w, x, dz, t, parallel);
}

}  // namespace
