// Kernels with the faults that the emulator is there to find, and their right forms. Run by tests/test_emulator.py.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../csrc/cuda/device.cuh"
#include "../csrc/cuda/launch.h"

namespace {

using namespace hg::cuda;

constexpr int kThreads = 96, kBlocks = 8;

// out[block] = sum over the block of x, by a warp operation and shared memory.
template <bool Barrier>
__global__ void block_sums(const float* x, float* out) {
  HG_SHARED(float, warps, [kThreads / 32]);
  float sum = x[blockIdx.x * kThreads + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  if (Barrier) __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = warps[0] + warps[1] + warps[2];
}

template <bool Wait>
__global__ void copies(const float* x, float* out) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  copy_async<4>(tile + threadIdx.x, x + blockIdx.x * kThreads + threadIdx.x);
  end_copies();
  if (Wait) wait_copies<0>();
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += tile[i];
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

enum class Fault { none, no_wait, uneven, too_few, too_many, armed_twice, never_waited };

// The same sums from one bulk copy of the block's row, twice: a barrier serves one phase after another.
template <Fault F>
__global__ void bulk_copies(const float* x, float* out) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  HG_SHARED(uint64_t, arrived, [1]);
  constexpr unsigned kBytes = kThreads * sizeof(float);
  if (threadIdx.x == 0) bulk_barrier_init(arrived);
  __syncthreads();
  for (unsigned phase = 0; phase < 2; ++phase) {
    if (threadIdx.x == 0) {
      order_bulk_copies();
      bulk_expect(arrived, F == Fault::too_few ? kBytes + 16 : F == Fault::too_many ? kBytes - 16 : kBytes);
      if (F == Fault::armed_twice) bulk_expect(arrived, kBytes);
      copy_bulk(tile, x + blockIdx.x * kThreads, F == Fault::uneven ? kBytes - 4 : kBytes, arrived);
    }
    if (F == Fault::no_wait || F == Fault::never_waited) {
      __syncthreads();
      break;
    }
    while (!bulk_try_wait(arrived, phase)) {
    }
    __syncthreads();
  }
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += tile[i];
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
  // The copy comes when the first thread waits for it.
  __syncthreads();
  while (F == Fault::no_wait && !bulk_try_wait(arrived, 0)) {
  }
}

__global__ void bulk_barrier_not_made(const float* x, float* out) {
  HG_SHARED(uint64_t, arrived, [1]);
  while (!bulk_try_wait(arrived, 0)) {
  }
  out[blockIdx.x] = x[0];
}

// Every block adds to the sums of its left neighbour, after all blocks have written theirs.
__global__ void grid_barrier(const float* x, float* out, unsigned* arrived) {
  if (threadIdx.x == 0) {
    out[blockIdx.x] = x[blockIdx.x];
    __threadfence();
    atomicAdd(arrived, 1u);
    while (load_acquire(arrived) < gridDim.x) {
    }
    out[kBlocks + blockIdx.x] = out[(blockIdx.x + gridDim.x - 1) % gridDim.x];
  }
}

__global__ void some_return_before_the_barrier(const float*, float* out) {
  if (threadIdx.x >= 90) return;
  __syncthreads();
  out[blockIdx.x] = 1;
}

__global__ void different_barriers(const float*, float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[blockIdx.x] = 1;
}

__global__ void a_lane_stays_away(const float* x, float* out) {
  float sum = x[threadIdx.x];
  if (threadIdx.x != 5) sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  __syncthreads();
  out[blockIdx.x] = sum;
}

__global__ void race(const float*, float* out) { out[0] = static_cast<float>(threadIdx.x); }

__global__ void beyond_global(const float* x, float* out) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  out[blockIdx.x] = x[i + 1];
}

__global__ void beyond_static_shared(const float*, float* out) {
  HG_SHARED(float, tile, [kThreads]);
  float* at = tile;
  at[threadIdx.x + 1] = 1;
  out[blockIdx.x] = at[threadIdx.x];
}

__global__ void beyond_dynamic_shared(const float*, float* out) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  tile[threadIdx.x + 1] = 1;
  out[blockIdx.x] = tile[threadIdx.x];
}

}  // namespace

int main(int, char** argv) {
  const std::string name = argv[1];
  std::vector<float> x(kBlocks * kThreads), out(2 * kBlocks);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7);
  unsigned arrived = 0;
  const auto go = [&](auto kernel, size_t shared = 0) {
    return launch(kernel, kBlocks, kThreads, shared, nullptr, x.data(), out.data());
  };
  const size_t row = kThreads * sizeof(float);
  cudaError_t error = cudaSuccess;
  if (name == "block_sums") error = go(block_sums<true>);
  if (name == "block_sums_without_barrier") error = go(block_sums<false>);
  if (name == "copies") error = go(copies<true>, row);
  if (name == "copies_without_wait") error = go(copies<false>, row);
  if (name == "bulk_copies") error = go(bulk_copies<Fault::none>, row);
  if (name == "bulk_copies_without_wait") error = go(bulk_copies<Fault::no_wait>, row);
  if (name == "bulk_copy_uneven") error = go(bulk_copies<Fault::uneven>, row);
  if (name == "bulk_copy_too_short") error = go(bulk_copies<Fault::too_few>, row);
  if (name == "bulk_copy_too_long") error = go(bulk_copies<Fault::too_many>, row);
  if (name == "bulk_barrier_armed_twice") error = go(bulk_copies<Fault::armed_twice>, row);
  if (name == "bulk_copy_never_waited_for") error = go(bulk_copies<Fault::never_waited>, row);
  if (name == "bulk_barrier_not_made") error = go(bulk_barrier_not_made);
  if (name == "some_return_before_the_barrier") error = go(some_return_before_the_barrier);
  if (name == "different_barriers") error = go(different_barriers);
  if (name == "a_lane_stays_away") error = go(a_lane_stays_away);
  if (name == "race") error = go(race);
  if (name == "beyond_global") error = go(beyond_global);
  if (name == "beyond_static_shared") error = go(beyond_static_shared);
  if (name == "beyond_dynamic_shared") error = go(beyond_dynamic_shared, row);
  if (name == "more_shared_than_allowed") error = go(copies<true>, 64 << 10);
  const auto barrier = grid_barrier;
  if (name == "grid_barrier")
    error = launch_cooperative(barrier, kBlocks, kThreads, 0, nullptr, x.data(), out.data(), &arrived);
  if (name == "grid_barrier_without_cooperation")
    error = launch(barrier, kBlocks, kThreads, 0, nullptr, x.data(), out.data(), &arrived);
  if (name == "grid_too_large")
    error = launch_cooperative(barrier, 1000, kThreads, 0, nullptr, x.data(), out.data(), &arrived);
  if (error != cudaSuccess) {
    std::printf("error: %s\n", cudaGetErrorString(error));
    // A launch that failed leaves nothing behind that the next one sees.
    error = go(block_sums<true>);
    if (error != cudaSuccess) return 1;
  }
  for (const float value : out) std::printf("%g ", value);
  std::printf("\n");
  return 0;
}
