// Sigmoid and tanh as straight-line arithmetic, for one number or for a register of them.
#pragma once

#include "exp.h"

namespace hg::cpu {

// exp(r) - 1 by Taylor's polynomial without its constant term: no digits cancel near 0.
template <class Real, class V, int... I>
HG_INLINE V taylor_expm1(V r, std::integer_sequence<int, I...>) {
  constexpr int degree = sizeof...(I) + 1;
  V y = r * static_cast<Real>(inverse_factorial(degree)) + static_cast<Real>(inverse_factorial(degree - 1));
  ((I > 0 && I < degree - 1 ? void(y = y * r + static_cast<Real>(inverse_factorial(degree - 1 - I))) : void()), ...);
  return y * r;
}

// exp(x) - 1 for x <= 0; -1 for -inf, NaN for NaN.
template <class Real, class Bits, class V>
HG_INLINE V expm1_nonpositive(V x) {
  using C = ExpConstants<Real>;
  x = x < C::lowest ? V{} + C::lowest : x;
  const V shifted = x * static_cast<Real>(1.44269504088896340736) + C::rounder;
  const V n = shifted - C::rounder;
  const V r = (x - n * C::ln2_high) - n * C::ln2_low;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + C::bias) << C::mantissa;
  V power;
  std::memcpy(&power, &bits, sizeof power);
  return taylor_expm1<Real>(r, std::make_integer_sequence<int, C::degree>()) * power + (power - Real(1));
}

template <class Real, class Bits, class V>
HG_INLINE V sigmoid(V x) {
  const V e = exp_nonpositive<Real, Bits>(x < Real(0) ? x : -x);
  return (x < Real(0) ? e : V{} + Real(1)) / (Real(1) + e);
}

template <class Real, class Bits, class V>
HG_INLINE V tanh(V x) {
  const V m = expm1_nonpositive<Real, Bits>(x < Real(0) ? x + x : -x - x);
  const V magnitude = m / (Real(2) + m);
  return x < Real(0) ? magnitude : -magnitude;
}

}  // namespace hg::cpu
