// Z <- D Z of a generalised linear model, 16 rows at a time.
#pragma once

#include <cstdint>

#include "glm_columns.h"
#include "simd.h"

namespace hg::cpu {

struct GlmWeigh {
  using S = Simd<float, 64>;
  using V = S::V;
  static constexpr int64_t kRows = S::width;

  const GlmColumns<float>& of;
  float* probabilities;  // scratch, classes x 16
  float* g_intercept;    // K x 16, accumulated if there are intercepts

  static int64_t scratch_size(const GlmColumns<float>& of) { return of.data.classes * kRows; }

  // 16 rows of every column, one column after another, and the weights of these rows. Z becomes D (Z + intercepts):
  // weights times z, or p * (z - <p, z>) for each of the k vectors.
  HG_INLINE void run(const float* weights, float* z) const {
    const int64_t classes = of.data.classes, intercepts = of.intercepts.size();
    float* const p = probabilities;
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t c = 0; c < classes; ++c) p[c * kRows + i] = weights[i * classes + c];
    for (int64_t c = 0; c < intercepts; ++c) S::store(z + c * kRows, S::load(z + c * kRows) + of.intercepts[c]);
    if (classes == 1)
      for (int64_t c = 0; c < of.K; ++c) S::store(z + c * kRows, S::load(p) * S::load(z + c * kRows));
    else
      for (int64_t first = 0; first < of.K; first += classes) {
        V mean{};
        float* at = z + first * kRows;
        for (int64_t c = 0; c < classes; ++c) mean += S::load(p + c * kRows) * S::load(at + c * kRows);
        for (int64_t c = 0; c < classes; ++c)
          S::store(at + c * kRows, S::load(p + c * kRows) * (S::load(at + c * kRows) - mean));
      }
    for (int64_t c = 0; c < intercepts; ++c)
      S::store(g_intercept + c * kRows, S::load(g_intercept + c * kRows) + S::load(z + c * kRows));
  }
};

}  // namespace hg::cpu
