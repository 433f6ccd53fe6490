// The Neumann series of a generalised linear model: the whole solve in one launch, or step by step.
#include "glm_solve_launch.cuh"

namespace hg::cuda {
namespace {

struct NeumannArguments {
  double alpha;
  const double* stop;  // squared norm per row
  double* history;     // steps x rows x kNeumannStats
};

template <class X, class Real>
class NeumannSolver {
 public:
  using Arguments = NeumannArguments;
  using State = SolveState<X, Real>;

  __host__ __device__ NeumannSolver(const GlmProblem<X, Real>& problem, const SolveArguments<Real>& arguments,
                                    const NeumannArguments& more, Arena& arena)
      : rows_(problem.k),
        more_(more),
        alpha_(static_cast<Real>(more.alpha)),
        damping_(arguments.damping),
        sums_(rows_, arena) {}

  __device__ void begin(State& state, const Slice& slice) {
    for (int e = slice.begin + threadIdx.x; e < slice.end; e += kThreads)
      state.solution[e - slice.begin] = state.block.v[e];
  }

  __device__ bool running() const { return running_; }

  __device__ void step(State& state, const Slice& slice, int64_t step) {
    const Team team(rows_);
    Real* v = state.block.v;
    for (int row = team.first; row < rows_; row += team.step) {
      double sums[kNeumannStats] = {};
      for (int i = team.rank; i < state.row_elements(); i += team.size) {
        const int e = row * state.row_elements() + i;
        const Real term = neumann_term(v[e], state.product(e, i), alpha_, damping_);
        v[e] = term;
        sums[kNormSquared] += static_cast<double>(term) * static_cast<double>(term);
        if (!finite(term)) sums[kNonFinite] = 1;
      }
      sums_.put(team, row, sums);
    }
    __syncthreads();
    for (int e = slice.begin + threadIdx.x; e < slice.end; e += kThreads) state.solution[e - slice.begin] += v[e];
    // All blocks have the same norms, to the last bit, and so come to the same end.
    stepped_ = true, running_ = false;
    for (int row = 0; row < rows_; ++row) {
      const double square = sums_.get(team, row, kNormSquared);
      running_ |= square > more_.stop[row] && finite(square);
      if (blockIdx.x == 0 && threadIdx.x == 0) {
        double* stats = more_.history + (step * rows_ + row) * kNeumannStats;
        stats[kNormSquared] = square;
        stats[kNonFinite] = sums_.get(team, row, kNonFinite) != 0;
      }
    }
  }

  __device__ void end(int64_t) {}

  // A term that meets the tolerance in the end is left out: it is the residual of the sum before it.
  __device__ Real result(const State& state, int e, Real sum) const {
    const int row = e / state.row_elements();
    const bool met = stepped_ && sums_.get(Team(rows_), row, kNormSquared) <= more_.stop[row];
    return alpha_ * (met ? sum - state.block.v[e] : sum);
  }

 private:
  int rows_;
  const NeumannArguments& more_;
  Real alpha_, damping_;
  RowSums<kNeumannStats> sums_;
  bool running_ = true, stepped_ = false;
};

__global__ void look(const double* stats, const double* stop, int64_t k, int* running) {
  int any = 0;
  for (int64_t row = threadIdx.x; row < k; row += blockDim.x) {
    const double square = stats[row * kNeumannStats + kNormSquared];
    any |= square > stop[row] && finite(square);
  }
  any = __any_sync(0xffffffffu, any);
  // Once over, a solve stays over: later steps leave their stats as they were.
  if (threadIdx.x == 0 && !any) *running = 0;
}

}  // namespace

const char* glm_neumann_solve(const GlmData& data, const GlmSolve& solve, double alpha, const double* stop,
                              double* history, bool& done, const Scratch& scratch, Stream stream) {
  done = false;
  if (!narrow_enough(data, solve.k)) return nullptr;
  const cudaError_t error = for_glm_dtypes(data.x_dtype, [&](auto x, auto real) {
    using X = decltype(x);
    using Real = decltype(real);
    return run_solve<NeumannSolver<X, Real>>(GlmProblem<X, Real>(data, solve.k), solve, {alpha, stop, history}, done,
                                             scratch, stream);
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* glm_neumann_plan(const GlmData& data, int64_t k, Plan& plan) {
  plan = {"steps", "the weights have too many columns, or x too many features, for one pass"};
  if (!narrow_enough(data, k)) return nullptr;
  const cudaError_t error = for_glm_dtypes(data.x_dtype, [&](auto x, auto real) {
    using X = decltype(x);
    using Real = decltype(real);
    GlmProblem<X, Real> problem(data, k);
    Chip chip;
    SolvePlan solve;
    cudaError_t e = read_chip(chip);
    if (e == cudaSuccess) e = plan_solve<NeumannSolver<X, Real>>(problem, chip, solve);
    plan = {solve.path, solve.reason};
    return e;
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* glm_neumann_running(const double* stats, const double* stop, int64_t k, int* running, Stream stream) {
  const cudaError_t error = launch(look, 1, 32, 0, stream, stats, stop, k, running);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hg::cuda
