// One shared object with several instruction sets: a kernel body is compiled for each, and the one
// that torch uses (ATEN_CPU_CAPABILITY=default|avx2|avx512) is picked at run time.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace hg::cpu {

// The sanitizers' checks make bodies so large that inlining all of them takes minutes; then only pointers and small
// structs cross a call, so that functions for different instruction sets may call each other.
#if defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define HG_INLINE inline __attribute__((always_inline))
#define HG_LAMBDA_INLINE __attribute__((always_inline))
#else
#define HG_INLINE inline
#define HG_LAMBDA_INLINE
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define HG_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi2")))
#define HG_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")))
#else
#define HG_TARGET_AVX2
#define HG_TARGET_AVX512
#endif

enum class Isa : int { base, avx2, avx512 };

// HG_ONLY_ISA=base|avx2|avx512: a build for tests on the machine that compiles it, with one body per kernel.
inline Isa isa() {
#if defined(HG_ONLY_ISA)
  return Isa::HG_ONLY_ISA;
#elif defined(__x86_64__) && defined(__GNUC__)
  static const Isa chosen = [] {
    const std::string torch_uses = at::get_cpu_capability();
    return torch_uses == "AVX512" ? Isa::avx512 : torch_uses == "AVX2" ? Isa::avx2 : Isa::base;
  }();
  return chosen;
#else
  return Isa::base;
#endif
}

inline const char* isa_name() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "base"; }

// Of a kernel's function for each instruction set the one to run.
#if defined(HG_ONLY_ISA)
#define HG_CHOSEN_ISA &HG_ONLY_ISA
#else
#define HG_CHOSEN_ISA isa() == Isa::avx512 ? &avx512 : isa() == Isa::avx2 ? &avx2 : &base
#endif

// Body::run compiled for every instruction set; get() returns the pointer to the right one.
template <class Body, class... Args>
struct ForIsa {
  using Function = void (*)(Args...);
  static void base(Args... args) { Body::run(args...); }
  HG_TARGET_AVX2 static void avx2(Args... args) { Body::run(args...); }
  HG_TARGET_AVX512 static void avx512(Args... args) { Body::run(args...); }
  static Function get() { return HG_CHOSEN_ISA; }
};

}  // namespace hg::cpu
