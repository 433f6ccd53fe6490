#include "tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

namespace hg {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }
at::Tensor empty_like(const at::Tensor& t) { return at::empty_like(t); }
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::zeros(sizes, options); }
at::Tensor full(at::IntArrayRef sizes, double value, const at::TensorOptions& options) {
  return at::full(sizes, value, options);
}

}  // namespace hg
