// Products with a matrix that is used at every step of a recurrence: packed once into panels two or three registers
// wide, which then stream through the cache in the order in which they are read.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace hg::cpu {

// Columns are packed in groups of so many bytes, three to eight panels, so that the buffer's size is the same for
// every instruction set.
constexpr int64_t kGroupBytes = 384;

template <class Real>
struct Packed {
  static constexpr int64_t kGroup = kGroupBytes / static_cast<int64_t>(sizeof(Real));
  const Real* b;  // element (t, j) at b[t * row_stride + j * column_stride]
  int64_t row_stride, column_stride, depth, columns;
  Real* panels;

  int64_t groups() const { return (columns + kGroup - 1) / kGroup; }
  int64_t size() const { return groups() * kGroup * depth; }
};

// out = addend + a b, a and out with `rows` rows; addend may be null, or out itself.
template <class Real>
struct Multiplied {
  const Real* a;
  int64_t a_stride, rows;
  const Real* addend;
  Real* out;
  int64_t stride;  // of addend and out
};

template <class Real, class Tiles>
struct PackedGemm {
  using S = Simd<Real, Tiles::bytes>;
  using V = typename S::V;
  // Registers per panel, and rows: their product and the panel's factors fill the register file, 32 with AVX-512, else
  // 16, where four rows by three were 1.2 times as fast as six by two.
  static constexpr int kWide = Tiles::bytes == 64 ? 2 : 3, kRows = Tiles::bytes == 64 ? 12 : 4;
  static constexpr int W = S::width, kPanel = kWide * W;

  static HG_INLINE void pack(const Packed<Real>& m, int64_t group) {
    const int64_t begin = group * Packed<Real>::kGroup, end = begin + Packed<Real>::kGroup;
    for (int64_t j = begin; j < end; j += kPanel) {
      Real* panel = m.panels + j * m.depth;
      for (int p = 0; p < kPanel; ++p)
        for (int64_t t = 0; t < m.depth; ++t)
          panel[t * kPanel + p] = j + p < m.columns ? m.b[t * m.row_stride + (j + p) * m.column_stride] : Real(0);
    }
  }

  using Rows = Multiplied<Real>;

  static HG_INLINE void multiply(const Packed<Real>& m, const Rows& at) {
    const int64_t blocks = (at.rows + kRows - 1) / kRows;
    for (int64_t j = 0; j < m.columns; j += kPanel)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * at.rows / blocks, count = (block + 1) * at.rows / blocks - first;
        tiles<kRows, kWide>(m, at, first, count, j, std::min<int64_t>(m.columns - j, kPanel));
      }
  }

 private:
  // Fewer rows in some blocks, fewer registers in the last panel.
  template <int R, int C>
  static HG_INLINE void tiles(const Packed<Real>& m, const Rows& at, int64_t first, int64_t count, int64_t j,
                              int64_t inside) {
    if constexpr (C > 1)
      if (inside <= (C - 1) * W) return tiles<R, C - 1>(m, at, first, count, j, inside);
    if constexpr (R > 1)
      if (count < R) return tiles<R - 1, C>(m, at, first, count, j, inside);
    tile<R, C>(m, at, first, j, inside);
  }

  template <int R, int C>
  static HG_INLINE void tile(const Packed<Real>& m, const Rows& at, int64_t first, int64_t j, int64_t inside) {
    // Unrolled by command: else the sums are zeroed and finished in memory, not in registers.
    V sums[R][C];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) sums[r][c] = V{};
    const Real *a = at.a + first * at.a_stride, *b = m.panels + j * m.depth;
    for (int64_t t = 0; t < m.depth; ++t, b += kPanel) {
      V factors[C];
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) factors[c] = S::factor(b + c * W);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Real factor = a[r * at.a_stride + t];
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) sums[r][c] += factor * factors[c];
      }
    }
    const int64_t i = first * at.stride + j;
    if (inside == C * W) {
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) {
          const int64_t k = i + r * at.stride + c * W;
          if (at.addend) sums[r][c] += S::load(at.addend + k);
          S::store(at.out + k, sums[r][c]);
        }
      return;
    }
    Real values[R][C * W];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) S::store(values[r] + c * W, sums[r][c]);
    for (int r = 0; r < R; ++r)
      for (int64_t p = 0, k = i + r * at.stride; p < inside; ++p)
        at.out[k + p] = values[r][p] + (at.addend ? at.addend[k + p] : Real(0));
  }
};

}  // namespace hg::cpu
