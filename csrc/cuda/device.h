// What the kernels need of a GPU: every instruction that C++ has no word for, and the launch. Nothing else in csrc/cuda
// speaks PTX or names a builtin of CUDA, so that a test can put another header in the place of this one and run the
// kernels on a CPU.
//
// Everything exists from sm_80 on, but for what is said to be sm_90a's. Addresses of shared memory are plain pointers;
// asynchronous copies and products count in groups, as in PTX.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <vector>

#define PEFTRT_DEVICE __device__ __forceinline__
#define PEFTRT_BOTH __host__ __device__ __forceinline__
#define PEFTRT_KERNEL __global__
#define PEFTRT_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define PEFTRT_CONSTANT const __grid_constant__  // of a kernel's argument that is read by run-time index
#define PEFTRT_TABLE __device__ const            // an array at namespace scope, read by run-time index

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

// Whether it has what four warps, a warpgroup, do together: sm_90a, with the a.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
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
PEFTRT_DEVICE void sync_warp() { __syncwarp(); }
// Writes before it are seen by other blocks before those after it.
PEFTRT_DEVICE void fence_device() { __threadfence(); }

PEFTRT_DEVICE uint64_t compare_and_swap(uint64_t* word, uint64_t expected, uint64_t desired) {
  return atomicCAS(reinterpret_cast<unsigned long long*>(word), expected, desired);
}

template <class T>
PEFTRT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Whether any lane of the warp says so.
PEFTRT_DEVICE bool any_lane(bool value) { return __any_sync(0xffffffffu, value) != 0; }

// sm_90a's barriers, words of shared memory: a phase is over when `count` threads have arrived, and the next begins.
// What a thread wrote before it arrived is there for those who waited.
using Barrier = uint64_t;
PEFTRT_DEVICE uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }
PEFTRT_DEVICE void start_barrier(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(count) : "memory");
}
PEFTRT_DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" : : "r"(shared_address(barrier)) : "memory");
}
// Until the phase of this parity is over. The first phase has parity 0; the one before it counts as over.
PEFTRT_DEVICE void wait(Barrier* barrier, uint32_t parity) {
  uint32_t over = 0;
  while (over == 0) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
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
PEFTRT_DEVICE Policy read_again() {
  Policy policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
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
PEFTRT_DEVICE Vector load_of_blocks(const Vector* from) {
  const uint4 value = __ldcg(reinterpret_cast<const uint4*>(from));
  return {{value.x, value.y, value.z, value.w}};
}
PEFTRT_DEVICE uint64_t load_of_blocks(const uint64_t* from) { return *const_cast<const volatile uint64_t*>(from); }
// Asks for the 32 bytes around an address, so that they are in the L2 when they are read.
PEFTRT_DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" : : "l"(from)); }
// Memory that nobody on this device reads soon.
PEFTRT_DEVICE void store_streaming(Vector* to, Vector value) {
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
}

// 16 bytes to shared memory, or 16 zero bytes where they are not there to read.
PEFTRT_DEVICE void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
PEFTRT_DEVICE void copy_async(void* to, const void* from, bool there, Policy policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0), "l"(policy)
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

// The compiler knows nothing of the value any more: what is computed of it stays where it stands.
PEFTRT_DEVICE void forget(int& value) { asm volatile("" : "+r"(value)); }

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
               : "r"(shared_address(row)));
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

// ---- products of a warpgroup: sm_90a; they run on while the warps do, from when they are committed ----

// Registers that a thread has, of those of its block: all warps of a warpgroup give, or take.
template <int kCount>
PEFTRT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kCount));
}
template <int kCount>
PEFTRT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kCount));
}

// What this thread has written to shared memory may be read by products.
PEFTRT_DEVICE void show_products() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// Rows of 64 16-bit elements in shared memory, 128 bytes one after the other from a multiple of 1024 on; the 16 bytes
// at 16 i of row r lie at 16 (i ^ r % 8). `first` is where the first 16 columns of a product begin in the first row,
// before they are so moved.
using Rows = uint64_t;
PEFTRT_DEVICE Rows rows_at(const void* first) {
  constexpr uint64_t kEightRows = 1024 / 16, kSwizzled128 = 1;
  return (shared_address(first) & 0x3ffff) / 16 | kEightRows << 32 | kSwizzled128 << 62;
}
// The same, so many bytes further on.
PEFTRT_DEVICE Rows rows_after(Rows rows, int bytes) {
  return (rows >> 32) << 32 | (uint32_t(rows) + uint32_t(bytes) / 16);
}

// Before the first product of a group: registers are as they were last written.
PEFTRT_DEVICE void start_products() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
PEFTRT_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

#define PEFTRT_SUMS_32                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PEFTRT_SUMS_64                                                                 \
  PEFTRT_SUMS_32                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PEFTRT_TIED_8(s, i)                                                                                   \
  "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), \
      "+f"(s[i + 7])
#define PEFTRT_TIED_32(s, i) \
  PEFTRT_TIED_8(s, i), PEFTRT_TIED_8(s, i + 8), PEFTRT_TIED_8(s, i + 16), PEFTRT_TIED_8(s, i + 24)
#define PEFTRT_TIED_64(s) PEFTRT_TIED_32(s, 0), PEFTRT_TIED_32(s, 32)

