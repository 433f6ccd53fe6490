// Matrix products shared by the threads.
#pragma once

#include <cstdint>

#include "panel_gemm.h"

namespace hg::cpu {

// So many products, and the elements from one's matrices to the next one's.
struct GemmBatch {
  int64_t count = 1, a = 0, b = 0, out = 0;
};

// `first`, and as many more as there are in the batch: by matrix units where they suit, else by panels.
template <class Real>
void multiply(const Part<Real>& first, const GemmBatch& batch);

}  // namespace hg::cpu
