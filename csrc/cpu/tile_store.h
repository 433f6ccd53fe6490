// How a register tile of sums gets into a matrix: all of it, or what of its columns is inside.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace hg::cpu {

// The first `count` of at most 2 * kMost - 1 elements, in pieces that are powers of two.
template <int kMost, class Real>
HG_INLINE void copy_few(const Real* from, Real* to, int64_t count) {
#pragma GCC unroll 8
  for (int piece = kMost; piece > 0; piece /= 2)
    if (count & piece) {
      std::memcpy(to, from, piece * sizeof(Real));
      from += piece, to += piece;
    }
}

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
  // As many vectors as there are, by way of memory, where what is not inside may be left out.
  Real values[C * W] = {};
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    Real* at = out + r * row;
    if (accumulate) {
      copy_few<C * W>(at, values, inside);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sums[r][c] += S::load(values + c * W);
    }
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) S::store(values + c * W, sums[r][c]);
    copy_few<C * W>(values, at, inside);
  }
}

}  // namespace hg::cpu
