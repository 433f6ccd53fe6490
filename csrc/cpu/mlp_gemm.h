// The matrix products of a multilayer perceptron on blocks that fit the cache: register tiles that end
// in what the network does with the product. All widths are padded to whole vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../mlp.h"
#include "simd.h"

namespace hg::cpu {

// A matrix that is read along its rows, panel by panel: groups of columns that fill a cache line. Element (r, c) is at
// r * stride + c / P * panel + c % P. In the rows of a usual matrix `panel` is P; panels one after another, their rows
// `stride` = P apart, are read from end to end, where long rows lie too far apart for the hardware to fetch ahead.
template <class Number>
struct Panels {
  using Real = Number;
  static constexpr int64_t P = kMlpPadding / static_cast<int64_t>(sizeof(Real));
  // Matrices of short rows need not be packed.
  static constexpr bool kInPlace = true;
  // A block of the batch has a multiple of so many rows, as many as its tangents leave room for within limits.
  static constexpr int64_t kRows = 8, kLeastRows = 24, kMostRows = 128, kTangentBytes = 512 << 10;
  const Real* data;
  int64_t stride, panel = P;

  // One after another. A distance of a multiple of 4 KiB would make all panels share a few sets of the cache.
  static Panels apart(const Real* data, int64_t rows) { return {data, P, height(rows) * P}; }
  static int64_t height(int64_t rows) { return rows % (2 * P) ? rows : rows + 1; }
  static int64_t size(int64_t rows, int64_t columns) { return height(rows) * ((columns + P - 1) / P * P); }
  // Where they are.
  static Panels rows(const Real* data, int64_t stride, int64_t, int64_t) { return {data, stride}; }
  // Or packed when they are used, a matrix or its transpose.
  static Panels late_rows(const Real* data, int64_t stride, int64_t rows, int64_t columns, Real* memory) {
    pack_rows(data, stride, 0, rows, columns, memory, rows);
    return apart(memory, rows);
  }
  static Panels late_columns(const Real* data, int64_t stride, int64_t count, int64_t rows, Real* memory) {
    pack_columns(data, stride, 0, count, rows, memory);
    return apart(memory, rows);
  }
  static int64_t late_size(int64_t rows, int64_t columns) { return size(rows, columns); }
  // For the factors of a product with so many rows; they are read where they are.
  static int64_t memory_size(int64_t, int64_t) { return 0; }

  // Packs rows from `begin` on of a matrix that has `all` of them; and columns, which are rows of `in`.
  static void pack_rows(const Real* in, int64_t stride, int64_t begin, int64_t count, int64_t columns, Real* out,
                        int64_t all);
  static void pack_columns(const Real* in, int64_t stride, int64_t begin, int64_t count, int64_t rows, Real* out);
};

// A term of a product: element (i, j) is the sum over t < depth of a(i, t) b(t, j).
template <class Right>
struct Factors {
  const typename Right::Real* a;  // (i, t) at i * a_stride + t, or, transposed, at t * a_stride + i
  int64_t a_stride;
  Right b;
  int64_t depth;
};

// Ra = product + bias; Rh = act'(a) Ra, and what the way back needs, act''(a) dL/dh Ra.
template <class Real>
struct ThroughActivation {
  static constexpr bool kTransposed = false;
  const Real *bias, *slope, *bend;
  int64_t slope_stride, bend_stride;
  Real *tangent, *curved;
  int64_t stride;

  template <class S>
  HG_INLINE void operator()(int64_t i, int64_t j, typename S::V sum) const {
    sum += S::load(bias + j);
    S::store(tangent + i * stride + j, S::load(slope + i * slope_stride + j) * sum);
    if (bend) S::store(curved + i * stride + j, S::load(bend + i * bend_stride + j) * sum);
  }
};

// Ra of the last layer.
template <class Real>
struct PlusBias {
  static constexpr bool kTransposed = false;
  const Real* bias;
  Real* out;
  int64_t stride;

  template <class S>
  HG_INLINE void operator()(int64_t i, int64_t j, typename S::V sum) const {
    S::store(out + i * stride + j, sum + S::load(bias + j));
  }
};

// R(dL/da) = act'(a) product + act''(a) dL/dh Ra.
template <class Real>
struct BackThroughActivation {
  static constexpr bool kTransposed = false;
  const Real *slope, *curved;
  int64_t slope_stride, curved_stride;
  Real* out;
  int64_t stride;

  template <class S>
  HG_INLINE void operator()(int64_t i, int64_t j, typename S::V sum) const {
    sum *= S::load(slope + i * slope_stride + j);
    if (curved) sum += S::load(curved + i * curved_stride + j);
    S::store(out + i * stride + j, sum);
  }
};

// The weights' part of H v, summed over blocks of the batch: the first of them writes.
template <class Real>
struct Accumulate {
  static constexpr bool kTransposed = true;
  Real* out;
  int64_t stride;
  bool first;

