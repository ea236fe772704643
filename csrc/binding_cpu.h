// What the functions of binding_cpu.cpp check and convert their arguments with.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "adamw_state.h"
#include "binding.h"
#include "cpu/kernels.h"
#include "nf4.h"

namespace {

using peftrt::cpu::AdapterTable;
using peftrt::cpu::Base;
using peftrt::cpu::Dropout;
using peftrt::cpu::LowRank;
using peftrt::cpu::Parallel;
using peftrt::cpu::Weight;
using torch::headeronly::IntHeaderOnlyArrayRef;

const char kLibrary[] = "peftrt_cpu::";

void check_dense(const Tensor& tensor, const char* op, const char* argument) {
  check(tensor.is_cpu() && tensor.is_contiguous(), op, argument, "a contiguous CPU tensor");
}

const uint8_t* bytes_of(const Tensor& tensor, int64_t count, const char* op, const char* argument) {
  check_dense(tensor, op, argument);
  check(tensor.scalar_type() == ScalarType::Byte, op, argument, "uint8");
  STD_TORCH_CHECK(tensor.numel() == count, kLibrary, op, ": ", argument, " must have ", count, " bytes, got ",
                  tensor.numel());
  return static_cast<const uint8_t*>(tensor.const_data_ptr());
}

Weight weight_of(const char* op, const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                 const std::optional<Tensor>& nested_offset, int64_t block_size, int64_t n, int64_t k) {
  check_block_size(block_size, op);
  check(nested_absmax.has_value() == nested_offset.has_value(), op, "nested_offset",
        "given exactly when nested_absmax is");
  const int64_t numel = n * k, blocks = (numel + block_size - 1) / block_size;
  Weight weight = {};
  weight.codes = bytes_of(codes, (numel + 1) / 2, op, "codes");
  weight.absmax = bytes_of(absmax, nested_absmax ? blocks : 4 * blocks, op, "absmax");
  if (nested_absmax) {
    const int64_t runs = (blocks + peftrt::kNestedBlock - 1) / peftrt::kNestedBlock;
    weight.nested_absmax = bytes_of(*nested_absmax, 4 * runs, op, "nested_absmax");
    std::memcpy(&weight.nested_offset, bytes_of(*nested_offset, 4, op, "nested_offset"), 4);
  }
  weight.n = n;
  weight.k = k;
  weight.block_size = int(block_size);
  return weight;
}

// A call of less work than this stays on the caller's thread. Work is counted in multiplications, of which a core does
// 30 in a nanosecond; to decode a weight counts as four. To wake a second thread takes 5 to 10 µs if it spins and 25 to
// 50 if it sleeps (OMP_WAIT_POLICY), so that two threads first win at 30 µs of work and at some 100 (Zen 3, November
// 2026).
constexpr int64_t kAlone = 1 << 20;
// Of an element in an optimizer's step, by the bits of its state, and in a norm: 0.6, 2.7 and 0.2 ns a core.
constexpr int64_t kStepWork32 = 20, kStepWork8 = 80, kNormWork = 6;

// torch's own threads, so that torch.set_num_threads is obeyed and no second pool competes with them; `spare` of them
// are left to others.
Parallel parallel(int64_t work, int64_t spare = 0) {
  const auto run = [](int64_t tasks, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  const int64_t threads = int64_t(torch::stable::get_num_threads()) - spare;
  return {work < kAlone || threads < 1 ? 1 : int(threads), run};
}

// a [..., a_width] times the weight -> out [..., out_width], both contiguous and of one dtype; their dtype and rows.
struct Product {
  Dtype dtype;
  int64_t rows;
};
Product check_product(const char* op, const char* argument, const Tensor& a, const Tensor& out) {
  check_dense(a, op, argument);
  check_dense(out, op, "out");
  check(a.dim() >= 1, op, argument, "[..., features]");
  check(out.scalar_type() == a.scalar_type() && out.dim() == a.dim(), op, "out", "of the input's dtype and dimensions");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < a.dim(); ++i) {
    check(out.size(i) == a.size(i), op, "out", "of the input's shape but for the last dimension");
    rows *= a.size(i);
  }
  return {dtype_of(a, op, argument), rows};
}

// a [..., a_width] and b [..., b_width] of one dtype, any strides; their rows.
int64_t check_rows(const char* op, const char* a_name, const Tensor& a, int64_t a_width, const char* b_name,
                   const Tensor& b, int64_t b_width) {
  check(a.is_cpu() && a.dim() >= 1 && a.size(-1) == a_width, op, a_name, "[..., features] on the CPU");
  check(b.is_cpu() && b.dim() == a.dim() && b.size(-1) == b_width && b.scalar_type() == a.scalar_type(), op, b_name,
        "[..., features], of x's dtype and dimensions");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < a.dim(); ++i) {
    check(b.size(i) == a.size(i), op, b_name, "of x's shape but for the last dimension");
    rows *= a.size(i);
  }
  return rows;
}

