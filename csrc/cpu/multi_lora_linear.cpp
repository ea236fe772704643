// out[i] = y_scale * (x' W^T + scaling * (x' A^T) B^T)[i] + bias + row_bias, with A, B, scales and row_bias of row i's
// slot: a batch in which every row has an adapter of its own, or none, over any base.
//
// x' is made once. Then x' A^T of all rows (a task: rows of one slot times a page of A), then its products with B, in
// fp32 beside the result (a task: rows of one slot, so many columns), which the base's kernel takes up before it
// rounds (finish.h). A slot's pages are read once for up to kRowsOfTask rows.
#include "cpu/finish.h"
#include "cpu/multi_lora.h"

namespace peftrt::cpu::PEFTRT_ISA {

namespace {

// The rows of x as their slots see them, for both the base and the adapters.
template <class T>
class Seen {
 public:
  Seen(const AdapterTable& table, int64_t m, const T* x, const Parallel& parallel)
      : scaled_(any(table, m) ? m * table.k : 0), rows_(any(table, m) ? scaled_.get() : x) {
    if (rows_ == x) return;
    const int64_t k = table.k;
    for_ranges(parallel, m, [&](int64_t begin, int64_t end) {
      Scratch<float> line(k);
      for (int64_t i = begin; i < end; ++i) {
        const int32_t slot = table.slot_ids[i];
        const float* scale = slot < 0 ? nullptr : table.vector(slot, 0);
        to_floats(x + i * k, k, line.get());
        if (scale != nullptr) scale_floats(scale, k, line.get());
        from_floats(line.get(), k, scaled_.get() + i * k);
      }
    });
  }
  const T* get() const { return rows_; }

 private:
  static bool any(const AdapterTable& table, int64_t m) {
    for (int64_t i = 0; i < m; ++i)
      if (table.slot_ids[i] >= 0 && table.vector(table.slot_ids[i], 0) != nullptr) return true;
    return false;
  }

  Scratch<T> scaled_;
  const T* rows_;
};

// addend[position][n] = the adapters' share.
template <class T>
void adapters_share(const Batch& batch, const T* x, float* addend, const Parallel& parallel) {
  const AdapterTable& table = batch.table;
  const int64_t n = table.n();
  Scratch<float> products(batch.rows * batch.ld);
  const Lines<T> lines(batch, table.k, x);
  if (!kIsFloat<T>)
    for_ranges(parallel, batch.rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) lines.convert(batch, i);
    });
  const Tasks pages([&](const auto& sink) { add_page_tasks(batch, sink); });
  for_each(parallel, pages.count(),
           [&](int64_t i) { multiply_page(batch, pages[i], false, lines.get(), products.get()); });
  const Tasks columns([&](const auto& sink) {
    for (int64_t g = 0; g < batch.groups; ++g)
      for (int part = 0; part < table.parts.count && batch.group(g).width > 0; ++part)
        add_tasks(batch.group(g), part, 0, table.parts.size(part), kColumnsOfTask, sink);
  });
  for_each(parallel, columns.count(), [&](int64_t i) {
    const Task& task = columns[i];
    const int64_t count = min64(kColumnsOfTask, table.parts.size(task.part) - task.piece);
    float* out = addend + task.first * n + table.parts.begin(task.part) + task.piece;
    if (add_pages(batch, task, task.part, true, count, products.get(), out, n, false)) return;
    for (int64_t row = 0; row < task.rows; ++row) std::memset(out + row * n, 0, size_t(count) * sizeof(float));
  });
}

// A result without a base.
template <class T>
void write_rows(int64_t m, int64_t n, const T* bias, const Finish& finish, T* out, const Parallel& parallel) {
  for_ranges(parallel, m, [&](int64_t begin, int64_t end) {
    alignas(sizeof(F)) float of_call[kLanes] = {}, line[kLanes];
    for (int64_t i = begin; i < end; ++i)
      for (int64_t column = 0; column < n; column += kLanes) {
        const int64_t count = min64(kLanes, n - column);
        if (bias != nullptr) to_floats(bias + column, count, of_call);
        storeu(line, finished(zero(), finish.rows[i], loadu(of_call), column, count));
        from_floats(line, count, out + i * finish.stride + column);
      }
  });
}

template <class T>
void forward(const Base* base, Dtype dtype, int64_t m, const T* x, const T* bias, const AdapterTable& table,
             bool invariant, T* out, int64_t stride, const Parallel& parallel) {
  const int64_t n = table.n();
  if (m == 0 || n == 0) return;
  const Batch batch(table, m);
  const Seen<T> seen(table, m, x, parallel);
  Scratch<float> addend(batch.ld > 0 ? batch.rows * n : 0);
  Scratch<RowFinish> rows(m);
  for (int64_t i = 0; i < m; ++i) rows.get()[i] = {};
  for (int64_t g = 0; g < batch.groups; ++g) {
    const Group& group = batch.group(g);
    const float *scale = table.vector(group.slot, 1), *row_bias = table.vector(group.slot, 2);
    for (int64_t i = group.first; i < group.first + group.rows; ++i)
      rows.get()[batch.row(i)] = {group.width > 0 ? addend.get() + i * n : nullptr, scale, row_bias};
  }
  if (batch.ld > 0) adapters_share(batch, seen.get(), addend.get(), parallel);
  const Finish finish = {stride, invariant, rows.get()};
  if (base == nullptr) return write_rows(m, n, bias, finish, out, parallel);
  finish_linear(*base, dtype, m, seen.get(), bias, nullptr, finish, out, parallel);
}

template <class T>
void forward_typed(const Base* base, Dtype dtype, int64_t m, const void* x, const void* bias, const AdapterTable& table,
                   bool invariant, void* out, int64_t stride, const Parallel& parallel) {
  forward(base, dtype, m, static_cast<const T*>(x), static_cast<const T*>(bias), table, invariant, static_cast<T*>(out),
          stride, parallel);
}

}  // namespace

void multi_lora_linear(const Base* base, Dtype dtype, int64_t m, const void* x, const void* bias,
                       const AdapterTable& table, bool invariant, void* out, int64_t stride, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::kFloat32:
      return forward_typed<float>(base, dtype, m, x, bias, table, invariant, out, stride, parallel);
    case Dtype::kBFloat16:
      return forward_typed<bf16>(base, dtype, m, x, bias, table, invariant, out, stride, parallel);
    case Dtype::kFloat16:
      return forward_typed<fp16>(base, dtype, m, x, bias, table, invariant, out, stride, parallel);
  }
}

}  // namespace peftrt::cpu::PEFTRT_ISA
