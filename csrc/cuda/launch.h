// The one place where kernels are launched: errors come back as values, arguments are converted as in a call.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace hg::cuda {

template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   std::common_type_t<P>... args) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel arguments end at 4 KB");
  void* pointers[] = {&args...};
  return cudaLaunchKernel(kernel, grid, block, pointers, shared, stream);
}

// All blocks of the grid run at the same time, so that they may wait for each other.
template <class... P>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                               std::common_type_t<P>... args) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel arguments end at 4 KB");
  void* pointers[] = {&args...};
  return cudaLaunchCooperativeKernel(kernel, grid, block, pointers, shared, stream);
}

}  // namespace hg::cuda
