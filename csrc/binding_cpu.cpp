// The CPU functions as torch sees them, in namespace peftrt_cpu: checks (binding_cpu.h), pointers, and nothing else.
//
// Built on torch's stable ABI. Where a function takes `out`, all its tensors are contiguous and `out` is written whole.
// Python checks its arguments with better words; what stands here keeps a bad call from reading or writing out of
// bounds.
#include "binding_cpu.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "binding_bottleneck.h"

namespace {

using peftrt::cpu::AdamwStep;
using peftrt::cpu::LowRankGradient;

void nf4_dequantize(Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_offset, int64_t block_size, Tensor out) {
  const char* op = "nf4_dequantize";
  check_dense(out, op, "out");
  const Dtype dtype = dtype_of(out, op, "out");
  const Weight weight = weight_of(op, codes, absmax, nested_absmax, nested_offset, block_size, 1, out.numel());
  peftrt::cpu::kernels().nf4_dequantize(weight, dtype, out.mutable_data_ptr(), parallel(4 * out.numel()));
}

void nf4_quantize(Tensor weight, int64_t block_size, Tensor codes, Tensor absmax) {
  const char* op = "nf4_quantize";
  check_dense(weight, op, "weight");
  const Dtype dtype = dtype_of(weight, op, "weight");
  check_block_size(block_size, op);
  const int64_t numel = weight.numel(), blocks = (numel + block_size - 1) / block_size;
  bytes_of(codes, (numel + 1) / 2, op, "codes");
  bytes_of(absmax, 4 * blocks, op, "absmax");
  peftrt::cpu::kernels().nf4_quantize(dtype, numel, int(block_size), weight.const_data_ptr(),
                                      static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                      static_cast<uint8_t*>(absmax.mutable_data_ptr()), parallel(4 * numel));
}

void nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor codes, Tensor nested_absmax) {
  const char* op = "nf4_quantize_scales";
  const int64_t blocks = codes.numel(), runs = (blocks + peftrt::kNestedBlock - 1) / peftrt::kNestedBlock;
  float mean;
  std::memcpy(&mean, bytes_of(offset, 4, op, "offset"), 4);
  const uint8_t* scales = bytes_of(absmax, 4 * blocks, op, "absmax");
  bytes_of(codes, blocks, op, "codes");
  bytes_of(nested_absmax, 4 * runs, op, "nested_absmax");
  peftrt::cpu::kernels().nf4_quantize_scales(blocks, scales, mean, static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                             static_cast<uint8_t*>(nested_absmax.mutable_data_ptr()),
                                             parallel(4 * blocks));
}

void linear(const char* op, const Tensor& x, const Tensor& codes, const std::optional<Tensor>& absmax,
            const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_offset, int64_t block_size,
            const std::optional<Tensor>& bias, const LowRank* adapter, bool invariant, const Tensor& out) {
  const Product product = check_product(op, "x", x, out);
  const int64_t n = out.size(-1), k = x.size(-1);
  const BaseOf base(op, codes, absmax, nested_absmax, nested_offset, n, k, block_size, x);
  check_bias(op, bias, n, x);
  const int64_t adapted = adapter == nullptr ? 0 : n * adapter->rank + k * adapter->width();
  const int64_t work = base.work(product.rows) + product.rows * adapted;
  peftrt::cpu::kernels().linear(*base.get(), product.dtype, product.rows, x.const_data_ptr(),
                                bias ? bias->const_data_ptr() : nullptr, adapter, invariant, out.mutable_data_ptr(),
                                parallel(work));
}

void nf4_linear_out(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_offset, int64_t block_size, std::optional<Tensor> bias, Tensor out,
                    bool invariant) {
  check_product("nf4_linear", "x", x, out);
  weight_of("nf4_linear", codes, absmax, nested_absmax, nested_offset, block_size, out.size(-1), x.size(-1));
  linear("nf4_linear", x, codes, absmax, nested_absmax, nested_offset, block_size, bias, nullptr, invariant, out);
}

