// Sums that come out the same in every run: every block writes its own partial sums, one block per
// row adds them in a fixed order. No atomics, no counters that two streams could share.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace hg::cuda {

constexpr int kThreads = 256;
// The grid of rows ends here; blocks take every kMaxGridRows-th row.
constexpr int kMaxGridRows = 65535;

// Adds up each sum over the block; thread 0 holds the result. All threads of the block must call it.
template <int S>
__device__ __forceinline__ void block_sum(double (&sums)[S]) {
  HG_SHARED(double, warps, [kThreads / 32][S]);
#pragma unroll
  for (int s = 0; s < S; ++s) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sums[s] += __shfl_down_sync(0xffffffffu, sums[s], offset);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][s] = sums[s];
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int s = 0; s < S; ++s)
      for (int w = 1; w < kThreads / 32; ++w) sums[s] += warps[w][s];
  // The caller's next row overwrites `warps`.
  __syncthreads();
}

// Adds the `count` partial sums of every row and hands them to `finish`, which updates the row's scalars.
template <class Finish>
__global__ void __launch_bounds__(kThreads)
    finish_rows(const double* partial, int64_t count, int64_t rows, Finish finish) {
  constexpr int S = Finish::kSums;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    // The same for all threads: the scalars are written by this block alone, and after block_sum.
    if (!finish.live(row)) continue;
    double sums[S] = {};
    for (int64_t i = threadIdx.x; i < count; i += kThreads)
#pragma unroll
      for (int s = 0; s < S; ++s) sums[s] += partial[(row * count + i) * S + s];
    block_sum(sums);
    if (threadIdx.x == 0) finish(row, sums);
  }
}

}  // namespace hg::cuda
