// Matrix products of native plans with a side of a dozen elements, as a layer of ten classes has: BLAS makes them at a
// third of its pace.
#include <algorithm>

#include "../plan.h"
#include "share.h"
#include "simd.h"

namespace hg::cpu {
namespace {

// Multiply-adds below which a second thread is not worth waiting for.
constexpr int64_t kGrain = 1 << 20;
// Rows or columns of the longer side that go to one thread come in multiples of this, which no tile is larger than.
constexpr int64_t kTile = 32;
// Columns that take as long as fewer: then it is the time to read the other factor.
constexpr int64_t kLeast = 4;
// Elements of a row that stay in the first cache while all rows of the other factor pass.
constexpr int64_t kStrip = 1024;

// out (+)= a b'; rows of a and rows of b are dense. Element (i, j) of out at i * down + j * along.
template <class Real>
struct Dots {
  const Real *a, *b;
  int64_t a_row, b_row;
  Real* out;
  int64_t down, along, first, last, columns, depth;
  bool accumulate;
};

// out (+)= a b with few rows; rows of b and out are dense, element (i, t) of a at i * a_row + t * a_depth.
template <class Real>
struct Few {
  const Real *a, *b;
  int64_t a_row, a_depth, b_depth;
  Real* out;
  int64_t out_row, rows, first, last, depth;
  bool accumulate;
};

template <class Real>
struct NarrowBodies {
  // A tile is R rows of a by C rows of b, each pair with a register of partial sums.
  template <class Tiles>
  struct ByDots {
    using S = Simd<Real, Tiles::bytes>;
    using V = typename S::V;
    static constexpr int W = S::width, kColumns = Tiles::bytes == 64 ? 5 : 3;

    static HG_INLINE void run(const Dots<Real>& g) {
      const int64_t blocks = (g.columns + kColumns - 1) / kColumns;
      for (int64_t i = g.first; i < g.last; i += 4)
        for (int64_t t = 0; t < g.depth; t += kStrip)
          for (int64_t block = 0; block < blocks; ++block) {
            const int64_t j = block * g.columns / blocks, columns = (block + 1) * g.columns / blocks - j;
            tiles<4, kColumns>(g, i, j, t, std::min<int64_t>(4, g.last - i), columns);
          }
    }

    template <int R, int C>
    static HG_INLINE void tiles(const Dots<Real>& g, int64_t i, int64_t j, int64_t t, int64_t rows, int64_t columns) {
      if constexpr (C > 1)
        if (columns < C) return tiles<R, C - 1>(g, i, j, t, rows, columns);
      if constexpr (R > 1)
        if (rows < R) return tiles<R - 1, C>(g, i, j, t, rows, columns);
      tile<R, C>(g, i, j, t);
    }

    template <int R, int C>
    static HG_INLINE void tile(const Dots<Real>& g, int64_t i, int64_t j, int64_t begin) {
      V sums[R][C];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 5
        for (int c = 0; c < C; ++c) sums[r][c] = V{};
      const Real *a = g.a + i * g.a_row, *b = g.b + j * g.b_row;
      const int64_t end = std::min(g.depth, begin + kStrip);
      int64_t t = begin;
      for (; t + W <= end; t += W) {
        V right[C];
#pragma GCC unroll 5
        for (int c = 0; c < C; ++c) right[c] = S::factor(b + c * g.b_row + t);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V left = S::factor(a + r * g.a_row + t);
#pragma GCC unroll 5
          for (int c = 0; c < C; ++c) sums[r][c] += left * right[c];
        }
      }
      const bool add = g.accumulate || begin > 0;
#pragma GCC unroll 5
      for (int c = 0; c < C; ++c) {
        Real column[4];
        S::sum4(sums[0][c], sums[R > 1 ? 1 : 0][c], sums[R > 2 ? 2 : 0][c], sums[R > 3 ? 3 : 0][c], column);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          for (int64_t rest = t; rest < end; ++rest) column[r] += a[r * g.a_row + rest] * b[c * g.b_row + rest];
          Real& at = g.out[(i + r) * g.down + (j + c) * g.along];
          at = add ? at + column[r] : column[r];
        }
      }
    }
  };

