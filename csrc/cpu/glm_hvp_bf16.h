// Products with several columns, X in bfloat16, by matrix units, where there are some.
#pragma once

#include "../glm.h"

namespace hg::cpu {

// Whether there are, and the problem fills enough of their tiles.
bool bf16_suits(const GlmData& data, int64_t k);

void glm_hvp_bf16(const GlmData& data, const float* v, int64_t k, float* out);

}  // namespace hg::cpu
