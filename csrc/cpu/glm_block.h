// What the product of a generalised linear model does with one block of rows of X while the block is
// in cache: Z = X V^T, Z <- D Z, G += Z^T X. Meanwhile the next block is on its way: half of its lines are
// sent for by the first step and half by the last, so that the memory never waits for the arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dot_panels.h"
#include "simd.h"

namespace hg::cpu {

// One block of rows. K = k * classes columns: the k vectors, each with one column per class.
template <class Real>
struct GlmBlock {
  const Real* x;          // rows x d, rows `stride` elements apart
  const Real* weights;    // rows x classes: D if classes is 1, else the probabilities
  const Real* const* v;   // K pointers to d elements
  const Real* panels;     // every eight of them, as far as they go, or null
  const Real* intercept;  // K elements of v that belong to a feature of ones, or null
  Real* z;                // scratch, rows x K
  Real* g;                // K x d, accumulated
  Real* g_intercept;      // K, accumulated
  int64_t rows, d, stride, K, classes;
  const char* next;           // the block after this one as it lies in memory, or null
  int64_t next_stride, size;  // bytes from row to row, and of an element
};

template <class Tiles, class Real>
struct GlmBlockBody {
  using S = Simd<Real, Tiles::bytes>;
  using V = typename S::V;
  using Block = GlmBlock<Real>;
  static constexpr int W = S::width, kLine = 64;

  using Panel = DotPanel<Real>;
  static constexpr int kPanelRows = DotTile<Real, Tiles>::kRows;

  // Rows of a tile of dot products with C columns, and registers of a strip of outer products with them.
  template <int C>
  static constexpr int kLong = std::min(8, Tiles::accumulators / C);

  static HG_INLINE void run(const Block& b) {
    int64_t in_panels = 0;
    if (b.panels)
      for (; in_panels + Panel::kColumns <= b.K; in_panels += Panel::kColumns) dot_panel<kPanelRows>(b, 0, in_panels);
    // Tiles of equal width: five columns are 3 + 2, not 4 + 1.
    const auto width_of = [](int64_t columns) {
      const int64_t tiles = std::max<int64_t>(1, (columns + Tiles::columns - 1) / Tiles::columns);
      return (columns + tiles - 1) / tiles;
    };
    int64_t width = width_of(b.K - in_panels);
    for (int64_t c = in_panels; c < b.K; c += width) dot_columns(b, c, std::min(width, b.K - c));
    for (int64_t r = 0; r < b.rows; ++r) weigh(b.z + r * b.K, b.weights + r * b.classes, b);
    int64_t c = 0;
    // With 32 registers a pass over the block is enough for eight.
    if constexpr (Tiles::bytes == 64)
      for (; c + 8 <= b.K; c += 8) outer_strips<8>(b, c);
    width = width_of(b.K - c);
    for (; c < b.K; c += width) outer_columns(b, c, std::min(width, b.K - c));
    if (b.intercept)
      for (int64_t c = 0; c < b.K; ++c) {
        Real sum = 0;
        for (int64_t r = 0; r < b.rows; ++r) sum += b.z[r * b.K + c];
        b.g_intercept[c] += sum;
      }
  }

 private:
  static HG_INLINE void dot_columns(const Block& b, int64_t c, int64_t count) {
    switch (count) {
      case 1:
        return dot_rows<kLong<1>, 1>(b, 0, c);
      case 2:
        return dot_rows<kLong<2>, 2>(b, 0, c);
      case 3:
        return dot_rows<kLong<3>, 3>(b, 0, c);
      case 4:
        return dot_rows<kLong<4>, 4>(b, 0, c);
      default:
        return dot_rows<kLong<Tiles::columns>, Tiles::columns>(b, 0, c);
    }
  }

