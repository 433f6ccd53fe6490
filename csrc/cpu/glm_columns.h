// The columns that vectors of a generalised linear model are made of, one for each of their classes, and how sums of
// ranges of rows become the product.
#pragma once

#include <cstdint>
#include <vector>

#include "../glm.h"

namespace hg::cpu {

template <class Real>
struct GlmColumns {
  const GlmData& data;
  const Real* v;
  int64_t k, K;
  std::vector<const Real*> columns;  // K pointers to d elements
  std::vector<Real> intercepts;      // K elements that belong to a feature of ones, or none

  GlmColumns(const GlmData& data, const Real* v, int64_t k)
      : data(data), v(v), k(k), K(k * data.classes), columns(K), intercepts(data.intercept ? K : 0) {
    for (int64_t c = 0; c < K; ++c) {
      const Real* vector = v + c / data.classes * weights();
      columns[c] = vector + c % data.classes * data.d;
      if (data.intercept) intercepts[c] = vector[data.classes * data.d + c % data.classes];
    }
  }

  // Sums of a range: K x d, and the intercepts'. Where they straddle cache lines, one vector takes 6 % longer.
  int64_t size() const { return K * (data.d + 1); }
  int64_t pitch() const { return (size() + 15) / 16 * 16; }

  // Adds them up in order, to those of the first range; out: the product.
  void finish(Real* totals, int64_t ranges, Real* out) const {
    const int64_t d = data.d, classes = data.classes;
    for (int64_t range = 1; range < ranges; ++range)
      for (int64_t j = 0; j < size(); ++j) totals[j] += totals[range * pitch() + j];
    const Real scale = static_cast<Real>(data.scale);
    for (int64_t c = 0; c < K; ++c) {
      Real* vector = out + c / classes * weights();
      for (int64_t j = 0; j < d; ++j) vector[c % classes * d + j] = scale * totals[c * d + j];
      if (data.intercept) vector[classes * d + c % classes] = scale * totals[K * d + c];
    }
    if (!data.l2) return;
    const Real* l2 = static_cast<const Real*>(data.l2);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < weights(); ++j) out[i * weights() + j] += l2[j] * v[i * weights() + j];
  }

 private:
  int64_t weights() const { return data.classes * (data.d + data.intercept); }
};

}  // namespace hg::cpu
