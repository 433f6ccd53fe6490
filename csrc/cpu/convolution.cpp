// Convolutions of native plans, without a matrix of patches: the registers' tiles of a matrix product whose rows are
// the rows of a padded image, each tap of the kernel at an offset of its own.
#include <algorithm>

#include "buffer.h"
#include "convolution_image.h"
#include "share.h"
#include "simd.h"
#include "tile_store.h"

namespace hg::cpu {
namespace {

using plan::Convolution;
using plan::View;

// Multiply-adds below which a second thread is not worth waiting for.
constexpr int64_t kGrain = 1 << 22;

template <class Real>
struct ConvolutionBodies {
  // y: a tile is R outputs of some pixels of one row.
  template <class Tiles>
  struct Images {
    using S = Simd<Real, Tiles::bytes>;
    using V = typename S::V;
    static constexpr int W = S::width, kOutputs = Tiles::bytes == 64 ? 12 : 6;

    static HG_INLINE void run(const ConvolutionTask<Real>& t) {
      const int64_t outputs = t.c.y.sizes[1], depth = t.image.taps.size();
      const int64_t blocks = (outputs + kOutputs - 1) / kOutputs;
      for (int64_t n = t.first; n < t.last; ++n) {
        t.pad(n);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t o = block * outputs / blocks, count = (block + 1) * outputs / blocks - o;
          const Real* factors = t.factors + o * depth;
          Real* y = const_cast<Real*>(t.y) + n * t.c.y.strides[0] + o * t.c.y.strides[1];
          for (int64_t r = 0; r < t.c.y.sizes[2]; ++r)
            for (int64_t j = 0; j < t.c.y.sizes[3]; j += 2 * W)
              tiles<kOutputs, 2>(t, factors, count, t.padded + r * t.image.columns + j, y + r * t.c.y.strides[2] + j,
                                 std::min<int64_t>(t.c.y.sizes[3] - j, 2 * W));
        }
      }
    }

    template <int R, int C>
    static HG_INLINE void tiles(const ConvolutionTask<Real>& t, const Real* factors, int64_t count, const Real* x,
                                Real* y, int64_t inside) {
      if constexpr (C > 1)
        if (inside <= W) return tiles<R, 1>(t, factors, count, x, y, inside);
      if constexpr (R > 1)
        if (count < R) return tiles<R - 1, C>(t, factors, count, x, y, inside);
      tile<R, C>(t, factors, x, y, inside);
    }

    template <int R, int C>
    static HG_INLINE void tile(const ConvolutionTask<Real>& t, const Real* factors, const Real* x, Real* y,
                               int64_t inside) {
      // Unrolled by command: else the sums are zeroed and finished in memory, not in registers.
      V sums[R][C];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sums[r][c] = V{};
      const int64_t *tap = t.image.taps.data(), *end = tap + t.image.taps.size();
      for (; tap != end; ++tap, factors += R) {
        V pixels[C];
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) pixels[c] = S::factor(x + *tap + c * W);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int c = 0; c < C; ++c) sums[r][c] += factors[r] * pixels[c];
      }
      store_tile<S>(sums, y, t.c.y.strides[1], inside, t.c.accumulate);
    }
  };

  // The gradient by w: a tile is R taps of some outputs, summed over the pixels of an image.
  template <class Tiles>
  struct Weight {
    using S = Simd<Real, Tiles::bytes>;
    using V = typename S::V;
    static constexpr int W = S::width, kTaps = Tiles::bytes == 64 ? 12 : 6;

    static HG_INLINE void run(const ConvolutionTask<Real>& t) {
      const int64_t outputs = padded(t.c.y.sizes[1]), depth = t.image.taps.size();
      const int64_t blocks = (depth + kTaps - 1) / kTaps;
      for (int64_t n = t.first; n < t.last; ++n) {
        t.pad(n);
        turn(t, n, outputs);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t tap = block * depth / blocks, count = (block + 1) * depth / blocks - tap;
          for (int64_t o = 0; o < outputs; o += 2 * W)
            tiles<kTaps, 2>(t, outputs, tap, count, o, std::min<int64_t>(outputs - o, 2 * W));
        }
      }
    }

    static HG_INLINE int64_t padded(int64_t outputs) { return (outputs + W - 1) / W * W; }

    static HG_INLINE void turn(const ConvolutionTask<Real>& t, int64_t n, int64_t outputs) {
      const View& v = t.c.y;
      const Real* y = t.y + n * v.strides[0];
      for (int64_t o = 0; o < outputs; o += W) {
        const int64_t inside = std::min<int64_t>(W, v.sizes[1] - o);
        Real* to = t.turned + o;
        for (int64_t r = 0; r < v.sizes[2]; ++r)
          for (int64_t q = 0; q < v.sizes[3]; ++q, to += outputs) {
            const Real* from = y + o * v.strides[1] + r * v.strides[2] + q * v.strides[3];
            if (inside == W)
#pragma GCC unroll 16
              for (int l = 0; l < W; ++l) to[l] = from[l * v.strides[1]];
            else
              for (int64_t l = 0; l < W; ++l) to[l] = l < inside ? from[l * v.strides[1]] : Real(0);
          }
      }
    }

    template <int R, int C>
    static HG_INLINE void tiles(const ConvolutionTask<Real>& t, int64_t outputs, int64_t tap, int64_t count, int64_t o,
                                int64_t inside) {
      if constexpr (C > 1)
        if (inside <= W) return tiles<R, 1>(t, outputs, tap, count, o, inside);
      if constexpr (R > 1)
        if (count < R) return tiles<R - 1, C>(t, outputs, tap, count, o, inside);
      tile<R, C>(t, outputs, tap, o);
    }

    template <int R, int C>
    static HG_INLINE void tile(const ConvolutionTask<Real>& t, int64_t outputs, int64_t tap, int64_t o) {
      // Of one image, and then added to those before it: rounding grows more slowly than in one long sum.
      V sums[R][C];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sums[r][c] = V{};
      const Real* from[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) from[r] = t.padded + t.image.taps[tap + r];
      const int64_t height = t.c.y.sizes[2], width = t.c.y.sizes[3];
      const Real* y = t.turned + o;
      for (int64_t h = 0; h < height; ++h)
        for (int64_t p = h * t.image.columns, end = p + width; p < end; ++p, y += outputs) {
          V gradients[C];
#pragma GCC unroll 2
          for (int c = 0; c < C; ++c) gradients[c] = S::factor(y + c * W);
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) sums[r][c] += from[r][p] * gradients[c];
        }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
          Real* const result = t.factors + (tap + r) * outputs + o + c * W;
          S::store(result, S::load(result) + sums[r][c]);
        }
    }
  };
};

