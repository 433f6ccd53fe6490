// What is to be known of the processor and of torch's BLAS, which is MKL.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include "isa.h"

namespace hg::cpu {

// "amd", "intel" or "other".
inline const char* vendor() {
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return "other";
  return ebx == signature_AMD_ebx ? "amd" : ebx == signature_INTEL_ebx ? "intel" : "other";
#else
  return "other";
#endif
}

// Whether BLAS uses half of what the registers can do. On AMD it does without AVX-512: that costs nothing up to Zen 4,
// whose units are half as wide as its registers, and half of the speed from Zen 5 on.
inline bool blas_at_half_speed() {
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned eax, ebx, ecx, edx;
  if (isa() != Isa::avx512 || vendor() != std::string("amd")) return false;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  constexpr unsigned kZen5 = 0x1a;
  return (eax >> 8 & 0xf) + (eax >> 20 & 0xff) >= kZen5;
#else
  return false;
#endif
}

}  // namespace hg::cpu
