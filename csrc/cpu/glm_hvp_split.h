// The product of a generalised linear model with many columns by matrix units.
#pragma once

#include <cstdint>

#include "../glm.h"

namespace hg::cpu {

// Whether they are faster than a pass over X: columns have to repay what packing X takes.
bool split_suits(const GlmData& data, int64_t k);

void glm_hvp_split(const GlmData& data, const float* v, int64_t k, float* out);

}  // namespace hg::cpu
