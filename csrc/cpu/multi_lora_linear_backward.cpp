// What flows back through a batch of many adapters: g = scaling * dz B, dx = dz W + g A, and for each slot, summed over
// its rows in their order, dA = g^T x' and dB = scaling * (x' A^T)^T dz, added to where the slot's pages lie.
//
// g and x' A^T are products of rows with pages (a task: rows of one slot times a page), then dx's share of the adapters
// (a task: rows of one slot, so many columns), which the base's kernel takes up before it rounds. dA and dB: a task is
// so many columns of x or dz and passes over all slots in turn, so that slots may share pages.
#include <algorithm>

#include "cpu/finish.h"
#include "cpu/multi_lora.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

constexpr int64_t kColumnsOfGradient = 256;

// addend[position][k] = g A.
void adapters_dx(const Batch& batch, const float* g, float* addend, const Parallel& parallel) {
  const AdapterTable& table = batch.table;
  const Tasks columns([&](const auto& sink) {
    for (int64_t i = 0; i < batch.groups; ++i)
      if (batch.group(i).width > 0) add_tasks(batch.group(i), 0, 0, table.k, kColumnsOfTask, sink);
  });
  for_each(parallel, columns.count(), [&](int64_t i) {
    const Task& task = columns[i];
    bool added = false;
    for (int part = 0; part < table.parts.count; ++part)
      added |= add_pages(batch, task, part, false, min64(kColumnsOfTask, table.k - task.piece), g,
                         addend + task.first * table.k + task.piece, table.k, added);
  });
}

// What a page holds, in elements of `values`, and of which columns: pages of equal key and start are the same columns.
struct Extent {
  int64_t start, end;
  int key;  // -1: of A, else B's part
};

// Whether a page of the batch lies across another one, or is at once A's and B's: columns are then no tasks apart.
bool pages_cross(const Batch& batch) {
  const AdapterTable& table = batch.table;
  int64_t count = 0;
  const auto pages = [&](const auto& sink) {
    for (int64_t g = 0; g < batch.groups; ++g)
      for (int part = 0; part < table.parts.count; ++part) {
        const int64_t slot = batch.group(g).slot, ranks = table.rank(slot, part), of_part = table.parts.size(part);
        for (int64_t rank = 0; rank < ranks; rank += kPage) {
          const int64_t rows = min64(kPage, ranks - rank);
          const int64_t a = table.page(false, slot, part, rank / kPage), b = table.page(true, slot, part, rank / kPage);
          if (table.k > 0) sink(Extent{a, a + rows * table.k, -1});
          if (of_part > 0) sink(Extent{b, b + rows * of_part, part});
        }
      }
  };
  pages([&](const Extent&) { ++count; });
  Scratch<Extent> sorted(count);
  Extent *begin = sorted.get(), *end = begin;
  pages([&](const Extent& extent) { *end++ = extent; });
  std::sort(begin, end, [](const Extent& a, const Extent& b) { return a.start < b.start; });
  int64_t reach = 0;  // of the pages that begin before
  for (const Extent* first = begin; first < end;) {
    const Extent* at = first;
    if (first->start < reach) return true;
    for (; at < end && at->start == first->start; ++at) {
      if (at->key != first->key) return true;
      reach = max64(reach, at->end);
    }
    first = at;
  }
  return false;
}

// Columns [column, column + columns) of a part of dB, or of dA: for every slot, products^T times its rows of lines.
void add_columns(const Batch& batch, int part, bool of_b, int64_t column, int64_t columns, const float* products,
                 const float* const* lines, float* dvalues) {
  const AdapterTable& table = batch.table;
  const int64_t width = of_b ? table.parts.size(part) : table.k, offset = of_b ? table.parts.begin(part) : 0;
  const float* block[kTogetherRows];
  for (int64_t g = 0; g < batch.groups; ++g) {
    const Group& group = batch.group(g);
    const int64_t ranks = table.rank(group.slot, part), start = batch.start(group.slot, part);
    for (int64_t rank = 0; rank < ranks; rank += kPage)
      for (int64_t row = 0; row < group.rows; row += kTogetherRows) {
        const int64_t depth = min64(kTogetherRows, group.rows - row), first = group.first + row;
        for (int64_t i = 0; i < depth; ++i) block[i] = lines[first + i] + offset + column;
        combine(min64(kPage, ranks - rank), depth, block, columns, products + first * batch.ld + start + rank, 1,
                batch.ld, dvalues + table.page(of_b, group.slot, part, rank / kPage) + column, width, true);
      }
  }
}