void linear_dx(const char* op, const Tensor& dy, const Tensor& codes, const std::optional<Tensor>& absmax,
               const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_offset,
               int64_t block_size, const LowRankGradient* adapter, bool invariant, const Tensor& out) {
  const Product product = check_product(op, "dy", dy, out);
  const int64_t n = dy.size(-1), k = out.size(-1);
  const BaseOf base(op, codes, absmax, nested_absmax, nested_offset, n, k, block_size, dy);
  const int64_t rank = adapter == nullptr ? 0 : adapter->rank;
  const int64_t work = base.work(product.rows) + product.rows * k * rank;
  peftrt::cpu::kernels().linear_dx(*base.get(), product.dtype, product.rows, dy.const_data_ptr(), adapter, invariant,
                                   out.mutable_data_ptr(), parallel(work));
}

void nf4_linear_dx_out(Tensor dy, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                       std::optional<Tensor> nested_offset, int64_t block_size, Tensor out, bool invariant) {
  check_product("nf4_linear_dx", "dy", dy, out);
  weight_of("nf4_linear_dx", codes, absmax, nested_absmax, nested_offset, block_size, dy.size(-1), out.size(-1));
  linear_dx("nf4_linear_dx", dy, codes, absmax, nested_absmax, nested_offset, block_size, nullptr, invariant, out);
}

// The same with any strides and a result of their own: what the operations call.
Tensor nf4_linear(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                  std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size,
                  std::optional<Tensor> bias, bool invariant) {
  Tensor out = empty_product("nf4_linear", "x", x, k, n);
  nf4_linear_out(dense(x), dense(codes), dense(absmax), dense(nested_absmax), dense(nested_offset), block_size,
                 dense(bias), out, invariant);
  return out;
}

// y = row_scale * (x W^T + s x A^T B^T) + bias; beside it, in fp32, x A^T (of `dropped`, which is what the adapter sees
// of x, where it is given). Without absmax the base is dense, here and in the gradient.
std::tuple<Tensor, Tensor> nf4_lora_linear(Tensor x, std::optional<Tensor> dropped, Tensor codes,
                                           std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                                           std::optional<Tensor> nested_offset, int64_t n, int64_t k,
                                           int64_t block_size, Tensor lora_A, Tensor lora_B, double scaling,
                                           std::optional<Tensor> bias, std::optional<Tensor> row_scale,
                                           IntHeaderOnlyArrayRef splits, bool invariant) {
  const char* op = "nf4_lora_linear";
  const Tensor a = dense(lora_A), b = dense(lora_B);
  const std::vector<int64_t> ends = ends_of(op, splits, n);
  LowRank adapter = low_rank_of(op, a, b, k, scaling, ends);
  Tensor out = empty_product(op, "x", x, k, n);
  Tensor xa = empty_product(op, "x", x, k, adapter.width(), ScalarType::Float);
  if (dropped) {
    check(dropped->is_cpu() && dropped->scalar_type() == ScalarType::Float && dropped->dim() == x.dim(), op, "dropped",
          "float32, of x's shape");
    for (int64_t i = 0; i < x.dim(); ++i) check(dropped->size(i) == x.size(i), op, "dropped", "float32, of x's shape");
  }
  const std::optional<Tensor> seen = dense(dropped), scale = dense(row_scale);
  adapter.dropped = seen ? static_cast<const float*>(seen->const_data_ptr()) : nullptr;
  adapter.row_scale = row_scale_of(op, scale, n);
  adapter.xa = static_cast<float*>(xa.mutable_data_ptr());
  linear(op, dense(x), codes, absmax, nested_absmax, nested_offset, block_size, dense(bias), &adapter, invariant, out);
  return {out, xa};
}

Tensor nf4_linear_dx(Tensor dy, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                     std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size, bool invariant) {
  Tensor out = empty_product("nf4_linear_dx", "dy", dy, n, k);
  nf4_linear_dx_out(dense(dy), dense(codes), dense(absmax), dense(nested_absmax), dense(nested_offset), block_size, out,
                    invariant);
  return out;
}

