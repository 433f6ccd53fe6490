// What the matrix products of a multilayer perceptron need besides: transposes with padded rows, and column sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace hg::cpu {

// out[j * out_stride + i] = in[i * in_stride + j], with zeros for i up to the padding.
template <class Real>
struct Transpose {
  const Real* in;
  int64_t in_stride, rows, columns;
  Real* out;
  int64_t out_stride;

  template <class Tiles>
  struct Body {
    using S = Simd<Real, Tiles::bytes>;
    using V = typename S::V;
    static constexpr int W = S::width;

    static HG_INLINE void run(const Transpose& m) {
      for (int64_t j = 0; j < m.columns; j += W)
        for (int64_t i = 0; i < m.out_stride; i += W)
          if (i + W <= m.rows && j + W <= m.columns)
            whole(m, i, j, std::make_integer_sequence<int, W>());
          else
            part(m, i, j);
    }

    static HG_INLINE void part(const Transpose& m, int64_t i, int64_t j) {
      const int64_t filled = std::min<int64_t>(i + W, m.rows), last = std::min<int64_t>(j + W, m.columns);
      for (int64_t c = j; c < last; ++c) {
        Real* out = m.out + c * m.out_stride;
        int64_t r = i;
        for (; r < filled; ++r) out[r] = m.in[r * m.in_stride + c];
        for (; r < i + W; ++r) out[r] = 0;
      }
    }

    // Swaps off-diagonal quarters of ever larger blocks, all in registers.
    template <int... L>
    static HG_INLINE void whole(const Transpose& m, int64_t i, int64_t j, std::integer_sequence<int, L...> lanes) {
      V x[W];
      for (int r = 0; r < W; ++r) x[r] = S::load(m.in + (i + r) * m.in_stride + j);
      swap<1>(x, lanes), swap<2>(x, lanes), swap<4>(x, lanes), swap<8>(x, lanes);
      for (int c = 0; c < W; ++c) S::store(m.out + (j + c) * m.out_stride + i, x[c]);
    }

    template <int Step, int... L>
    static HG_INLINE void swap(V (&x)[W], std::integer_sequence<int, L...>) {
      if constexpr (Step < W)
        for (int r = 0; r < W; ++r) {
          if (r & Step) continue;
          const V a = x[r], b = x[r + Step];
          x[r] = __builtin_shufflevector(a, b, (L & Step ? W + L - Step : L)...);
          x[r + Step] = __builtin_shufflevector(a, b, (L & Step ? W + L : L + Step)...);
        }
    }
  };

  static void run(const Transpose& m) {
    static const auto function = ForTiles<Body, const Transpose&>::get();
    function(m);
  }
};

// out[j] += the sum of column j.
template <class Real>
struct ColumnSums {
  const Real* in;
  int64_t stride, rows, columns;
  Real* out;

  template <class Tiles>
  struct Body {
    using S = Simd<Real, Tiles::bytes>;

    static HG_INLINE void run(const ColumnSums& m) {
      for (int64_t j = 0; j < m.columns; j += S::width) {
        typename S::V sums[4] = {};
        int64_t i = 0;
        for (; i + 4 <= m.rows; i += 4)
          for (int u = 0; u < 4; ++u) sums[u] += S::load(m.in + (i + u) * m.stride + j);
        for (; i < m.rows; ++i) sums[0] += S::load(m.in + i * m.stride + j);
        S::store(m.out + j, S::load(m.out + j) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
      }
    }
  };

  static void run(const ColumnSums& m) {
    static const auto function = ForTiles<Body, const ColumnSums&>::get();
    function(m);
  }
};

}  // namespace hg::cpu
