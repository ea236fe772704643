// The CUDA functions as torch sees them, in namespace peftrt_cuda, with the schemas of peftrt_cpu: checks, pointers,
// and nothing else.
//
// Built on torch's stable ABI. Every launch is on the current stream of its tensors' device; nothing waits, memory
// comes from torch, and so all of it can be captured in a graph. Python checks its arguments with better words; what
// stands here keeps a bad call from reading or writing out of bounds.
#include "binding_cuda.h"

#include <atomic>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

namespace {

void nf4_dequantize(Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_offset, int64_t block_size, Tensor out) {
  const Call call("nf4_dequantize", out);
  call.check_dense(out, "out");
  const Dtype dtype = dtype_of(out, call.op(), "out");
  const Weight weight = weight_of(call, codes, absmax, nested_absmax, nested_offset, block_size, out.numel());
  check_launch(peftrt::cuda::nf4_dequantize(weight.codes, weight.scales, out.numel(), dtype, out.mutable_data_ptr(),
                                            call.stream()),
               call.op());
}

void nf4_quantize(Tensor weight, int64_t block_size, Tensor codes, Tensor absmax) {
  const Call call("nf4_quantize", weight);
  call.check_dense(weight, "weight");
  const int shift = shift_of(block_size, call.op());
  const int64_t numel = weight.numel(), blocks = (numel + block_size - 1) / block_size;
  uint8_t* packed = call.bytes_out(codes, (numel + 1) / 2, "codes");
  uint8_t* scales = call.bytes_out(absmax, 4 * blocks, "absmax", 4);
  check_launch(peftrt::cuda::nf4_quantize(dtype_of(weight, call.op(), "weight"), weight.const_data_ptr(), numel, shift,
                                          packed, reinterpret_cast<float*>(scales), call.stream()),
               call.op());
}

void nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor codes, Tensor nested_absmax) {
  const Call call("nf4_quantize_scales", absmax);
  const int64_t blocks = codes.numel(), runs = (blocks + peftrt::kNestedBlock - 1) / peftrt::kNestedBlock;
  const Tensor scales = call.bytes(absmax, 4 * blocks, "absmax", 4), mean = call.bytes(offset, 4, "offset", 4);
  uint8_t* packed = call.bytes_out(codes, blocks, "codes");
  uint8_t* nested = call.bytes_out(nested_absmax, 4 * runs, "nested_absmax", 4);
  check_launch(peftrt::cuda::nf4_quantize_scales(reinterpret_cast<const float*>(pointer(scales)), blocks,
                                                 reinterpret_cast<const float*>(pointer(mean)), packed,
                                                 reinterpret_cast<float*>(nested), call.stream()),
               call.op());
}

// Never the same twice in a process, and seldom in two that use one device.
uint64_t next_ticket() {
  static std::atomic<uint64_t> last(uint64_t(std::random_device{}()) << 16);
  return ++last;
}

// A product's operands, kept as a weight's are.
struct Operands {
  Linear linear;
  Weight weight;
  Tensor rows;
  std::optional<Tensor> bias;
  std::vector<int64_t> sizes;  // of the result
};
Operands operands_of(const Call& call, const Tensor& x, const Tensor& codes, const Tensor& absmax,
                     const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_offset, int64_t n,
                     int64_t k, int64_t block_size, const std::optional<Tensor>& bias, int64_t most) {
  check(x.dim() >= 1 && x.size(-1) == k, call.op(), "x", "[..., K]");
  check(n >= 0 && n < 1LL << 31 && k < 1LL << 31, call.op(), "weight", "of less than 2^31 rows and columns");
  const Dtype dtype = dtype_of(x, call.op(), "x");
  check(dtype != Dtype::kFloat32, call.op(), "x", "bfloat16 or float16");
  std::vector<int64_t> sizes(size_t(x.dim()), n);
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= sizes[size_t(i)] = x.size(i);
  STD_TORCH_CHECK(m <= most, kLibrary, call.op(), ": x must be of at most ", most, " rows, got ", m);
  // Codes that lie crookedly are copied: that takes less time than the kernel for them, and keeps the bits.
  Operands of = {{},
                 weight_of(call, codes, absmax, nested_absmax, nested_offset, block_size, n * k, k % 32 == 0 ? 16 : 1),
                 call.dense(x, "x", 16),
                 {},
                 sizes};
  if (bias) {
    check(bias->dim() == 1 && bias->numel() == n && bias->scalar_type() == x.scalar_type(), call.op(), "bias",
          "[N], of x's dtype");
    of.bias = call.dense(*bias, "bias", 2);
  }
  of.linear = {dtype, of.weight.codes, of.weight.scales, of.rows.const_data_ptr(), nullptr, nullptr, m, n, k};
  of.linear.bias = of.bias ? of.bias->const_data_ptr() : nullptr;
  return of;
}

