// The pybind11 module hypergrad_ext._C: every host function, by its own name.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "cpu/isa.h"
#include "host.h"

namespace py = pybind11;

namespace {

// A list or tuple of tensors, borrowed from Python for the length of the call: counting references
// of 150 tensors would take as long as the kernel.
class TensorSequence {
  using Borrow = c10::MaybeOwnedTraits<at::Tensor>;

 public:
  TensorSequence(const char* name, const py::handle& object) {
    if (!PyList_Check(object.ptr()) && !PyTuple_Check(object.ptr()))
      throw py::type_error(std::string(name) + " must be a list or tuple of tensors, got " + type_name(object.ptr()));
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(object.ptr());
    tensors_.reserve(size);
    for (Py_ssize_t i = 0; i < size; ++i)
      tensors_.push_back(Borrow::createBorrow(tensor(name, PySequence_Fast_GET_ITEM(object.ptr(), i))));
  }
  TensorSequence(const TensorSequence&) = delete;
  ~TensorSequence() {
    for (at::Tensor& t : tensors_) Borrow::destroyBorrow(t);
  }

  static const at::Tensor& tensor(const char* name, PyObject* object) {
    if (!THPVariable_Check(object))
      throw py::type_error(std::string(name) + " must hold tensors, got " + type_name(object));
    return THPVariable_Unpack(object);
  }

  operator at::TensorList() const { return tensors_; }

 private:
  static const char* type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }
  std::vector<at::Tensor> tensors_;
};

void neumann_step_(py::handle v, py::handle p, py::handle hv, py::handle stats, double alpha, double damping) {
  const TensorSequence v_list("v", v), p_list("p", p), hv_list("hv", hv);
  const at::Tensor& stats_tensor = TensorSequence::tensor("stats", stats.ptr());
  const py::gil_scoped_release release;
  hg::neumann_step_(v_list, p_list, hv_list, stats_tensor, alpha, damping);
}

void cg_step_(py::handle x, py::handle r, py::handle p, py::handle hp, py::handle state, double damping) {
  const TensorSequence x_list("x", x), r_list("r", r), p_list("p", p), hp_list("hp", hp);
  const at::Tensor& state_tensor = TensorSequence::tensor("state", state.ptr());
  const py::gil_scoped_release release;
  hg::cg_step_(x_list, r_list, p_list, hp_list, state_tensor, damping);
}

