// Transposition of a square of registers.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

namespace hg::cpu {

// Swaps off-diagonal quarters of ever larger blocks, all in registers.
template <int Step, class V, int R, int... L>
HG_INLINE void swap_quarters(V (&x)[R], std::integer_sequence<int, L...>) {
  constexpr int W = sizeof...(L);
  if constexpr (Step < W)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r & Step) continue;
      const V a = x[r], b = x[r + Step];
      x[r] = __builtin_shufflevector(a, b, (L & Step ? W + L - Step : L)...);
      x[r + Step] = __builtin_shufflevector(a, b, (L & Step ? W + L : L + Step)...);
    }
}

#if defined(HG_HAVE_AVX2)
// Four elements of rows r, r + 4, r + 8 and r + 12: loads do what would be half of the shuffles, of which a core makes
// one in a cycle.
HG_INLINE Vector<float, 64>::type four_rows(const float* in, int64_t in_row) {
  using Quad = Simd<float, 64>::Quad;
  const auto quad = [&](int64_t row)
                        HG_LAMBDA_INLINE -> const Quad& { return *reinterpret_cast<const Quad*>(in + row * in_row); };
  Vector<float, 64>::type x;
  asm("vbroadcastf32x4 %1, %0" : "=v"(x) : "m"(quad(0)));
  asm("vbroadcastf32x4 %2, %0%{%1%}" : "+v"(x) : "Yk"(uint16_t(0xf0)), "m"(quad(4)));
  asm("vbroadcastf32x4 %2, %0%{%1%}" : "+v"(x) : "Yk"(uint16_t(0xf00)), "m"(quad(8)));
  asm("vbroadcastf32x4 %2, %0%{%1%}" : "+v"(x) : "Yk"(uint16_t(0xf000)), "m"(quad(12)));
  return x;
}
#endif

// out[c * out_row + r] = in[r * in_row + c] for r and c below a register's width.
template <class S, class Real>
HG_INLINE void turn(const Real* in, int64_t in_row, Real* out, int64_t out_row) {
  constexpr int W = S::width;
  constexpr std::make_integer_sequence<int, W> kLanes;
#if defined(HG_HAVE_AVX2)
  if constexpr (W == 16) {
#pragma GCC unroll 4
    for (int q = 0; q < W; q += 4) {
      typename S::V x[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) x[r] = four_rows(in + r * in_row + q, in_row);
      swap_quarters<1>(x, kLanes), swap_quarters<2>(x, kLanes);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) S::store(out + (q + c) * out_row, x[c]);
    }
    return;
  }
#endif
  typename S::V x[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) x[r] = S::load(in + r * in_row);
  swap_quarters<1>(x, kLanes), swap_quarters<2>(x, kLanes), swap_quarters<4>(x, kLanes), swap_quarters<8>(x, kLanes);
#pragma GCC unroll 16
  for (int c = 0; c < W; ++c) S::store(out + c * out_row, x[c]);
}

}  // namespace hg::cpu
