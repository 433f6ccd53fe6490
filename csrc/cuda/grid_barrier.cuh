// A barrier of all blocks of a cooperative launch.
#pragma once

#include "device.cuh"

namespace hg::cuda {

// `arrived` is 0 at launch and counts on through all barriers.
class GridBarrier {
 public:
  __device__ explicit GridBarrier(unsigned* arrived) : arrived_(arrived) {}

  // What any block has written before it, all blocks may read after it.
  __device__ void wait() {
    target_ += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived_, 1u);
      // The difference stays right when the count wraps around.
      while (static_cast<int>(load_acquire(arrived_) - target_) < 0) {
      }
    }
    __syncthreads();
  }

 private:
  unsigned* arrived_;
  unsigned target_ = 0;
};

}  // namespace hg::cuda
