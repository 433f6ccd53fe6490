// How a register tile of sums gets into a matrix: all of it, or what of its columns is inside.
#pragma once

#include <cstdint>

#include "simd.h"

namespace hg::cpu {

// out (+)= sums, R rows `row` elements apart, of which the first `inside` of C vectors' elements are there.
template <class S, class Real, int R, int C>
HG_INLINE void store_tile(typename S::V (&sums)[R][C], Real* out, int64_t row, int64_t inside, bool accumulate) {
  constexpr int W = S::width;
  if (inside == C * W) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        Real* at = out + r * row + c * W;
        if (accumulate) sums[r][c] += S::load(at);
        S::store(at, sums[r][c]);
      }
    return;
  }
  Real values[R][C * W];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) S::store(values[r] + c * W, sums[r][c]);
  for (int r = 0; r < R; ++r)
    for (int64_t p = 0; p < inside; ++p) {
      Real& at = out[r * row + p];
      at = accumulate ? at + values[r][p] : values[r][p];
    }
}

}  // namespace hg::cpu
