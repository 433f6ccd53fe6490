// What kernels ask of the chip beyond C++: shared memory, copies that run beside the arithmetic, and loads that see
// what other blocks have written. The emulator has its own form of each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(HG_EMULATE_CUDA)
#include "emulator/device_forms.h"
#else

// Static shared memory: HG_SHARED(double, sums, [8][2]) declares double sums[8][2].
#define HG_SHARED(type, name, ...) __shared__ type name __VA_ARGS__

namespace hg::cuda {

// Dynamic shared memory of the block, aligned to 128 bytes.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
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

// For loops that wait for another block.
__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

}  // namespace hg::cuda

#endif
