// Host functions of the GLM family: tensors in, memory-safety checks, kernel calls.
#include <c10/core/GradMode.h>

#include <vector>

#include "cuda/call.h"
#include "glm_cuda.h"
#include "host.h"
#include "kernels.h"
#include "solve_loop.h"
#include "tensors.h"

namespace hg {
namespace {

DType dtype_of(const char* name, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::f64;
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      TORCH_CHECK_TYPE(t.is_cpu(), name, " must be float64, float32 or bfloat16 on ", t.device(), ", got ",
                       t.scalar_type());
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float64, float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

// x: (n, d); weights: (n,) or (n, classes); v: (k, weights of the model), contiguous.
GlmData checked(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& v,
                const std::optional<at::Tensor>& l2, double scale, bool intercept) {
  GlmData data;
  data.x_dtype = dtype_of("x", x);
  const auto vectors = data.x_dtype == DType::f64 ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1),
                    "x must have shape (n, d) with contiguous rows, got ", x.sizes(), " with strides ", x.strides());
  data.n = x.size(0), data.d = x.size(1), data.stride = x.stride(0);
  TORCH_CHECK_VALUE((weights.dim() == 1 || weights.dim() == 2) && weights.size(0) == data.n && weights.is_contiguous(),
                    "weights must be contiguous with shape (", data.n, ",) or (", data.n, ", classes), got ",
                    weights.sizes());
  data.classes = weights.dim() == 2 ? weights.size(1) : 1;
  TORCH_CHECK_VALUE(weights.dim() == 1 || data.classes > 1, "weights must have at least 2 classes, got ", data.classes);
  const int64_t numel = data.classes * (data.d + intercept);
  TORCH_CHECK_VALUE(v.dim() == 2 && v.size(1) == numel && v.is_contiguous(), "v must be contiguous with shape (k, ",
                    numel, "), got ", v.sizes());
  TORCH_CHECK_TYPE(weights.scalar_type() == vectors && v.scalar_type() == vectors, "weights and v must be ", vectors,
                   " beside x of ", x.scalar_type(), ", got ", weights.scalar_type(), " and ", v.scalar_type());
  TORCH_CHECK_VALUE(x.device() == v.device() && weights.device() == v.device() && (v.is_cpu() || v.is_cuda()),
                    "x, weights and v must be on one device, the CPU or CUDA, got ", x.device(), ", ", weights.device(),
                    " and ", v.device());
  if (l2)
    TORCH_CHECK_VALUE(
        l2->numel() == numel && l2->is_contiguous() && l2->scalar_type() == vectors && l2->device() == v.device(),
        "l2 must be like one row of v: ", numel, " elements of ", vectors, ", got ", l2->sizes(), " of ",
        l2->scalar_type());
  // Autograd does not see the kernel.
  TORCH_CHECK_VALUE(!v.requires_grad() || !c10::GradMode::is_enabled(), "v", kRequiresGrad);
  data.x = x.const_data_ptr();
  data.weights = weights.const_data_ptr();
  data.l2 = l2 ? l2->const_data_ptr() : nullptr;
  data.intercept = intercept;
  data.scale = scale;
  return data;
}

// Bytes that two matrix products on the CPU hold at a time.
constexpr int64_t kChunkBytes = 8 << 20;

// The product on the CPU.
Multiply product_with(const GlmProblem& problem, int64_t k) {
  if (cpu::glm_many(problem.data, k))
    return {[problem](const at::Tensor& v, at::Tensor& out) { two_products(problem, v, out, kChunkBytes); }};
  const auto product = [&data = problem.data](const at::Tensor& v, at::Tensor& out) {
    cpu::glm_hvp(data, v.const_data_ptr(), v.size(0), out.mutable_data_ptr());
  };
  return {product, cpu::glm_team(problem.data, k)};
}

}  // namespace

