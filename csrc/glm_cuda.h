// The GLM ops on a CUDA device, for arguments that the host functions have checked.
#pragma once

#include "glm_products.h"
#include "host.h"

namespace hg::glm_cuda {

Plan neumann_plan(const GlmProblem& problem, const at::Tensor& b);
at::Tensor hvp(const GlmProblem& problem, const at::Tensor& v);
std::tuple<at::Tensor, at::Tensor> neumann_solve(const GlmProblem& problem, const at::Tensor& b, double alpha,
                                                 double damping, int64_t steps, const at::Tensor& stop);
std::tuple<at::Tensor, at::Tensor, at::Tensor> cg_solve(const GlmProblem& problem, const at::Tensor& b, double damping,
                                                        int64_t steps, const at::Tensor& state);

}  // namespace hg::glm_cuda
