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

VectorList rows_of(const at::Tensor& t) {
  const DType dtype = t.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
  return {{{static_cast<char*>(t.data_ptr()), t.size(1), t.size(1)}}, dtype};
}

}  // namespace hg
