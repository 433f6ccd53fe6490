// Whole solves on the CPU: products by whoever knows how, fused steps between them, and no Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <tuple>

#include "cpu/share.h"

namespace hg {

struct Multiply {
  // Writes H v of every row into `out`; both (k, n), contiguous.
  std::function<void(const at::Tensor& v, at::Tensor& out)> product;
  // The team of its jobs, if it consists of these: then one crew stays for the whole solve.
  cpu::Team team{1, false};
};

// Refuse what the loops could not work on. stop: (k,), squared norms; state: (k, 4), as for cg_step_.
void check_stop(const at::Tensor& b, int64_t steps, const at::Tensor& stop);
void check_state(const at::Tensor& b, const at::Tensor& state);

// As glm_neumann_solve and glm_cg_solve, for checked arguments.
std::tuple<at::Tensor, at::Tensor> neumann_series(const at::Tensor& b, double alpha, double damping, int64_t steps,
                                                  const at::Tensor& stop, const Multiply& multiply);
std::tuple<at::Tensor, at::Tensor, at::Tensor> conjugate_gradients(const at::Tensor& b, double damping, int64_t steps,
                                                                   const at::Tensor& state, const Multiply& multiply);

}  // namespace hg
