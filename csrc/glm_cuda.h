// The GLM ops on a CUDA device, for arguments that the host functions have checked.
#pragma once

#include "glm.h"
#include "host.h"

namespace hg::glm_cuda {

// What glm_hvp takes, and what the check has made of it.
struct Problem {
  const GlmData& data;
  const at::Tensor &x, &weights;
  const std::optional<at::Tensor>& l2;
};

Plan neumann_plan(const Problem& problem, const at::Tensor& b);
at::Tensor hvp(const Problem& problem, const at::Tensor& v);
std::tuple<at::Tensor, at::Tensor> neumann_solve(const Problem& problem, const at::Tensor& b, double alpha,
                                                 double damping, int64_t steps, const at::Tensor& stop);
std::tuple<at::Tensor, at::Tensor, at::Tensor> cg_solve(const Problem& problem, const at::Tensor& b, double damping,
                                                        int64_t steps, const at::Tensor& state);

}  // namespace hg::glm_cuda