at::Tensor glm_hvp(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& v,
                   const std::optional<at::Tensor>& l2, double scale, bool intercept) {
  const GlmData data = checked(x, weights, v, l2, scale, intercept);
  const GlmProblem problem{data, x, weights, l2};
  if (!cuda::for_cpu(v)) return glm_cuda::hvp(problem, v);
  at::Tensor out = empty_like(v);
  product_with(problem, v.size(0)).product(v, out);
  return out;
}

at::Tensor glm_gram(const at::Tensor& x, const at::Tensor& weights) {
  TORCH_CHECK_TYPE(
      (x.scalar_type() == at::kDouble || x.scalar_type() == at::kFloat) && weights.scalar_type() == x.scalar_type(),
      "x and weights must both be float64 or both be float32, got ", x.scalar_type(), " and ", weights.scalar_type());
  TORCH_CHECK_VALUE(x.is_cpu() && weights.is_cpu(), "x and weights must be on the CPU, got ", x.device(), " and ",
                    weights.device());
  TORCH_CHECK_VALUE(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1),
                    "x must have shape (n, d) with contiguous rows, got ", x.sizes(), " with strides ", x.strides());
  TORCH_CHECK_VALUE(weights.dim() == 2 && weights.size(0) == x.size(0) && weights.is_contiguous(),
                    "weights must be contiguous with shape (", x.size(0), ", m), got ", weights.sizes());
  // Autograd does not see the kernel.
  TORCH_CHECK_VALUE(!(x.requires_grad() || weights.requires_grad()) || !c10::GradMode::is_enabled(), "x and weights",
                    kRequiresGrad);
  GlmData data{};
  data.x = x.const_data_ptr(), data.weights = weights.const_data_ptr();
  data.x_dtype = x.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
  data.n = x.size(0), data.d = x.size(1), data.stride = x.stride(0), data.classes = weights.size(1);
  const std::vector<int64_t> sizes{data.classes, data.d, data.d};
  if (data.n == 0 || data.d == 0) return zeros(sizes, weights.options());
  at::Tensor out = empty(sizes, weights.options());
  cpu::glm_gram(data, out.mutable_data_ptr());
  return out;
}

Plan glm_neumann_plan(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& b,
                      const std::optional<at::Tensor>& l2, double scale, bool intercept) {
  const GlmData data = checked(x, weights, b, l2, scale, intercept);
  const GlmProblem problem{data, x, weights, l2};
  if (!cuda::for_cpu(b)) return glm_cuda::neumann_plan(problem, b);
  return {"steps", "on the CPU a step is a call of its own"};
}

std::tuple<at::Tensor, at::Tensor> glm_neumann_solve(const at::Tensor& x, const at::Tensor& weights,
                                                     const at::Tensor& b, const std::optional<at::Tensor>& l2,
                                                     double scale, bool intercept, double alpha, double damping,
                                                     int64_t steps, const at::Tensor& stop) {
  const GlmData data = checked(x, weights, b, l2, scale, intercept);
  const GlmProblem problem{data, x, weights, l2};
  check_stop(b, steps, stop);
  if (!cuda::for_cpu(b)) return glm_cuda::neumann_solve(problem, b, alpha, damping, steps, stop);
  return neumann_series(b, alpha, damping, steps, stop, product_with(problem, b.size(0)));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> glm_cg_solve(const at::Tensor& x, const at::Tensor& weights,
                                                            const at::Tensor& b, const std::optional<at::Tensor>& l2,
                                                            double scale, bool intercept, double damping, int64_t steps,
                                                            const at::Tensor& state) {
  const GlmData data = checked(x, weights, b, l2, scale, intercept);
  const GlmProblem problem{data, x, weights, l2};
  check_state(b, state);
  if (!cuda::for_cpu(b)) return glm_cuda::cg_solve(problem, b, damping, steps, state);
  return conjugate_gradients(b, damping, steps, state, product_with(problem, b.size(0)));
}

}  // namespace hg
