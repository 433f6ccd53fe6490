// The GLM ops on a CUDA device: one pass or two matrix products, one launch or a loop. Nothing waits for the device.
#include "glm_cuda.h"

#include <ATen/Context.h>

#include "cuda/call.h"
#include "tensors.h"

namespace hg::glm_cuda {
namespace {

// Bytes that two matrix products hold at a time.
constexpr int64_t kChunkBytes = 256 << 20;

void one_pass(const GlmProblem& problem, const at::Tensor& v, const at::Tensor& out, const int* running) {
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

// out = H v. Where `running` is given and 0, out is left as it is or holds a product that nobody needs.
void product(const GlmProblem& problem, const at::Tensor& v, const at::Tensor& out, const int* running) {
  if (takes_one_pass(problem.data, v))
    one_pass(problem, v, out, running);
  else
    two_products(problem, v, out, kChunkBytes);
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

Plan neumann_plan(const GlmProblem& problem, const at::Tensor& b) {
  Plan plan;
  cuda::call("glm_neumann_plan", b.device(),
             [&](const auto&, auto) { return cuda::glm_neumann_plan(problem.data, b.size(0), plan); });
  return plan;
}

at::Tensor hvp(const GlmProblem& problem, const at::Tensor& v) {
  at::Tensor out = empty_like(v);
  product(problem, v, out, nullptr);
  return out;
}

std::tuple<at::Tensor, at::Tensor> neumann_solve(const GlmProblem& problem, const at::Tensor& b, double alpha,
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
  if (steps > 0) {
    // Terms that meet the tolerance in the end are left out: they are the residuals of the sums before them.
    const at::Tensor squares = history.select(2, kNormSquared), last = squares.select(1, 0).ne(-1).sum(0, true).sub(1);
    const at::Tensor met = squares.index_select(0, last).le(stop).view({k, 1});
    p.sub_(v.where(met, zeros({}, v.options())));
  }
  return {p.mul_(alpha), history};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cg_solve(const GlmProblem& problem, const at::Tensor& b, double damping,
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
