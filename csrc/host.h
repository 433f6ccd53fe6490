// Host functions: tensors in, memory-safety checks, then one kernel call. Each is bound by pybind11
// (the 1 us path of eager solvers) and registered with the dispatcher (for torch.compile).
#pragma once

#include <ATen/core/Tensor.h>

namespace hg {

// Shapes: every tensor of a list has `stats.size(0)` rows when stats is (k, 2), else stats is (2,).
void neumann_step_(at::TensorList v, at::TensorList p, at::TensorList hv, const at::Tensor& stats, double alpha,
                   double damping);

// state is (4,) or (k, 4), laid out as CgState.
void cg_step_(at::TensorList x, at::TensorList r, at::TensorList p, at::TensorList hp, const at::Tensor& state,
              double damping);

}  // namespace hg