// sum [64 x 2 kSums] (+)= a [64 x 16] b [16 x 2 kSums], in fp32; b's columns are the rows at `b`. Warp w of the
// warpgroup has rows 16 w ... of a and sum, a as multiply_matrices has it, and sum[4 j + i] as c[i] of columns 8 j ...
// Neither these registers nor the rows may be touched until the group has been waited for.
template <class T, int kSums>
PEFTRT_DEVICE void multiply_rows(float (&sum)[kSums], const uint32_t (&a)[4], Rows b, bool add);
// Waits for this thread's groups but for the `kLeft` newest: `sum` is there.
template <int kLeft, int kSums>
PEFTRT_DEVICE void wait_products(float (&sum)[kSums]);

#define PEFTRT_MULTIPLY_ROWS(T, type, count, columns, sums, tied, a0, a1, a2, a3, b_, add_)                      \
  template <>                                                                                                    \
  PEFTRT_DEVICE void multiply_rows<T, count>(float (&sum)[count], const uint32_t (&a)[4], Rows b, bool add) {    \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " add_ ", 0; wgmma.mma_async.sync.aligned.m64n" columns         \
                 "k16.f32." type "." type " {" sums "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_ ", p, 1, 1, 0; }" \
                 : tied                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add))                             \
                 : "memory");                                                                                    \
  }
#define PEFTRT_MULTIPLY_32(T, type)                                                                                  \
  PEFTRT_MULTIPLY_ROWS(T, type, 32, "64", PEFTRT_SUMS_32, PEFTRT_TIED_32(sum, 0), "%32", "%33", "%34", "%35", "%36", \
                       "%37")
#define PEFTRT_MULTIPLY_64(T, type)                                                                                \
  PEFTRT_MULTIPLY_ROWS(T, type, 64, "128", PEFTRT_SUMS_64, PEFTRT_TIED_64(sum), "%64", "%65", "%66", "%67", "%68", \
                       "%69")
PEFTRT_MULTIPLY_32(Bf16, "bf16")
PEFTRT_MULTIPLY_32(Fp16, "f16")
PEFTRT_MULTIPLY_64(Bf16, "bf16")
PEFTRT_MULTIPLY_64(Fp16, "f16")

// The sums are operands of the wait, so that the compiler reads none before it.
#define PEFTRT_WAIT_PRODUCTS(count, left_, tied)                                         \
  template <>                                                                            \
  PEFTRT_DEVICE void wait_products<0, count>(float (&sum)[count]) {                      \
    asm volatile("wgmma.wait_group.sync.aligned " left_ ";" : tied : "n"(0) : "memory"); \
  }
PEFTRT_WAIT_PRODUCTS(32, "%32", PEFTRT_TIED_32(sum, 0))
PEFTRT_WAIT_PRODUCTS(64, "%64", PEFTRT_TIED_64(sum))

// ---- the host's side: null, or what went wrong ----

inline const char* error_of(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

inline const char* multiprocessors(int* count) {
  int device = 0;
  if (const char* error = error_of(cudaGetDevice(&device))) return error;
  return error_of(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

// What the driver has said of a kernel on a device, and what it was asked for: either takes it longer than a launch.
struct Remembered {
  const void* kernel;
  int device;
  int arch, threads;  // of the machine code, as 90; the most that it can be launched with
  int shared;         // bytes of dynamic shared memory that it may have
};
inline const char* remember(const void* kernel, int shared, Remembered* found) {
  static std::mutex mutex;
  static std::vector<Remembered> known;
  int device = 0;
  if (const char* error = error_of(cudaGetDevice(&device))) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t i = 0;
  while (i < known.size() && (known[i].kernel != kernel || known[i].device != device)) ++i;
  if (i == known.size()) {
    cudaFuncAttributes attributes = {};
    if (const char* error = error_of(cudaFuncGetAttributes(&attributes, kernel))) return error;
    known.push_back({kernel, device, attributes.binaryVersion, attributes.maxThreadsPerBlock, 48 * 1024});
  }
  if (shared > known[i].shared) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return error_of(status);
    known[i].shared = shared;
  }
  *found = known[i];
  return nullptr;
}

// The architecture of the machine code that a kernel has for this device, as 90.
template <class... Parameters>
const char* architecture(void (*kernel)(Parameters...), int* found) {
  Remembered of = {};
  const char* error = remember(reinterpret_cast<const void*>(kernel), 0, &of);
  *found = of.arch;
  return error;
}

// Whether that machine code can be launched with so many threads.
template <class... Parameters>
const char* takes_threads(void (*kernel)(Parameters...), int threads, bool* found) {
  Remembered of = {};
  const char* error = remember(reinterpret_cast<const void*>(kernel), 0, &of);
  *found = error == nullptr && of.threads >= threads;
  return error;
}

// `shared` bytes of dynamic shared memory; over 48 KB they have to be asked for.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, void* stream,
                   Parameters... parameters) {
  Remembered of = {};
  if (shared > 48 * 1024) {
    if (const char* error = remember(reinterpret_cast<const void*>(kernel), shared, &of)) return error;
  }
  kernel<<<unsigned(blocks), unsigned(threads), size_t(shared), static_cast<cudaStream_t>(stream)>>>(parameters...);
  return error_of(cudaGetLastError());
}

}  // namespace peftrt::cuda
