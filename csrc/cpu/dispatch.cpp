// The choice of instruction set, made once a process by CPUID.
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/kernels.h"

// The operations of one instruction set, and their table.
#define PEFTRT_DEFINE_KERNELS(isa)                                                                                  \
  namespace isa {                                                                                                   \
  void nf4_dequantize(const Weight&, Dtype, void*, const Parallel&);                                                \
  void nf4_quantize(Dtype, int64_t, int, const void*, uint8_t*, uint8_t*, const Parallel&);                         \
  void nf4_quantize_scales(int64_t, const uint8_t*, float, uint8_t*, uint8_t*, const Parallel&);                    \
  void linear(const Base&, Dtype, int64_t, const void*, const void*, const LowRank*, bool, void*, const Parallel&); \
  void linear_dx(const Base&, Dtype, int64_t, const void*, const LowRankGradient*, bool, void*, const Parallel&);   \
  void multi_lora_linear(const Base*, Dtype, int64_t, const void*, const void*, const AdapterTable&, bool, void*,   \
                         int64_t, const Parallel&);                                                                 \
  void multi_lora_linear_backward(const Base*, Dtype, int64_t, const void*, const void*, const AdapterTable&, bool, \
                                  void*, float*, const Parallel&);                                                  \
  void low_rank_gradient(Dtype, int64_t, int64_t, int64_t, const void*, const void*, const float*,                  \
                         const LowRankGradient&, float*, float*, const Parallel&);                                  \
  void bottleneck(Dtype, int64_t, const void*, const void*, const Bottleneck&, bool, void*, const Parallel&);       \
  void bottleneck_gradient(Dtype, int64_t, const void*, const void*, const Bottleneck&, const BottleneckGradient&,  \
                           const Parallel&);                                                                        \
  void lora_weight_norm(const Base&, const LowRank&, float*, const Parallel&);                                      \
  void row_scale_gradient(Dtype, int64_t, int64_t, const void*, const void*, const void*, const float*, float*,     \
                          const Parallel&);                                                                         \
  void dropout(Dtype, int64_t, const Dropout&, const void*, void*, const Parallel&);                                \
  void adamw_step(const AdamwStep&, const Parallel&);                                                               \
  void gradient_norm(const int64_t*, const int64_t*, int64_t, double*, double, float*, const Parallel&);            \
  static const Kernels kernels = {#isa,                                                                             \
                                  nf4_dequantize,                                                                   \
                                  nf4_quantize,                                                                     \
                                  nf4_quantize_scales,                                                              \
                                  linear,                                                                           \
                                  linear_dx,                                                                        \
                                  multi_lora_linear,                                                                \
                                  multi_lora_linear_backward,                                                       \
                                  low_rank_gradient,                                                                \
                                  bottleneck,                                                                       \
                                  bottleneck_gradient,                                                              \
                                  lora_weight_norm,                                                                 \
                                  row_scale_gradient,                                                               \
                                  dropout,                                                                          \
                                  adamw_step,                                                                       \
                                  gradient_norm};                                                                   \
  }

namespace peftrt::cpu {

PEFTRT_DEFINE_KERNELS(portable)

#if defined(PEFTRT_HAS_AVX512)
PEFTRT_DEFINE_KERNELS(avx512)
static bool runs_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(PEFTRT_HAS_AVX2)
PEFTRT_DEFINE_KERNELS(avx2)
static bool runs_avx2() {
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // Clang's __builtin_cpu_supports does not know f16c
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

#if defined(PEFTRT_HAS_NEON)
PEFTRT_DEFINE_KERNELS(neon)
#endif

const Kernels* kernels_for(const char* isa) {
  if (std::strcmp(isa, "portable") == 0) return &portable::kernels;
#if defined(PEFTRT_HAS_AVX512)
  if (std::strcmp(isa, "avx512") == 0 && runs_avx512()) return &avx512::kernels;
#endif
#if defined(PEFTRT_HAS_AVX2)
  if (std::strcmp(isa, "avx2") == 0 && runs_avx2()) return &avx2::kernels;
#endif
#if defined(PEFTRT_HAS_NEON)
  if (std::strcmp(isa, "neon") == 0) return &neon::kernels;  // every aarch64 has it
#endif
  return nullptr;
}

static const Kernels& choose() {
  const char* forced = std::getenv("PEFTRT_CPU_ISA");
  if (forced != nullptr && *forced != '\0') {
    if (const Kernels* found = kernels_for(forced)) return *found;
  }
  constexpr const char* kBestFirst[] = {"avx512", "avx2", "neon"};
  for (const char* isa : kBestFirst) {
    if (const Kernels* found = kernels_for(isa)) return *found;
  }
  return portable::kernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace peftrt::cpu
