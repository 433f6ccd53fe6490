// The GLM ops on a CUDA device: one pass or two matrix products, one launch or a loop. Nothing waits for the device.
#include "glm_cuda.h"

#include <ATen/Context.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "cuda/call.h"
#include "tensors.h"

namespace hg::glm_cuda {
namespace {

// Bytes of X, in the precision of the vectors, and of Z that two matrix products hold at a time.
constexpr int64_t kChunkBytes = 256 << 20;

void one_pass(const Problem& problem, const at::Tensor& v, const at::Tensor& out, const int* running) {
  cuda::call("glm_hvp", v.device(), [&](const auto& scratch, auto stream) {
    return cuda::glm_hvp(problem.data, v.const_data_ptr(), v.size(0), out.mutable_data_ptr(), running, scratch, stream);
  });
}

// Whether the ops on the current device take the kernel for one pass.
bool takes_one_pass(const GlmData& data, const at::Tensor& v) {
  bool yes = false;
  cuda::call("glm_hvp", v.device(), [&](const auto&, auto) {
    yes = cuda::glm_one_pass(data, v.size(0));
    return static_cast<const char*>(nullptr);
  });
  return yes;
}

void two_products(const Problem& problem, const at::Tensor& v, const at::Tensor& out) {
  // X may belong to a graph, which has no business here.
  const c10::impl::ExcludeDispatchKeyGuard below_autograd(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  const GlmData& data = problem.data;
  const int64_t k = v.size(0), columns = k * data.classes;
  const at::Tensor v_weights = v.narrow(1, 0, data.classes * data.d).reshape({columns, data.d});
  const at::Tensor g = zeros({columns, data.d}, v.options());
  const at::Tensor v_bias =
      data.intercept ? v.narrow(1, data.classes * data.d, data.classes).reshape({1, columns}) : at::Tensor();
  at::Tensor g_bias = data.intercept ? zeros({columns}, v.options()) : at::Tensor();
  const int64_t row_bytes = v.element_size() * (columns + (problem.x.dtype() == v.dtype() ? 0 : data.d));
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, row_bytes));
  for (int64_t row = 0; row < data.n; row += chunk) {
    const int64_t rows = std::min(chunk, data.n - row);
    // bf16 data are read exactly, as in the kernels: a product in bf16 would round the vectors.
    const at::Tensor x = problem.x.narrow(0, row, rows).to(v.scalar_type());
    at::Tensor z = data.intercept ? v_bias.addmm(x, v_weights.t()) : x.mm(v_weights.t());
    if (data.classes == 1) {
      z.mul_(problem.weights.narrow(0, row, rows).unsqueeze(1));
    } else {
      const at::Tensor p = problem.weights.narrow(0, row, rows).unsqueeze(1);
      const at::Tensor z3 = z.view({rows, k, data.classes});
      z3.mul_(p);
      z3.addcmul_(p, z3.sum(2, /*keepdim=*/true), -1);
    }
    g.addmm_(z.t(), x);
    if (data.intercept) g_bias.add_(z.sum(0));
  }
  out.narrow(1, 0, data.classes * data.d).copy_(g.view({k, -1}));
  if (data.intercept) out.narrow(1, data.classes * data.d, data.classes).copy_(g_bias.view({k, -1}));
  out.mul_(data.scale);
  if (problem.l2) out.addcmul_(problem.l2->view({1, -1}), v);
}

// out = H v. Where `running` is given and 0, out is left as it is or holds a product that nobody needs.
void product(const Problem& problem, const at::Tensor& v, const at::Tensor& out, const int* running) {
  if (takes_one_pass(problem.data, v))
    one_pass(problem, v, out, running);
  else
    two_products(problem, v, out);
}

// Calls run(solve, done, scratch, stream); whether the solve was launched.
template <class Run>
bool in_one_launch(const char* op, const at::Tensor& b, const at::Tensor& out, double damping, int64_t steps,
                   const Run& run) {
  const cuda::GlmSolve solve{b.const_data_ptr(),
                             out.mutable_data_ptr(),
                             b.size(0),
                             steps,
                             damping,
                             at::globalContext().deterministicAlgorithms()};
  bool done = false;
  cuda::call(op, b.device(), [&](const auto& scratch, auto stream) { return run(solve, done, scratch, stream); });
  return done;
}

}  // namespace

