// The pybind11 module hypergrad_ext._C: every host function, by its own name.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <tuple>
#include <vector>

#include "cpu/amx.h"
#include "cpu/blas.h"
#include "cpu/isa.h"
#include "host.h"
#include "tensors.h"
#if defined(HG_EMULATE_CUDA)
#include "cuda/emulator/emulator.h"
#endif

namespace py = pybind11;

namespace hg {

const at::Tensor* from_python(PyObject* object) {
  return THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}
PyObject* to_python(const at::Tensor& t) { return THPVariable_Wrap(t); }

namespace plan {
void bind(py::module_& m);
}  // namespace plan

}  // namespace hg

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
    const at::Tensor* t = hg::from_python(object);
    if (!t) throw py::type_error(std::string(name) + " must hold tensors, got " + type_name(object));
    // Their memory, if any, is not their values: wrappers (DTensor, FakeTensor), and what is zero or negated lazily.
    constexpr c10::DispatchKeySet kBeyondMemory{c10::DispatchKey::Python, c10::DispatchKey::ZeroTensor,
                                                c10::DispatchKey::Negative, c10::DispatchKey::Conjugate};
    if (t->key_set().has_any(kBeyondMemory))
      throw py::type_error(std::string(name) + " must be in plain memory, got a " + type_name(object) +
                           (t->key_set().has(c10::DispatchKey::Python) ? "" : " that is zero or negated lazily"));
    return *t;
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

void pcg_step_(py::handle x, py::handle r, py::handle p, py::handle hp, py::handle m, py::handle state,
               double damping) {
  const TensorSequence x_list("x", x), r_list("r", r), p_list("p", p), hp_list("hp", hp), m_list("m", m);
  const at::Tensor& state_tensor = TensorSequence::tensor("state", state.ptr());
  const py::gil_scoped_release release;
  hg::pcg_step_(x_list, r_list, p_list, hp_list, m_list, state_tensor, damping);
}

void richardson_step_(py::handle x, py::handle hx, py::handle b, py::handle m, py::handle stats, double alpha,
                      double damping) {
  const TensorSequence x_list("x", x), hx_list("hx", hx), b_list("b", b), m_list("m", m);
  const at::Tensor& stats_tensor = TensorSequence::tensor("stats", stats.ptr());
  const py::gil_scoped_release release;
  hg::richardson_step_(x_list, hx_list, b_list, m_list, stats_tensor, alpha, damping);
}

void chebyshev_step_(py::handle x_old, py::handle x, py::handle hx, py::handle b, py::handle m, py::handle stats,
                     double alpha, double momentum, double damping) {
  const TensorSequence old_list("x_old", x_old), x_list("x", x), hx_list("hx", hx), b_list("b", b), m_list("m", m);
  const at::Tensor& stats_tensor = TensorSequence::tensor("stats", stats.ptr());
  const py::gil_scoped_release release;
  hg::chebyshev_step_(old_list, x_list, hx_list, b_list, m_list, stats_tensor, alpha, momentum, damping);
}

void minres_step_(py::handle x, py::handle v, py::handle v_old, py::handle w, py::handle w_old, py::handle hv,
                  py::handle state, double damping) {
  const TensorSequence x_list("x", x), v_list("v", v), v_old_list("v_old", v_old);
  const TensorSequence w_list("w", w), w_old_list("w_old", w_old), hv_list("hv", hv);
  const at::Tensor& state_tensor = TensorSequence::tensor("state", state.ptr());
  const py::gil_scoped_release release;
  hg::minres_step_(x_list, v_list, v_old_list, w_list, w_old_list, hv_list, state_tensor, damping);
}

py::object wrap(const at::Tensor& t) { return py::reinterpret_steal<py::object>(hg::to_python(t)); }

const at::Tensor& tensor(const char* name, py::handle object) { return TensorSequence::tensor(name, object.ptr()); }

std::optional<at::Tensor> optional_tensor(const char* name, py::handle object) {
  if (object.is_none()) return std::nullopt;
  return tensor(name, object);
}

// f's tensor, computed without the GIL.
template <class F>
py::object tensor_of(const F& f) {
  at::Tensor result;
  {
    const py::gil_scoped_release release;
    result = f();
  }
  return wrap(result);
}

// f's tensors as a Python tuple, likewise.
template <class F>
py::tuple tensors_of(const F& f) {
  decltype(f()) result;
  {
    const py::gil_scoped_release release;
    result = f();
  }
  return std::apply([](const auto&... t) { return py::make_tuple(wrap(t)...); }, result);
}

