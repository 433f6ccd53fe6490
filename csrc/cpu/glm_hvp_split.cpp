// Z = X V^T, Z <- D Z, G += Z^T X for some rows at a time, which all threads share.
#include "glm_hvp_split.h"

#include <algorithm>

#include "buffer.h"
#include "glm_columns.h"
#include "glm_hvp_bf16.h"
#include "glm_widen.h"
#include "share.h"
#include "shared_gemm.h"
#include "simd.h"
#include "split_multiply.h"

namespace hg::cpu {
namespace {

// Numbers of a row, or columns, from which on both products are faster than a pass over X.
constexpr int64_t kLeast = 256;
// Bytes of Z, and of rows that are widened, and rows: a multiple of what is packed at a time.
constexpr int64_t kBytes = 2 << 20, kWideBytes = 8 << 20, kRows = 512;
// Ranges of rows per thread that are widened and weighed.
constexpr int64_t kRanges = 4;

// Some rows of Z, and the weights of these rows. Z becomes D (Z + intercepts): weights times z, or p * (z - <p, z>) for
// each of the k vectors.
struct Weigh {
  const GlmColumns<float>& of;
  const float* weights;
  float* z;
  int64_t rows;
  float* sums;  // of the columns, accumulated if there are intercepts

  template <class Tiles>
  struct Body {
    using S = Simd<float, Tiles::bytes>;
    using V = typename S::V;

    static HG_INLINE void run(const Weigh& m) {
      const int64_t classes = m.of.data.classes, K = m.of.K, intercepts = m.of.intercepts.size();
      const float* p = m.weights;
      float* z = m.z;
      for (int64_t r = 0; r < m.rows; ++r, p += classes, z += K) {
        for (int64_t c = 0; c < intercepts; ++c) z[c] += m.of.intercepts[c];
        if (classes == 1)
          for (int64_t c = 0; c < K; ++c) z[c] *= *p;
        else
          for (int64_t first = 0; first < K; first += classes) centre(p, z + first, classes);
        for (int64_t c = 0; c < intercepts; ++c) m.sums[c] += z[c];
      }
    }

    static HG_INLINE void centre(const float* p, float* z, int64_t classes) {
      V sums[4] = {};
      int64_t c = 0;
      for (; c + 4 * S::width <= classes; c += 4 * S::width)
        for (int u = 0; u < 4; ++u) sums[u] += S::load(p + c + u * S::width) * S::load(z + c + u * S::width);
      float mean = S::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
      for (; c < classes; ++c) mean += p[c] * z[c];
      for (c = 0; c < classes; ++c) z[c] = p[c] * (z[c] - mean);
    }
  };

  static void run(const Weigh& m) {
    static const auto function = ForTiles<Body, const Weigh&>::get();
    function(m);
  }
};

// `count` rows of X from `row` on, widened to `wide` if they are in a half precision.
struct WideRows {
  const float* data;
  int64_t stride;

  static WideRows of(const GlmData& data, int64_t row, int64_t count, float* wide, const Team& team) {
    if (data.x_dtype == DType::bf16) return widened<BFloat16>(data, row, count, wide, team);
    if (data.x_dtype == DType::f16) return widened<Float16>(data, row, count, wide, team);
    return {static_cast<const float*>(data.x) + row * data.stride, data.stride};
  }

 private:
  template <class X>
  static WideRows widened(const GlmData& data, int64_t row, int64_t count, float* wide, const Team& team) {
    const X* x = static_cast<const X*>(data.x) + row * data.stride;
    const int64_t ranges = team.ranges(count, kRanges);
    share(ranges, team, [&](int64_t range) {
      const int64_t first = range * count / ranges, last = (range + 1) * count / ranges;
      Widen<X, float>::run({x + first * data.stride, last - first, data.d, data.stride, wide + first * data.d});
    });
    return {wide, data.d};
  }
};

}  // namespace

bool split_suits(const GlmData& data, int64_t k) {
  const int64_t K = k * data.classes, bytes = 2 * K * data.d * static_cast<int64_t>(sizeof(float));
  if (data.x_dtype == DType::f64 || (bf16_suits(data, k) && bytes < kMostOfBf16)) return false;
  return std::max(data.d, K) >= kLeast && split_suits(data.n, K, data.d);
}

void glm_hvp_split(const GlmData& data, const float* v, int64_t k, float* out) {
  const GlmColumns<float> of(data, v, k);
  const int64_t d = data.d, K = of.K, classes = data.classes;
  const float* weights = static_cast<const float*>(data.weights);
  const int64_t fitting = kBytes / (K * static_cast<int64_t>(sizeof(float))) / kRows * kRows;
  const bool narrow = data.x_dtype != DType::f32;
  const int64_t widened = narrow ? kWideBytes / (d * static_cast<int64_t>(sizeof(float))) / kRows * kRows : data.n;
  const int64_t most = std::min(data.n, std::max(kRows, std::min(fitting, widened)));
  const Team team = glm_team(data, k);
  // Columns of several vectors that have intercepts between them are put side by side.
  const bool apart = k > 1 && data.intercept;
  // Every range has sums of its own, added in order.
  const int64_t ranges = team.ranges(most, kRanges);
  const Buffer<float> columns(apart ? K * d : 0), z(most * K), totals(of.pitch()), sums(ranges * K),
      wide(narrow ? most * d : 0);
  for (int64_t c = 0; apart && c < K; ++c) std::copy_n(of.columns[c], d, columns.get() + c * d);
  const float* const V = apart ? columns.get() : v;
  float *const g = totals.get(), *const g_intercept = g + K * d;
  std::fill_n(sums.get(), ranges * K, 0.0f);
  lead(team, [&] {
    for (int64_t row = 0; row < data.n; row += most) {
      const int64_t rows = std::min(most, data.n - row);
      const WideRows x = WideRows::of(data, row, rows, wide.get(), team);
      multiply<float>({x.data, x.stride, 1, V, 1, d, z.get(), K, rows, K, d, false}, {});
      share(ranges, team, [&](int64_t range) {
        const int64_t first = range * rows / ranges, last = (range + 1) * rows / ranges;
        Weigh::run({of, weights + (row + first) * classes, z.get() + first * K, last - first, sums.get() + range * K});
      });
      multiply<float>({z.get(), 1, K, x.data, x.stride, 1, g, d, K, d, rows, row > 0}, {});
    }
  });
  std::fill_n(g_intercept, K, 0.0f);
  for (int64_t i = 0; i < ranges * K; ++i) g_intercept[i % K] += sums.get()[i];
  of.finish(totals.get(), 1, out);
}

}  // namespace hg::cpu