  // A few rows of b at a time are read from end to end, and added to all of out, which stays in the cache.
  template <class Tiles>
  struct ByRows {
    using S = Simd<Real, Tiles::bytes>;
    using V = typename S::V;
    static constexpr int W = S::width, kRows = Tiles::bytes == 64 ? 10 : 5, kDeep = 32;

    static HG_INLINE void run(const Few<Real>& g) {
      const int64_t blocks = (g.rows + kRows - 1) / kRows;
      for (int64_t t = 0; t < g.depth; t += kDeep) {
        const int64_t deep = std::min<int64_t>(kDeep, g.depth - t);
        int64_t j = g.first;
        for (; j + 2 * W <= g.last; j += 2 * W) columns<2>(g, blocks, j, t, deep);
        for (; j + W <= g.last; j += W) columns<1>(g, blocks, j, t, deep);
        for (int64_t i = 0; i < g.rows; ++i)
          for (int64_t k = j; k < g.last; ++k) {
            Real& at = g.out[i * g.out_row + k];
            Real sum = t > 0 || g.accumulate ? at : Real(0);
            for (int64_t u = t; u < t + deep; ++u) sum += g.a[i * g.a_row + u * g.a_depth] * g.b[u * g.b_depth + k];
            at = sum;
          }
      }
    }

    // C registers of columns, for all rows.
    template <int C>
    static HG_INLINE void columns(const Few<Real>& g, int64_t blocks, int64_t j, int64_t t, int64_t deep) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i = block * g.rows / blocks, count = (block + 1) * g.rows / blocks - i;
        tiles<kRows, C>(g, i, count, j, t, deep);
      }
    }

    template <int R, int C>
    static HG_INLINE void tiles(const Few<Real>& g, int64_t i, int64_t count, int64_t j, int64_t t, int64_t deep) {
      if constexpr (R > 1)
        if (count < R) return tiles<R - 1, C>(g, i, count, j, t, deep);
      if (deep == kDeep)
        tile<R, C>(g, i, j, t, kDeep);
      else
        tile<R, C>(g, i, j, t, deep);
    }

    template <int R, int C>
    static HG_INLINE void tile(const Few<Real>& g, int64_t i, int64_t j, int64_t t, int64_t deep) {
      V sums[R][C];
      Real* const out = g.out + i * g.out_row + j;
      const bool add = t > 0 || g.accumulate;
#pragma GCC unroll 10
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sums[r][c] = add ? S::load(out + r * g.out_row + c * W) : V{};
      const Real *a = g.a + i * g.a_row + t * g.a_depth, *b = g.b + t * g.b_depth + j;
#pragma GCC unroll 4
      for (int64_t u = 0; u < deep; ++u, a += g.a_depth, b += g.b_depth) {
        // The rows after these: so many streams at once are more than the hardware follows.
        V row[C];
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
          if (i == 0) __builtin_prefetch(b + kDeep * g.b_depth + c * W);
          row[c] = S::factor(b + c * W);
        }
#pragma GCC unroll 10
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int c = 0; c < C; ++c) sums[r][c] += a[r * g.a_row] * row[c];
      }
#pragma GCC unroll 10
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) S::store(out + r * g.out_row + c * W, sums[r][c]);
    }
  };
};

// Where the part of a task begins, at a whole tile.
int64_t begin_of(int64_t task, int64_t tasks, int64_t total) {
  return task == tasks ? total : task * ((total + kTile - 1) / kTile) / tasks * kTile;
}

}  // namespace

template <class Real>
Team PlanKernels<Real>::dots_team(const plan::Gemm& g) {
  const int64_t total = std::max(g.out.sizes[1], g.out.sizes[2]), narrow = std::min(g.out.sizes[1], g.out.sizes[2]);
  return team_for(total * std::max(narrow, kLeast) * g.a.sizes[2], kGrain);
}

