// What the matrix products of a multilayer perceptron need besides: matrices and transposes in panels, column sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "mlp_gemm.h"
#include "simd.h"
#include "turn.h"

namespace hg::cpu {

// With zeros beside the last column.
template <class Real>
void Panels<Real>::pack_rows(const Real* in, int64_t stride, int64_t begin, int64_t rows, int64_t columns, Real* out,
                             int64_t all) {
  out += begin * P;
  for (int64_t j = 0; j < columns; j += P, out += height(all) * P) {
    const int64_t filled = std::min(P, columns - j);
    for (int64_t r = 0; r < rows; ++r) {
      if (filled == P) {
        std::memcpy(out + r * P, in + r * stride + j, P * sizeof(Real));
        continue;
      }
      std::memcpy(out + r * P, in + r * stride + j, filled * sizeof(Real));
      std::memset(out + r * P + filled, 0, (P - filled) * sizeof(Real));
    }
  }
}

// A transpose in panels, likewise.
template <class Real>
struct Transpose {
  static constexpr int64_t P = Panels<Real>::P;
  const Real* in;
  int64_t in_stride, rows, columns;
  Real* out;

  template <class Tiles>
  struct Body {
    using S = Simd<Real, Tiles::bytes>;
    static constexpr int W = S::width;

    static HG_INLINE void run(const Transpose& m) {
      Real* panel = m.out;
      for (int64_t p = 0; p < m.rows; p += P, panel += Panels<Real>::height(m.columns) * P)
        for (int64_t j = 0; j < m.columns; j += W)
          for (int64_t i = p; i < p + P; i += W)
            if (i + W <= m.rows && j + W <= m.columns)
              turn<S>(m.in + i * m.in_stride + j, m.in_stride, panel + j * P + i - p, P);
            else
              part(m, i, j, panel + j * P + i - p);
    }

    static HG_INLINE void part(const Transpose& m, int64_t i, int64_t j, Real* out) {
      const int64_t filled = std::clamp<int64_t>(m.rows - i, 0, W), last = std::min<int64_t>(j + W, m.columns);
      for (int64_t c = j; c < last; ++c, out += P) {
        int64_t r = 0;
        for (; r < filled; ++r) out[r] = m.in[(i + r) * m.in_stride + c];
        for (; r < W; ++r) out[r] = 0;
      }
    }
  };

  static void run(const Transpose& m) {
    static const auto function = ForTiles<Body, const Transpose&>::get();
    function(m);
  }
};

template <class Real>
void Panels<Real>::pack_columns(const Real* in, int64_t stride, int64_t begin, int64_t count, int64_t rows, Real* out) {
  Transpose<Real>::run({in, stride, count, rows, out + begin * height(rows)});
}

// out[j] += the sum of column j; the first block of rows writes.
template <class Real>
struct ColumnSums {
  const Real* in;
  int64_t stride, rows, columns;
  Real* out;
  bool first;

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
        typename S::V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        if (!m.first) sum += S::load(m.out + j);
        S::store(m.out + j, sum);
      }
    }
  };

  static void run(const ColumnSums& m) {
    static const auto function = ForTiles<Body, const ColumnSums&>::get();
    function(m);
  }
};

}  // namespace hg::cpu
