// kLanes floats at a time: the only thing that differs between instruction sets, chosen by a macro of the build.
//
// Each simd_<isa>.h defines, in namespace peftrt::cpu::<isa>:
// clang-format off
//   kLanes                                    floats a vector: 8 or 16
//   F                                         a vector of kLanes floats
//   kMicroRows2, kMicroRows1                  rows of a micro-kernel two vectors or one wide, that fill the registers
//   zero, set1, loadu, storeu, add, mul, fma  (a * b + c; fused where the hardware has it)
//   sub, div, sqrt                            exactly rounded, as add and mul
//   load<T>, store<T>                         kLanes elements of float, bf16 or fp16, converted; RNE on the way out
//   round_to<T>                               the nearest T, as a float; the identity for T = float
//   canonical_nan                             the quiet NaN without payload where there is a NaN
//   sum                                       the sum of the lanes, in one fixed order
//   transpose                                 kLanes vectors, in place
//   set_halves(a, b)                          a in the first half of the lanes, b in the rest
//   lookup64(codes, sink)                     32 bytes -> 64 values of kNf4, unscaled: sink(j, F), in an order of its
//                                             own; the first half of every vector is from the first 32 weights
//   to_lookup_order(from, to)                 64 floats put into that order
//   from_lookup_order(from, to)               and back
//   decode64<T>(codes, s0, s1, sink)          32 bytes -> 64 weights round_to<T>(code * scale) in natural order: of
//                                             sink(j, F), F has elements kLanes * j and on; s0 scales the first 32
//   max_magnitude(most, v)                    the larger of most, which is not negative, and |v|; a NaN is the largest
//   largest(most)                             the largest lane of such a vector
//   encode64<T>(weights, r0, r1, codes)       64 weights of T -> 32 bytes: the nearest levels, by kNf4Thresholds, of
//                                             weight * r0 for the first 32 of them, of weight * r1 for the rest
// clang-format on
#pragma once

#if defined(PEFTRT_ISA_AVX512)
#include "cpu/simd_avx512.h"
#elif defined(PEFTRT_ISA_AVX2)
#include "cpu/simd_avx2.h"
#elif defined(PEFTRT_ISA_NEON)
#include "cpu/simd_neon.h"
#else
#include "cpu/simd_portable.h"
#endif