Tensor nf4_linear(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                  std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size,
                  std::optional<Tensor> bias) {
  const Call call("nf4_linear", x);
  int64_t most = 0;
  check_launch(peftrt::cuda::nf4_linear_rows(&most), call.op());
  Operands of = operands_of(call, x, codes, absmax, nested_absmax, nested_offset, n, k, block_size, bias, most);
  Tensor y = torch::stable::new_empty(x, of.sizes);
  of.linear.y = y.mutable_data_ptr();
  int64_t bytes = 0;
  check_launch(peftrt::cuda::nf4_linear_workspace(of.linear, &bytes), call.op());
  // Given back when this returns: the allocator hands it to later work of the same stream only.
  Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  check_launch(peftrt::cuda::nf4_linear(of.linear, next_ticket(), workspace.mutable_data_ptr(), call.stream()),
               call.op());
  return y;
}

constexpr int64_t kAdapterRows = 64;

// The parts' starts; the splits are checked.
void set_parts(const Call& call, Adapters& adapters, IntHeaderOnlyArrayRef splits, int64_t n) {
  check(splits.size() >= 1 && splits.size() <= size_t(peftrt::cuda::kMaxParts), call.op(), "splits", "1 to 8 sizes");
  adapters.parts = int(splits.size());
  int64_t start = 0;
  for (size_t i = 0; i < splits.size(); ++i) {
    check(splits[i] >= 0 && splits[i] <= n - start, call.op(), "splits", "sizes that sum to N");
    adapters.part_start[i + 1] = int(start += splits[i]);
  }
  check(start == n, call.op(), "splits", "sizes that sum to N");
}

void run_multi_lora(const Call& call, const Tensor& x, Operands& of, const Adapters& adapters, Tensor& y,
                    int64_t y_stride) {
  of.linear.y = y.mutable_data_ptr();
  int64_t bytes = 0;
  check_launch(peftrt::cuda::multi_lora_workspace(of.linear, adapters, &bytes), call.op());
  Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  check_launch(peftrt::cuda::multi_lora_linear(of.linear, adapters, y_stride, next_ticket(),
                                               workspace.mutable_data_ptr(), call.stream()),
               call.op());
}

// A table's tensors, kept as a weight's are. What they hold is on the device, and is not looked at here.
struct Table {
  Adapters adapters = {};
  std::vector<Tensor> kept;