py::object wrap(const at::Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

// The tensors that every op of the GLM family starts with.
struct GlmArguments {
  at::Tensor x, weights, v;
  std::optional<at::Tensor> l2;

  GlmArguments(py::handle x_, py::handle weights_, const char* name, py::handle v_, py::handle l2_)
      : x(TensorSequence::tensor("x", x_.ptr())),
        weights(TensorSequence::tensor("weights", weights_.ptr())),
        v(TensorSequence::tensor(name, v_.ptr())) {
    if (!l2_.is_none()) l2 = TensorSequence::tensor("l2", l2_.ptr());
  }
};

py::object glm_hvp(py::handle x, py::handle weights, py::handle v, py::handle l2, double scale, bool intercept) {
  const GlmArguments a(x, weights, "v", v, l2);
  at::Tensor out;
  {
    const py::gil_scoped_release release;
    out = hg::glm_hvp(a.x, a.weights, a.v, a.l2, scale, intercept);
  }
  return wrap(out);
}

py::tuple glm_neumann_solve(py::handle x, py::handle weights, py::handle b, py::handle l2, double scale, bool intercept,
                            double alpha, double damping, int64_t steps, py::handle stop) {
  const GlmArguments a(x, weights, "b", b, l2);
  const at::Tensor& limit = TensorSequence::tensor("stop", stop.ptr());
  std::tuple<at::Tensor, at::Tensor> result;
  {
    const py::gil_scoped_release release;
    result = hg::glm_neumann_solve(a.x, a.weights, a.v, a.l2, scale, intercept, alpha, damping, steps, limit);
  }
  return py::make_tuple(wrap(std::get<0>(result)), wrap(std::get<1>(result)));
}

py::tuple glm_cg_solve(py::handle x, py::handle weights, py::handle b, py::handle l2, double scale, bool intercept,
                       double damping, int64_t steps, py::handle state) {
  const GlmArguments a(x, weights, "b", b, l2);
  const at::Tensor& scalars = TensorSequence::tensor("state", state.ptr());
  std::tuple<at::Tensor, at::Tensor, at::Tensor> result;
  {
    const py::gil_scoped_release release;
    result = hg::glm_cg_solve(a.x, a.weights, a.v, a.l2, scale, intercept, damping, steps, scalars);
  }
  return py::make_tuple(wrap(std::get<0>(result)), wrap(std::get<1>(result)), wrap(std::get<2>(result)));
}

// The tensors that both forms of softmax_hessian start with.
struct SoftmaxArguments {
  at::Tensor logits, u;
  std::optional<at::Tensor> weights;

  SoftmaxArguments(py::handle logits_, py::handle u_, py::handle weights_)
      : logits(TensorSequence::tensor("logits", logits_.ptr())), u(TensorSequence::tensor("u", u_.ptr())) {
    if (!weights_.is_none()) weights = TensorSequence::tensor("weights", weights_.ptr());
  }
};

py::object softmax_hessian(py::handle logits, py::handle u, double scale, py::handle weights) {
  const SoftmaxArguments a(logits, u, weights);
  at::Tensor out;
  {
    const py::gil_scoped_release release;
    out = hg::softmax_hessian(a.logits, a.u, scale, a.weights);
  }
  return wrap(out);
}

void softmax_hessian_(py::handle logits, py::handle u, double scale, py::handle weights) {
  const SoftmaxArguments a(logits, u, weights);
  const py::gil_scoped_release release;
  hg::softmax_hessian_(a.logits, a.u, scale, a.weights);
}

py::object mlp_hvp(py::handle weights, py::handle hidden, py::handle slopes, py::handle bends, py::handle deltas,
                   py::handle probabilities, py::handle v, double scale, bool biases, double l2) {
  const TensorSequence weight_list("weights", weights), hidden_list("hidden", hidden), slope_list("slopes", slopes);
  const TensorSequence bend_list("bends", bends), delta_list("deltas", deltas);
  std::optional<at::Tensor> p;
  if (!probabilities.is_none()) p = TensorSequence::tensor("probabilities", probabilities.ptr());
  const at::Tensor& vectors = TensorSequence::tensor("v", v.ptr());
  at::Tensor out;
  {
    const py::gil_scoped_release release;
    out = hg::mlp_hvp(weight_list, hidden_list, slope_list, bend_list, delta_list, p, vectors, scale, biases, l2);
  }
  return wrap(out);
}

py::dict build_info() {
  py::dict info;
  info["isa"] = hg::cpu::isa_name();
  info["threads"] = at::get_num_threads();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(HG_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#if defined(HG_EMULATE_CUDA)
  info["emulated"] = true;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // Without torch's own translator a c10 error would carry the C++ backtrace into the message.
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const c10::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
    } catch (const c10::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
    } catch (const c10::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
    }
  });
  m.doc() = "Compiled kernels of hypergrad_ext.";
  m.def("build_info", &build_info);
  m.def("neumann_step_", &neumann_step_, py::arg("v"), py::arg("p"), py::arg("hv"), py::arg("stats"), py::arg("alpha"),
        py::arg("damping") = 0.0);
  m.def("cg_step_", &cg_step_, py::arg("x"), py::arg("r"), py::arg("p"), py::arg("hp"), py::arg("state"),
        py::arg("damping") = 0.0);
  m.def("glm_hvp", &glm_hvp, py::arg("x"), py::arg("weights"), py::arg("v"), py::arg("l2"), py::arg("scale"),
        py::arg("intercept"));
  m.def("glm_neumann_solve", &glm_neumann_solve, py::arg("x"), py::arg("weights"), py::arg("b"), py::arg("l2"),
        py::arg("scale"), py::arg("intercept"), py::arg("alpha"), py::arg("damping"), py::arg("steps"),
        py::arg("stop"));
  m.def("glm_cg_solve", &glm_cg_solve, py::arg("x"), py::arg("weights"), py::arg("b"), py::arg("l2"), py::arg("scale"),
        py::arg("intercept"), py::arg("damping"), py::arg("steps"), py::arg("state"));
  m.def("softmax_hessian", &softmax_hessian, py::arg("logits"), py::arg("u"), py::arg("scale"),
        py::arg("weights") = py::none());
  m.def("softmax_hessian_", &softmax_hessian_, py::arg("logits"), py::arg("u"), py::arg("scale"),
        py::arg("weights") = py::none());
  m.def("mlp_hvp", &mlp_hvp, py::arg("weights"), py::arg("hidden"), py::arg("slopes"), py::arg("bends"),
        py::arg("deltas"), py::arg("probabilities"), py::arg("v"), py::arg("scale"), py::arg("biases"), py::arg("l2"));
}
