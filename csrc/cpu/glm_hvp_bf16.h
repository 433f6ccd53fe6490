// Products with several columns, X in bfloat16, by matrix units, where there are some.
#pragma once

#include "../glm.h"

namespace hg::cpu {

// Bytes of columns and their sums, in float32, with which they are faster than products of matrices.
constexpr int64_t kMostOfBf16 = 8 << 20;

// Whether there are, and the problem fills enough of their tiles.
bool bf16_suits(const GlmData& data, int64_t k);

void glm_hvp_bf16(const GlmData& data, const float* v, int64_t k, float* out);

}  // namespace hg::cpu