void dropout(Tensor x, int64_t seed, double p, Tensor out) {
  const char* op = "dropout";
  check_dense(x, op, "x");
  check_dense(out, op, "out");
  check(out.numel() == x.numel() && out.scalar_type() == x.scalar_type(), op, "out", "of x's size and dtype");
  peftrt::cpu::kernels().dropout(dtype_of(x, op, "x"), x.numel(), dropout_of(op, seed, p), x.const_data_ptr(),
                                 out.mutable_data_ptr(), parallel(8 * x.numel()));
}

// g = scaling * dz B, dA = g^T drop(x) and dB = scaling * dz^T xa, in fp32, with dz = row_scale * dy; a seed where
// something was dropped. dA and dB are empty where they are not wanted.
std::tuple<Tensor, Tensor, Tensor> low_rank_gradient(Tensor dy, Tensor x, Tensor xa, Tensor lora_B, double scaling,
                                                     std::optional<int64_t> seed, double p,
                                                     std::optional<Tensor> row_scale, bool needs_da, bool needs_db,
                                                     IntHeaderOnlyArrayRef splits) {
  const char* op = "low_rank_gradient";
  check(lora_B.is_cpu() && lora_B.dim() == 2, op, "lora_B", "[N, R] on the CPU");
  const int64_t n = lora_B.size(0), rank = lora_B.size(1);
  const std::vector<int64_t> ends = ends_of(op, splits, n);
  const int64_t width = rank * int64_t(ends.size());
  check(x.is_cpu() && x.dim() >= 1, op, "x", "[..., K] on the CPU");
  const int64_t k = x.size(-1);
  check(dy.is_cpu() && dy.dim() == x.dim() && dy.size(-1) == n && dy.scalar_type() == x.scalar_type(), op, "dy",
        "[..., N], of x's dtype and dimensions");
  check(xa.is_cpu() && xa.dim() == x.dim() && xa.size(-1) == width && xa.scalar_type() == ScalarType::Float, op, "xa",
        "float32 [..., R], of x's dimensions");
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    check(dy.size(i) == x.size(i) && xa.size(i) == x.size(i), op, "dy and xa", "of as many rows as x");
    m *= x.size(i);
  }
  const Tensor rows_dy = dense(dy), rows_x = dense(x), rows_xa = dense(xa), b = dense(lora_B);
  Tensor g = torch::stable::new_empty(xa, {m, width}), da = torch::stable::new_empty(xa, {needs_da ? width : 0, k}),
         db = torch::stable::new_empty(xa, {needs_db ? n : 0, rank});
  const Dropout dropout = seed ? dropout_of(op, *seed, p) : Dropout{};
  const std::optional<Tensor> scale = dense(row_scale);
  LowRankGradient adapter = {};
  adapter.rank = rank;
  adapter.parts = {int(ends.size()), ends.data()};
  adapter.row_scale = row_scale_of(op, scale, n);
  adapter.b_dtype = dtype_of(b, op, "lora_B");
  adapter.b = b.const_data_ptr();
  adapter.dropout = seed ? &dropout : nullptr;
  adapter.scaling = float(scaling);
  adapter.g = static_cast<float*>(g.mutable_data_ptr());
  peftrt::cpu::kernels().low_rank_gradient(dtype_of(x, op, "x"), m, n, k, rows_dy.const_data_ptr(),
                                           rows_x.const_data_ptr(), static_cast<const float*>(rows_xa.const_data_ptr()),
                                           adapter, needs_da ? static_cast<float*>(da.mutable_data_ptr()) : nullptr,
                                           needs_db ? static_cast<float*>(db.mutable_data_ptr()) : nullptr,
                                           parallel(m * (n * rank + needs_da * k * width + needs_db * n * rank)));
  return {g, da, db};
}

