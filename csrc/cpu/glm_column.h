// The product of a generalised linear model with one vector, for some rows of X: their dot products with it, times D,
// times the rows again. Every row comes from memory once, and is in L1 for its second use.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace hg::cpu {

template <class Real, class X>
struct GlmColumn {
  const X* x;           // rows x d, rows `stride` elements apart
  const Real* weights;  // D, one for each row
  const Real* v;        // d elements
  Real intercept;       // the element of v that belongs to a feature of ones, or 0
  Real* g;              // d elements, accumulated
  Real* g_intercept;    // accumulated
  int64_t rows, d, stride;
  int64_t follow;  // rows of X that lie behind these
};

template <class Tiles, class Real, class X>
class GlmColumnBody {
  using S = Simd<Real, Tiles::bytes>;
  using V = typename S::V;
  using Column = GlmColumn<Real, X>;
  static constexpr int W = S::width, kLine = 64;
  // What is in use at a time has to fit.
  static constexpr int64_t kL1 = 28 << 10;
  // Bytes by which lines are sent for ahead of their use, at least.
  static constexpr int64_t kAhead = 24 << 10;

  // The elements after the last whole register are at the end of one that ends where the row ends; those before them,
  // which have been met already, have zeros in v and sums in g that do not count.
  struct Tail {
    alignas(kLine) Real v[W], g[W];
  };

  struct Half {
    static constexpr int bytes = Tiles::bytes / 2;
  };

 public:
  // d is at least the width of the smallest registers.
  static HG_INLINE void run(const Column& c) {
    if constexpr (Tiles::bytes > 16)
      if (c.d < W) return GlmColumnBody<Half, Real, X>::run(c);
    Tail tail{};
    const int64_t rest = c.d % W;
    std::copy_n(c.v + c.d - rest, rest, tail.v + W - rest);
    const int64_t row = c.d * sizeof(X), vectors = 2 * c.d * sizeof(Real);
    if (8 * row + vectors <= kL1)
      overlapped<4>(c, tail);
    else if (6 * row + vectors <= kL1)
      overlapped<3>(c, tail);
    else
      one_by_one<8>(c, tail, 0);
    for (int64_t j = W - rest; j < W; ++j) c.g[c.d - W + j] += tail.g[j];
  }

 private:
  // The dot products of R rows while the R rows before them are added up: reading X, which takes the longest, never
  // waits for other work. Twice R rows have to fit L1.
  template <int R>
  static HG_INLINE void overlapped(const Column& c, Tail& tail) {
    if (c.rows < R) return one_by_one<1>(c, tail, 0);
    const int64_t ahead = rows_ahead<R>(c);
    Real z[R];
    pass<R, true, false>(c, tail, 0, ahead, z);
    int64_t r = R;
    for (; r + R <= c.rows; r += R) pass<R, true, true>(c, tail, r, ahead, z);
    pass<R, false, true>(c, tail, r, ahead, z);
    one_by_one<1>(c, tail, r);
  }

  template <int R>
  static HG_INLINE void one_by_one(const Column& c, Tail& tail, int64_t r) {
    const int64_t ahead = rows_ahead<R>(c);
    Real z[R];
    for (; r + R <= c.rows; r += R) {
      pass<R, true, false>(c, tail, r, ahead, z);
      pass<R, false, true>(c, tail, r + R, ahead, z);
    }
    if constexpr (R > 1) one_by_one<1>(c, tail, r);
  }

  template <int R>
  static HG_INLINE int64_t rows_ahead(const Column& c) {
    return std::max<int64_t>(R, kAhead / std::max<int64_t>(1, c.stride * sizeof(X)) / R * R);
  }

  // Adds up the R rows before r, times z, if kAdd; then z is D times the dot products of the R rows from r on, if kDot.
  template <int R, bool kDot, bool kAdd>
  static HG_INLINE void pass(const Column& c, Tail& tail, int64_t r, int64_t ahead, Real (&z)[R]) {
    const int64_t stride = c.stride, whole = c.d / W * W;
    const X* const x = c.x + (kDot ? r : r - R) * stride;
    const X* const before = kAdd ? c.x + (r - R) * stride : x;
    const X* const next = r + ahead + R <= c.rows + c.follow ? x + ahead * stride : x;
    V sums[R] = {};
    const auto step = [&](int64_t j, const Real* v, Real* g) HG_LAMBDA_INLINE {
      V column, sum{};
      if constexpr (kDot) column = S::factor(v);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        // Where rows are gone over twice, each time sends for half of the next ones.
        if ((kDot && kAdd) || i % 2 == kDot)
          if (j * sizeof(X) % kLine == 0) __builtin_prefetch(next + i * stride + j, 0, 2);
        if constexpr (kDot) sums[i] += S::load(x + i * stride + j) * column;
        if constexpr (kAdd) sum += z[i] * S::load(before + i * stride + j);
      }
      // Added up apart: R rows are rounded once as what is in g already.
      if constexpr (kAdd) S::store(g, S::load(g) + sum);
    };
    const Real* const v = c.v;
    Real* const g = c.g;
    // The first apart: in a loop with the others it took a sixth longer on one thread (Zen 4, g++ 12).
    step(0, v, g);
    for (int64_t j = W; j < whole; j += W) step(j, v + j, g + j);
    if (whole < c.d) step(c.d - W, tail.v, tail.g);
    if constexpr (kDot) {
      if constexpr (R % 4 == 0)
        for (int i = 0; i < R; i += 4) S::sum4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], z + i);
      else
        for (int i = 0; i < R; ++i) z[i] = S::sum(sums[i]);
      Real total = 0;
      for (int i = 0; i < R; ++i) {
        z[i] = (z[i] + c.intercept) * c.weights[r + i];
        total += z[i];
      }
      *c.g_intercept += total;
    }
  }
};

}  // namespace hg::cpu
