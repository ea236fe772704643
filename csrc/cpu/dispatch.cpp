// The choice of instruction set, made once a process: by CPUID, or by the architecture alone.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

#define PEFTRT_DECLARE_OPS(isa)                                                                     \
  namespace isa {                                                                                   \
  void nf4_dequantize(const Weight&, Dtype, void*, const Parallel&);                                \
  void nf4_quantize(Dtype, int64_t, int, const void*, uint8_t*, uint8_t*, const Parallel&);         \
  void nf4_quantize_scales(int64_t, const uint8_t*, float, uint8_t*, uint8_t*, const Parallel&);    \
  void nf4_linear(const Weight&, Dtype, int64_t, const void*, const void*, void*, const Parallel&); \
  void nf4_linear_dx(const Weight&, Dtype, int64_t, const void*, void*, const Parallel&);           \
  void dropout(Dtype, int64_t, uint64_t, uint32_t, float, const void*, void*, const Parallel&);     \
  }

namespace peftrt::cpu {

PEFTRT_DECLARE_OPS(portable)
static const Kernels kPortable = {
    "portable",           portable::nf4_dequantize, portable::nf4_quantize, portable::nf4_quantize_scales,
    portable::nf4_linear, portable::nf4_linear_dx,  portable::dropout};

#if defined(PEFTRT_HAS_AVX2)
PEFTRT_DECLARE_OPS(avx2)
static const Kernels kAvx2 = {"avx2",           avx2::nf4_dequantize, avx2::nf4_quantize, avx2::nf4_quantize_scales,
                              avx2::nf4_linear, avx2::nf4_linear_dx,  avx2::dropout};
static bool runs_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#if defined(PEFTRT_HAS_NEON)
// Every aarch64 has it.
PEFTRT_DECLARE_OPS(neon)
static const Kernels kNeon = {"neon",           neon::nf4_dequantize, neon::nf4_quantize, neon::nf4_quantize_scales,
                              neon::nf4_linear, neon::nf4_linear_dx,  neon::dropout};
#endif

const Kernels* kernels_for(const char* isa) {
  if (std::strcmp(isa, "portable") == 0) return &kPortable;
#if defined(PEFTRT_HAS_AVX2)
  if (std::strcmp(isa, "avx2") == 0 && runs_avx2()) return &kAvx2;
#endif
#if defined(PEFTRT_HAS_NEON)
  if (std::strcmp(isa, "neon") == 0) return &kNeon;
#endif
  return nullptr;
}

static const Kernels& choose() {
  const char* forced = std::getenv("PEFTRT_CPU_ISA");
  if (forced != nullptr && *forced != '\0') {
    if (const Kernels* found = kernels_for(forced)) return *found;
  }
  constexpr const char* kBestFirst[] = {"avx2", "neon"};
  for (const char* isa : kBestFirst) {
    if (const Kernels* found = kernels_for(isa)) return *found;
  }
  return kPortable;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace peftrt::cpu
