// What the kernels need of a GPU: every instruction that C++ has no word for, and the launch. Nothing else in csrc/cuda
// speaks PTX or names a builtin of CUDA, so that a test can put another header in the place of this one and run the
// kernels on a CPU.
//
// Everything exists from sm_80 on. Addresses of shared memory are plain pointers; asynchronous copies count in groups,
// as in PTX.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define PEFTRT_DEVICE __device__ __forceinline__
#define PEFTRT_BOTH __host__ __device__ __forceinline__
#define PEFTRT_KERNEL __global__
#define PEFTRT_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define PEFTRT_TABLE __device__ const  // an array at namespace scope, read by run-time index

namespace peftrt::cuda {

// ---- where this thread is ----

PEFTRT_DEVICE int thread_index() { return int(threadIdx.x); }
PEFTRT_DEVICE int64_t block_index() { return blockIdx.x; }
PEFTRT_DEVICE int64_t block_count() { return gridDim.x; }

// The architecture that this code is compiled for, as 90; 0 in the host's pass, which compiles no kernel.
#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 0;
#endif

// The block's dynamic shared memory.
PEFTRT_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t peftrt_shared[];
  return peftrt_shared;
}

// A part of it whose address the compiler knows, so that a word's address is its offset and nothing is added to it. The
// block's own memory starts at address 0, or at 1024 behind what sm_90 keeps for itself.
constexpr int kFixedAddress = 1024;
PEFTRT_DEVICE int fixed_offset() {
  const int offset = kFixedAddress - int(__cvta_generic_to_shared(shared_memory()));
  if (offset < 0) __trap();
  return offset;
}
PEFTRT_DEVICE uint32_t load_fixed(uint32_t offset) {
  uint32_t word;
  asm("ld.shared.b32 %0, [%1 + 1024];" : "=r"(word) : "r"(offset));
  return word;
}

// ---- waiting and ordering ----

PEFTRT_DEVICE void sync_block() { __syncthreads(); }
// Writes before it are seen by other blocks before those after it.
PEFTRT_DEVICE void fence_device() { __threadfence(); }

PEFTRT_DEVICE uint64_t compare_and_swap(uint64_t* word, uint64_t expected, uint64_t desired) {
  return atomicCAS(reinterpret_cast<unsigned long long*>(word), expected, desired);
}

template <class T>
PEFTRT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- loads, stores, copies ----

struct alignas(16) Vector {
  uint32_t word[4];
};

// For memory that is read once: it leaves the L2 first, which then holds what is read again.
using Policy = uint64_t;
PEFTRT_DEVICE Policy read_once() {
  Policy policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

PEFTRT_DEVICE uint32_t load_word(const void* from, Policy policy) {
  uint32_t value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.b32 %0, [%1], %2;" : "=r"(value) : "l"(from), "l"(policy));
  return value;
}
PEFTRT_DEVICE uint32_t load_half_word(const void* from, Policy policy) {
  uint16_t value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.b16 %0, [%1], %2;" : "=h"(value) : "l"(from), "l"(policy));
  return value;
}
// What another block has written: past the L1, which may hold older bytes.
PEFTRT_DEVICE float load_of_blocks(const float* from) { return __ldcg(from); }
PEFTRT_DEVICE uint64_t load_of_blocks(const uint64_t* from) { return *const_cast<const volatile uint64_t*>(from); }
// Memory that nobody on this device reads soon.
PEFTRT_DEVICE void store_streaming(Vector* to, Vector value) {
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
}

// 16 bytes to shared memory, or 16 zero bytes where they are not there to read.
PEFTRT_DEVICE void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
PEFTRT_DEVICE void copy_async(void* to, const void* from, bool there, Policy policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
               :
               : "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0), "l"(policy)
               : "memory");
}
PEFTRT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's groups but for the `kLeft` newest.
template <int kLeft>
PEFTRT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kLeft) : "memory");
}

// ---- words ----

// Byte i of the result is byte (selector >> 4 i) & 15 of the eight bytes low, high.
PEFTRT_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// ---- numbers: rounding is to nearest even, and nothing is fused that is not called so ----

PEFTRT_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
PEFTRT_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
PEFTRT_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PEFTRT_DEVICE float reciprocal(float a) { return __frcp_rn(a); }
PEFTRT_DEVICE uint32_t float_bits(float a) { return __float_as_uint(a); }
PEFTRT_DEVICE float bits_float(uint32_t a) { return __uint_as_float(a); }

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

PEFTRT_DEVICE float to_float(float a) { return a; }
PEFTRT_DEVICE float to_float(Bf16 a) { return bits_float(uint32_t(a.bits) << 16); }
PEFTRT_DEVICE float to_float(Fp16 a) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(a.bits));
  return value;
}

// Both rounded, `first` in the low half.
template <class T>
PEFTRT_DEVICE uint32_t pack(float first, float second);
template <>
PEFTRT_DEVICE uint32_t pack<Bf16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
template <>
PEFTRT_DEVICE uint32_t pack<Fp16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// ---- matrices of a warp; the lane is 4 g + t ----

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r names row r of matrix i, 16 bytes of shared memory. Word i of
// the result is what lies at bytes [4 t, 4 t + 4) of row g of matrix i.
PEFTRT_DEVICE void load_matrices(const void* row, uint32_t (&word)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row))));
}

// c [16 x 8] += a [16 x 16] b [16 x 8], summed in fp32. With pairs of 16-bit elements in a word, the first in the low
// half: a = {(g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)}, b = {(2t, g), (2t + 8, g)}, c = {(g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.
template <class T>
PEFTRT_DEVICE void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
PEFTRT_DEVICE void multiply_matrices<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
PEFTRT_DEVICE void multiply_matrices<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- the host's side: null, or what went wrong ----

inline const char* error_of(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

inline const char* multiprocessors(int* count) {
  int device = 0;
  if (const char* error = error_of(cudaGetDevice(&device))) return error;
  return error_of(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

// The architecture of the machine code that a kernel has for this device, as 90.
template <class... Parameters>
const char* architecture(void (*kernel)(Parameters...), int* found) {
  cudaFuncAttributes attributes = {};
  const char* error = error_of(cudaFuncGetAttributes(&attributes, kernel));
  *found = attributes.binaryVersion;
  return error;
}

// `shared` bytes of dynamic shared memory; over 48 KB they have to be asked for.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, void* stream,
                   Parameters... parameters) {
  if (shared > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return error_of(status);
  }
  kernel<<<unsigned(blocks), unsigned(threads), size_t(shared), static_cast<cudaStream_t>(stream)>>>(parameters...);
  return error_of(cudaGetLastError());
}

}  // namespace peftrt::cuda
