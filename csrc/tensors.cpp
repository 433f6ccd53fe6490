#include "tensors.h"

#include <ATen/ops/as_strided.h>
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

std::vector<at::Tensor> views(const at::Tensor& flat, const std::vector<std::vector<int64_t>>& shapes) {
  TORCH_CHECK_VALUE((flat.dim() == 1 || flat.dim() == 2) && flat.stride(-1) == 1,
                    "flat must be of shape (n,) or (k, n), with dense rows, got ", flat.sizes());
  std::vector<at::Tensor> parts;
  parts.reserve(shapes.size());
  int64_t at = flat.storage_offset();
  const int64_t end = at + flat.size(-1);
  for (const std::vector<int64_t>& shape : shapes) {
    const bool rows = flat.dim() == 2;
    std::vector<int64_t> sizes, strides(shape.size() + rows);
    if (rows) sizes.push_back(flat.size(0)), strides[0] = flat.stride(0);
    sizes.insert(sizes.end(), shape.begin(), shape.end());
    int64_t count = 1;
    for (size_t d = sizes.size(); d-- > (rows ? 1 : 0);) strides[d] = count, count *= sizes[d];
    TORCH_CHECK_VALUE(count >= 0 && at + count <= end, "flat has too few elements: ", flat.sizes());
    parts.push_back(at::as_strided(flat, sizes, strides, at));
    at += count;
  }
  return parts;
}

VectorList rows_of(const at::Tensor& t) {
  const DType dtype = t.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
  return {{{static_cast<char*>(t.data_ptr()), t.size(1), t.size(1)}}, dtype};
}

}  // namespace hg