// dX of a base and an adapter whose g [M, R] the function above has computed.
Tensor nf4_lora_linear_dx(Tensor dy, Tensor codes, std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                          std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size, Tensor g,
                          Tensor lora_A, std::optional<int64_t> seed, double p, std::optional<Tensor> row_scale,
                          bool invariant) {
  const char* op = "nf4_lora_linear_dx";
  check(lora_A.is_cpu() && lora_A.dim() == 2 && lora_A.size(1) == k, op, "lora_A", "[R, K] on the CPU");
  const int64_t rank = lora_A.size(0);
  Tensor out = empty_product(op, "dy", dy, n, k);
  check_dense(g, op, "g");
  check(g.scalar_type() == ScalarType::Float && g.dim() == 2 && g.size(1) == rank && g.size(0) * k == out.numel(), op,
        "g", "float32 [M, R]");
  const Tensor a = dense(lora_A);
  const Dropout dropout = seed ? dropout_of(op, *seed, p) : Dropout{};
  const std::optional<Tensor> scale = dense(row_scale);
  LowRankGradient adapter = {};
  adapter.rank = rank;
  adapter.parts = {1, &n};  // dx has no parts: all of A adds to all of it
  adapter.row_scale = row_scale_of(op, scale, n);
  adapter.a_dtype = dtype_of(a, op, "lora_A");
  adapter.a = a.const_data_ptr();
  adapter.dropout = seed ? &dropout : nullptr;
  adapter.g = static_cast<float*>(g.mutable_data_ptr());
  linear_dx(op, dense(dy), codes, absmax, nested_absmax, nested_offset, block_size, &adapter, invariant, out);
  return out;
}

// || W[n] + s B[n] A ||_2, float32 [N], of a dense base (absmax is not given) or an NF4 one.
Tensor lora_weight_norm(Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                        std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size, Tensor lora_A,
                        Tensor lora_B, double scaling, IntHeaderOnlyArrayRef splits) {
  const char* op = "lora_weight_norm";
  const Tensor a = dense(lora_A), b = dense(lora_B);
  const std::vector<int64_t> ends = ends_of(op, splits, n);
  const LowRank adapter = low_rank_of(op, a, b, k, scaling, ends);
  Tensor values = weight;
  const std::optional<Tensor> scales = dense(absmax), nested = dense(nested_absmax), offset = dense(nested_offset);
  Weight nf4 = {};
  Base base = {};
  base.n = n, base.k = k;
  if (scales) {
    values = dense(weight);
    nf4 = weight_of(op, values, *scales, nested, offset, block_size, n, k);
    base.nf4 = &nf4;
  } else {
    check(weight.is_cpu() && weight.dim() == 2 && weight.size(0) == n && weight.size(1) == k, op, "weight",
          "[N, K] on the CPU");
    base.transposed = weight.stride(1) != 1 && weight.stride(0) == 1;
    if (!base.transposed && weight.stride(1) != 1) values = torch::stable::contiguous(weight);
    base.stride = values.stride(base.transposed ? 1 : 0);
    base.dtype = dtype_of(values, op, "weight");
    base.dense = values.const_data_ptr();
  }
  Tensor out = torch::stable::new_empty(a, {n}, ScalarType::Float);
  peftrt::cpu::kernels().lora_weight_norm(base, adapter, static_cast<float*>(out.mutable_data_ptr()),
                                          parallel((4 + adapter.rank) * n * k));
  return out;
}

// sum_m dy (y - bias) / row_scale, float32 [N].
Tensor row_scale_gradient(Tensor dy, Tensor y, std::optional<Tensor> bias, Tensor row_scale) {
  const char* op = "row_scale_gradient";
  const Tensor rows_dy = dense(dy), rows_y = dense(y);
  const Product product = check_product(op, "dy", rows_dy, rows_y);
  const int64_t n = rows_dy.size(-1);
  check(rows_y.size(-1) == n, op, "y", "of dy's shape");
  const std::optional<Tensor> added = dense(bias), scale = dense(std::optional<Tensor>(row_scale));
  check_bias(op, added, n, rows_dy);
  Tensor out = torch::stable::new_empty(*scale, {n}, ScalarType::Float);
  peftrt::cpu::kernels().row_scale_gradient(product.dtype, product.rows, n, rows_dy.const_data_ptr(),
                                            rows_y.const_data_ptr(), added ? added->const_data_ptr() : nullptr,
                                            row_scale_of(op, scale, n), static_cast<float*>(out.mutable_data_ptr()),
                                            parallel(4 * product.rows * n));
  return out;
}

