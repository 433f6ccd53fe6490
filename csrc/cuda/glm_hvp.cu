// Hessian-vector products of generalised linear models on a CUDA device: every block takes a share of the rows
// through its shared memory, once for both products, and writes sums of its own, which a second kernel adds in a
// fixed order.
#include "../kernels.h"
#include "glm_launch.cuh"

namespace hg::cuda {
namespace {

// partial: blocks x columns x pitch. Does nothing where `running` says that the solve around it is over.
template <class X, class Real>
__global__ void __launch_bounds__(kThreads, 2) glm_partial_products(const __grid_constant__ GlmProblem<X, Real> problem,
                                                                    const Real* v, Real* partial, const int* running) {
  if (running && !*running) return;
  Arena arena(dynamic_shared());
  GlmBlock<X, Real> block(problem, arena);
  begin_share(block, problem);
  block.tiles.prefetch();
  block.load_v(v);
  block.multiply();
  partial += static_cast<int64_t>(blockIdx.x) * problem.elements();
  for (int e = threadIdx.x; e < problem.elements(); e += kThreads) partial[e] = block.g[e];
  block.tiles.end();
}

// out = scale (sum of the partial products) + l2 v: 32 elements per block, one per lane, warps share the sums.
template <class X, class Real>
__global__ void __launch_bounds__(kThreads)
    glm_finish(const __grid_constant__ GlmProblem<X, Real> problem, const Real* v, const Real* partial, int blocks,
               Real* out, const int* running) {
  if (running && !*running) return;
  HG_SHARED(double, sums, [kWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int e = static_cast<int>(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (e < problem.elements())
    for (int64_t b = warp; b < blocks; b += kWarps) sum += partial[b * problem.elements() + e];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || e >= problem.elements()) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  const int64_t at = problem.place(e);
  if (at < 0) return;
  const Real product = problem.scale * static_cast<Real>(sum);
  const int64_t weights = static_cast<int64_t>(problem.classes) * (problem.d + problem.intercept);
  out[at] = problem.l2 ? product + problem.l2[at % weights] * v[at] : product;
}

}  // namespace

bool glm_one_pass(const GlmData& data, int64_t k) {
  if (!narrow_enough(data, k)) return false;
  Chip chip;
  if (read_chip(chip) != cudaSuccess) return false;
  return for_glm_dtypes(data.x_dtype, [&](auto x, auto real) {
    GlmProblem<decltype(x), decltype(real)> problem(data, k);
    return GlmLaunch<decltype(x), decltype(real)>::streaming(problem, chip, 0, true).blocks > 0;
  });
}

const char* glm_hvp(const GlmData& data, const void* v, int64_t k, void* out, const int* running,
                    const Scratch& scratch, Stream stream) {
  const cudaError_t error = for_glm_dtypes(data.x_dtype, [&](auto x, auto real) {
    using X = decltype(x);
    using Real = decltype(real);
    Chip chip;
    cudaError_t e = read_chip(chip);
    if (e != cudaSuccess) return e;
    GlmProblem<X, Real> problem(data, k);
    const auto plan = GlmLaunch<X, Real>::streaming(problem, chip, 0, true);
    if (problem.elements() == 0) return cudaSuccess;
    if (plan.blocks == 0) return cudaErrorInvalidConfiguration;
    if (problem.stages > 1) {
      e = limit_to_code(glm_partial_products<X, Real>, chip);
      if (e != cudaSuccess) return e;
      problem.bulk = !GlmLaunch<X, Real>::no_bulk(problem, chip);
    }
    const int64_t sums = static_cast<int64_t>(plan.blocks) * problem.elements();
    Real* partial = reinterpret_cast<Real*>(scratch((sums * sizeof(Real) + 7) / 8));
    e = allow_shared(glm_partial_products<X, Real>);
    if (e == cudaSuccess)
      e = launch(glm_partial_products<X, Real>, plan.blocks, kThreads, plan.shared, stream, problem,
                 static_cast<const Real*>(v), partial, running);
    if (e == cudaSuccess)
      e = launch(glm_finish<X, Real>, (problem.elements() + 31) / 32, kThreads, 0, stream, problem,
                 static_cast<const Real*>(v), partial, plan.blocks, static_cast<Real*>(out), running);
    return e;
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hg::cuda