Plan neumann_plan(const Problem& problem, const at::Tensor& b) {
  Plan plan;
  cuda::call("glm_neumann_plan", b.device(),
             [&](const auto&, auto) { return cuda::glm_neumann_plan(problem.data, b.size(0), plan); });
  return plan;
}

at::Tensor hvp(const Problem& problem, const at::Tensor& v) {
  at::Tensor out = empty_like(v);
  product(problem, v, out, nullptr);
  return out;
}

std::tuple<at::Tensor, at::Tensor> neumann_solve(const Problem& problem, const at::Tensor& b, double alpha,
                                                 double damping, int64_t steps, const at::Tensor& stop) {
  const GlmData& data = problem.data;
  const int64_t k = b.size(0);
  at::Tensor history = full({steps, k, kNeumannStats}, -1.0, stop.options());
  const double* limit = stop.const_data_ptr<double>();
  double* stats = history.mutable_data_ptr<double>();
  if (b.numel() > 0) {
    at::Tensor out = empty_like(b);
    if (in_one_launch("glm_neumann_solve", b, out, damping, steps, [&](const cuda::GlmSolve& solve, auto&&... where) {
          return cuda::glm_neumann_solve(data, solve, alpha, limit, stats, where...);
        }))
      return {out, history};
  }
  at::Tensor v = b.clone(), p = b.clone(), hv = empty_like(b);
  const at::Tensor running = full({1}, 1, b.options().dtype(at::kInt));
  int* flag = running.mutable_data_ptr<int>();
  for (int64_t step = 0; step < steps; ++step, stats += k * kNeumannStats) {
    product(problem, v, hv, flag);
    cuda::call("glm_neumann_solve", b.device(), [&](const auto& scratch, auto stream) {
      const char* error =
          cuda::neumann_step(rows_of(v), rows_of(p), rows_of(hv), k, stats, alpha, damping, scratch, stream, flag);
      return error ? error : cuda::glm_neumann_running(stats, limit, k, flag, stream);
    });
  }
  return {p.mul_(alpha), history};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cg_solve(const Problem& problem, const at::Tensor& b, double damping,
                                                        int64_t steps, const at::Tensor& state) {
  const GlmData& data = problem.data;
  const int64_t k = b.size(0);
  at::Tensor scalars = state.clone(), taken = zeros({}, b.options().dtype(at::kLong));
  double* rows = scalars.mutable_data_ptr<double>();
  int64_t* count = taken.mutable_data_ptr<int64_t>();
  if (b.numel() > 0) {
    at::Tensor out = empty_like(b);
    if (in_one_launch("glm_cg_solve", b, out, damping, steps, [&](const cuda::GlmSolve& solve, auto&&... where) {
          return cuda::glm_cg_solve(data, solve, rows, count, where...);
        }))
      return {out, scalars, taken};
  }
  at::Tensor solution = zeros(b.sizes(), b.options()), r = b.clone(), p = b.clone(), hp = empty_like(b);
  const at::Tensor running = full({1}, 1, b.options().dtype(at::kInt));
  int* flag = running.mutable_data_ptr<int>();
  for (int64_t step = 0; step < steps; ++step) {
    cuda::call("glm_cg_solve", b.device(),
               [&](const auto&, auto stream) { return cuda::glm_cg_running(rows, k, flag, count, stream); });
    product(problem, p, hp, flag);
    cuda::call("glm_cg_solve", b.device(), [&](const auto& scratch, auto stream) {
      return cuda::cg_step(rows_of(solution), rows_of(r), rows_of(p), rows_of(hp), k, rows, damping, scratch, stream);
    });
  }
  return {solution, scalars, taken};
}

}  // namespace hg::glm_cuda