// A batch in which every row has an adapter of its own: peftrt/ops/_multi_lora_linear.py has the arguments.
void multi_lora_linear_out(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> absmax,
                           std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_offset, int64_t n,
                           int64_t k, int64_t block_size, Tensor values, Tensor ranks, Tensor A_pages, Tensor B_pages,
                           Tensor scaling, std::optional<Tensor> vectors, std::optional<Tensor> vector_starts,
                           IntHeaderOnlyArrayRef splits, Tensor slot_ids, std::optional<Tensor> bias, Tensor out,
                           bool invariant) {
  const char* op = "multi_lora_linear";
  const int64_t m = check_rows(op, "x", x, k, "out", out, n);
  const Table table(op, m, n, k, values, ranks, A_pages, B_pages, scaling, vectors, vector_starts, splits, slot_ids);
  const BaseOf base(op, weight, absmax, nested_absmax, nested_offset, n, k, block_size, x);
  const Tensor rows = dense(x);
  const std::optional<Tensor> added = dense(bias);
  check_bias(op, added, n, x);
  peftrt::cpu::kernels().multi_lora_linear(
      base.get(), dtype_of(x, op, "x"), m, rows.const_data_ptr(), added ? added->const_data_ptr() : nullptr,
      table.table, invariant, out.mutable_data_ptr(), row_stride(op, out), parallel(base.work(m) + table.work(m)));
}

Tensor multi_lora_linear(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> absmax,
                         std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_offset, int64_t n, int64_t k,
                         int64_t block_size, Tensor values, Tensor ranks, Tensor A_pages, Tensor B_pages,
                         Tensor scaling, std::optional<Tensor> vectors, std::optional<Tensor> vector_starts,
                         IntHeaderOnlyArrayRef splits, Tensor slot_ids, std::optional<Tensor> bias, bool invariant) {
  Tensor out = empty_product("multi_lora_linear", "x", x, k, n);
  multi_lora_linear_out(x, weight, absmax, nested_absmax, nested_offset, n, k, block_size, values, ranks, A_pages,
                        B_pages, scaling, vectors, vector_starts, splits, slot_ids, bias, out, invariant);
  return out;
}

// dx of x's dtype, and the gradient of values in fp32; each is empty where it is not wanted.
std::tuple<Tensor, Tensor> multi_lora_linear_backward(Tensor dz, Tensor x, std::optional<Tensor> weight,
                                                      std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                                                      std::optional<Tensor> nested_offset, int64_t n, int64_t k,
                                                      int64_t block_size, Tensor values, Tensor ranks, Tensor A_pages,
                                                      Tensor B_pages, Tensor scaling, IntHeaderOnlyArrayRef splits,
                                                      Tensor slot_ids, bool needs_dx, bool needs_dvalues,
                                                      bool invariant) {
  const char* op = "multi_lora_linear_backward";
  const int64_t m = check_rows(op, "x", x, k, "dz", dz, n);
  const Table table(op, m, n, k, values, ranks, A_pages, B_pages, scaling, std::nullopt, std::nullopt, splits,
                    slot_ids);
  const BaseOf base(op, weight, absmax, nested_absmax, nested_offset, n, k, block_size, x);
  const Tensor rows_dz = dense(dz), rows_x = dense(x);
  Tensor dx = needs_dx ? empty_product(op, "x", x, k, k) : torch::stable::new_empty(x, {0});
  Tensor dvalues = torch::stable::new_zeros(values, {needs_dvalues ? values.numel() : 0}, ScalarType::Float);
  peftrt::cpu::kernels().multi_lora_linear_backward(
      base.get(), dtype_of(x, op, "x"), m, rows_dz.const_data_ptr(), rows_x.const_data_ptr(), table.table, invariant,
      needs_dx ? dx.mutable_data_ptr() : nullptr,
      needs_dvalues ? static_cast<float*>(dvalues.mutable_data_ptr()) : nullptr,
      parallel(needs_dx * base.work(m) + 2 * table.work(m)));
  return {dx, dvalues};
}

