// Products with X in bfloat16 and several columns by matrix units, where there are some.
#pragma once

#include "../glm.h"

namespace hg::cpu {

// Whether there are, and the problem fills enough of their tiles.
bool hvp_split_suits(const GlmData& data, int64_t k);

void glm_hvp_split(const GlmData& data, const float* v, int64_t k, float* out);

}  // namespace hg::cpu
