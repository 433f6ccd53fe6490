// Gram matrices of generalised linear models, X^T D X: what is left of the diagonal by panels of columns, the rest is
// its mirror image. Rows of X come by blocks that stay in the cache while all panels pass.
#include "glm_gram.h"

#include <algorithm>
#include <type_traits>

#include "../glm.h"
#include "buffer.h"
#include "panel_gemm.h"
#include "share.h"
#include "simd.h"
#include "turn.h"

namespace hg::cpu {
namespace {

// Columns of a panel: three registers of AVX-512, fewer than the widest tile has, so that less is done right of the
// diagonal.
constexpr int64_t kPanelBytes = 192;
// Rows of X that are added up before they go to the matrix: fewer where they are short, and torch takes dot products.
constexpr int64_t kDepth = 128, kShortDepth = 32;
// Bytes of a block of rows, which is in the second cache for all panels, and rows at the most; columns of X turned are
// so much further apart than they are long.
constexpr int64_t kBytes = 400 << 10, kMaxRows = 4096, kGap = 16;
// Multiply-adds that a thread should have at least, and tasks per thread.
constexpr int64_t kGrain = 1 << 19, kTasks = 4;
// Where panels are fewer than tasks should be, ranges of rows have sums of their own, in at most so many bytes.
constexpr int64_t kSumBytes = 64 << 20;
// Squares in which the matrix is turned.
constexpr int64_t kSquare = 16;

// Columns of X as rows.
template <class Real>
struct Columns {
  const Real* x;
  int64_t stride, rows, columns;
  Real* out;
  int64_t out_stride;

  template <class Tiles>
  struct Body {
    using S = Simd<Real, Tiles::bytes>;
    static constexpr int W = S::width;

    static HG_INLINE void run(const Columns& m) {
      int64_t t = 0;
      for (; t + W <= m.rows; t += W) {
        int64_t j = 0;
        for (; j + W <= m.columns; j += W)
          turn<S>(m.x + t * m.stride + j, m.stride, m.out + j * m.out_stride + t, m.out_stride);
        for (; j < m.columns; ++j) part(m, t, t + W, j);
      }
      for (int64_t j = 0; j < m.columns; ++j) part(m, t, m.rows, j);
    }

    static HG_INLINE void part(const Columns& m, int64_t t, int64_t end, int64_t j) {
      for (; t < end; ++t) m.out[j * m.out_stride + t] = m.x[t * m.stride + j];
    }
  };

  static void run(const Columns& m) {
    static const auto function = ForTiles<Body, const Columns&>::get();
    function(m);
  }
};

template <class Real>
struct Gram {
  static constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(Real));
  const Real* x;
  int64_t n, d, stride;
  const Real* weights;
  int64_t step;  // from weight to weight

  void form(Real* out) const {
    if constexpr (std::is_same_v<Real, float>)
      if (split_suits(n, d)) return form_gram_split(x, n, d, stride, weights, step, out);
    const int64_t panels = (d + kPanel - 1) / kPanel, size = d * d;
    const int64_t fitting = kBytes / (d * static_cast<int64_t>(sizeof(Real))) / kDepth * kDepth;
    const int64_t block = std::clamp(fitting, kDepth, kMaxRows), pitch = block + kGap;
    const Team team = team_for(n * d * (d + kPanel) / 2, kGrain);
    const int64_t most = 1 + kSumBytes / (size * static_cast<int64_t>(sizeof(Real)));
    const int64_t wanted = team.threads > 1 ? (kTasks * team.threads + panels - 1) / panels : 1;
    const int64_t ranges = std::clamp<int64_t>(std::min(wanted, n / kDepth), 1, most);
    const Buffer<Real> sums((ranges - 1) * size), turned(ranges * d * pitch);
    const auto sum_of = [&](int64_t range) { return range == 0 ? out : sums.get() + (range - 1) * size; };
    lead(team, [&] {
      for (int64_t begin = 0; begin < n; begin += ranges * block) {
        const int64_t rows = std::min(n - begin, ranges * block);
        // Calls f(first row, number of rows, panel, range).
        const auto each = [&](const auto& f) {
          share(ranges * panels, team, [&](int64_t task) {
            const int64_t range = task % ranges, first = range * rows / ranges;
            f(begin + first, (range + 1) * rows / ranges - first, task / ranges * kPanel, range);
          });
        };
        each([&](int64_t row, int64_t count, int64_t j, int64_t range) {
          Columns<Real>::run({x + row * stride + j, stride, count, std::min(kPanel, d - j),
                              turned.get() + (range * d + j) * pitch, pitch});
        });
        // From the panel's part of the diagonal on down. The largest panels first.
        each([&](int64_t row, int64_t count, int64_t j, int64_t range) {
          const int64_t depth = d < kPanel ? kShortDepth : kDepth;
          for (int64_t t = 0; t < count; t += depth)
            multiply_part<Real>({turned.get() + (range * d + j) * pitch + t, pitch, 1, x + (row + t) * stride + j,
                                 stride, 1, sum_of(range) + j * d + j, d, d - j, std::min(kPanel, d - j),
                                 std::min(depth, count - t), begin > 0 || t > 0, weights + (row + t) * step, step});
        });
      }
      share((d + kSquare - 1) / kSquare, team, [&](int64_t task) {
        const int64_t top = task * kSquare, bottom = std::min(top + kSquare, d);
        for (int64_t range = 1; range < ranges; ++range)
          for (int64_t i = top; i < bottom; ++i)
            for (int64_t j = 0; j <= i; ++j) out[i * d + j] += sum_of(range)[i * d + j];
        for (int64_t left = 0; left < bottom; left += kSquare)
          for (int64_t j = left; j < std::min(left + kSquare, bottom); ++j)
            for (int64_t i = std::max(top, j + 1); i < bottom; ++i) out[j * d + i] = out[i * d + j];
      });
    });
  }
};

template <class Real>
void form_all(const GlmData& data, Real* out) {
  const Real* weights = static_cast<const Real*>(data.weights);
  for (int64_t c = 0; c < data.classes; ++c)
    Gram<Real>{static_cast<const Real*>(data.x), data.n, data.d, data.stride, weights + c, data.classes}.form(
        out + c * data.d * data.d);
}

}  // namespace

void glm_gram(const GlmData& data, void* out) {
  if (data.x_dtype == DType::f64)
    form_all(data, static_cast<double*>(out));
  else
    form_all(data, static_cast<float*>(out));
}

}  // namespace hg::cpu
