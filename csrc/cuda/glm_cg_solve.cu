// Conjugate gradients on a generalised linear model: the whole solve in one launch, or step by step. Each right-hand
// side stops by itself.
#include "glm_solve_launch.cuh"

namespace hg::cuda {
namespace {

enum Dots : int { kPHp, kPP, kHpHp, kDots };

struct CgArguments {
  double* state;   // rows x kCgState
  int64_t* taken;  // steps
};

template <class X, class Real>
class CgSolver {
 public:
  using Arguments = CgArguments;
  using State = SolveState<X, Real>;

  __host__ __device__ CgSolver(const GlmProblem<X, Real>& problem, const SolveArguments<Real>& arguments,
                               const CgArguments& more, Arena& arena)
      : rows_(problem.k),
        more_(more),
        damping_(arguments.damping),
        r_(arena.take<Real>(problem.elements())),
        scalars_(arena.take<double>(rows_ * kCgState)),
        factor_(arena.take<double>(rows_)),
        dots_(rows_, arena),
        squares_(rows_, arena) {}

  __device__ void begin(State& state, const Slice& slice) {
    for (int e = threadIdx.x; e < state.problem.elements(); e += kThreads) r_[e] = state.block.v[e];
    for (int e = slice.begin + threadIdx.x; e < slice.end; e += kThreads) state.solution[e - slice.begin] = 0;
    for (int i = threadIdx.x; i < rows_ * kCgState; i += kThreads) scalars_[i] = more_.state[i];
  }

  __device__ bool running() const {
    for (int row = 0; row < rows_; ++row)
      if (scalars(row).running()) return true;
    return false;
  }

  __device__ void step(State& state, const Slice& slice, int64_t) {
    const Team team(rows_);
    const int size = state.row_elements();
    Real *p = state.block.v, *hp = state.block.g;
    for (int row = team.first; row < rows_; row += team.step) {
      if (!scalars(row).running()) continue;
      double sums[kDots] = {};
#pragma unroll 1
      for (int i = team.rank; i < size; i += team.size) {
        const int e = row * size + i;
        hp[e] = state.product(e, i);
        const double a = p[e], b = damped(hp[e], p[e], damping_);
        sums[kPHp] += a * b;
        sums[kPP] += a * a;
        sums[kHpHp] += b * b;
      }
      dots_.put(team, row, sums);
    }
    __syncthreads();
    for (int row = threadIdx.x; row < rows_; row += kThreads)
      if (scalars(row).running())
        factor_[row] = scalars(row).step_length(dots_.get(team, row, kPHp), dots_.get(team, row, kPP),
                                                dots_.get(team, row, kHpHp), kEpsilon);
    __syncthreads();
    for (int row = team.first; row < rows_; row += team.step) {
      if (!scalars(row).running()) continue;
      const Real alpha = static_cast<Real>(factor_[row]);
      double sums[1] = {};
#pragma unroll 1
      for (int i = team.rank; i < size; i += team.size) {
        const int e = row * size + i;
        r_[e] = cg_residual(r_[e], hp[e], p[e], alpha, damping_);
        sums[0] += static_cast<double>(r_[e]) * static_cast<double>(r_[e]);
      }
      squares_.put(team, row, sums);
    }
    for (int e = slice.begin + threadIdx.x; e < slice.end; e += kThreads) {
      const int row = e / size;
      Real& x = state.solution[e - slice.begin];
      if (scalars(row).running()) x = cg_solution(x, p[e], static_cast<Real>(factor_[row]));
    }
    __syncthreads();
    for (int row = threadIdx.x; row < rows_; row += kThreads) {
      const double square = squares_.get(team, row, 0);
      if (scalars(row).running()) factor_[row] = scalars(row).conjugation(square, square);
    }
    __syncthreads();
    for (int row = team.first; row < rows_; row += team.step) {
      if (!scalars(row).running()) continue;
      const Real beta = static_cast<Real>(factor_[row]);
      for (int i = team.rank; i < size; i += team.size) {
        const int e = row * size + i;
        p[e] = cg_direction(r_[e], p[e], beta);
      }
    }
  }

  __device__ void end(int64_t steps) {
    if (blockIdx.x > 0) return;
    for (int i = threadIdx.x; i < rows_ * kCgState; i += kThreads) more_.state[i] = scalars_[i];
    if (threadIdx.x == 0) *more_.taken = steps;
  }
  __device__ Real result(const State&, int, Real solution) const { return solution; }

 private:
  static constexpr double kEpsilon = sizeof(Real) == 8 ? 0x1p-52 : 0x1p-23;

  __device__ CgScalars scalars(int row) const { return CgScalars{scalars_ + row * kCgState}; }

  int rows_;
  const CgArguments& more_;
  Real damping_;
  Real* r_;
  double *scalars_, *factor_;
  RowSums<kDots> dots_;
  RowSums<1> squares_;
};

__global__ void look(const double* state, int64_t k, int* running, int64_t* taken) {
  int any = 0;
  for (int64_t row = threadIdx.x; row < k; row += blockDim.x) any |= state[row * kCgState + kFlag] == kRunning;
  any = __any_sync(0xffffffffu, any);
  if (threadIdx.x > 0) return;
  *running = any;
  if (any) ++*taken;
}

}  // namespace

const char* glm_cg_solve(const GlmData& data, const GlmSolve& solve, double* state, int64_t* taken, bool& done,
                         const Scratch& scratch, Stream stream) {
  done = false;
  if (!narrow_enough(data, solve.k)) return nullptr;
  const cudaError_t error = for_glm_dtypes(data.x_dtype, [&](auto x, auto real) {
    using X = decltype(x);
    using Real = decltype(real);
    return run_solve<CgSolver<X, Real>>(GlmProblem<X, Real>(data, solve.k), solve, {state, taken}, done, scratch,
                                        stream);
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* glm_cg_running(const double* state, int64_t k, int* running, int64_t* taken, Stream stream) {
  const cudaError_t error = launch(look, 1, 32, 0, stream, state, k, running, taken);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hg::cuda