void adapters_gradient(const Batch& batch, const float* g, const float* xa, const float* const* x,
                       const float* const* dz, float* dvalues, const Parallel& parallel) {
  const AdapterTable& table = batch.table;
  const Tasks columns([&](const auto& sink) {
    for (int64_t piece = 0; piece < table.k; piece += kColumnsOfGradient) sink(Task{0, 0, 0, -1, piece});
    for (int part = 0; part < table.parts.count; ++part)
      for (int64_t piece = 0; piece < table.parts.size(part); piece += kColumnsOfGradient)
        sink(Task{0, 0, 0, part, piece});
  });
  const Parallel alone = {1, parallel.run};
  for_each(pages_cross(batch) ? alone : parallel, columns.count(), [&](int64_t i) {
    const Task& task = columns[i];
    const int64_t left = (task.part < 0 ? table.k : table.parts.size(task.part)) - task.piece;
    const int64_t count = min64(kColumnsOfGradient, left);
    if (task.part >= 0) return add_columns(batch, task.part, true, task.piece, count, xa, dz, dvalues);
    for (int part = 0; part < table.parts.count; ++part)
      add_columns(batch, part, false, task.piece, count, g, x, dvalues);
  });
}

// The adapters' share of dx, by position, and the gradients of their values.
template <class T>
void adapters_backward(const Batch& batch, const T* dz, const T* x, float* addend, float* dvalues,
                       const Parallel& parallel) {
  const AdapterTable& table = batch.table;
  const int64_t size = batch.rows * batch.ld;
  Scratch<float> g(size), xa(dvalues == nullptr ? 0 : size);
  const Lines<T> lines_dz(batch, table.n(), dz), lines_x(batch, table.k, x);
  if (!kIsFloat<T>)
    for_ranges(parallel, batch.rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) lines_dz.convert(batch, i), lines_x.convert(batch, i);
    });
  const Tasks pages([&](const auto& sink) { add_page_tasks(batch, sink); });
  const int64_t count = pages.count();
  for_each(parallel, dvalues == nullptr ? count : 2 * count, [&](int64_t i) {
    if (i < count) return multiply_page(batch, pages[i], true, lines_dz.get(), g.get());
    multiply_page(batch, pages[i - count], false, lines_x.get(), xa.get());
  });
  if (addend != nullptr) adapters_dx(batch, g.get(), addend, parallel);
  if (dvalues != nullptr) adapters_gradient(batch, g.get(), xa.get(), lines_x.get(), lines_dz.get(), dvalues, parallel);
}

// dx without a base.
template <class T>
void write_dx(int64_t m, int64_t k, const RowFinish* rows, T* dx, const Parallel& parallel) {
  for_ranges(parallel, m, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (rows[i].addend != nullptr)
        from_floats(rows[i].addend, k, dx + i * k);
      else
        std::memset(static_cast<void*>(dx + i * k), 0, size_t(k) * sizeof(T));
    }
  });
}

template <class T>
void backward(const Base* base, Dtype dtype, int64_t m, const void* dz_bytes, const void* x_bytes,
              const AdapterTable& table, bool invariant, void* dx_bytes, float* dvalues, const Parallel& parallel) {
  const T *dz = static_cast<const T*>(dz_bytes), *x = static_cast<const T*>(x_bytes);
  T* dx = static_cast<T*>(dx_bytes);
  const Batch batch(table, m);
  const int64_t k = table.k;
  Scratch<float> addend(dx != nullptr && batch.ld > 0 ? batch.rows * k : 0);
  if (batch.ld > 0) adapters_backward(batch, dz, x, dx == nullptr ? nullptr : addend.get(), dvalues, parallel);
  if (dx == nullptr) return;
  Scratch<RowFinish> rows(m);
  for (int64_t i = 0; i < m; ++i) rows.get()[i] = {};
  for (int64_t g = 0; g < batch.groups; ++g) {
    const Group& group = batch.group(g);
    for (int64_t i = group.first; group.width > 0 && i < group.first + group.rows; ++i)
      rows.get()[batch.row(i)].addend = addend.get() + i * k;
  }
  if (base == nullptr) return write_dx(m, k, rows.get(), dx, parallel);
  finish_linear_dx(*base, dtype, m, dz, nullptr, {k, invariant, rows.get()}, dx, parallel);
}

}  // namespace

void multi_lora_linear_backward(const Base* base, Dtype dtype, int64_t m, const void* dz, const void* x,
                                const AdapterTable& table, bool invariant, void* dx, float* dvalues,
                                const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return backward<float>(base, dtype, m, dz, x, table, invariant, dx, dvalues, parallel);
    case Dtype::kBFloat16:
      return backward<bf16>(base, dtype, m, dz, x, table, invariant, dx, dvalues, parallel);
    case Dtype::kFloat16:
      return backward<fp16>(base, dtype, m, dz, x, table, invariant, dx, dvalues, parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
