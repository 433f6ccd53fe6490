// A whole solve in one cooperative launch. Every block keeps its rows of X in shared memory, if they fit, and a copy
// of the solver's vectors; one sum over all blocks per step makes every block's product the whole product, and all
// blocks go through the same step with the same numbers. The solution itself is spread over the blocks.
#pragma once

#include "glm_launch.cuh"
#include "grid_barrier.cuh"

namespace hg::cuda {

// Elements of the vectors up to which every block can go through them by itself in the time of a barrier.
constexpr int kSolveElements = 8192;
// A block with less of X than this computes for a shorter time than one more block adds to every barrier.
constexpr int64_t kSolveBytes = 4096;

template <class Real>
struct SolveArguments {
  const Real* b;
  Real* out;
  int64_t steps;
  Real damping;
  Real* totals;       // elements if there are partial sums, else 3 x elements that are 0
  Real* partial;      // blocks x elements, or null: sums in the order in which blocks come
  unsigned* arrived;  // 0
};

// Elements of the vectors that are a block's own.
struct Slice {
  int begin, end;

  __host__ __device__ static int size(int elements, int blocks) { return (elements + blocks - 1) / blocks; }
  __device__ explicit Slice(int elements) {
    const int each = size(elements, static_cast<int>(gridDim.x));
    const int first = static_cast<int>(blockIdx.x) * each;
    begin = first < elements ? first : elements;
    end = elements - begin < each ? elements : begin + each;
  }
};

// Threads that go through a row together: the whole block, or a warp each where there are rows enough.
struct Team {
  int first, step, rank, size;

  __device__ explicit Team(int rows) {
    step = rows >= kWarps ? kWarps : 1;
    size = kThreads / step;
    first = threadIdx.x / size;
    rank = threadIdx.x % size;
  }
};

// Sums over rows: `put` by all threads of a row's team, a barrier, then `get` by anyone.
template <int S>
class RowSums {
 public:
  __host__ __device__ RowSums(int rows, Arena& arena) : sums_(arena.take<double>(rows * kWarps * S)) {}

  __device__ void put(const Team& team, int row, double (&sums)[S]) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], offset);
      if (threadIdx.x % 32 == 0) sums_[(row * kWarps + team.rank / 32) * S + s] = sums[s];
    }
  }
  __device__ double get(const Team& team, int row, int s) const {
    double sum = sums_[row * kWarps * S + s];
    for (int w = 1; w < team.size / 32; ++w) sum += sums_[(row * kWarps + w) * S + s];
    return sum;
  }

 private:
  double* sums_;
};

// The penalty, laid out like the classes of one row of V.
template <class X, class Real>
class Penalty {
 public:
  __host__ __device__ Penalty(const GlmProblem<X, Real>& problem, Arena& arena)
      : l2_(arena.take<Real>(problem.classes * problem.pitch)) {}

  __device__ void load(const GlmProblem<X, Real>& problem) {
    for (int e = threadIdx.x; e < problem.classes * problem.pitch; e += kThreads) {
      const int64_t at = problem.place(e);
      l2_[e] = at < 0 || !problem.l2 ? 0 : problem.l2[at];
    }
  }
  __device__ Real operator[](int i) const { return l2_[i]; }

 private:
  Real* l2_;
};

// Replaces every block's g by the sum over all blocks.
template <class Real>
class GridSum {
 public:
  __device__ GridSum(const SolveArguments<Real>& arguments, int elements)
      : arguments_(arguments), elements_(elements), slice_(elements), barrier_(arguments.arrived) {}

  __device__ void add(Real* g, int64_t step) {
    if (gridDim.x == 1) return;
    const Real* total = arguments_.partial ? in_order(g) : as_they_come(g, step);
    // Around the first cache, which is not kept in step with other multiprocessors.
    for (int e = threadIdx.x; e < elements_; e += kThreads) g[e] = __ldcg(total + e);
    __syncthreads();
  }

