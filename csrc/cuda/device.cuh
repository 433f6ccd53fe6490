// What kernels ask of the chip beyond C++: dynamic shared memory, copies that run beside the arithmetic, loads
// that see what other blocks have written, and a barrier of the whole grid.
#pragma once

#include <cstdint>

namespace hg::cuda {

// Dynamic shared memory of the block, aligned to 32 bytes.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(32) char memory[];
  return memory;
}

// Copies Bytes bytes (4, 8 or 16, aligned) from global to shared memory; done after wait_copies and a barrier.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(Bytes) : "memory");
}

// Ends a batch of this thread's copies.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most Pending of this thread's batches are under way.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// A barrier of all blocks of a cooperative launch. `arrived` is 0 at launch and counts on through all barriers.
class GridBarrier {
 public:
  __device__ explicit GridBarrier(unsigned* arrived) : arrived_(arrived) {}

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
