// Products with the Hessian of a multilayer perceptron layer by layer: torch's matrix products, our kernels between.
#pragma once

#include <ATen/core/Tensor.h>

#include "mlp.h"

namespace hg {

// out = H v on a CUDA device, where the tensors and the pointers in `data` are; in a build with CUDA only.
const char* mlp_hvp_by_layers(const MlpData& data, at::TensorList weights, at::TensorList hidden, at::TensorList deltas,
                              const at::Tensor& v, at::Tensor& out, cuda::Stream stream);

}  // namespace hg