  template <class T>
  const T* keep(const Call& call, const Tensor& tensor, ScalarType type, std::vector<int64_t> sizes, const char* name) {
    bool fits = tensor.scalar_type() == type && tensor.dim() == int64_t(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(int64_t(i)) == sizes[i];
    check(fits, call.op(), name, "of the table's sizes, int32, int64 or float32");
    kept.push_back(call.dense(tensor, name, sizeof(T)));
    return static_cast<const T*>(kept.back().const_data_ptr());
  }
};

Table table_of(const Call& call, int64_t m, int64_t n, const Tensor& values, const Tensor& ranks, const Tensor& A_pages,
               const Tensor& B_pages, const Tensor& scaling, const std::optional<Tensor>& vectors,
               const std::optional<Tensor>& vector_starts, IntHeaderOnlyArrayRef splits, const Tensor& slot_ids,
               const std::optional<Tensor>& error_flag) {
  Table table;
  Adapters& adapters = table.adapters;
  set_parts(call, adapters, splits, n);
  check(ranks.dim() == 2 && A_pages.dim() == 3 && values.dim() == 1, call.op(), "ranks and A_pages",
        "[E, P] and [E, P, W], and values [S]");
  const int64_t slots = ranks.size(0), parts = adapters.parts, pages = A_pages.size(2);
  check(slots < 1LL << 31 && pages <= 32, call.op(), "A_pages", "of at most 32 pages");
  adapters.slots = slots, adapters.pages = int(pages);
  adapters.A_dtype = adapters.B_dtype = dtype_of(values, call.op(), "values");
  table.kept.push_back(call.dense(values, "values", adapters.A_dtype == Dtype::kFloat32 ? 4 : 2));
  adapters.A = adapters.B = table.kept.back().const_data_ptr();
  adapters.ranks = table.keep<int32_t>(call, ranks, ScalarType::Int, {slots, parts}, "ranks");
  adapters.A_pages = table.keep<int64_t>(call, A_pages, ScalarType::Long, {slots, parts, pages}, "A_pages");
  adapters.B_pages = table.keep<int64_t>(call, B_pages, ScalarType::Long, {slots, parts, pages}, "B_pages");
  adapters.scaling = table.keep<float>(call, scaling, ScalarType::Float, {slots, parts}, "scaling");
  adapters.slot_ids = table.keep<int32_t>(call, slot_ids, ScalarType::Int, {m}, "slot_ids");
  check(vectors.has_value() == vector_starts.has_value(), call.op(), "vector_starts", "given exactly when vectors are");
  if (vectors) {
    adapters.vectors = table.keep<float>(call, *vectors, ScalarType::Float, {vectors->numel()}, "vectors");
    adapters.vector_starts = table.keep<int64_t>(call, *vector_starts, ScalarType::Long, {slots, 3}, "vector_starts");
  }
  if (error_flag) {
    check(error_flag->is_cpu() && error_flag->scalar_type() == ScalarType::Int && error_flag->numel() == 1, call.op(),
          "error_flag", "int32 [1] in pinned memory of the host");
    adapters.error_flag = static_cast<int32_t*>(error_flag->mutable_data_ptr());
  }
  return table;
}

Tensor nf4_multi_lora_linear(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                             std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size,
                             Tensor values, Tensor ranks, Tensor A_pages, Tensor B_pages, Tensor scaling,
                             std::optional<Tensor> vectors, std::optional<Tensor> vector_starts,
                             IntHeaderOnlyArrayRef splits, Tensor slot_ids, std::optional<Tensor> bias,
                             std::optional<Tensor> error_flag) {
  const Call call("nf4_multi_lora_linear", x);
  Operands of = operands_of(call, x, codes, absmax, nested_absmax, nested_offset, n, k, block_size, bias, kAdapterRows);
  const Table table = table_of(call, of.linear.m, n, values, ranks, A_pages, B_pages, scaling, vectors, vector_starts,
                               splits, slot_ids, error_flag);
  Tensor y = torch::stable::new_empty(x, of.sizes);
  run_multi_lora(call, x, of, table.adapters, y, n);
  return y;
}

// out is [M, N], at any stride of its rows.
void nf4_multi_lora_linear_out(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                               std::optional<Tensor> nested_offset, int64_t n, int64_t k, int64_t block_size,
                               Tensor values, Tensor ranks, Tensor A_pages, Tensor B_pages, Tensor scaling,
                               std::optional<Tensor> vectors, std::optional<Tensor> vector_starts,
                               IntHeaderOnlyArrayRef splits, Tensor slot_ids, std::optional<Tensor> bias,
                               std::optional<Tensor> error_flag, Tensor out) {
  const Call call("nf4_multi_lora_linear", x);
  Operands of = operands_of(call, x, codes, absmax, nested_absmax, nested_offset, n, k, block_size, bias, kAdapterRows);
  const Table table = table_of(call, of.linear.m, n, values, ranks, A_pages, B_pages, scaling, vectors, vector_starts,
                               splits, slot_ids, error_flag);
  call.check_here(out, "out");
  check(out.scalar_type() == x.scalar_type() && out.dim() == 2 && out.size(0) == of.linear.m && out.size(1) == n,
        call.op(), "out", "[M, N], of x's dtype");
  check((n <= 1 || out.stride(1) == 1) && (of.linear.m <= 1 || out.stride(0) >= n), call.op(), "out",
        "of rows whose elements lie together");
  run_multi_lora(call, x, of, table.adapters, out, of.linear.m <= 1 ? n : out.stride(0));
}

// One adapter for all rows: y = row_scale * (x W^T + s x A^T B^T) + bias; beside it, in fp32, x A^T.
std::tuple<Tensor, Tensor> nf4_lora_linear(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> nested_absmax,
                                           std::optional<Tensor> nested_offset, int64_t n, int64_t k,
                                           int64_t block_size, Tensor lora_A, Tensor lora_B, double scaling,
                                           std::optional<Tensor> bias, std::optional<Tensor> row_scale,
                                           IntHeaderOnlyArrayRef splits) {
  const Call call("nf4_lora_linear", x);
  Operands of = operands_of(call, x, codes, absmax, nested_absmax, nested_offset, n, k, block_size, bias, kAdapterRows);
  Adapters adapters = {};
  const int64_t whole[] = {n};
  set_parts(call, adapters, splits.size() == 0 ? IntHeaderOnlyArrayRef(whole, 1) : splits, n);
  check(lora_B.dim() == 2 && lora_B.size(0) == n && lora_B.size(1) <= 256, call.op(), "lora_B", "[N, R], R <= 256");
  const int64_t rank = lora_B.size(1);
  check(lora_A.dim() == 2 && lora_A.size(0) == adapters.parts * rank && lora_A.size(1) == k, call.op(), "lora_A",
        "[P R, K]");
  adapters.A_dtype = dtype_of(lora_A, call.op(), "lora_A"), adapters.B_dtype = dtype_of(lora_B, call.op(), "lora_B");
  const Tensor a = call.dense(lora_A, "lora_A", adapters.A_dtype == Dtype::kFloat32 ? 4 : 2),
               b = call.dense(lora_B, "lora_B", adapters.B_dtype == Dtype::kFloat32 ? 4 : 2);
  Table table;
  if (row_scale) adapters.y_scale = table.keep<float>(call, *row_scale, ScalarType::Float, {n}, "row_scale");
  adapters.A = a.const_data_ptr(), adapters.B = b.const_data_ptr();
  adapters.slots = 1, adapters.pages = int((rank + peftrt::cuda::kPageRanks - 1) / peftrt::cuda::kPageRanks);
  adapters.rank = int(rank), adapters.scale = float(scaling);
  Tensor y = torch::stable::new_empty(x, of.sizes);
  of.sizes.back() = adapters.parts * rank;
  Tensor xa = torch::stable::new_empty(x, of.sizes, ScalarType::Float);
  adapters.xa = static_cast<float*>(xa.mutable_data_ptr());
  run_multi_lora(call, x, of, adapters, y, n);
  return {y, xa};
}

// How many rows of x nf4_linear takes on a device.
int64_t nf4_linear_rows(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  int64_t rows = 0;
  check_launch(peftrt::cuda::nf4_linear_rows(&rows), "nf4_linear_rows");
  return rows;
}

std::string sm() { return PEFTRT_CUDA_ARCHS; }

}  // namespace