  // Eight columns by rows from r on, R at a time, then the rest with smaller tiles.
  template <int R>
  static HG_INLINE void dot_panel(const Block& b, int64_t r, int64_t c) {
    const Real* panel = b.panels + c / Panel::kColumns * Panel::size(b.d);
    for (; r + R <= b.rows; r += R) {
      const Real* x = b.x + r * b.stride;
      Real* z = b.z + r * b.K + c;
      // Copies: for all that the compiler knows the block is among what is written.
      const char* const next = c == 0 && b.next ? b.next + r * b.next_stride : nullptr;
      const int64_t row = b.next_stride, size = b.size;
      DotTile<Real, Tiles>::template run<R>(x, b.stride, panel, b.d, z, b.K, [=](int64_t j) HG_LAMBDA_INLINE {
        if (next)
          for (int i = 1; i < R; i += 2) __builtin_prefetch(next + i * row + j * size, 0, 2);
      });
      for (int64_t j = b.d / Panel::kQuad * Panel::kQuad; j < b.d; ++j)
        for (int i = 0; i < R; ++i)
          for (int k = 0; k < Panel::kColumns; ++k) z[i * b.K + k] += x[i * b.stride + j] * b.v[c + k][j];
      if (b.intercept)
        for (int i = 0; i < R; ++i)
          for (int k = 0; k < Panel::kColumns; ++k) z[i * b.K + k] += b.intercept[c + k];
    }
    if constexpr (R > 1)
      if (r < b.rows) dot_panel<(R > 4 ? 4 : 1)>(b, r, c);
  }

  // Rows from r on, R at a time, then the rest with smaller tiles.
  template <int R, int C>
  static HG_INLINE void dot_rows(const Block& b, int64_t r, int64_t c) {
    for (; r + R <= b.rows; r += R) dots<R, C>(b, r, c);
    if constexpr (R > 1)
      if (r < b.rows) dot_rows<(R > 2 ? 2 : 1), C>(b, r, c);
  }

  // z[r .. r+R, c .. c+C] = X V^T
  template <int R, int C>
  static HG_INLINE void dots(const Block& b, int64_t r, int64_t c) {
    const Real* x = b.x + r * b.stride;
    const Real* const* v = b.v + c;
    const bool fetch = c == 0 && b.next;
    V sums[R][C] = {};
    int64_t j = 0;
    for (; j + W <= b.d; j += W) {
      if (fetch && j * b.size % kLine == 0)
        for (int i = 1; i < R; i += 2) prefetch(b, r + i, j);
      // The shorter side of the tile waits in registers for the longer one.
      if constexpr (C <= R) {
        V column[C];
        for (int k = 0; k < C; ++k) column[k] = S::factor(v[k] + j);
        for (int i = 0; i < R; ++i) {
          const V row = S::factor(x + i * b.stride + j);
          for (int k = 0; k < C; ++k) sums[i][k] += row * column[k];
        }
      } else {
        V row[R];
        for (int i = 0; i < R; ++i) row[i] = S::factor(x + i * b.stride + j);
        for (int k = 0; k < C; ++k) {
          const V column = S::factor(v[k] + j);
          for (int i = 0; i < R; ++i) sums[i][k] += row[i] * column;
        }
      }
    }
    Real z[R * C];
    const V* flat = &sums[0][0];
    int t = 0;
    for (; t + 4 <= R * C; t += 4) S::sum4(flat[t], flat[t + 1], flat[t + 2], flat[t + 3], z + t);
    for (; t < R * C; ++t) z[t] = S::sum(flat[t]);
    if (j < b.d)
      for (int i = 0; i < R; ++i)
        for (int k = 0; k < C; ++k)
          for (int64_t l = j; l < b.d; ++l) z[i * C + k] += x[i * b.stride + l] * v[k][l];
    if (b.intercept)
      for (int i = 0; i < R; ++i)
        for (int k = 0; k < C; ++k) z[i * C + k] += b.intercept[c + k];
    for (int i = 0; i < R; ++i) std::memcpy(b.z + (r + i) * b.K + c, z + i * C, C * sizeof(Real));
  }

  // z <- D z for one row: a weight, or p * (z - <p, z>) for each of the k vectors.
  static HG_INLINE void weigh(Real* z, const Real* weights, const Block& b) {
    if (b.classes == 1) {
      // Read once: for all that the compiler knows it is among what is written.
      const Real weight = weights[0];
      int64_t c = 0;
      for (; c + 4 <= b.K; c += 4)
        for (int i = 0; i < 4; ++i) z[c + i] *= weight;
      for (; c < b.K; ++c) z[c] *= weight;
      return;
    }
    for (Real* end = z + b.K; z < end; z += b.classes) {
      Real mean = 0;
      for (int64_t c = 0; c < b.classes; ++c) mean += weights[c] * z[c];
      for (int64_t c = 0; c < b.classes; ++c) z[c] = weights[c] * (z[c] - mean);
    }
  }