void adamw_step(Tensor state, Tensor chunks, Tensor addresses, Tensor hyper, std::optional<Tensor> coefficient,
                int64_t bits, int64_t page_bytes, int64_t dtype, int64_t spare) {
  const char* op = "adamw_step";
  bytes_of(state, state.numel(), op, "state");
  check(state.dim() == 1, op, "state", "[bytes]");
  check(bits == 32 || bits == 8, op, "bits", "32 or 8");
  check(page_bytes > 0 && page_bytes % 16 == 0, op, "page_bytes", "a multiple of 16");
  check(dtype >= 0 && dtype <= 2, op, "dtype", "0, 1 or 2");
  const ChunkTable table(op, chunks, 5, addresses);
  table.check_pages(op, state.numel(), page_bytes, int(bits), dtype);
  const float* rows = table_of<float>(op, "hyper", hyper, ScalarType::Float, 6);
  check(hyper.size(0) == table.tensors, op, "hyper", "of as many rows as addresses");
  if (coefficient) {
    check_dense(*coefficient, op, "coefficient");
    check(coefficient->scalar_type() == ScalarType::Float && coefficient->numel() == 1, op, "coefficient",
          "one float32");
  }
  const AdamwStep step = {Dtype(dtype),
                          int(bits),
                          page_bytes,
                          static_cast<uint8_t*>(state.mutable_data_ptr()),
                          table.count,
                          table.rows,
                          table.addresses,
                          rows,
                          coefficient ? *static_cast<const float*>(coefficient->const_data_ptr()) : 1.0f};
  peftrt::cpu::kernels().adamw_step(step, parallel((bits == 32 ? kStepWork32 : kStepWork8) * table.elements, spare));
}

void gradient_norm(Tensor addresses, Tensor chunks, Tensor partials, double max_norm, Tensor out) {
  const char* op = "gradient_norm";
  const ChunkTable table(op, chunks, 3, addresses);
  check_dense(partials, op, "partials"), check_dense(out, op, "out");
  check(max_norm > 0, op, "max_norm", "above 0");
  check(partials.scalar_type() == ScalarType::Double && partials.dim() == 1 && partials.numel() == table.count, op,
        "partials", "float64, one a chunk");
  check(out.scalar_type() == ScalarType::Float && out.dim() == 1 && out.numel() == 2, op, "out", "float32 [2]");
  peftrt::cpu::kernels().gradient_norm(
      table.addresses, table.rows, table.count, static_cast<double*>(partials.mutable_data_ptr()), max_norm,
      static_cast<float*>(out.mutable_data_ptr()), parallel(kNormWork * table.elements));
}

std::string isa() { return peftrt::cpu::kernels().isa; }

}  // namespace

#define PEFTRT_EITHER "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, "
#define PEFTRT_WEIGHT "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
#define PEFTRT_BASE                                                                                              \
  "Tensor? weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, int n, int k, int block_size, " \
  "Tensor values, Tensor ranks, Tensor A_pages, Tensor B_pages, Tensor scaling, "
#define PEFTRT_TABLE PEFTRT_BASE "Tensor? vectors, Tensor? vector_starts, int[] splits, Tensor slot_ids, Tensor? bias, "

