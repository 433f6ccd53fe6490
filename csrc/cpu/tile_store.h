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

// out (+)= sums, R rows `row` elements apart, of which the first `inside` of C vectors' elements are there: all of
// those before the last vector.
template <class S, class Real, int R, int C>
HG_INLINE void store_tile(typename S::V (&sums)[R][C], Real* out, int64_t row, int64_t inside, bool accumulate) {
  constexpr int W = S::width;
  const int64_t whole = inside / W, rest = inside % W;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      Real* at = out + r * row + c * W;
      if (c < C - 1 || whole == C) {
        if (accumulate) sums[r][c] += S::load(at);
        S::store(at, sums[r][c]);
        continue;
      }
      // By way of memory, where what is not inside may be left out.
      Real values[W] = {};
      if (accumulate) {
        copy_few<W / 2>(at, values, rest);
        sums[r][c] += S::load(values);
      }
      S::store(values, sums[r][c]);
      copy_few<W / 2>(values, at, rest);
    }
}

}  // namespace hg::cpu
