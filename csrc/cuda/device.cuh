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

// Copies of whole pieces by the copy engine, from compute capability 9.0 on. They arrive at barriers in shared memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// For one thread that arrives in every phase, and before a barrier of the block.
__device__ __forceinline__ void bulk_barrier_init(uint64_t* barrier) {
  if constexpr (kBulkCopies)
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
        : "memory");
}

// That thread's arrival: the phase is over when so many bytes have come. What the thread has written before, those
// who wait may read after.
__device__ __forceinline__ void bulk_expect(uint64_t* barrier, unsigned bytes) {
  if constexpr (kBulkCopies)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Copies bytes (a multiple of 16, aligned likewise) from global to shared memory.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  if constexpr (kBulkCopies)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Whether the phase of this parity is over. Waits for that as long as the chip sees fit, which is not for ever.
__device__ __forceinline__ bool bulk_try_wait(uint64_t* barrier, unsigned parity) {
  unsigned done = 1;
  if constexpr (kBulkCopies)
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  return done != 0;
}

// Orders this thread's own writes to shared memory before the copies that it sends for later.
__device__ __forceinline__ void order_bulk_copies() {
  if constexpr (kBulkCopies) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// For loops that wait for another block.
__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

}  // namespace hg::cuda

#endif