  static HG_INLINE void outer_columns(const Block& b, int64_t c, int64_t count) {
    switch (count) {
      case 1:
        return outer_strips<1>(b, c);
      case 2:
        return outer_strips<2>(b, c);
      case 3:
        return outer_strips<3>(b, c);
      case 4:
        return outer_strips<4>(b, c);
      default:
        return outer_strips<Tiles::columns>(b, c);
    }
  }

  template <int C>
  static HG_INLINE void outer_strips(const Block& b, int64_t c) {
    int64_t j = 0;
    for (; j + kLong<C> * W <= b.d; j += kLong<C> * W) outer<C, kLong<C>, 1>(b, c, j);
    // Rows are unrolled where strip and columns are both short.
    for (; j + 2 * W <= b.d; j += 2 * W) outer<C, 2, C == 1 ? 4 : C == 2 ? 2 : 1>(b, c, j);
    for (; j + W <= b.d; j += W) outer<C, 1, C == 1 ? 8 : C == 8 ? 2 : 4>(b, c, j);
    for (int k = 0; k < C; ++k)
      for (int64_t l = j; l < b.d; ++l) {
        Real sum = 0;
        for (int64_t r = 0; r < b.rows; ++r) sum += b.z[r * b.K + c + k] * b.x[r * b.stride + l];
        b.g[(c + k) * b.d + l] += sum;
      }
  }

  // g[c .. c+C, j .. j+Strip*W] += Z^T X over all rows, with Unroll sums of each element.
  template <int C, int Strip, int Unroll>
  static HG_INLINE void outer(const Block& b, int64_t c, int64_t j) {
    constexpr int kTogether = std::max(2, Unroll);
    V sums[Unroll][C][Strip] = {};
    const Real *x = b.x + j, *z = b.z + c;
    const char* next = c == 0 && b.next ? b.next + j * b.size : nullptr;
    const int64_t rows = b.rows, stride = b.stride, K = b.K, next_stride = b.next_stride, lines = Strip * W * b.size;
    int64_t r = 0;
    for (; r + kTogether <= rows; r += kTogether) {
#pragma GCC unroll 8
      for (int u = 0; u < kTogether; ++u, x += stride, z += K) {
        if (u % 2 == 0 && next) {
          for (int64_t l = 0; l < lines; l += kLine) __builtin_prefetch(next + l, 0, 2);
          next += 2 * next_stride;
        }
        add_row<C, Strip>(x, z, sums[u % Unroll]);
      }
    }
    for (; r < rows; ++r, x += stride, z += K) add_row<C, Strip>(x, z, sums[0]);
    for (int k = 0; k < C; ++k)
      for (int s = 0; s < Strip; ++s) {
        Real* g = b.g + (c + k) * b.d + j + s * W;
        V sum = sums[0][k][s];
        for (int u = 1; u < Unroll; ++u) sum += sums[u][k][s];
        S::store(g, S::load(g) + sum);
      }
  }

  // One row of it.
  template <int C, int Strip>
  static HG_INLINE void add_row(const Real* x, const Real* z, V (&sums)[C][Strip]) {
    // The shorter side of the tile waits in registers for the longer one.
    if constexpr (C <= Strip) {
      V weights[C];
#pragma GCC unroll 8
      for (int k = 0; k < C; ++k) weights[k] = S::every(z + k);
#pragma GCC unroll 8
      for (int s = 0; s < Strip; ++s) {
        const V row = S::factor(x + s * W);
#pragma GCC unroll 8
        for (int k = 0; k < C; ++k) sums[k][s] = S::multiply_add(row, weights[k], sums[k][s]);
      }
    } else {
      V row[Strip];
#pragma GCC unroll 8
      for (int s = 0; s < Strip; ++s) row[s] = S::factor(x + s * W);
#pragma GCC unroll 8
      for (int k = 0; k < C; ++k) {
        const V weight = S::every(z + k);
#pragma GCC unroll 8
        for (int s = 0; s < Strip; ++s) sums[k][s] = S::multiply_add(row[s], weight, sums[k][s]);
      }
    }
  }

  static HG_INLINE void prefetch(const Block& b, int64_t r, int64_t j) {
    __builtin_prefetch(b.next + r * b.next_stride + j * b.size, 0, 2);
  }
};

}  // namespace hg::cpu
