// What the steps that recompute the residual sum up: r.r, r.Mr, and whether the new x is finite.
#pragma once

#include "../update.h"

namespace hg::cuda {

template <class State>
__device__ __forceinline__ void add_residual_sums(State r, State z, State x, double* sums) {
  // In double, where the square of a float does not overflow.
  const double wide = r;
  sums[kResidualSquared] += wide * wide;
  sums[kResidualEnergy] += wide * static_cast<double>(z);
  if (!finite(x)) sums[kSolutionNonFinite] = 1;
}

struct ResidualFinish {
  static constexpr int kSums = kResidualStats;
  double* stats;

  __device__ bool live(int64_t) const { return true; }
  __device__ void operator()(int64_t row, const double* sums) const {
    double* out = stats + row * kResidualStats;
    out[kResidualSquared] = sums[kResidualSquared];
    out[kSolutionNonFinite] = sums[kSolutionNonFinite] != 0;
    out[kResidualEnergy] = sums[kResidualEnergy];
  }
};

}  // namespace hg::cuda
