// Transposition of a square of registers.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

namespace hg::cpu {

// Swaps off-diagonal quarters of ever larger blocks, all in registers.
template <int Step, class V, int W, int... L>
HG_INLINE void swap_quarters(V (&x)[W], std::integer_sequence<int, L...>) {
  if constexpr (Step < W)
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      if (r & Step) continue;
      const V a = x[r], b = x[r + Step];
      x[r] = __builtin_shufflevector(a, b, (L & Step ? W + L - Step : L)...);
      x[r + Step] = __builtin_shufflevector(a, b, (L & Step ? W + L : L + Step)...);
    }
}

// out[c * out_row + r] = in[r * in_row + c] for r and c below a register's width.
template <class S, class Real>
HG_INLINE void turn(const Real* in, int64_t in_row, Real* out, int64_t out_row) {
  constexpr int W = S::width;
  constexpr std::make_integer_sequence<int, W> kLanes;
  typename S::V x[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) x[r] = S::load(in + r * in_row);
  swap_quarters<1>(x, kLanes), swap_quarters<2>(x, kLanes), swap_quarters<4>(x, kLanes), swap_quarters<8>(x, kLanes);
#pragma GCC unroll 16
  for (int c = 0; c < W; ++c) S::store(out + c * out_row, x[c]);
}

}  // namespace hg::cpu
