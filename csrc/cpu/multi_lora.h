// Rows of a batch that have adapters of their own, in the order of their slots, and what forward and backward share:
// products of rows with pages.
//
// Each slot's rows are a group, in their order in the batch. A task is a piece of a group: so many rows, one page or so
// many columns. How many tasks there are depends on the adapters in the batch, the number of parallel regions does not.
#pragma once

#include "cpu/lines.h"

namespace peftrt::cpu::PEFTRT_ISA {

constexpr int64_t kPage = AdapterTable::kPage;
constexpr int64_t kRowsOfTask = 24;      // rows of a group in one task: a group of many rows is many tasks
constexpr int64_t kColumnsOfTask = 512;  // columns of a page: 16 KB of a page of floats, half an L1
static_assert(kPage <= kTogetherRows, "a page is multiplied at once");

struct Group {
  int64_t slot, first, rows;
  int64_t width;  // the sum of the slot's ranks over its parts
};

// A piece of a group: rows from `first` on, of those in order.
struct Task {
  int64_t slot, first, rows;
  int part;
  int64_t piece;  // a page, or where the columns begin
};

class Batch {
 public:
  Batch(const AdapterTable& table, int64_t m)
      : table(table), order_(m), groups_(min64(m, table.slots)), next_(table.slots + 1) {
    int64_t* next = next_.get();
    std::memset(next, 0, size_t(table.slots + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < m; ++i)
      if (table.slot_ids[i] >= 0) ++next[table.slot_ids[i] + 1];
    for (int64_t slot = 0; slot < table.slots; ++slot) {
      if (next[slot + 1] > 0) add_group(slot, next[slot], next[slot + 1]);
      next[slot + 1] += next[slot];
    }
    for (int64_t i = 0; i < m; ++i)
      if (table.slot_ids[i] >= 0) order_.get()[next[table.slot_ids[i]]++] = i;
    rows = next[table.slots];
  }

  const AdapterTable& table;
  int64_t rows = 0;    // that have a slot
  int64_t groups = 0;  // slots that have a row
  int64_t ld = 0;      // the largest width of a group: the stride of what has one value a row and rank

  const Group& group(int64_t i) const { return groups_.get()[i]; }
  int64_t row(int64_t position) const { return order_.get()[position]; }

  // Where a part's ranks begin among those of its slot.
  int64_t start(int64_t slot, int part) const {
    int64_t sum = 0;
    for (int p = 0; p < part; ++p) sum += table.rank(slot, p);
    return sum;
  }

 private:
  void add_group(int64_t slot, int64_t first, int64_t count) {
    const int64_t width = start(slot, table.parts.count);
    groups_.get()[groups++] = {slot, first, count, width};
    ld = max64(ld, width);
  }

  Scratch<int64_t> order_;
  Scratch<Group> groups_;
  Scratch<int64_t> next_;
};

// Tasks of all groups in a row: fill(sink) calls sink(task) for each, and is called twice.
class Tasks {
 public:
  template <class Fill>
  explicit Tasks(const Fill& fill) : count_(counted(fill)), tasks_(count_) {
    int64_t at = 0;
    fill([&](const Task& task) { tasks_.get()[at++] = task; });
  }
  int64_t count() const { return count_; }
  const Task& operator[](int64_t i) const { return tasks_.get()[i]; }

 private:
  template <class Fill>
  static int64_t counted(const Fill& fill) {
    int64_t count = 0;
    fill([&](const Task&) { ++count; });
    return count;
  }