#define PEFTRT_WEIGHT "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "

#define PEFTRT_TABLE_CALL                                                                                          \
  "Tensor x, " PEFTRT_WEIGHT                                                                                       \
  "int n, int k, int block_size, Tensor values, Tensor ranks, Tensor A_pages, Tensor "                             \
  "B_pages, Tensor scaling, Tensor? vectors, Tensor? vector_starts, int[] splits, Tensor slot_ids, Tensor? bias, " \
  "Tensor? error_flag"

STABLE_TORCH_LIBRARY(peftrt_cuda, m) {
  m.def("nf4_dequantize(" PEFTRT_WEIGHT "int block_size, Tensor(a!) out) -> ()");
  m.def("nf4_quantize(Tensor weight, int block_size, Tensor(a!) codes, Tensor(b!) absmax) -> ()");
  m.def("nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor(a!) codes, Tensor(b!) nested_absmax) -> ()");
  m.def("nf4_linear(Tensor x, " PEFTRT_WEIGHT "int n, int k, int block_size, Tensor? bias) -> Tensor");
  m.def("nf4_multi_lora_linear(" PEFTRT_TABLE_CALL ") -> Tensor");
  m.def("nf4_multi_lora_linear_out(" PEFTRT_TABLE_CALL ", Tensor(a!) out) -> ()");
  m.def("nf4_lora_linear(Tensor x, " PEFTRT_WEIGHT
        "int n, int k, int block_size, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, Tensor? row_scale, "
        "int[] splits) -> (Tensor, Tensor)");
  m.def("nf4_linear_rows(int device) -> int");
  m.def("sm() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cuda, CUDA, m) {
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_quantize_scales", TORCH_BOX(&nf4_quantize_scales));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear));
  m.impl("nf4_multi_lora_linear", TORCH_BOX(&nf4_multi_lora_linear));
  m.impl("nf4_multi_lora_linear_out", TORCH_BOX(&nf4_multi_lora_linear_out));
  m.impl("nf4_lora_linear", TORCH_BOX(&nf4_lora_linear));
}

STABLE_TORCH_LIBRARY_IMPL(peftrt_cuda, CompositeExplicitAutograd, m) {
  m.impl("nf4_linear_rows", TORCH_BOX(&nf4_linear_rows));
  m.impl("sm", TORCH_BOX(&sm));
}
