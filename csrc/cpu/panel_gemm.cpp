// Matrix products of native plans: columns of the right factor are packed into a panel as wide as a register tile,
// which then stays in the second cache while all rows of the left one pass. On Zen 4 that is 1.05 to 1.3 times as fast
// as MKL, and several times for small matrices, where BLAS takes longer to begin than the tiles take to end.
#include "panel_gemm.h"

#include <algorithm>

#include "buffer.h"
#include "simd.h"
#include "tile_store.h"
#include "turn.h"

namespace hg::cpu {
namespace {

// What a panel adds up, at the most: it takes 192 KB of the second cache.
constexpr int64_t kDepth = 768;
// A right factor that is read by few rows, or that fits the first cache, is read where it is.
constexpr int64_t kFewRows = 24, kFirstCache = 32 << 10;

template <class Real>
struct PanelBodies {
  template <class Tiles>
  struct Body {
    using S = Simd<Real, Tiles::bytes>;
    using V = typename S::V;
    // Tiles fill the register file, 32 vectors with AVX-512, else 16.
    static constexpr bool kLarge = Tiles::bytes == 64;
    static constexpr int W = S::width, kWide = kLarge ? 4 : 2, kPanel = kWide * W;

    static HG_INLINE void run(const Part<Real>& g, Real* memory) {
      for (int64_t j = 0; j < g.columns; j += kPanel)
        for (int64_t t = 0; t < g.depth; t += kDepth)
          panel(g, memory, std::min(kDepth, g.depth - t), t, j, std::min<int64_t>(g.columns - j, kPanel));
    }

    // The right factor's rows [t, t + depth) of some columns, by all rows of the left one.
    struct Operand {
      const Real *a, *b;
      int64_t b_row, depth;
      Real* out;
      int64_t inside;
      bool accumulate;
    };

    static HG_INLINE void panel(const Part<Real>& g, Real* memory, int64_t depth, int64_t t, int64_t j,
                                int64_t inside) {
      const Real* b = g.b + t * g.b_depth + j * g.b_column;
      const int64_t span = depth * g.b_depth * static_cast<int64_t>(sizeof(Real));
      const bool in_place =
          !g.scale && g.b_column == 1 && inside % W == 0 && (g.rows <= kFewRows || span <= kFirstCache);
      if (g.scale)
        pack_scaled(g, b, g.scale + t * g.scale_step, depth, inside, memory);
      else if (!in_place)
        pack(g, b, depth, inside, memory);
      const Operand at{
          g.a + t * g.a_depth,  in_place ? b : memory, in_place ? g.b_depth : kPanel, depth, g.out + j, inside,
          g.accumulate || t > 0};
      if (inside <= W) return strips<12, 1>(g, at);
      if (inside <= 2 * W) return strips<kLarge ? 12 : 6, 2>(g, at);
      if constexpr (kLarge) {
        if (inside <= 3 * W) return strips<8, 3>(g, at);
        strips<6, 4>(g, at);
      }
    }

    static HG_INLINE void pack(const Part<Real>& g, const Real* b, int64_t depth, int64_t inside, Real* panel) {
      int64_t p = 0;
      for (; p + W <= inside; p += W) {
        const Real* from = b + p * g.b_column;
        Real* to = panel + p;
        int64_t t = 0;
        if (g.b_column == 1)
          for (; t < depth; ++t) S::store(to + t * kPanel, S::load(from + t * g.b_depth));
        else if (g.b_depth == 1)
          for (; t + W <= depth; t += W) turn<S>(from + t, g.b_column, to + t * kPanel, kPanel);
        for (; t < depth; ++t)
          for (int64_t q = 0; q < W; ++q) to[t * kPanel + q] = from[t * g.b_depth + q * g.b_column];
      }
      for (const int64_t end = (inside + W - 1) / W * W; p < end; ++p)
        for (int64_t t = 0; t < depth; ++t)
          panel[t * kPanel + p] = p < inside ? b[t * g.b_depth + p * g.b_column] : Real(0);
    }

    static HG_INLINE void pack_scaled(const Part<Real>& g, const Real* b, const Real* scale, int64_t depth,
                                      int64_t inside, Real* panel) {
      for (int64_t t = 0; t < depth; ++t, b += g.b_depth, scale += g.scale_step, panel += kPanel) {
        int64_t p = 0;
        for (; p + W <= inside; p += W) S::store(panel + p, *scale * S::load(b + p));
        for (const int64_t end = (inside + W - 1) / W * W; p < end; ++p)
          panel[p] = p < inside ? *scale * b[p] : Real(0);
      }
    }

    // All rows, in strips of equal heights.
    template <int R, int C>
    static HG_INLINE void strips(const Part<Real>& g, const Operand& at) {
      const int64_t blocks = (g.rows + R - 1) / R;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i = block * g.rows / blocks;
        tiles<R, C>(g, at, i, (block + 1) * g.rows / blocks - i);
      }
    }

    template <int R, int C>
    static HG_INLINE void tiles(const Part<Real>& g, const Operand& at, int64_t i, int64_t count) {
      if constexpr (R > 1)
        if (count < R) return tiles<R - 1, C>(g, at, i, count);
      tile<R, C>(g, at, i);
    }

    template <int R, int C>
    static HG_INLINE void tile(const Part<Real>& g, const Operand& at, int64_t i) {
      // Unrolled by command: else the sums are zeroed and finished in memory, not in registers.
      V sums[R][C];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[r][c] = V{};
      const Real *a = at.a + i * g.a_row, *b = at.b;
      for (int64_t t = 0; t < at.depth; ++t, a += g.a_depth, b += at.b_row) {
        V factors[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) factors[c] = S::load(b + c * W);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) sums[r][c] += a[r * g.a_row] * factors[c];
      }
      store_tile<S>(sums, at.out + i * g.out_row, g.out_row, at.inside, at.accumulate);
    }
  };
};

}  // namespace

template <class Real>
void multiply_part(const Part<Real>& part) {
  static const auto function = ForTiles<PanelBodies<Real>::template Body, const Part<Real>&, Real*>::get();
  // Memory for a panel, a thread's own.
  static thread_local const Buffer<Real> memory(kDepth * kGroupBytes / static_cast<int64_t>(sizeof(Real)));
  function(part, memory.get());
}

template void multiply_part(const Part<float>&);
template void multiply_part(const Part<double>&);

}  // namespace hg::cpu
