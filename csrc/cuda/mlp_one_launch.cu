// Hessian-vector products of deep and narrow multilayer perceptrons in one launch: blocks go through all layers with
// some rows of the batch each, without waiting for each other before the end, where sums over the batch are added up.
#include <algorithm>

#include "../mlp.h"
#include "grid_barrier.cuh"
#include "launch.h"
#include "mlp_rows.cuh"

namespace hg::cuda {
namespace {

template <class Real>
__global__ void __launch_bounds__(kThreads, 2) mlp_rows(const __grid_constant__ rows::Problem<Real> problem) {
  const MlpLaunch& launch = problem.launch;
  rows::Block<Real> block(problem, dynamic_shared());
  GridBarrier barrier(problem.arrived);
  const int slot = static_cast<int>(blockIdx.x) / launch.row_blocks;
#pragma unroll 1
  for (int64_t first = 0; first < problem.k; first += launch.slots) {
    if (first + slot < problem.k) block.product(first + slot);
    if (launch.row_blocks == 1) continue;
    barrier.wait();
    const int64_t left = problem.k - first;
    block.add_up(first, left < launch.slots ? left : launch.slots);
    // The next vectors' sums take the place of these.
    if (left > launch.slots) barrier.wait();
  }
}

template <class Real>
cudaError_t run(const MlpData& data, const MlpLaunch& launch, const Real* v, int64_t k, Real* out, bool& done,
                const Scratch& scratch, Stream stream) {
  const auto kernel = mlp_rows<Real>;
  const int blocks = launch.slots * launch.row_blocks;
  const bool together = launch.row_blocks > 1;
  cudaError_t e = allow_shared(kernel);
  if (e == cudaSuccess && together) {
    int resident = 0;
    Chip chip;
    e = read_chip(chip);
    if (e == cudaSuccess) e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, launch.shared);
    if (e == cudaSuccess && blocks > resident * chip.multiprocessors) return cudaSuccess;
  }
  if (e != cudaSuccess) return e;

  rows::Problem<Real> problem{};
  const auto at = [](const Rows& m) { return static_cast<const Real*>(m.data); };
  for (const MlpLayer& layer : data.layers) {
    problem.layers[problem.count++] = {at(layer.weight),
                                       at(layer.hidden),
                                       at(layer.delta),
                                       at(layer.slope),
                                       at(layer.bend),
                                       static_cast<int>(layer.out),
                                       static_cast<int>(layer.weight.stride),
                                       static_cast<int>(layer.hidden.stride),
                                       static_cast<int>(layer.delta.stride),
                                       static_cast<int>(layer.slope.stride),
                                       static_cast<int>(layer.bend.stride)};
    problem.numel += layer.out * (layer.in + data.biases);
  }
  problem.launch = launch;
  problem.inputs = static_cast<int>(data.layers[0].in), problem.biases = data.biases;
  problem.n = data.n, problem.k = k;
  problem.probabilities = at(data.probabilities), problem.probabilities_stride = data.probabilities.stride;
  problem.v = v, problem.out = out;
  problem.scale = static_cast<Real>(data.scale), problem.l2 = static_cast<Real>(data.l2);
  if (!together) {
    e = hg::cuda::launch(kernel, blocks, kThreads, launch.shared, stream, problem);
    done = e == cudaSuccess;
    return e;
  }
  // The count of the barrier, then the sums.
  double* memory = scratch(4 + (int64_t{blocks} * launch.padded * static_cast<int64_t>(sizeof(Real)) + 7) / 8);
  problem.arrived = reinterpret_cast<unsigned*>(memory), problem.partial = reinterpret_cast<Real*>(memory + 4);
  e = cudaMemsetAsync(memory, 0, 32, stream);
  if (e == cudaSuccess) e = launch_cooperative(kernel, blocks, kThreads, launch.shared, stream, problem);
  if (e == cudaErrorCooperativeLaunchTooLarge) {
    // Another process has part of the chip, and the runtime could not know.
    cudaGetLastError();
    return cudaSuccess;
  }
  done = e == cudaSuccess;
  return e;
}

}  // namespace

const char* current_chip(Chip& chip) {
  const cudaError_t error = read_chip(chip);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* mlp_one_launch(const MlpData& data, const MlpLaunch& launch, const void* v, int64_t k, void* out,
                           bool& done, const Scratch& scratch, Stream stream) {
  done = k == 0;
  if (done) return nullptr;
  const auto go = [&](auto zero) {
    using Real = decltype(zero);
    return run(data, launch, static_cast<const Real*>(v), k, static_cast<Real*>(out), done, scratch, stream);
  };
  const cudaError_t error = data.dtype == DType::f64 ? go(double{}) : go(float{});
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hg::cuda
