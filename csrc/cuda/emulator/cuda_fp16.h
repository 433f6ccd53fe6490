// float16 of the emulated device, by the CPU kernels' conversions.
#pragma once

#include "../../cpu/half.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float x) : bits(static_cast<uint16_t>(hg::cpu::to_float16<uint32_t>(x))) {}
  __half(double x) : __half(static_cast<float>(x)) {}
  operator float() const { return hg::cpu::from_float16<float, uint32_t>(bits); }
};

struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