void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t n, const Tensor& x) {
  if (!bias) return;
  check_dense(*bias, op, "bias");
  check(bias->dim() == 1 && bias->numel() == n && bias->scalar_type() == x.scalar_type(), op, "bias",
        "[N], of x's dtype");
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

// An empty [..., width] for a product of `a` [..., a_width], of a's dtype unless another is named.
Tensor empty_product(const char* op, const char* argument, const Tensor& a, int64_t a_width, int64_t width,
                     std::optional<ScalarType> dtype = std::nullopt) {
  check(a.is_cpu() && a.dim() >= 1 && a.size(-1) == a_width, op, argument, "[..., features] on the CPU");
  std::vector<int64_t> sizes(size_t(a.dim()), width);
  for (int64_t i = 0; i + 1 < a.dim(); ++i) sizes[size_t(i)] = a.size(i);
  return torch::stable::new_empty(a, sizes, dtype);
}

// Where each part of the outputs ends, of their sizes; one part where none are given.
std::vector<int64_t> ends_of(const char* op, IntHeaderOnlyArrayRef splits, int64_t n) {
  if (splits.empty()) return {n};
  std::vector<int64_t> ends;
  for (const int64_t size : splits) {
    check(size >= 0, op, "splits", "of sizes");
    ends.push_back((ends.empty() ? 0 : ends.back()) + size);
  }
  check(ends.back() == n, op, "splits", "sizes that sum to N");
  return ends;
}

// The rank of a part of an A that has `width` rows.
int64_t rank_of(const char* op, int64_t width, const std::vector<int64_t>& ends) {
  check(width % int64_t(ends.size()) == 0, op, "lora_A", "of as many rows for each part");
  return width / int64_t(ends.size());
}

// An adapter of a base [n, k] as the kernels take it; A and B are contiguous and, as the ends, outlive it.
LowRank low_rank_of(const char* op, const Tensor& a, const Tensor& b, int64_t k, double scaling,
                    const std::vector<int64_t>& ends) {
  check(a.is_cpu() && a.dim() == 2 && a.size(1) == k, op, "lora_A", "[R, K] on the CPU");
  LowRank adapter = {};
  adapter.rank = rank_of(op, a.size(0), ends);
  adapter.parts = {int(ends.size()), ends.data()};
  check(b.is_cpu() && b.dim() == 2 && b.size(0) == ends.back() && b.size(1) == adapter.rank, op, "lora_B",
        "[N, R] on the CPU");
  adapter.a_dtype = dtype_of(a, op, "lora_A");
  adapter.b_dtype = dtype_of(b, op, "lora_B");
  adapter.a = a.const_data_ptr();
  adapter.b = b.const_data_ptr();
  adapter.scaling = float(scaling);
  return adapter;
}

// The values of a contiguous row scale [n], which outlives them; null where there is none.
const float* row_scale_of(const char* op, const std::optional<Tensor>& row_scale, int64_t n) {
  if (!row_scale) return nullptr;
  check_dense(*row_scale, op, "row_scale");
  check(row_scale->dim() == 1 && row_scale->numel() == n && row_scale->scalar_type() == ScalarType::Float, op,
        "row_scale", "float32 [N]");
  return static_cast<const float*>(row_scale->const_data_ptr());
}

// An adapter table's tensors as the kernels take them. What a row of the batch can reach is looked at: a bad slot id,
// rank or start is refused.
class Table {
 public:
  Table(const char* op, int64_t m, int64_t n, int64_t k, const Tensor& values, const Tensor& ranks,
        const Tensor& a_pages, const Tensor& b_pages, const Tensor& scaling, const std::optional<Tensor>& vectors,
        const std::optional<Tensor>& starts, IntHeaderOnlyArrayRef splits, const Tensor& slot_ids)
      : values_(dense(values)),
        ranks_(dense(ranks)),
        a_pages_(dense(a_pages)),
        b_pages_(dense(b_pages)),
        scaling_(dense(scaling)),
        slot_ids_(dense(slot_ids)),
        vectors_(dense(vectors)),
        starts_(dense(starts)) {
    check(n >= 0 && k >= 0 && !splits.empty(), op, "splits", "of at least one size, N and K not negative");
    ends_ = ends_of(op, splits, n);
    check(values_.is_cpu() && values_.dim() == 1, op, "values", "[S] on the CPU");
    check(ranks_.dim() == 2 && a_pages_.dim() == 3, op, "ranks and A_pages", "[E, P] and [E, P, W]");
    const int64_t slots = ranks_.size(0), parts = int64_t(ends_.size()), pages = a_pages_.size(2);
    table.dtype = dtype_of(values_, op, "values");
    table.values = values_.const_data_ptr();
    table.parts = {int(parts), ends_.data()};
    table.k = k, table.slots = slots, table.pages = pages;
    table.ranks = data<int32_t>(op, "ranks", ranks_, ScalarType::Int, {slots, parts});
    table.a_pages = data<int64_t>(op, "A_pages", a_pages_, ScalarType::Long, {slots, parts, pages});
    table.b_pages = data<int64_t>(op, "B_pages", b_pages_, ScalarType::Long, {slots, parts, pages});
    table.scaling = data<float>(op, "scaling", scaling_, ScalarType::Float, {slots, parts});
    table.slot_ids = data<int32_t>(op, "slot_ids", slot_ids_, ScalarType::Int, {m});
    check(vectors_.has_value() == starts_.has_value(), op, "vector_starts", "given exactly when vectors are");
    if (vectors_) {
      check(vectors_->dim() == 1, op, "vectors", "[V]");
      table.vectors = data<float>(op, "vectors", *vectors_, ScalarType::Float, {vectors_->numel()});
      table.starts = data<int64_t>(op, "vector_starts", *starts_, ScalarType::Long, {slots, 3});
    }
    std::vector<bool> seen(size_t(slots), false);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t slot = table.slot_ids[i];
      check(slot >= -1 && slot < slots, op, "slot_ids", "-1 or a slot of the table");
      if (slot < 0 || seen[size_t(slot)]) continue;
      seen[size_t(slot)] = true;
      check_slot(op, slot);
    }
  }

  // Multiplications that the adapters take, and reading their pages, of which a value counts as six.
  int64_t work(int64_t m) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < m; ++i)
      for (int part = 0; table.slot_ids[i] >= 0 && part < table.parts.count; ++part)
        sum += 6 * table.rank(table.slot_ids[i], part) * (table.k + table.parts.size(part));
    return sum;
  }

  AdapterTable table = {};

 private:
  template <class T>
  static const T* data(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                       const std::vector<int64_t>& sizes) {
    bool fits = tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.dim() == int64_t(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(int64_t(i)) == sizes[i];
    check(fits, op, argument, "of the table's shape and dtype, on the CPU");
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  void check_slot(const char* op, int64_t slot) const {
    const int64_t size = values_.numel(), page = AdapterTable::kPage;
    for (int part = 0; part < table.parts.count; ++part) {
      const int64_t ranks = table.rank(slot, part);
      check(ranks >= 0 && ranks <= page * table.pages, op, "ranks", "what the pages hold");
      for (int64_t rank = 0; rank < ranks; rank += page) {
        const int64_t held = ranks - rank < page ? ranks - rank : page;
        const int64_t a = table.page(false, slot, part, rank / page), b = table.page(true, slot, part, rank / page);
        check(a >= 0 && a <= size - held * table.k, op, "A_pages", "inside of values");
        check(b >= 0 && b <= size - held * table.parts.size(part), op, "B_pages", "inside of values");
      }
    }
    if (!vectors_) return;
    for (int which = 0; which < 3; ++which) {
      const int64_t start = table.starts[3 * slot + which],
                    room = vectors_->numel() - (which == 0 ? table.k : table.n());
      check(start >= -1 && (start == -1 || start <= room), op, "vector_starts", "inside of vectors, or -1");
    }
  }

  Tensor values_, ranks_, a_pages_, b_pages_, scaling_, slot_ids_;
  std::optional<Tensor> vectors_, starts_;
  std::vector<int64_t> ends_;
};

// A base weight [n, k]: NF4, dense in x's dtype, or none, and the tensors that it points to.
class BaseOf {
 public:
  BaseOf(const char* op, const std::optional<Tensor>& weight, const std::optional<Tensor>& absmax,
         const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_offset, int64_t n, int64_t k,
         int64_t block_size, const Tensor& x)
      : weight_(weight),
        absmax_(dense(absmax)),
        nested_absmax_(dense(nested_absmax)),
        nested_offset_(dense(nested_offset)) {
    if (!weight_) return;
    base_.n = n, base_.k = k;
    // the rows of a dense one may lie apart
    if (absmax_ || weight_->dim() != 2 || weight_->stride(1) != 1) weight_ = dense(weight_);
    if (!absmax_) {
      check(weight_->is_cpu() && weight_->dim() == 2 && weight_->size(0) == n && weight_->size(1) == k &&
                weight_->scalar_type() == x.scalar_type(),
            op, "weight", "[N, K] of x's dtype, on the CPU");
      check(!nested_absmax_ && !nested_offset_, op, "nested_absmax", "given beside absmax alone");
      base_.dtype = dtype_of(*weight_, op, "weight");
      base_.dense = weight_->const_data_ptr();
      base_.stride = weight_->stride(0);
      return;
    }
    nf4_ = weight_of(op, *weight_, *absmax_, nested_absmax_, nested_offset_, block_size, n, k);
    base_.nf4 = &nf4_;
  }
  BaseOf(const BaseOf&) = delete;
  BaseOf& operator=(const BaseOf&) = delete;

  const Base* get() const { return weight_ ? &base_ : nullptr; }
  int64_t work(int64_t m) const { return weight_ ? (4 + m) * base_.n * base_.k : 0; }

 private:
  std::optional<Tensor> weight_, absmax_, nested_absmax_, nested_offset_;
  Weight nf4_ = {};
  Base base_ = {};
};

// Elements from one of the flattened rows of [..., N] to the next.
int64_t row_stride(const char* op, const Tensor& out) {
  const int64_t n = out.size(-1);
  if (out.numel() == 0) return n;
  bool fits = n <= 1 || out.stride(-1) == 1;
  int64_t stride = n, rows = 1;
  for (int64_t i = out.dim() - 2; i >= 0; --i) {
    if (out.size(i) == 1) continue;
    if (rows == 1) stride = out.stride(i);
    fits = fits && out.stride(i) == stride * rows;
    rows *= out.size(i);
  }
  check(fits && (rows <= 1 || stride >= n), op, "out", "of rows at one stride, a row's elements together");
  return stride;
}

Dropout dropout_of(const char* op, int64_t seed, double p) {
  check(p >= 0.0 && p < 1.0, op, "p", "in [0, 1)");
  const double threshold = std::nearbyint(p * 4294967296.0);
  check(threshold < 4294967296.0, op, "p", "at most 1 - 2^-32");
  return {uint64_t(seed), uint32_t(threshold), float(1.0 - p)};
}

// A contiguous tensor of some type and of two dimensions, `columns` wide; its values.
template <class T>
const T* table_of(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype, int64_t columns) {
  check_dense(tensor, op, argument);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.dim() == 2 && tensor.size(1) == columns, kLibrary, op, ": ",
                  argument, " must be ", dtype == ScalarType::Long ? "int64" : "float32", " [rows, ", columns, "]");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// What an operation by addresses is told of many tensors. Each row is looked at before the first is used: all but the
// addresses themselves, and where the tensors there end, can be checked.
struct ChunkTable {
  static constexpr int64_t kMost = 4096;  // elements of a row

  int64_t count, tensors, elements = 0;
  const int64_t *rows, *addresses;

  ChunkTable(const char* op, const Tensor& chunks, int64_t columns, const Tensor& table)
      : count(0), tensors(0), rows(table_of<int64_t>(op, "chunks", chunks, ScalarType::Long, columns)) {
    addresses = table_of<int64_t>(op, "addresses", table, ScalarType::Long, 3);
    count = chunks.size(0), tensors = table.size(0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t *row = rows + columns * i, tensor = row[0];
      check_row(tensor >= 0 && tensor < tensors, op, i, "a tensor of addresses");
      check_row(row[1] >= 0 && row[2] >= 1 && row[2] <= kMost, op, i, "1 to 4096 elements of a tensor");
      const int64_t* address = addresses + 3 * tensor;
      check(address[1] == 0 || address[0] != 0, op, "addresses", "of a parameter wherever there is a gradient");
      check(address[2] >= 0 && address[2] <= 2, op, "addresses", "with a dtype's code in the last column");
      elements += row[2];
    }
  }

  // That each row's state lies in a page of `state`, and its tensor is of the dtype that the call is for.
  void check_pages(const char* op, int64_t state_bytes, int64_t page_bytes, int bits, int64_t dtype) const {
    const int64_t room = peftrt::state_capacity(page_bytes, bits);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t *row = rows + 5 * i, page = row[3], start = row[4];
      check_row(page >= 0 && page % 16 == 0 && page <= state_bytes - page_bytes, op, i, "a page of state");
      check_row(start >= 0 && start % peftrt::kStateBlock == 0 && start <= room - row[2], op, i,
                "elements from a block of its page on that the page has room for");
      check_row(addresses[3 * row[0] + 2] == dtype, op, i, "a tensor of the call's dtype");
    }
  }

 private:
  static void check_row(bool condition, const char* op, int64_t row, const char* expected) {
    STD_TORCH_CHECK(condition, kLibrary, op, ": row ", row, " of chunks must name ", expected);
  }
};

}  // namespace
