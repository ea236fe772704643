// Eight floats at a time: the only thing that differs between instruction sets, chosen by a macro of the build.
//
// Each simd_<isa>.h defines, in namespace peftrt::cpu::<isa>:
//   F                                        eight floats
//   zero, set1, loadu, storeu, add, mul, fma  (a * b + c; fused where the hardware has it)
//   load<T>, store<T>                         eight elements of float, bf16 or fp16, converted; RNE on the way out
//   round_to<T>                               the nearest T, as a float; the identity for T = float
//   sum                                       the sum of the eight, in one fixed order
//   transpose8                                eight vectors of eight, in place
//   kIsFloat<T>                               whether T is float
//   set_halves(a, b)                          a in the first four, b in the rest
//   lookup64(codes, sink)                     32 bytes -> 64 values of kNf4, unscaled: sink(j, F), in an order of its
//   own to_lookup_order(from, to)                 64 floats put into that order decode64<T>(codes, s0, s1, sink) 32
//   bytes -> 64 weights round_to<T>(code * scale) in natural order: sink(j, F)
//                                             has elements 8j .. 8j + 7; s0 scales the first 32 of them, s1 the rest
//   max_magnitude(most, v)                    the larger of most, which is not negative, and |v|; a NaN is the largest
//   largest(most)                             the largest lane of such a vector
//   encode64<T>(weights, r0, r1, codes)       64 weights of T -> 32 bytes: the nearest levels, by kNf4Thresholds, of
//                                             weight * r0 for the first 32 of them, of weight * r1 for the rest
#pragma once

#if defined(PEFTRT_ISA_AVX2)
#include "cpu/simd_avx2.h"
#elif defined(PEFTRT_ISA_NEON)
#include "cpu/simd_neon.h"
#else
#include "cpu/simd_portable.h"
#endif
