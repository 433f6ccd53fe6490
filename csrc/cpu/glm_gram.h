// Gram matrices X^T D X of float32 by matrix units, where there are some.
#pragma once

#include <cstdint>

namespace hg::cpu {

// Whether there are, and the matrix fills enough of their tiles.
bool split_suits(int64_t n, int64_t d);

// Rows of x `stride` apart, weights `step`; out: d x d.
void form_gram_split(const float* x, int64_t n, int64_t d, int64_t stride, const float* weights, int64_t step,
                     float* out);

}  // namespace hg::cpu