// The tensors that every op of the GLM family starts with.
struct GlmArguments {
  at::Tensor x, weights, v;
  std::optional<at::Tensor> l2;

  GlmArguments(py::handle x_, py::handle weights_, const char* name, py::handle v_, py::handle l2_)
      : x(tensor("x", x_)), weights(tensor("weights", weights_)), v(tensor(name, v_)), l2(optional_tensor("l2", l2_)) {}
};

py::list views(py::handle flat, const std::vector<std::vector<int64_t>>& shapes) {
  py::list list;
  for (const at::Tensor& part : hg::views(TensorSequence::tensor("flat", flat.ptr()), shapes))
    list.append(py::reinterpret_steal<py::object>(hg::to_python(part)));
  return list;
}

py::object norms(py::handle x, std::optional<int64_t> rows) {
  const TensorSequence list("x", x);
  return tensor_of([&] { return hg::norms(list, rows); });
}

py::object glm_hvp(py::handle x, py::handle weights, py::handle v, py::handle l2, double scale, bool intercept) {
  const GlmArguments a(x, weights, "v", v, l2);
  return tensor_of([&] { return hg::glm_hvp(a.x, a.weights, a.v, a.l2, scale, intercept); });
}

py::object glm_gram(py::handle x, py::handle weights) {
  const at::Tensor &a = tensor("x", x), &b = tensor("weights", weights);
  return tensor_of([&] { return hg::glm_gram(a, b); });
}

py::tuple glm_neumann_solve(py::handle x, py::handle weights, py::handle b, py::handle l2, double scale, bool intercept,
                            double alpha, double damping, int64_t steps, py::handle stop) {
  const GlmArguments a(x, weights, "b", b, l2);
  const at::Tensor& limit = tensor("stop", stop);
  return tensors_of(
      [&] { return hg::glm_neumann_solve(a.x, a.weights, a.v, a.l2, scale, intercept, alpha, damping, steps, limit); });
}

py::tuple glm_neumann_plan(py::handle x, py::handle weights, py::handle b, py::handle l2, double scale,
                           bool intercept) {
  const GlmArguments a(x, weights, "b", b, l2);
  const hg::Plan plan = hg::glm_neumann_plan(a.x, a.weights, a.v, a.l2, scale, intercept);
  return py::make_tuple(plan.path, plan.reason);
}

py::tuple glm_cg_solve(py::handle x, py::handle weights, py::handle b, py::handle l2, double scale, bool intercept,
                       double damping, int64_t steps, py::handle state) {
  const GlmArguments a(x, weights, "b", b, l2);
  const at::Tensor& scalars = tensor("state", state);
  return tensors_of(
      [&] { return hg::glm_cg_solve(a.x, a.weights, a.v, a.l2, scale, intercept, damping, steps, scalars); });
}

// The tensors that both forms of softmax_hessian start with.
struct SoftmaxArguments {
  at::Tensor logits, u;
  std::optional<at::Tensor> weights;

  SoftmaxArguments(py::handle logits_, py::handle u_, py::handle weights_)
      : logits(tensor("logits", logits_)), u(tensor("u", u_)), weights(optional_tensor("weights", weights_)) {}
};

py::object softmax_hessian(py::handle logits, py::handle u, double scale, py::handle weights) {
  const SoftmaxArguments a(logits, u, weights);
  return tensor_of([&] { return hg::softmax_hessian(a.logits, a.u, scale, a.weights); });
}

void softmax_hessian_(py::handle logits, py::handle u, double scale, py::handle weights) {
  const SoftmaxArguments a(logits, u, weights);
  const py::gil_scoped_release release;
  hg::softmax_hessian_(a.logits, a.u, scale, a.weights);
}

// The tensors that every op of the MLP family starts with.
struct MlpArguments {
  TensorSequence weights, hidden, slopes, bends, deltas;
  std::optional<at::Tensor> probabilities;
  const at::Tensor& v;

  MlpArguments(py::handle weights_, py::handle hidden_, py::handle slopes_, py::handle bends_, py::handle deltas_,
               py::handle probabilities_, const char* name, py::handle v_)
      : weights("weights", weights_),
        hidden("hidden", hidden_),
        slopes("slopes", slopes_),
        bends("bends", bends_),
        deltas("deltas", deltas_),
        probabilities(optional_tensor("probabilities", probabilities_)),
        v(tensor(name, v_)) {}

