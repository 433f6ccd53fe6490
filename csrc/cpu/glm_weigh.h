// Z <- D Z of a generalised linear model, 16 rows at a time.
#pragma once

#include <algorithm>
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

  // Columns `pitch` apart of `rows` rows, at most 16, whose weights these are; there are zeros below them. Z becomes
  // D (Z + intercepts): weights times z, or p * (z - <p, z>) for each of the k vectors.
  HG_INLINE void run(const float* weights, int64_t rows, float* z, int64_t pitch) const {
    const int64_t classes = of.data.classes, intercepts = of.intercepts.size();
    float* const p = probabilities;
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t c = 0; c < classes; ++c) p[c * kRows + i] = i < rows ? weights[i * classes + c] : 0;
    for (int64_t c = 0; c < intercepts; ++c) S::store(z + c * pitch, S::load(z + c * pitch) + of.intercepts[c]);
    if (classes == 1)
      for (int64_t c = 0; c < of.K; ++c) S::store(z + c * pitch, S::load(p) * S::load(z + c * pitch));
    else
      for (int64_t first = 0; first < of.K; first += classes) {
        V mean{};
        float* at = z + first * pitch;
        for (int64_t c = 0; c < classes; ++c) mean += S::load(p + c * kRows) * S::load(at + c * pitch);
        for (int64_t c = 0; c < classes; ++c)
          S::store(at + c * pitch, S::load(p + c * kRows) * (S::load(at + c * pitch) - mean));
      }
    for (int64_t c = 0; c < intercepts; ++c)
      S::store(g_intercept + c * kRows, S::load(g_intercept + c * kRows) + S::load(z + c * pitch));
  }
};

}  // namespace hg::cpu
