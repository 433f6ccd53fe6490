// What the steps that recompute the residual sum up: r.r, r.Mr, and whether the new x is finite.
#pragma once

#include <array>
#include <vector>

#include "../update.h"
#include "lanes.h"

namespace hg::cpu {

template <class State, bool Preconditioned>
HG_INLINE void residual_terms(State r, State z, State x, State* terms) {
  // 0 x is 0, and NaN where x is not finite.
  terms[0] = r * r + 0 * x;
  if constexpr (Preconditioned) terms[1] = r * z;
}

// Runs element(i, terms) for all i < n, in which it updates x, and adds to the stats.
template <class State, bool Preconditioned, class F>
HG_INLINE void add_residual_sums(int64_t n, const State* x, double* stats, const F& element) {
  double sums[1 + Preconditioned] = {};
  sum_elements<State, 1 + Preconditioned>(n, sums, element);
  stats[kResidualSquared] += sums[0];
  stats[kResidualEnergy] += sums[Preconditioned];
  // A sum that is not finite can also come of a float32 square that overflows.
  if (!finite(sums[0]))
    for (int64_t i = 0; i < n; ++i)
      if (!finite(x[i])) stats[kSolutionNonFinite] = 1;
}

inline void write_residual_stats(const std::vector<std::array<double, kResidualStats>>& sums, double* stats) {
  for (const auto& row : sums) {
    for (int s = 0; s < kResidualStats; ++s) stats[s] = row[s];
    stats[kSolutionNonFinite] = row[kSolutionNonFinite] != 0;
    stats += kResidualStats;
  }
}

}  // namespace hg::cpu
