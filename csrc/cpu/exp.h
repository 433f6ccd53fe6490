// The exponential function as straight-line arithmetic, which compilers vectorise; libm's they do not.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "isa.h"

namespace hg::cpu {

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2. A number with `rounder` added to it holds its nearest integer in the last
// mantissa bits. n * ln2_high is exact. Below `lowest` the result would be denormal.
template <class Real>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
  static constexpr float rounder = 0x1.8p23f, lowest = -87.3365f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
  static constexpr double rounder = 0x1.8p52, lowest = -708.396, ln2_high = 0.693145751953125,
                          ln2_low = 1.42860682030941723212e-6;
};

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

// Taylor's polynomial by Horner's scheme, unrolled by hand: a loop in here would keep the caller's from being
// vectorised. The term left out is 5e-9 (degree 7) or 4e-18 (degree 13) of the result.
template <class Real, class V, int... I>
HG_INLINE V taylor_exp(V r, std::integer_sequence<int, I...>) {
  constexpr int degree = sizeof...(I);
  V y = r * static_cast<Real>(inverse_factorial(degree)) + static_cast<Real>(inverse_factorial(degree - 1));
  ((I > 0 ? void(y = y * r + static_cast<Real>(inverse_factorial(degree - 1 - I))) : void()), ...);
  return y;
}

// exp(x) for x <= 0 to a relative error of 1.1e-7 (float) or 1.8e-16 (double); 0 where it would be denormal, and so
// for -inf; NaN for NaN.
// V: Real, or a register of them, with Bits to match.
template <class Real, class Bits, class V>
HG_INLINE V exp_nonpositive(V x) {
  using C = ExpConstants<Real>;
  const V shifted = x * static_cast<Real>(1.44269504088896340736) + C::rounder;
  const V n = shifted - C::rounder;
  const V r = (x - n * C::ln2_high) - n * C::ln2_low;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + C::bias) << C::mantissa;
  V power;
  std::memcpy(&power, &bits, sizeof power);
  const V y = taylor_exp<Real>(r, std::make_integer_sequence<int, C::degree>()) * power;
  return x < C::lowest ? V{} : y;
}

}  // namespace hg::cpu
