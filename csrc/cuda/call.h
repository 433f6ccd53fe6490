// From a host function to a CUDA launcher: device guard, current stream, scratch memory, error check.
// Device-generic c10 alone, so that it compiles, links and imports against a torch without CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <limits>
#include <vector>

#include "../kernels.h"
#include "../tensors.h"

namespace hg::cuda {

// Whether a tensor is one for the CPU kernels. A build that emulates CUDA takes CPU memory for a device's, and has
// none of the CPU kernels: calls of them are left out with the branch, if the compiler sees through this function.
#if defined(HG_EMULATE_CUDA)
__attribute__((always_inline)) inline bool for_cpu(const at::Tensor&) { return false; }
#else
inline bool for_cpu(const at::Tensor& t) { return t.is_cpu(); }
#endif

// Calls launch(scratch, stream) for tensors on `device`, on whose current stream everything runs.
template <class Launch>
void call(const char* op, at::Device device, const Launch& launch) {
#if defined(HG_EMULATE_CUDA)
  std::vector<at::Tensor> memory;
  const auto scratch = [&](int64_t doubles) {
    memory.push_back(full({doubles}, std::numeric_limits<double>::quiet_NaN(), at::kDouble));
    return memory.back().mutable_data_ptr<double>();
  };
  const char* error = launch(scratch, Stream{});
  TORCH_CHECK(error == nullptr, op, ": the emulator reports: ", error);
#elif defined(HG_WITH_CUDA)
  const c10::DeviceGuard guard(device);
  const c10::impl::VirtualGuardImpl impl(device.type());
  const auto stream = static_cast<Stream>(impl.getStreamNativeHandle(impl.getStream(device)));
  // Given back before the kernels have run, but to the same stream, where the next user comes after them.
  at::Tensor memory;
  const auto scratch = [&](int64_t doubles) {
    memory = empty({doubles}, at::TensorOptions(at::kDouble).device(device));
    return memory.mutable_data_ptr<double>();
  };
  const char* error = launch(scratch, stream);
  TORCH_CHECK(error == nullptr, op, ": CUDA reports: ", error);
#else
  TORCH_CHECK(false, op, ": the tensors are on ", device,
              ", but hypergrad_ext._C was built without CUDA (HYPERGRAD_EXT_BUILD=cuda builds it)");
#endif
}

}  // namespace hg::cuda
