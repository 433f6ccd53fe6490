// Small matrix products of native plans, where BLAS takes longer to begin than the registers' tiles take to end.
#include <algorithm>

#include "../plan.h"
#include "share.h"
#include "simd.h"
#include "tile_store.h"

namespace hg::cpu {
namespace {

// Multiply-adds that a thread should have at least, and ranges of the batch per thread.
constexpr int64_t kGrain = 1 << 19, kRanges = 2;

// out (+)= a b for one matrix of a batch; element (i, t) of a at i * a_row + t * a_depth, and so on.
template <class Real>
struct Small {
  const Real* a;
  int64_t a_row, a_depth;
  const Real* b;
  int64_t b_depth, b_column;
  Real* out;
  int64_t out_row, rows, columns, depth;
  bool accumulate;
};

template <class Real>
struct SmallBodies {
  template <class Tiles>
  struct Body {
    using S = Simd<Real, Tiles::bytes>;
    using V = typename S::V;
    static constexpr int W = S::width, kRows = Tiles::bytes == 64 ? 12 : 6, kPanel = 2 * W;

    static HG_INLINE void run(const Small<Real>& g) {
      alignas(64) Real panel[plan::kSmallDepth * kPanel];
      for (int64_t j = 0; j < g.columns; j += kPanel) {
        const int64_t inside = std::min<int64_t>(g.columns - j, kPanel);
        const bool dense = g.b_column == 1 && (inside == kPanel || inside == W);
        if (!dense) pack(g, j, inside, panel);
        const Real* b = dense ? g.b + j : panel;
        const int64_t b_depth = dense ? g.b_depth : kPanel, blocks = (g.rows + kRows - 1) / kRows;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t i = block * g.rows / blocks, count = (block + 1) * g.rows / blocks - i;
          tiles<kRows, 2>(g, b, b_depth, i, count, j, inside);
        }
      }
    }

    static HG_INLINE void pack(const Small<Real>& g, int64_t j, int64_t inside, Real* panel) {
      const Real* b = g.b + j * g.b_column;
      for (int64_t p = 0; p < kPanel; ++p)
        for (int64_t t = 0; t < g.depth; ++t)
          panel[t * kPanel + p] = p < inside ? b[t * g.b_depth + p * g.b_column] : Real(0);
    }

    template <int R, int C>
    static HG_INLINE void tiles(const Small<Real>& g, const Real* b, int64_t b_depth, int64_t i, int64_t count,
                                int64_t j, int64_t inside) {
      if constexpr (C > 1)
        if (inside <= W) return tiles<R, 1>(g, b, b_depth, i, count, j, inside);
      if constexpr (R > 1)
        if (count < R) return tiles<R - 1, C>(g, b, b_depth, i, count, j, inside);
      tile<R, C>(g, b, b_depth, i, j, inside);
    }

    template <int R, int C>
    static HG_INLINE void tile(const Small<Real>& g, const Real* b, int64_t b_depth, int64_t i, int64_t j,
                               int64_t inside) {
      // Unrolled by command: else the sums are zeroed and finished in memory, not in registers.
      V sums[R][C];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sums[r][c] = V{};
      const Real* a = g.a + i * g.a_row;
      for (int64_t t = 0; t < g.depth; ++t, a += g.a_depth, b += b_depth) {
        V factors[C];
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) factors[c] = S::load(b + c * W);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int c = 0; c < C; ++c) sums[r][c] += a[r * g.a_row] * factors[c];
      }
      store_tile<S>(sums, g.out + i * g.out_row + j, g.out_row, inside, g.accumulate);
    }
  };
};

}  // namespace

template <class Real>
void PlanKernels<Real>::multiply(const plan::Gemm& g, Real* const* slots) {
  static const auto function = ForTiles<SmallBodies<Real>::template Body, const Small<Real>&>::get();
  const Real* a = slots[g.a.slot] + g.a.offset;
  const Real* b = slots[g.b.slot] + g.b.offset;
  Real* out = slots[g.out.slot] + g.out.offset;
  const int64_t batch = g.out.sizes[0];
  const Team team = team_for(batch * g.out.sizes[1] * g.out.sizes[2] * g.a.sizes[2], kGrain);
  const int64_t ranges = team.ranges(batch, kRanges);
  share(ranges, team, [&](int64_t range) {
    for (int64_t i = range * batch / ranges; i < (range + 1) * batch / ranges; ++i)
      function({a + i * g.a.strides[0], g.a.strides[1], g.a.strides[2], b + i * g.b.strides[0], g.b.strides[1],
                g.b.strides[2], out + i * g.out.strides[0], g.out.strides[1], g.out.sizes[1], g.out.sizes[2],
                g.a.sizes[2], g.accumulate});
  });
}

template void PlanKernels<float>::multiply(const plan::Gemm&, float* const*);
template void PlanKernels<double>::multiply(const plan::Gemm&, double* const*);

}  // namespace hg::cpu