  // f(weights, ..., v, rest...)
  template <class F, class... Rest>
  auto call(const F& f, const Rest&... rest) const {
    return f(weights, hidden, slopes, bends, deltas, probabilities, v, rest...);
  }
};

py::object mlp_hvp(py::handle weights, py::handle hidden, py::handle slopes, py::handle bends, py::handle deltas,
                   py::handle probabilities, py::handle v, double scale, bool biases, double l2) {
  const MlpArguments a(weights, hidden, slopes, bends, deltas, probabilities, "v", v);
  return tensor_of([&] { return a.call(hg::mlp_hvp, scale, biases, l2); });
}

py::tuple mlp_hvp_plan(const py::sequence& sizes, int64_t n, int64_t k, int64_t itemsize, bool curved,
                       const py::object& chip) {
  std::vector<int64_t> all;
  for (const py::handle size : sizes) all.push_back(size.cast<int64_t>());
  std::optional<hg::Chip> known;
  if (!chip.is_none()) {
    const auto of = [&](const char* key) { return chip[key].cast<int>(); };
    known = hg::Chip{of("multiprocessors"), of("shared_per_block"), of("shared_per_multiprocessor"), of("cooperative"),
                     of("capability")};
  }
  const hg::Plan plan = hg::mlp_hvp_plan(all, n, k, itemsize, curved, known);
  return py::make_tuple(plan.path, plan.reason);
}

py::tuple mlp_neumann_solve(py::handle weights, py::handle hidden, py::handle slopes, py::handle bends,
                            py::handle deltas, py::handle probabilities, py::handle b, double scale, bool biases,
                            double l2, double alpha, double damping, int64_t steps, py::handle stop) {
  const MlpArguments a(weights, hidden, slopes, bends, deltas, probabilities, "b", b);
  const at::Tensor& limit = tensor("stop", stop);
  return tensors_of([&] { return a.call(hg::mlp_neumann_solve, scale, biases, l2, alpha, damping, steps, limit); });
}

py::tuple mlp_cg_solve(py::handle weights, py::handle hidden, py::handle slopes, py::handle bends, py::handle deltas,
                       py::handle probabilities, py::handle b, double scale, bool biases, double l2, double damping,
                       int64_t steps, py::handle state) {
  const MlpArguments a(weights, hidden, slopes, bends, deltas, probabilities, "b", b);
  const at::Tensor& scalars = tensor("state", state);
  return tensors_of([&] { return a.call(hg::mlp_cg_solve, scale, biases, l2, damping, steps, scalars); });
}

py::tuple dense_neumann_solve(py::handle matrix, py::handle b, double alpha, double damping, int64_t steps,
                              py::handle stop) {
  const at::Tensor &a = tensor("matrix", matrix), &rows = tensor("b", b), &limit = tensor("stop", stop);
  return tensors_of([&] { return hg::dense_neumann_solve(a, rows, alpha, damping, steps, limit); });
}

py::tuple dense_cg_solve(py::handle matrix, py::handle b, double damping, int64_t steps, py::handle state) {
  const at::Tensor &a = tensor("matrix", matrix), &rows = tensor("b", b), &scalars = tensor("state", state);
  return tensors_of([&] { return hg::dense_cg_solve(a, rows, damping, steps, scalars); });
}

py::tuple lstm_cell(py::handle gates, py::handle c) {
  const at::Tensor &a = tensor("gates", gates), &b = tensor("c", c);
  return tensors_of([&] { return hg::lstm_cell(a, b); });
}

py::tuple lstm_cell_backward(py::handle activations, py::handle c, py::handle c_next, py::handle grad_h,
                             py::handle grad_c, py::handle grad_activations) {
  const at::Tensor &a = tensor("activations", activations), &before = tensor("c", c), &after = tensor("c_next", c_next);
  const at::Tensor &by_h = tensor("grad_h", grad_h), &by_c = tensor("grad_c", grad_c);
  const auto by_a = optional_tensor("grad_activations", grad_activations);
  return tensors_of([&] { return hg::lstm_cell_backward(a, before, after, by_h, by_c, by_a); });
}