template <class Real>
void PlanKernels<Real>::dots(const plan::Gemm& g, Real* const* slots) {
  static const auto function = ForTiles<NarrowBodies<Real>::template ByDots, const Dots<Real>&>::get();
  // The longer side is the one that passes once.
  const bool turned = g.out.sizes[2] > g.out.sizes[1];
  const plan::View &left = turned ? g.b : g.a, &right = turned ? g.a : g.b;
  const auto rows = [&](const plan::View& v, bool is_b) { return v.strides[is_b ? 2 : 1]; };
  const int64_t total = std::max(g.out.sizes[1], g.out.sizes[2]), narrow = std::min(g.out.sizes[1], g.out.sizes[2]);
  const Team team = dots_team(g);
  for (int64_t n = 0; n < g.out.sizes[0]; ++n)
    share(team.threads, team, [&](int64_t task) {
      function({slots[left.slot] + left.offset + n * left.strides[0],
                slots[right.slot] + right.offset + n * right.strides[0], rows(left, turned), rows(right, !turned),
                slots[g.out.slot] + g.out.offset + n * g.out.strides[0], turned ? 1 : g.out.strides[1],
                turned ? g.out.strides[1] : 1, begin_of(task, team.threads, total),
                begin_of(task + 1, team.threads, total), narrow, g.a.sizes[2], g.accumulate});
    });
}

template <class Real>
void PlanKernels<Real>::dots(const plan::Gemm& g, Real* const* slots, plan::Range rows) {
  static const auto function = ForTiles<NarrowBodies<Real>::template ByDots, const Dots<Real>&>::get();
  function({slots[g.a.slot] + g.a.offset, slots[g.b.slot] + g.b.offset, g.a.strides[1], g.b.strides[2],
            slots[g.out.slot] + g.out.offset, g.out.strides[1], g.out.strides[2], rows.begin, rows.end, g.out.sizes[2],
            g.a.sizes[2], g.accumulate});
}

template <class Real>
void PlanKernels<Real>::few_rows(const plan::Gemm& g, Real* const* slots, plan::Range depth, Real* out, int64_t out_row,
                                 bool accumulate) {
  static const auto function = ForTiles<NarrowBodies<Real>::template ByRows, const Few<Real>&>::get();
  function({slots[g.a.slot] + g.a.offset + depth.begin * g.a.strides[2],
            slots[g.b.slot] + g.b.offset + depth.begin * g.b.strides[1], g.a.strides[1], g.a.strides[2], g.b.strides[1],
            out, out_row, g.out.sizes[1], 0, g.out.sizes[2], depth.end - depth.begin, accumulate});
}

template <class Real>
void PlanKernels<Real>::few_rows(const plan::Gemm& g, Real* const* slots) {
  static const auto function = ForTiles<NarrowBodies<Real>::template ByRows, const Few<Real>&>::get();
  const int64_t columns = g.out.sizes[2];
  const Team team = team_for(columns * g.out.sizes[1] * g.a.sizes[2], kGrain);
  for (int64_t n = 0; n < g.out.sizes[0]; ++n)
    share(team.threads, team, [&](int64_t task) {
      function({slots[g.a.slot] + g.a.offset + n * g.a.strides[0], slots[g.b.slot] + g.b.offset + n * g.b.strides[0],
                g.a.strides[1], g.a.strides[2], g.b.strides[1], slots[g.out.slot] + g.out.offset + n * g.out.strides[0],
                g.out.strides[1], g.out.sizes[1], begin_of(task, team.threads, columns),
                begin_of(task + 1, team.threads, columns), g.a.sizes[2], g.accumulate});
    });
}

template Team PlanKernels<float>::dots_team(const plan::Gemm&);
template Team PlanKernels<double>::dots_team(const plan::Gemm&);
template void PlanKernels<float>::dots(const plan::Gemm&, float* const*);
template void PlanKernels<double>::dots(const plan::Gemm&, double* const*);
template void PlanKernels<float>::few_rows(const plan::Gemm&, float* const*);
template void PlanKernels<double>::few_rows(const plan::Gemm&, double* const*);
template void PlanKernels<float>::dots(const plan::Gemm&, float* const*, plan::Range);
template void PlanKernels<double>::dots(const plan::Gemm&, double* const*, plan::Range);
template void PlanKernels<float>::few_rows(const plan::Gemm&, float* const*, plan::Range, float*, int64_t, bool);
template void PlanKernels<double>::few_rows(const plan::Gemm&, double* const*, plan::Range, double*, int64_t, bool);

}  // namespace hg::cpu
