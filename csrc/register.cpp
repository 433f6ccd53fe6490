// The host functions as the dispatcher's kernels. Schemas and fakes are in hypergrad_ext/ops.py, one block per op.
#include <torch/library.h>

#include "host.h"

namespace hg {
namespace {

void register_ops(torch::Library& m) {
  m.impl("neumann_step_", &neumann_step_);
  m.impl("cg_step_", &cg_step_);
  m.impl("pcg_step_", &pcg_step_);
  m.impl("richardson_step_", &richardson_step_);
  m.impl("chebyshev_step_", &chebyshev_step_);
  m.impl("minres_step_", &minres_step_);
  m.impl("glm_hvp", &glm_hvp);
  m.impl("glm_neumann_solve", &glm_neumann_solve);
  m.impl("glm_cg_solve", &glm_cg_solve);
  m.impl("softmax_hessian", &softmax_hessian);
  m.impl("softmax_hessian_", &softmax_hessian_);
  m.impl("mlp_hvp", &mlp_hvp);
  m.impl("lstm_cell", &lstm_cell);
  m.impl("lstm_cell_backward", &lstm_cell_backward);
  m.impl("lstm_cell_double_backward", &lstm_cell_double_backward);
  m.impl("lstm_layer", &lstm_layer);
  m.impl("lstm_layer_backward", &lstm_layer_backward);
  m.impl("lstm_layer_double_backward", &lstm_layer_double_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(hypergrad_ext, CPU, m) {
  register_ops(m);
  // A GPU's libraries form Gram matrices, and it takes these solves step by step, so that it need not wait for the
  // host.
  m.impl("glm_gram", &glm_gram);
  m.impl("mlp_neumann_solve", &mlp_neumann_solve);
  m.impl("mlp_cg_solve", &mlp_cg_solve);
  m.impl("dense_neumann_solve", &dense_neumann_solve);
  m.impl("dense_cg_solve", &dense_cg_solve);
}
#if defined(HG_WITH_CUDA)
TORCH_LIBRARY_IMPL(hypergrad_ext, CUDA, m) { register_ops(m); }
#endif

}  // namespace hg