// The factors of a block of outputs, tap by tap, as a tile reads them.
template <class Real>
void reorder(const Convolution& c, const Real* w, int64_t most, Real* factors) {
  const auto &sizes = c.w.sizes, &strides = c.w.strides;
  const int64_t outputs = sizes[0], blocks = (outputs + most - 1) / most;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * outputs / blocks, end = (block + 1) * outputs / blocks;
    for (int64_t i = 0; i < sizes[1]; ++i)
      for (int64_t r = 0; r < sizes[2]; ++r)
        for (int64_t q = 0; q < sizes[3]; ++q)
          for (int64_t o = begin; o < end; ++o)
            *factors++ = w[o * strides[0] + i * strides[1] + (c.flipped ? sizes[2] - 1 - r : r) * strides[2] +
                           (c.flipped ? sizes[3] - 1 - q : q) * strides[3]];
  }
}

}  // namespace

template <class Real>
void PlanKernels<Real>::convolve(const Convolution& c, Real* const* slots) {
  using Bodies = ConvolutionBodies<Real>;
  static const auto images = ForTiles<Bodies::template Images, const ConvolutionTask<Real>&>::get();
  static const auto weight = ForTiles<Bodies::template Weight, const ConvolutionTask<Real>&>::get();
  constexpr int64_t kWidest = 64 / sizeof(Real);
  const Image image(c);
  const auto place = [&](const View& v) { return slots[v.slot] + v.offset; };
  const int64_t batch = c.y.sizes[0], outputs = c.y.sizes[1], depth = image.taps.size();
  const int64_t across = (outputs + kWidest - 1) / kWidest * kWidest, pixels = c.y.sizes[2] * c.y.sizes[3];
  const int64_t padded = image.size(c), turned = c.by_weight ? pixels * across : 0, sums = depth * across;
  const Team team = team_for(batch * pixels * outputs * depth, kGrain);
  const int64_t tasks = std::min(team.threads, batch);
  const int64_t own = (padded + turned + (c.by_weight ? sums : 0) + kWidest) / kWidest * kWidest;
  const Buffer<Real> buffer(tasks * own + (c.by_weight ? 0 : outputs * depth));
  Real* const factors = buffer.get() + tasks * own;
  if (!c.by_weight) reorder(c, place(c.w), isa() == Isa::avx512 ? 12 : 6, factors);
  share(tasks, team, [&](int64_t task) {
    Real* const mine = buffer.get() + task * own;
    std::fill(mine, mine + padded, Real(0));
    if (c.by_weight) std::fill(mine + padded + turned, mine + padded + turned + sums, Real(0));
    const ConvolutionTask<Real> t{c,
                                  image,
                                  place(c.x),
                                  place(c.w),
                                  place(c.y),
                                  mine,
                                  mine + padded,
                                  c.by_weight ? mine + padded + turned : factors,
                                  task * batch / tasks,
                                  (task + 1) * batch / tasks};
    (c.by_weight ? weight : images)(t);
  });
  if (!c.by_weight) return;
  const int64_t lanes = isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16, wide = lanes / sizeof(Real);
  const int64_t row = (outputs + wide - 1) / wide * wide;
  Real* const w = place(c.w);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0, t = 0; i < c.w.sizes[1]; ++i)
      for (int64_t r = 0; r < c.w.sizes[2]; ++r)
        for (int64_t q = 0; q < c.w.sizes[3]; ++q, ++t) {
          Real& at = w[o * c.w.strides[0] + i * c.w.strides[1] + r * c.w.strides[2] + q * c.w.strides[3]];
          Real sum = c.accumulate ? at : Real(0);
          for (int64_t task = 0; task < tasks; ++task) sum += buffer.get()[task * own + padded + turned + t * row + o];
          at = sum;
        }
}

template void PlanKernels<float>::convolve(const Convolution&, float* const*);
template void PlanKernels<double>::convolve(const Convolution&, double* const*);

}  // namespace hg::cpu
