// bfloat16 and float16 read and written as float, by integer arithmetic that every compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace hg::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

HG_INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
HG_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class To, class From>
HG_INLINE To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The formulas, for one number or for a register of them: Real is float or a register, Bits its bits. The half
// is in the low 16 of them.
template <class Real, class Bits>
HG_INLINE Real from_bfloat16(Bits half) {
  return reinterpret<Real>(half << 16);
}

// The exponent is rebiased by a multiplication with 2^112, which also normalises denormals;
// infinities and NaN, whose exponent field is all ones, get theirs set by hand.
template <class Real, class Bits>
HG_INLINE Real from_float16(Bits half) {
  const Bits magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  const Bits finite = reinterpret<Bits>(reinterpret<Real>(magnitude) * 0x1p112f);
  const Bits bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return reinterpret<Real>(bits | sign);
}

// To nearest, ties to even.
template <class Bits, class Real>
HG_INLINE Bits to_bfloat16(Real x) {
  const Bits bits = reinterpret<Bits>(x), quiet_nan = Bits{} + 0x7fc0u;
  return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : quiet_nan;
}

// To nearest, ties to even. Adding 1/2 to a number below 2^-14 leaves it, rounded to one of float16's
// denormals, in the last bits.
template <class Bits, class Real>
HG_INLINE Bits to_float16(Real x) {
  const Bits sign = reinterpret<Bits>(x) & 0x80000000u, magnitude = reinterpret<Bits>(x) ^ sign;
  const Bits denormal = reinterpret<Bits>(reinterpret<Real>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const Bits infinity = Bits{} + 0x7c00u, quiet_nan = Bits{} + 0x7e00u;
  const Bits finite = magnitude < 0x38800000u ? denormal : normal;
  const Bits half = magnitude >= 0x47800000u ? (x == x ? infinity : quiet_nan) : finite;
  return half | sign >> 16;
}

HG_INLINE double widen(double x) { return x; }
HG_INLINE float widen(float x) { return x; }
HG_INLINE float widen(BFloat16 x) { return from_bfloat16<float, uint32_t>(x.bits); }
HG_INLINE float widen(Float16 x) { return from_float16<float, uint32_t>(x.bits); }

HG_INLINE void store(double* at, double x) { *at = x; }
HG_INLINE void store(float* at, float x) { *at = x; }
HG_INLINE void store(BFloat16* at, float x) { at->bits = static_cast<uint16_t>(to_bfloat16<uint32_t>(x)); }
HG_INLINE void store(Float16* at, float x) { at->bits = static_cast<uint16_t>(to_float16<uint32_t>(x)); }

}  // namespace hg::cpu