  const int64_t count_;
  Scratch<Task> tasks_;
};

// sink(task) for every block of a group's rows and every piece of [begin, end) in steps of `step`.
template <class Sink>
inline void add_tasks(const Group& group, int part, int64_t begin, int64_t end, int64_t step, const Sink& sink) {
  for (int64_t piece = begin; piece < end; piece += step)
    for (int64_t row = 0; row < group.rows; row += kRowsOfTask)
      sink(Task{group.slot, group.first + row, min64(kRowsOfTask, group.rows - row), part, piece});
}

// A task for every page of every part.
template <class Sink>
inline void add_page_tasks(const Batch& batch, const Sink& sink) {
  for (int64_t g = 0; g < batch.groups; ++g)
    for (int part = 0; part < batch.table.parts.count; ++part)
      add_tasks(batch.group(g), part, 0, ceil_div(batch.table.rank(batch.group(g).slot, part), kPage), 1, sink);
}

// products[position][start of the part + rank] = scaling * (the row of lines) . (row `rank` of the pages of A, or, of
// the columns of the part, of B).
inline void multiply_page(const Batch& batch, const Task& task, bool of_b, const float* const* lines, float* products) {
  const AdapterTable& table = batch.table;
  const int64_t first = of_b ? table.parts.begin(task.part) : 0, depth = of_b ? table.parts.size(task.part) : table.k;
  const int64_t rank = task.piece * kPage, count = min64(kPage, table.rank(task.slot, task.part) - rank);
  const int64_t page = table.page(of_b, task.slot, task.part, task.piece);
  float sums[kRowsOfTask * kTogetherRows];
  with_type(table.dtype, table.values,
            [&](auto values) { dots(lines + task.first, task.rows, first, depth, values + page, depth, count, sums); });
  const float scaling = load_one(table.scaling + task.slot * table.parts.count + task.part);
  float* to = products + task.first * batch.ld + batch.start(task.slot, task.part) + rank;
  for (int64_t i = 0; i < task.rows; ++i)
    for (int64_t r = 0; r < count; ++r) to[i * batch.ld + r] = scaling * sums[i * kTogetherRows + r];
}

// out[rows][ld_out], `columns` of them from the task's on, (+)= products times the rows of a part's pages of A, or B.
// False where the part has no ranks, and nothing is written.
inline bool add_pages(const Batch& batch, const Task& task, int part, bool of_b, int64_t columns, const float* products,
                      float* out, int64_t ld_out, bool add_to_out) {
  const AdapterTable& table = batch.table;
  const int64_t width = of_b ? table.parts.size(part) : table.k, ranks = table.rank(task.slot, part);
  const float* s = products + task.first * batch.ld + batch.start(task.slot, part);
  with_type(table.dtype, table.values, [&](auto values) {
    decltype(values) lines[kPage];
    for (int64_t rank = 0; rank < ranks; rank += kPage) {
      const auto page = values + table.page(of_b, task.slot, part, rank / kPage) + task.piece;
      const int64_t depth = min64(kPage, ranks - rank);
      for (int64_t r = 0; r < depth; ++r) lines[r] = page + r * width;
      combine(task.rows, depth, lines, columns, s + rank, batch.ld, 1, out, ld_out, add_to_out || rank > 0);
    }
  });
  return ranks > 0;
}

// Rows of a matrix of T as floats, by position: as they lie where they are floats.
template <class T>
class Lines {
 public:
  Lines(const Batch& batch, int64_t width, const T* from)
      : width_(width), from_(from), floats_(kIsFloat<T> ? 0 : batch.rows * width), lines_(batch.rows) {
    for (int64_t i = 0; i < batch.rows; ++i) {
      if constexpr (kIsFloat<T>)
        lines_.get()[i] = from + batch.row(i) * width;
      else
        lines_.get()[i] = floats_.get() + i * width;
    }
  }
  // What is not floats is converted: one row of the batch.
  void convert(const Batch& batch, int64_t position) const {
    if constexpr (!kIsFloat<T>)
      to_floats(from_ + batch.row(position) * width_, width_, floats_.get() + position * width_);
  }
  const float* const* get() const { return lines_.get(); }

 private:
  const int64_t width_;
  const T* from_;
  Scratch<float> floats_;
  Scratch<const float*> lines_;
};

}  // namespace peftrt::cpu::PEFTRT_ISA