STABLE_TORCH_LIBRARY(peftrt_cpu, m) {
  m.def("nf4_dequantize(" PEFTRT_WEIGHT "int block_size, Tensor(a!) out) -> ()");
  m.def("nf4_quantize(Tensor weight, int block_size, Tensor(a!) codes, Tensor(b!) absmax) -> ()");
  m.def("nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor(a!) codes, Tensor(b!) nested_absmax) -> ()");
  m.def("nf4_linear(Tensor x, " PEFTRT_WEIGHT
        "int n, int k, int block_size, Tensor? bias, bool invariant=False) -> Tensor");
  m.def("nf4_linear.out(Tensor x, " PEFTRT_WEIGHT
        "int block_size, Tensor? bias, Tensor(a!) out, bool invariant=False) -> ()");
  m.def("nf4_lora_linear(Tensor x, Tensor? dropped, " PEFTRT_EITHER
        "int n, int k, int block_size, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, Tensor? row_scale, "
        "int[] splits=[], bool invariant=False) -> (Tensor, Tensor)");
  m.def("nf4_linear_dx(Tensor dy, " PEFTRT_WEIGHT "int n, int k, int block_size, bool invariant=False) -> Tensor");
  m.def("nf4_linear_dx.out(Tensor dy, " PEFTRT_WEIGHT "int block_size, Tensor(a!) out, bool invariant=False) -> ()");
  m.def(
      "low_rank_gradient(Tensor dy, Tensor x, Tensor xa, Tensor lora_B, float scaling, int? seed, float p, "
      "Tensor? row_scale, bool needs_da, bool needs_db, int[] splits=[]) -> (Tensor, Tensor, Tensor)");
  m.def("nf4_lora_linear_dx(Tensor dy, " PEFTRT_EITHER
        "int n, int k, int block_size, Tensor g, Tensor lora_A, int? seed, float p, Tensor? row_scale, "
        "bool invariant=False) -> Tensor");
  m.def("multi_lora_linear(Tensor x, " PEFTRT_TABLE "bool invariant=False) -> Tensor");
  m.def("multi_lora_linear.out(Tensor x, " PEFTRT_TABLE "Tensor(a!) out, bool invariant=False) -> ()");
  m.def("multi_lora_linear_backward(Tensor dz, Tensor x, " PEFTRT_BASE
        "int[] splits, Tensor slot_ids, bool needs_dx, bool needs_dvalues, bool invariant=False) -> (Tensor, Tensor)");
  m.def(
      "bottleneck(Tensor x, Tensor residual, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, "
      "float scaling, int activation, bool invariant=False) -> (Tensor, Tensor)");
  m.def(
      "bottleneck_gradient(Tensor dy, Tensor x, Tensor inner, Tensor up_weight, float scaling, int activation, "
      "bool needs_down, bool needs_up) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lora_weight_norm(Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, int n, int k, int "
      "block_size, Tensor lora_A, Tensor lora_B, float scaling, int[] splits=[]) -> Tensor");
  m.def("row_scale_gradient(Tensor dy, Tensor y, Tensor? bias, Tensor row_scale) -> Tensor");
  m.def("dropout(Tensor x, int seed, float p, Tensor(a!) out) -> ()");
  m.def(
      "adamw_step(Tensor(a!) state, Tensor chunks, Tensor addresses, Tensor hyper, Tensor? coefficient, int bits, "
      "int page_bytes, int dtype, int spare) -> ()");
  m.def("gradient_norm(Tensor addresses, Tensor chunks, Tensor(a!) partials, float max_norm, Tensor(b!) out) -> ()");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cpu, CPU, m) {
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_quantize_scales", TORCH_BOX(&nf4_quantize_scales));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear));
  m.impl("nf4_linear.out", TORCH_BOX(&nf4_linear_out));
  m.impl("nf4_lora_linear", TORCH_BOX(&nf4_lora_linear));
  m.impl("nf4_linear_dx", TORCH_BOX(&nf4_linear_dx));
  m.impl("nf4_linear_dx.out", TORCH_BOX(&nf4_linear_dx_out));
  m.impl("low_rank_gradient", TORCH_BOX(&low_rank_gradient));
  m.impl("nf4_lora_linear_dx", TORCH_BOX(&nf4_lora_linear_dx));
  m.impl("multi_lora_linear", TORCH_BOX(&multi_lora_linear));
  m.impl("multi_lora_linear.out", TORCH_BOX(&multi_lora_linear_out));
  m.impl("multi_lora_linear_backward", TORCH_BOX(&multi_lora_linear_backward));
  m.impl("bottleneck", TORCH_BOX(&bottleneck));
  m.impl("bottleneck_gradient", TORCH_BOX(&bottleneck_gradient));
  m.impl("lora_weight_norm", TORCH_BOX(&lora_weight_norm));
  m.impl("row_scale_gradient", TORCH_BOX(&row_scale_gradient));
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("adamw_step", TORCH_BOX(&adamw_step));
  m.impl("gradient_norm", TORCH_BOX(&gradient_norm));
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
