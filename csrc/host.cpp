#include "host.h"

#include <torch/library.h>

#include "checks.h"
#include "cuda/call.h"
#include "kernels.h"

namespace hg {

void neumann_step_(at::TensorList v, at::TensorList p, at::TensorList hv, const at::Tensor& stats, double alpha,
                   double damping) {
  const int64_t rows = check_rows("stats", stats, kNeumannStats);
  const bool batched = stats.dim() == 2;
  Lists lists(stats.device(), rows, batched);
  const VectorList& v_list = lists.state("v", v);
  const VectorList& p_list = lists.state("p", p);
  const VectorList& hv_list = lists.product("hv", hv);
  double* out = stats.mutable_data_ptr<double>();
  if (cuda::for_cpu(stats)) return cpu::neumann_step(v_list, p_list, hv_list, rows, out, alpha, damping);
  // Instantiated, and so linked, only in a build with CUDA.
  cuda::call("neumann_step_", stats.device(), [&](const auto& scratch, auto stream) {
    return cuda::neumann_step(v_list, p_list, hv_list, rows, out, alpha, damping, scratch, stream);
  });
}

void cg_step_(at::TensorList x, at::TensorList r, at::TensorList p, at::TensorList hp, const at::Tensor& state,
              double damping) {
  const int64_t rows = check_rows("state", state, kCgState);
  const bool batched = state.dim() == 2;
  Lists lists(state.device(), rows, batched);
  const VectorList& x_list = lists.state("x", x);
  const VectorList& r_list = lists.state("r", r);
  const VectorList& p_list = lists.state("p", p);
  const VectorList& hp_list = lists.product("hp", hp);
  double* scalars = state.mutable_data_ptr<double>();
  if (cuda::for_cpu(state)) return cpu::cg_step(x_list, r_list, p_list, hp_list, rows, scalars, damping);
  cuda::call("cg_step_", state.device(), [&](const auto& scratch, auto stream) {
    return cuda::cg_step(x_list, r_list, p_list, hp_list, rows, scalars, damping, scratch, stream);
  });
}

namespace {
void register_ops(torch::Library& m) {
  m.impl("neumann_step_", &neumann_step_);
  m.impl("cg_step_", &cg_step_);
}
}  // namespace

// Schemas and fakes are in hypergrad_ext/ops.py, one block per op.
TORCH_LIBRARY_IMPL(hypergrad_ext, CPU, m) { register_ops(m); }
#if defined(HG_WITH_CUDA)
TORCH_LIBRARY_IMPL(hypergrad_ext, CUDA, m) { register_ops(m); }
#endif

}  // namespace hg
