// New tensors, and tensors in and out of Python. torch's headers for these take far longer to compile than the host
// functions that need them: tensors.cpp and bindings.cpp include them once for all.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "vector_list.h"

struct _object;  // PyObject

namespace hg {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& t);
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor full(at::IntArrayRef sizes, double value, const at::TensorOptions& options);

// Parts of a flat tensor (n,), or (k, n), one after another along its last dimension, as views of these shapes.
std::vector<at::Tensor> views(const at::Tensor& flat, const std::vector<std::vector<int64_t>>& shapes);

// Rows of vectors, (k, n), as a list of one tensor.
VectorList rows_of(const at::Tensor& t);

// What is wrong with an argument that requires grad.
constexpr char kRequiresGrad[] =
    " must not require grad: this op is not differentiable when it is called directly, hypergrad_ext.functional is";

// The tensor that a Python object is, or null.
const at::Tensor* from_python(_object* object);
// A new reference.
_object* to_python(const at::Tensor& t);

}  // namespace hg
