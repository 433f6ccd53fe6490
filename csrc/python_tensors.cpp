#include <torch/csrc/autograd/python_variable.h>

#include "tensors.h"

namespace hg {

const at::Tensor* from_python(PyObject* object) {
  return THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

PyObject* to_python(const at::Tensor& t) { return THPVariable_Wrap(t); }

}  // namespace hg