  template <class S>
  HG_INLINE void operator()(int64_t i, int64_t j, typename S::V sum) const {
    Real* at = out + i * stride + j;
    if (!first) sum += S::load(at);
    S::store(at, sum);
  }
};

// Columns that a product of matrices so wide has to fill: whole registers of AVX2, which are half ones of AVX-512.
template <class Real>
int64_t filled(int64_t columns) {
  constexpr int64_t kUnit = 32 / static_cast<int64_t>(sizeof(Real));
  return (columns + kUnit - 1) / kUnit * kUnit;
}

template <class Right, template <class> class Finish>
struct Gemm {
  using Real = typename Right::Real;
  Factors<Right> factors[2];
  int terms;
  int64_t rows, columns;  // columns: rounded up by `filled`, for which there must be place
  Finish<Real> finish;
  Real* memory;  // for left factors, where they take any

  template <class Tiles>
  struct Body {
    using S = Simd<Real, Tiles::bytes>;
    static constexpr int W = S::width;

    static HG_INLINE void run(const Gemm& g) {
      // Tiles that fill the register file: 32 vectors with AVX-512, else 16.
      constexpr bool kLarge = Tiles::bytes == 64;
      int64_t j = 0;
      if constexpr (kLarge)
        for (; j + 4 * W <= g.columns; j += 4 * W) strip<S, 6, 4>(g, j);
      for (; j + 2 * W <= g.columns; j += 2 * W) strip<S, kLarge ? 8 : 5, 2>(g, j);
      for (; j + W <= g.columns; j += W) strip<S, 8, 1>(g, j);
      if constexpr (kLarge)
        if (j < g.columns) strip<Simd<Real, Tiles::bytes / 2>, 8, 1>(g, j);
    }

    template <class S, int R, int C>
    static HG_INLINE void strip(const Gemm& g, int64_t j) {
      int64_t i = 0;
      for (; i + R <= g.rows; i += R) tile<S, R, C>(g, i, j);
      for (; i + 4 <= g.rows; i += 4) tile<S, 4, C>(g, i, j);
      for (; i + 2 <= g.rows; i += 2) tile<S, 2, C>(g, i, j);
      for (; i < g.rows; ++i) tile<S, 1, C>(g, i, j);
    }

    template <class S, int R, int C>
    static HG_INLINE void tile(const Gemm& g, int64_t i, int64_t j) {
      // Unrolled by command: else the sums are zeroed and finished in memory, not in registers.
      using V = typename S::V;
      constexpr int W = S::width;
      V sums[R][C];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[r][c] = V{};
      for (int term = 0; term < g.terms; ++term) {
        const Factors<Right>& f = g.factors[term];
        constexpr bool kTransposed = Finish<Real>::kTransposed;
        const int64_t across = kTransposed ? 1 : f.a_stride, along = kTransposed ? f.a_stride : 1;
        constexpr int64_t P = Panels<Real>::P;
        const Real *a = f.a + i * across, *b = f.b.data + j / P * f.b.panel + j % P;
        for (int64_t t = 0; t < f.depth; ++t, a += along, b += f.b.stride) {
          V row[C];
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) row[c] = S::factor(b + c * W / P * f.b.panel + c * W % P);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[r][c] += a[r * across] * row[c];
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) g.finish.template operator()<S>(i + r, j + c * W, sums[r][c]);
    }
  };

  static void run(const Gemm& g) {
    static const auto function = ForTiles<Body, const Gemm&>::get();
    function(g);
  }
};

// Ra of a last layer much narrower than a register: sums along the depth, of which no lane is padding. Here b is the
// matrix itself, in its own rows: element (i, j) is the sum over t < depth of a(i, t) b(j, t).
template <class Real>
struct NarrowGemm {
  Factors<Panels<Real>> factors[2];
  int terms;
  int64_t rows, columns;
  PlusBias<Real> finish;

  template <class Tiles>
  struct Body {
    using S = Simd<Real, Tiles::bytes>;
    using V = typename S::V;

    static HG_INLINE void run(const NarrowGemm& g) {
      int64_t i = 0;
      for (; i + 4 <= g.rows; i += 4)
        for (int64_t j = 0; j < g.columns; ++j) elements<4>(g, i, j);
      for (; i < g.rows; ++i)
        for (int64_t j = 0; j < g.columns; ++j) elements<1>(g, i, j);
    }

    template <int R>
    static HG_INLINE void elements(const NarrowGemm& g, int64_t i, int64_t j) {
      V sums[4] = {};
      Real rest[R] = {}, out[4];
      for (int term = 0; term < g.terms; ++term) {
        const Factors<Panels<Real>>& f = g.factors[term];
        const Real *a = f.a + i * f.a_stride, *b = f.b.data + j * f.b.stride;
        int64_t t = 0;
        for (; t + S::width <= f.depth; t += S::width) {
          const V by = S::factor(b + t);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sums[r] += S::load(a + r * f.a_stride + t) * by;
        }
        for (; t < f.depth; ++t)
          for (int r = 0; r < R; ++r) rest[r] += a[r * f.a_stride + t] * b[t];
      }
      S::sum4(sums[0], sums[1], sums[2], sums[3], out);
      for (int r = 0; r < R; ++r) g.finish.out[(i + r) * g.finish.stride + j] = out[r] + rest[r] + g.finish.bias[j];
    }
  };

  static void run(const NarrowGemm& g) {
    static const auto function = ForTiles<Body, const NarrowGemm&>::get();
    function(g);
  }
};

}  // namespace hg::cpu
