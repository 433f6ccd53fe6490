// bfloat16 and float16 read as float, by integer arithmetic that every compiler vectorises.
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

HG_INLINE double widen(double x) { return x; }
HG_INLINE float widen(float x) { return x; }
HG_INLINE float widen(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

// The exponent is rebiased by a multiplication with 2^112, which also normalises denormals;
// infinities and NaN, whose exponent field is all ones, get theirs set by hand.
HG_INLINE float widen(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t finite = as_bits(as_float(magnitude) * as_float(0x77800000u));
  const uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return as_float(bits | sign);
}

}  // namespace hg::cpu
