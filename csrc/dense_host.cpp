// Host functions for matrices given by their entries: whole solves.
#include <ATen/ops/mm.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "host.h"
#include "plan.h"
#include "solve_loop.h"

namespace hg {
namespace {

void check(const at::Tensor& matrix, const at::Tensor& b) {
  TORCH_CHECK_TYPE(b.scalar_type() == at::kDouble || b.scalar_type() == at::kFloat,
                   "b must be float64 or float32, got ", b.scalar_type());
  TORCH_CHECK_VALUE(b.is_cpu() && b.dim() == 2 && b.is_contiguous(),
                    "b must be contiguous on the CPU with shape (k, n), got ", b.sizes(), " on ", b.device());
  TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.size(0) == b.size(1) && matrix.size(1) == b.size(1),
                    "matrix must have shape (", b.size(1), ", ", b.size(1), "), got ", matrix.sizes());
  TORCH_CHECK_TYPE(matrix.scalar_type() == b.scalar_type(), "matrix must be ", b.scalar_type(), " like b, got ",
                   matrix.scalar_type());
  TORCH_CHECK_VALUE(matrix.device() == b.device(), "matrix must be on the CPU like b, got ", matrix.device());
  // Autograd does not see the loop.
  TORCH_CHECK_VALUE(!b.requires_grad() || !c10::GradMode::is_enabled(), "b must not require grad");
}

// Up to so many vectors are multiplied by dot products with the matrix's rows, as the narrow layers of plans.
constexpr int64_t kMostDots = 32;

template <class Real>
Multiply by_dots(const at::Tensor& matrix, int64_t k) {
  const int64_t n = matrix.size(0), row = matrix.stride(0);
  const plan::Gemm product{
      {0, 0, {1, k, n}, {0, n, 1}}, {1, 0, {1, n, n}, {0, 1, row}}, {2, 0, {1, k, n}, {0, n, 1}}, false};
  const auto multiply = [matrix, product](const at::Tensor& v, at::Tensor& out) {
    // Plans have one kind of slot: what is only read is among them.
    Real* const slots[] = {const_cast<Real*>(v.const_data_ptr<Real>()),
                           const_cast<Real*>(matrix.const_data_ptr<Real>()), out.mutable_data_ptr<Real>()};
    cpu::PlanKernels<Real>::dots(product, slots);
  };
  return {multiply, cpu::PlanKernels<Real>::dots_team(product)};
}

Multiply product_with(const at::Tensor& matrix, int64_t k) {
  if (k <= kMostDots && matrix.stride(1) == 1)
    return matrix.scalar_type() == at::kDouble ? by_dots<double>(matrix, k) : by_dots<float>(matrix, k);
  return {[transposed = matrix.t()](const at::Tensor& v, at::Tensor& out) { at::mm_out(out, v, transposed); }};
}

using BelowAutograd = c10::impl::ExcludeDispatchKeyGuard;

}  // namespace

std::tuple<at::Tensor, at::Tensor> dense_neumann_solve(const at::Tensor& matrix, const at::Tensor& b, double alpha,
                                                       double damping, int64_t steps, const at::Tensor& stop) {
  check(matrix, b);
  check_stop(b, steps, stop);
  const BelowAutograd guard(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  return neumann_series(b, alpha, damping, steps, stop, product_with(matrix.detach(), b.size(0)));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dense_cg_solve(const at::Tensor& matrix, const at::Tensor& b,
                                                              double damping, int64_t steps, const at::Tensor& state) {
  check(matrix, b);
  check_state(b, state);
  const BelowAutograd guard(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  return conjugate_gradients(b, damping, steps, state, product_with(matrix.detach(), b.size(0)));
}

}  // namespace hg