py::tuple lstm_cell_double_backward(py::handle activations, py::handle c, py::handle c_next, py::handle grad_h,
                                    py::handle grad_c, py::handle v_gates, py::handle v_c) {
  const at::Tensor &a = tensor("activations", activations), &before = tensor("c", c), &after = tensor("c_next", c_next);
  const at::Tensor &by_h = tensor("grad_h", grad_h), &by_c = tensor("grad_c", grad_c);
  const at::Tensor &v_a = tensor("v_gates", v_gates), &v_before = tensor("v_c", v_c);
  return tensors_of([&] { return hg::lstm_cell_double_backward(a, before, after, by_h, by_c, v_a, v_before); });
}

py::tuple lstm_layer(py::handle x_gates, py::handle w_hh, py::handle h0, py::handle c0) {
  const at::Tensor &x = tensor("x_gates", x_gates), &w = tensor("w_hh", w_hh), &h = tensor("h0", h0);
  const at::Tensor& c = tensor("c0", c0);
  return tensors_of([&] { return hg::lstm_layer(x, w, h, c); });
}

py::tuple lstm_layer_backward(py::handle activations, py::handle c, py::handle c0, py::handle w_hh, py::handle grad_h,
                              py::handle grad_c, py::handle grad_activations) {
  const at::Tensor &a = tensor("activations", activations), &after = tensor("c", c), &first = tensor("c0", c0);
  const at::Tensor &w = tensor("w_hh", w_hh), &by_h = tensor("grad_h", grad_h);
  const auto by_c = optional_tensor("grad_c", grad_c), by_a = optional_tensor("grad_activations", grad_activations);
  return tensors_of([&] { return hg::lstm_layer_backward(a, after, first, w, by_h, by_c, by_a); });
}

py::tuple lstm_layer_double_backward(py::handle activations, py::handle c, py::handle c0, py::handle w_hh,
                                     py::handle dh, py::handle dc, py::handle v_gates, py::handle v_h0,
                                     py::handle v_c0) {
  const at::Tensor &a = tensor("activations", activations), &after = tensor("c", c), &first = tensor("c0", c0);
  const at::Tensor &w = tensor("w_hh", w_hh), &by_h = tensor("dh", dh), &by_c = tensor("dc", dc);
  const at::Tensor &v_a = tensor("v_gates", v_gates), &v_h = tensor("v_h0", v_h0), &v_c = tensor("v_c0", v_c0);
  return tensors_of([&] { return hg::lstm_layer_double_backward(a, after, first, w, by_h, by_c, v_a, v_h, v_c); });
}

