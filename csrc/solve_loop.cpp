#include "solve_loop.h"

#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace hg {

void check_stop(const at::Tensor& b, int64_t steps, const at::Tensor& stop) {
  const int64_t k = b.size(0);
  TORCH_CHECK_VALUE(stop.dim() == 1 && stop.size(0) == k && stop.scalar_type() == at::kDouble && stop.is_contiguous(),
                    "stop must be float64 with shape (", k, ",), got ", stop.scalar_type(), " ", stop.sizes());
  TORCH_CHECK_VALUE(steps >= 0, "steps must be at least 0, got ", steps);
  TORCH_CHECK_VALUE(stop.device() == b.device(), "stop must be on the device of b, ", b.device(), ", got ",
                    stop.device());
}

void check_state(const at::Tensor& b, const at::Tensor& state) {
  const int64_t k = b.size(0);
  TORCH_CHECK_VALUE(state.dim() == 2 && state.size(0) == k && state.size(1) == kCgState &&
                        state.scalar_type() == at::kDouble && state.is_contiguous(),
                    "state must be float64 with shape (", k, ", ", static_cast<int>(kCgState), "), got ",
                    state.scalar_type(), " ", state.sizes());
  TORCH_CHECK_VALUE(state.device() == b.device(), "state must be on the device of b, ", b.device(), ", got ",
                    state.device());
}

std::tuple<at::Tensor, at::Tensor> neumann_series(const at::Tensor& b, double alpha, double damping, int64_t steps,
                                                  const at::Tensor& stop, const Multiply& multiply) {
  const int64_t k = b.size(0);
  at::Tensor v = b.clone(), p = b.clone(), hv = empty_like(b);
  // Steps that are not taken keep a squared norm of -1.
  at::Tensor history = full({steps, k, kNeumannStats}, -1.0, stop.options());
  const VectorList v_list = rows_of(v), p_list = rows_of(p), hv_list = rows_of(hv);
  const double* limit = stop.const_data_ptr<double>();
  double* stats = history.mutable_data_ptr<double>();
  std::vector<bool> met(k);
  cpu::lead(multiply.team, [&] {
    for (int64_t step = 0; step < steps; ++step, stats += k * kNeumannStats) {
      multiply.product(v, hv);
      cpu::neumann_step(v_list, p_list, hv_list, k, stats, alpha, damping);
      bool running = false;
      for (int64_t row = 0; row < k; ++row) {
        const double square = stats[row * kNeumannStats + kNormSquared];
        met[row] = square <= limit[row];
        // A norm that is not finite goes on being so: nothing to wait for in that row.
        running |= !met[row] && finite(square);
      }
      if (!running) break;
    }
  });
  // What is known to be small is the residual of the sum before this term.
  for (int64_t row = 0; row < k; ++row)
    if (met[row]) p.select(0, row).sub_(v.select(0, row));
  return {p.mul_(alpha), history};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> conjugate_gradients(const at::Tensor& b, double damping, int64_t steps,
                                                                   const at::Tensor& state, const Multiply& multiply) {
  const int64_t k = b.size(0);
  at::Tensor x = zeros(b.sizes(), b.options()), r = b.clone(), p = b.clone(), hp = empty_like(b);
  at::Tensor scalars = state.clone();
  const VectorList x_list = rows_of(x), r_list = rows_of(r), p_list = rows_of(p), hp_list = rows_of(hp);
  double* rows = scalars.mutable_data_ptr<double>();
  int64_t step = 0;
  cpu::lead(multiply.team, [&] {
    for (; step < steps; ++step) {
      bool running = false;
      for (int64_t row = 0; row < k; ++row) running |= rows[row * kCgState + kFlag] == kRunning;
      if (!running) break;
      multiply.product(p, hp);
      cpu::cg_step(x_list, r_list, p_list, hp_list, k, rows, damping);
    }
  });
  return {x, scalars, full({}, static_cast<double>(step), at::kLong)};
}

}  // namespace hg