 private:
  // Every block adds up its slice of what all have written. Nobody writes partial sums or totals before all have
  // read those of the step before: one of the two barriers is always in between.
  __device__ const Real* in_order(const Real* g) {
    for (int e = threadIdx.x; e < elements_; e += kThreads)
      arguments_.partial[static_cast<int64_t>(blockIdx.x) * elements_ + e] = g[e];
    barrier_.wait();
    for (int e = slice_.begin + threadIdx.x / 32; e < slice_.end; e += kWarps) {
      double sum = 0;
      for (int64_t b = threadIdx.x % 32; b < gridDim.x; b += 32) sum += __ldcg(arguments_.partial + b * elements_ + e);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (threadIdx.x % 32 == 0) arguments_.totals[e] = static_cast<Real>(sum);
    }
    barrier_.wait();
    return arguments_.totals;
  }

  // Three totals in turn, so that one barrier is enough: while one is added to, the next is cleared, which all have
  // read two steps ago; the third may still be being read.
  __device__ const Real* as_they_come(const Real* g, int64_t step) {
    Real* total = arguments_.totals + step % 3 * elements_;
    Real* next = arguments_.totals + (step + 1) % 3 * elements_;
    for (int e = threadIdx.x; e < elements_; e += kThreads) atomicAdd(total + e, g[e]);
    for (int e = slice_.begin + threadIdx.x; e < slice_.end; e += kThreads) next[e] = 0;
    barrier_.wait();
    return total;
  }

  const SolveArguments<Real>& arguments_;
  int elements_;
  Slice slice_;
  GridBarrier barrier_;
};

// What a solver needs to know of its block.
template <class X, class Real>
struct SolveState {
  const GlmProblem<X, Real>& problem;
  GlmBlock<X, Real> block;
  Penalty<X, Real> l2;
  Real* solution;  // the block's slice

  __host__ __device__ SolveState(const GlmProblem<X, Real>& problem_, int blocks, Arena& arena)
      : problem(problem_),
        block(problem_, arena),
        l2(problem_, arena),
        solution(arena.take<Real>(Slice::size(problem_.elements(), blocks))) {}

  __device__ int row_elements() const { return problem.classes * problem.pitch; }
  // Element i of a row, element e of the block, of H v, where g holds the sums.
  __device__ Real product(int e, int i) const { return problem.scale * block.g[e] + l2[i] * block.v[e]; }
};

// Solver: a vector iteration on every block's copy; see glm_neumann_solve.cu and glm_cg_solve.cu. Two blocks hide each
// other's barriers where x is streamed; in float64 they would not have registers enough.
template <class Solver, class X, class Real>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 8 ? 1 : 2)
    glm_solve(const __grid_constant__ GlmProblem<X, Real> problem,
              const __grid_constant__ SolveArguments<Real> arguments,
              const __grid_constant__ typename Solver::Arguments more) {
  Arena arena(dynamic_shared());
  SolveState<X, Real> state(problem, static_cast<int>(gridDim.x), arena);
  Solver solver(problem, arguments, more, arena);
  const Slice slice(problem.elements());
  begin_share(state.block, problem);
  state.block.tiles.prefetch();
  state.block.load_v(arguments.b);
  state.l2.load(problem);
  __syncthreads();
  solver.begin(state, slice);
  __syncthreads();
  GridSum<Real> sum(arguments, problem.elements());
  int64_t step = 0;
  for (; step < arguments.steps && solver.running(); ++step) {
    state.block.multiply();
    // X does not depend on the step: the next tiles may come while the blocks wait for each other.
    if (!state.block.tiles.resident()) state.block.tiles.prefetch();
    sum.add(state.block.g, step);
    solver.step(state, slice, step);
  }
  solver.end(step);
  for (int e = slice.begin + threadIdx.x; e < slice.end; e += kThreads) {
    const int64_t at = problem.place(e);
    if (at >= 0) arguments.out[at] = solver.result(state, e, state.solution[e - slice.begin]);
  }
  state.block.tiles.end();
}

}  // namespace hg::cuda
