// How a whole solve is launched: where x is during the steps, and with how many blocks.
#pragma once

#include <string_view>

#include "glm_solve.cuh"

namespace hg::cuda {

// How a solve runs: "resident", "bulk" or "stream", or "steps" if not as one launch.
struct SolvePlan {
  const char *path = "steps", *reason = nullptr;
  int blocks = 0;
  int64_t shared = 0;
};

// Plans the launch on this chip; fills in tiles and stages of the problem.
template <class Solver, class X, class Real>
cudaError_t plan_solve(GlmProblem<X, Real>& problem, Chip chip, SolvePlan& plan) {
  using Launch = GlmLaunch<X, Real>;
  const auto kernel = glm_solve<Solver, X, Real>;
  const auto bytes = [&](int blocks) {
    Arena arena(nullptr);
    SolveState<X, Real>(problem, blocks, arena);
    Solver(problem, SolveArguments<Real>{}, typename Solver::Arguments{}, arena);
    return arena.size();
  };
  plan.reason = "the vectors are too long for every block to hold a copy";
  if (problem.elements() > kSolveElements) return cudaSuccess;
  plan.reason = "the device has no cooperative launches";
  if (!chip.cooperative) return cudaSuccess;

  // All rows on the chip, one block per multiprocessor; else a stream through it in every step.
  const int64_t row_bytes = std::max<int64_t>(1, problem.pitch * sizeof(X));
  int64_t rows = (problem.n + chip.multiprocessors - 1) / chip.multiprocessors;
  rows = round_up(std::max(rows, kSolveBytes / row_bytes), kTileRows);
  problem.stages = 1;
  // More rows than this do not fit, and might not count in 32 bits.
  problem.tile = static_cast<int>(std::min<int64_t>(rows, 1 << 16));
  plan.blocks = static_cast<int>(std::max<int64_t>(1, (problem.n + rows - 1) / rows));
  plan.shared = bytes(plan.blocks);
  const bool fits = rows <= problem.tile && plan.shared <= chip.shared_per_block;
  if (!fits) {
    plan.reason = "not even a small tile of x fits beside the vectors in shared memory";
    problem.tile = kTileRows;
    const int64_t own = bytes(chip.multiprocessors) - Launch::shared_bytes(problem);
    const Launch streaming = Launch::streaming(problem, chip, own, false);
    if (streaming.blocks == 0) return cudaSuccess;
    plan.blocks = streaming.blocks;
    plan.shared = bytes(plan.blocks);
    if (plan.shared > chip.shared_per_block) return cudaSuccess;
  }

  int resident = 0;
  const auto occupancy = [&] {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, plan.shared);
  };
  cudaError_t e = allow_shared(kernel);
  if (e == cudaSuccess) e = occupancy();
  if (e != cudaSuccess) return e;
  plan.reason = "not all blocks can run at the same time";
  if (resident > 0 && problem.stages > 1 && plan.blocks > resident * chip.multiprocessors) {
    // Registers leave room for fewer blocks, which stream more rows each and own larger slices of the solution.
    plan.blocks = resident * chip.multiprocessors;
    plan.shared = bytes(plan.blocks);
    if (plan.shared > chip.shared_per_block) return cudaSuccess;
    e = occupancy();
  }
  if (e != cudaSuccess || plan.blocks > resident * chip.multiprocessors) return e;
  if (problem.stages == 1) {
    plan.path = "resident", plan.reason = "x fits in shared memory";
    return cudaSuccess;
  }
  e = limit_to_code(kernel, chip);
  if (e != cudaSuccess) return e;
  const char* no_bulk = Launch::no_bulk(problem, chip);
  problem.bulk = !no_bulk;
  plan.path = no_bulk ? "stream" : "bulk";
  plan.reason = no_bulk ? no_bulk : "x does not fit in shared memory";
  return cudaSuccess;
}

// Launches the solve if it can run as one launch; else leaves `done` false.
template <class Solver, class X, class Real>
cudaError_t run_solve(GlmProblem<X, Real> problem, const GlmSolve& solve, const typename Solver::Arguments& more,
                      bool& done, const Scratch& scratch, cudaStream_t stream) {
  done = false;
  Chip chip;
  SolvePlan plan;
  cudaError_t e = read_chip(chip);
  if (e == cudaSuccess) e = plan_solve<Solver>(problem, chip, plan);
  if (e != cudaSuccess || plan.path == std::string_view("steps")) return e;

  const int64_t elements = problem.elements();
  const int64_t sums = solve.deterministic ? elements * (plan.blocks + 1) : 3 * elements;
  // The count of the barrier, then the sums.
  double* memory = scratch(4 + (sums * sizeof(Real) + 7) / 8);
  e = cudaMemsetAsync(memory, 0, 32 + (solve.deterministic ? 0 : sums * sizeof(Real)), stream);
  if (e != cudaSuccess) return e;
  Real* totals = reinterpret_cast<Real*>(memory + 4);
  const SolveArguments<Real> arguments{static_cast<const Real*>(solve.b),
                                       static_cast<Real*>(solve.out),
                                       solve.steps,
                                       static_cast<Real>(solve.damping),
                                       totals,
                                       solve.deterministic ? totals + elements : nullptr,
                                       reinterpret_cast<unsigned*>(memory)};
  e = launch_cooperative(glm_solve<Solver, X, Real>, plan.blocks, kThreads, plan.shared, stream, problem, arguments,
                         more);
  if (e == cudaErrorCooperativeLaunchTooLarge) {
    // Another process has part of the chip, and the runtime could not know.
    cudaGetLastError();
    return cudaSuccess;
  }
  done = e == cudaSuccess;
  return e;
}

}  // namespace hg::cuda
