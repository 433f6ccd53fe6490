// Gram matrices of generalised linear models, X^T D X: what is left of the diagonal by panels of columns, the rest is
// its mirror image. Rows of X come by blocks that stay in the cache while all panels pass.
#include <algorithm>

#include "../glm.h"
#include "buffer.h"
#include "panel_gemm.h"
#include "share.h"

namespace hg::cpu {
namespace {

// Columns of a panel: half of those that a tile of the full width has, so that little is done right of the diagonal.
constexpr int64_t kPanelBytes = kGroupBytes / 2;
// Rows of X that are added up before they go to the matrix, and rows of a block.
constexpr int64_t kDepth = 256, kBlock = 1024;
// Multiply-adds that a thread should have at least, and tasks per thread.
constexpr int64_t kGrain = 1 << 19, kTasks = 4;
// Where panels are fewer than tasks should be, ranges of rows have sums of their own, in at most so many bytes.
constexpr int64_t kSumBytes = 64 << 20;
// Squares in which the matrix is turned.
constexpr int64_t kSquare = 16;

template <class Real>
struct Gram {
  static constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(Real));
  const Real* x;
  int64_t n, d, stride;
  const Real* weights;
  int64_t step;  // from weight to weight

  // Adds the rows [begin, end) to `out`, from the panel's part of the diagonal on down; or writes them there.
  void add(int64_t panel, int64_t begin, int64_t end, bool accumulate, Real* out) const {
    const int64_t j = panel * kPanel;
    for (int64_t t = begin; t < end; t += kDepth) {
      const Real* from = x + t * stride + j;
      multiply_part<Real>({from, 1, stride, from, stride, 1, out + j * d + j, d, d - j, std::min(kPanel, d - j),
                           std::min(kDepth, end - t), accumulate || t > begin, weights + t * step, step});
    }
  }

  void form(Real* out) const {
    const int64_t panels = (d + kPanel - 1) / kPanel, size = d * d;
    const Team team = team_for(n * d * (d + kPanel) / 2, kGrain);
    const int64_t most = 1 + kSumBytes / (size * static_cast<int64_t>(sizeof(Real)));
    const int64_t wanted = team.threads > 1 ? (kTasks * team.threads + panels - 1) / panels : 1;
    const int64_t ranges = std::clamp<int64_t>(std::min(wanted, n / kDepth), 1, most);
    const Buffer<Real> sums((ranges - 1) * size);
    const auto sum_of = [&](int64_t range) { return range == 0 ? out : sums.get() + (range - 1) * size; };
    for (int64_t begin = 0; begin < n; begin += ranges * kBlock) {
      const int64_t rows = std::min(n - begin, ranges * kBlock);
      // The largest panels first.
      share(ranges * panels, team, [&](int64_t task) {
        const int64_t range = task % ranges;
        add(task / ranges, begin + range * rows / ranges, begin + (range + 1) * rows / ranges, begin > 0,
            sum_of(range));
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
