// Small vectors, for products that are linear in them and take what is below 1e-38 for zero: matrix units do, and of a
// number they multiply parts as small as 2^-16 of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "buffer.h"

namespace hg::cpu {

// Vectors whose largest number is below this are multiplied with a power of two, and their products divided by it.
constexpr float kSmall = 0x1p-48f;

// That power: 1 for a vector that is not small, or all zeros.
inline float lift_of(const float* v, int64_t size) {
  float most = 0;
  for (int64_t i = 0; i < size; ++i) {
    most = std::max(most, std::abs(v[i]));
    if (most >= kSmall) return 1;
  }
  return most > 0 ? std::ldexp(1.0f, std::min(-std::ilogb(most), 120)) : 1;
}

// Calls f(v, out), the product with k vectors of so many numbers.
template <class F>
void lifted(const float* v, int64_t k, int64_t size, float* out, const F& f) {
  bool any = false;
  for (int64_t row = 0; row < k && !any; ++row) any = lift_of(v + row * size, size) != 1;
  if (!any) return f(v, out);
  const Buffer<float> copy(k * size), lifts(k);
  for (int64_t row = 0; row < k; ++row) {
    const float lift = lifts.get()[row] = lift_of(v + row * size, size);
    for (int64_t i = row * size; i < (row + 1) * size; ++i) copy.get()[i] = lift * v[i];
  }
  f(copy.get(), out);
  for (int64_t row = 0; row < k; ++row) {
    const float back = 1 / lifts.get()[row];
    for (int64_t i = row * size; i < (row + 1) * size; ++i) out[i] *= back;
  }
}

}  // namespace hg::cpu