py::dict build_info() {
  py::dict info;
  info["isa"] = hg::cpu::isa_name();
  info["amx"] = hg::cpu::has_amx();
  info["vendor"] = hg::cpu::vendor();
  info["blas_at_half_speed"] = hg::cpu::blas_at_half_speed();
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
  info["launches"] = hg::emulator::counts().launches;
  info["bulk_copies"] = hg::emulator::counts().bulk_copies;
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
  m.def("views", &views, py::arg("flat"), py::arg("shapes"));
  m.def("norms", &norms, py::arg("x"), py::arg("rows") = py::none());
  m.def("neumann_step_", &neumann_step_, py::arg("v"), py::arg("p"), py::arg("hv"), py::arg("stats"), py::arg("alpha"),
        py::arg("damping") = 0.0);
  m.def("cg_step_", &cg_step_, py::arg("x"), py::arg("r"), py::arg("p"), py::arg("hp"), py::arg("state"),
        py::arg("damping") = 0.0);
  m.def("pcg_step_", &pcg_step_, py::arg("x"), py::arg("r"), py::arg("p"), py::arg("hp"), py::arg("m"),
        py::arg("state"), py::arg("damping") = 0.0);
  m.def("richardson_step_", &richardson_step_, py::arg("x"), py::arg("hx"), py::arg("b"), py::arg("m"),
        py::arg("stats"), py::arg("alpha"), py::arg("damping") = 0.0);
  m.def("chebyshev_step_", &chebyshev_step_, py::arg("x_old"), py::arg("x"), py::arg("hx"), py::arg("b"), py::arg("m"),
        py::arg("stats"), py::arg("alpha"), py::arg("momentum"), py::arg("damping") = 0.0);
  m.def("minres_step_", &minres_step_, py::arg("x"), py::arg("v"), py::arg("v_old"), py::arg("w"), py::arg("w_old"),
        py::arg("hv"), py::arg("state"), py::arg("damping") = 0.0);
  m.def("glm_hvp", &glm_hvp, py::arg("x"), py::arg("weights"), py::arg("v"), py::arg("l2"), py::arg("scale"),
        py::arg("intercept"));
  m.def("glm_gram", &glm_gram, py::arg("x"), py::arg("weights"));
  m.def("glm_neumann_solve", &glm_neumann_solve, py::arg("x"), py::arg("weights"), py::arg("b"), py::arg("l2"),
        py::arg("scale"), py::arg("intercept"), py::arg("alpha"), py::arg("damping"), py::arg("steps"),
        py::arg("stop"));
  m.def("glm_neumann_plan", &glm_neumann_plan, py::arg("x"), py::arg("weights"), py::arg("b"), py::arg("l2"),
        py::arg("scale"), py::arg("intercept"));
  m.def("glm_cg_solve", &glm_cg_solve, py::arg("x"), py::arg("weights"), py::arg("b"), py::arg("l2"), py::arg("scale"),
        py::arg("intercept"), py::arg("damping"), py::arg("steps"), py::arg("state"));
  m.def("softmax_hessian", &softmax_hessian, py::arg("logits"), py::arg("u"), py::arg("scale"),
        py::arg("weights") = py::none());
  m.def("softmax_hessian_", &softmax_hessian_, py::arg("logits"), py::arg("u"), py::arg("scale"),
        py::arg("weights") = py::none());
  m.def("mlp_hvp", &mlp_hvp, py::arg("weights"), py::arg("hidden"), py::arg("slopes"), py::arg("bends"),
        py::arg("deltas"), py::arg("probabilities"), py::arg("v"), py::arg("scale"), py::arg("biases"), py::arg("l2"));
  m.def("mlp_hvp_plan", &mlp_hvp_plan, py::arg("sizes"), py::arg("n"), py::arg("k"), py::arg("itemsize"),
        py::arg("curved"), py::arg("chip") = py::none());
  m.def("mlp_neumann_solve", &mlp_neumann_solve, py::arg("weights"), py::arg("hidden"), py::arg("slopes"),
        py::arg("bends"), py::arg("deltas"), py::arg("probabilities"), py::arg("b"), py::arg("scale"),
        py::arg("biases"), py::arg("l2"), py::arg("alpha"), py::arg("damping"), py::arg("steps"), py::arg("stop"));
  m.def("mlp_cg_solve", &mlp_cg_solve, py::arg("weights"), py::arg("hidden"), py::arg("slopes"), py::arg("bends"),
        py::arg("deltas"), py::arg("probabilities"), py::arg("b"), py::arg("scale"), py::arg("biases"), py::arg("l2"),
        py::arg("damping"), py::arg("steps"), py::arg("state"));
  m.def("dense_neumann_solve", &dense_neumann_solve, py::arg("matrix"), py::arg("b"), py::arg("alpha"),
        py::arg("damping"), py::arg("steps"), py::arg("stop"));
  m.def("dense_cg_solve", &dense_cg_solve, py::arg("matrix"), py::arg("b"), py::arg("damping"), py::arg("steps"),
        py::arg("state"));
  m.def("lstm_cell", &lstm_cell, py::arg("gates"), py::arg("c"));
  m.def("lstm_cell_backward", &lstm_cell_backward, py::arg("activations"), py::arg("c"), py::arg("c_next"),
        py::arg("grad_h"), py::arg("grad_c"), py::arg("grad_activations") = py::none());
  m.def("lstm_cell_double_backward", &lstm_cell_double_backward, py::arg("activations"), py::arg("c"),
        py::arg("c_next"), py::arg("grad_h"), py::arg("grad_c"), py::arg("v_gates"), py::arg("v_c"));
  m.def("lstm_layer", &lstm_layer, py::arg("x_gates"), py::arg("w_hh"), py::arg("h0"), py::arg("c0"));
  m.def("lstm_layer_backward", &lstm_layer_backward, py::arg("activations"), py::arg("c"), py::arg("c0"),
        py::arg("w_hh"), py::arg("grad_h"), py::arg("grad_c") = py::none(), py::arg("grad_activations") = py::none());
  m.def("lstm_layer_double_backward", &lstm_layer_double_backward, py::arg("activations"), py::arg("c"), py::arg("c0"),
        py::arg("w_hh"), py::arg("dh"), py::arg("dc"), py::arg("v_gates"), py::arg("v_h0"), py::arg("v_c0"));
  hg::plan::bind(m);
}
