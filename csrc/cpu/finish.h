// What becomes of a row of a base's product before it is rounded, and the products that take it: how an operation over
// many adapters has its share, its scales and its biases rounded together with the base's.
#pragma once

#include "cpu/kernels.h"
#include "cpu/micro.h"

namespace peftrt::cpu::PEFTRT_ISA {

// One row: out[n] = scale[n] * (sum[n] + addend[n]) + the call's bias[n] + bias[n]. Null where the row has none.
struct RowFinish {
  const float* addend;
  const float* scale;
  const float* bias;
};

struct Finish {
  int64_t stride;              // elements from one row of out to the next
  bool invariant;              // one order of summation whatever the number of rows
  const RowFinish* rows = {};  // [m], null: no row has any

  const RowFinish* at(int64_t row) const { return rows == nullptr ? nullptr : rows + row; }
};

// `count` of kLanes floats, zeros behind them.
PEFTRT_INLINE F load_some(const float* from, int64_t count) {
  if (count == kLanes) return loadu(from);
  alignas(sizeof(F)) float line[kLanes] = {};
  std::memcpy(line, from, size_t(count) * sizeof(float));
  return loadu(line);
}

// One output, as finished() below has kLanes of them.
PEFTRT_INLINE float finished_one(float sum, const RowFinish* row, float bias, int64_t n) {
  if (row == nullptr) return sum + bias;
  if (row->addend != nullptr) sum += load_one(row->addend + n);
  if (row->scale != nullptr) sum *= load_one(row->scale + n);
  sum += bias;
  return row->bias == nullptr ? sum : sum + load_one(row->bias + n);
}

// `count` outputs of a row from n on.
PEFTRT_INLINE F finished(F sums, const RowFinish& row, F bias, int64_t n, int64_t count) {
  if (row.addend != nullptr) sums = add(sums, load_some(row.addend + n, count));
  if (row.scale != nullptr) sums = mul(sums, load_some(row.scale + n, count));
  sums = add(sums, bias);
  return row.bias == nullptr ? sums : add(sums, load_some(row.bias + n, count));
}

// floats[0 .. count) += from[0 .. count).
inline void add_floats(const float* from, int64_t count, float* floats) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) storeu(floats + i, add(loadu(floats + i), loadu(from + i)));
  for (int64_t i = whole; i < count; ++i) floats[i] += from[i];
}

// And the row's addend from `column` on, where it has one.
inline void add_addend(const RowFinish* row, int64_t column, int64_t count, float* floats) {
  if (row != nullptr && row->addend != nullptr) add_floats(row->addend + column, count, floats);
}

// linear and linear_dx (kernels.h) of rows that are finished so; of dx only the
// addend. A dense base is of x's dtype.
void finish_linear(const Base& base, Dtype dtype, int64_t m, const void* x, const void* bias, const LowRank* adapter,
                   const Finish& finish, void* out, const Parallel& parallel);
void finish_linear_dx(const Base& base, Dtype dtype, int64_t m, const void* dy, const LowRankGradient* adapter,
                      const Finish& finish, void* out, const Parallel& parallel);

}  // namespace peftrt::cpu::PEFTRT_ISA
