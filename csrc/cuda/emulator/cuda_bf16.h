// bfloat16 of the emulated device, by the CPU kernels' conversions.
#pragma once

#include "../../cpu/half.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(static_cast<uint16_t>(hg::cpu::to_bfloat16<uint32_t>(x))) {}
  __nv_bfloat16(double x) : __nv_bfloat16(static_cast<float>(x)) {}
  operator float() const { return hg::cpu::from_bfloat16<float, uint32_t>(bits); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
