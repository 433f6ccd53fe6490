// The one place where kernels are launched: errors come back as values, arguments are converted as in a call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../chip.h"

namespace hg::cuda {

// What there is of the current device.
inline cudaError_t read_chip(Chip& chip) {
  int device, major = 0, minor = 0;
  cudaError_t e = cudaGetDevice(&device);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&value, attribute, device);
  };
  get(chip.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(chip.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(chip.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(chip.cooperative, cudaDevAttrCooperativeLaunch);
  get(major, cudaDevAttrComputeCapabilityMajor);
  get(minor, cudaDevAttrComputeCapabilityMinor);
  chip.capability = 10 * major + minor;
  return e;
}

// Lowers the capability to the one that the kernel was written for: a driver that knows no code of the device takes
// that of an older one, in which what is new is missing.
template <class... P>
cudaError_t limit_to_code(void (*kernel)(P...), Chip& chip) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && attributes.ptxVersion < chip.capability) chip.capability = attributes.ptxVersion;
  return error;
}

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

// Lets every launch of a kernel have as much dynamic shared memory as the device has beside the kernel's static
// `statics` bytes. Not as much as one launch needs: the limit is the kernel's, and another host thread may be about
// to launch it with more.
template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), int64_t statics = 0) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - static_cast<int>(statics));
}

}  // namespace hg::cuda
