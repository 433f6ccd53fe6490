// The product of a generalised linear model by torch's matrix products, where there are many columns.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "glm.h"

namespace hg {

struct GlmProblem {
  const GlmData& data;
  const at::Tensor &x, &weights;
  const std::optional<at::Tensor>& l2;
};

// out = H v. Of Z = X V^T, and of X where it is not in the precision of the vectors, so many bytes are held at a time,
// or a few hundred rows.
void two_products(const GlmProblem& problem, const at::Tensor& v, const at::Tensor& out, int64_t bytes);

}  // namespace hg
