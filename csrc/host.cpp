#include "host.h"

#include "checks.h"
#include "cuda/call.h"
#include "kernels.h"
#include "tensors.h"

namespace hg {

at::Tensor norms(at::TensorList x, std::optional<int64_t> rows) {
  TORCH_CHECK_VALUE(rows.value_or(1) >= 0, "rows must be at least 0, got ", rows.value_or(1));
  Lists lists(at::kCPU, rows.value_or(1), rows.has_value());
  const VectorList& list = lists.state("x", x);
  const at::TensorOptions options = at::TensorOptions().dtype(at::kDouble);
  at::Tensor result = rows ? empty({*rows}, options) : empty({}, options);
  cpu::norms(list, rows.value_or(1), result.mutable_data_ptr<double>());
  return result;
}

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

void pcg_step_(at::TensorList x, at::TensorList r, at::TensorList p, at::TensorList hp, at::TensorList m,
               const at::Tensor& state, double damping) {
  const int64_t rows = check_rows("state", state, kPcgState);
  Lists lists(state.device(), rows, state.dim() == 2);
  const VectorList& x_list = lists.state("x", x);
  const VectorList& r_list = lists.state("r", r);
  const VectorList& p_list = lists.state("p", p);
  const VectorList& hp_list = lists.product("hp", hp);
  const VectorList& m_list = lists.constant("m", m, true);
  double* scalars = state.mutable_data_ptr<double>();
  if (cuda::for_cpu(state)) return cpu::pcg_step(x_list, r_list, p_list, hp_list, m_list, rows, scalars, damping);
  cuda::call("pcg_step_", state.device(), [&](const auto& scratch, auto stream) {
    return cuda::pcg_step(x_list, r_list, p_list, hp_list, m_list, rows, scalars, damping, scratch, stream);
  });
}

void richardson_step_(at::TensorList x, at::TensorList hx, at::TensorList b, at::TensorList m, const at::Tensor& stats,
                      double alpha, double damping) {
  const int64_t rows = check_rows("stats", stats, kResidualStats);
  Lists lists(stats.device(), rows, stats.dim() == 2);
  const VectorList& x_list = lists.state("x", x);
  const VectorList& hx_list = lists.product("hx", hx);
  const VectorList& b_list = lists.constant("b", b);
  const VectorList* m_list = m.empty() ? nullptr : &lists.constant("m", m, true);
  double* out = stats.mutable_data_ptr<double>();
  if (cuda::for_cpu(stats)) return cpu::richardson_step(x_list, hx_list, b_list, m_list, rows, out, alpha, damping);
  cuda::call("richardson_step_", stats.device(), [&](const auto& scratch, auto stream) {
    return cuda::richardson_step(x_list, hx_list, b_list, m_list, rows, out, alpha, damping, scratch, stream);
  });
}

void chebyshev_step_(at::TensorList x_old, at::TensorList x, at::TensorList hx, at::TensorList b, at::TensorList m,
                     const at::Tensor& stats, double alpha, double momentum, double damping) {
  const int64_t rows = check_rows("stats", stats, kResidualStats);
  Lists lists(stats.device(), rows, stats.dim() == 2);
  const VectorList& old_list = lists.state("x_old", x_old);
  const VectorList& x_list = lists.constant("x", x);
  const VectorList& hx_list = lists.product("hx", hx);
  const VectorList& b_list = lists.constant("b", b);
  const VectorList* m_list = m.empty() ? nullptr : &lists.constant("m", m, true);
  double* out = stats.mutable_data_ptr<double>();
  if (cuda::for_cpu(stats))
    return cpu::chebyshev_step(old_list, x_list, hx_list, b_list, m_list, rows, out, alpha, momentum, damping);
  cuda::call("chebyshev_step_", stats.device(), [&](const auto& scratch, auto stream) {
    return cuda::chebyshev_step(old_list, x_list, hx_list, b_list, m_list, rows, out, alpha, momentum, damping, scratch,
                                stream);
  });
}

void minres_step_(at::TensorList x, at::TensorList v, at::TensorList v_old, at::TensorList w, at::TensorList w_old,
                  at::TensorList hv, const at::Tensor& state, double damping) {
  const int64_t rows = check_rows("state", state, kMinresState);
  Lists lists(state.device(), rows, state.dim() == 2);
  const VectorList& x_list = lists.state("x", x);
  const VectorList& v_list = lists.constant("v", v);
  const VectorList& v_old_list = lists.state("v_old", v_old);
  const VectorList& w_list = lists.constant("w", w);
  const VectorList& w_old_list = lists.state("w_old", w_old);
  const VectorList& hv_list = lists.product("hv", hv);
  double* scalars = state.mutable_data_ptr<double>();
  if (cuda::for_cpu(state))
    return cpu::minres_step(x_list, v_list, v_old_list, w_list, w_old_list, hv_list, rows, scalars, damping);
  cuda::call("minres_step_", state.device(), [&](const auto& scratch, auto stream) {
    return cuda::minres_step(x_list, v_list, v_old_list, w_list, w_old_list, hv_list, rows, scalars, damping, scratch,
                             stream);
  });
}

}  // namespace hg
