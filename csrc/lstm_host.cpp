// Host functions of the LSTM ops: tensors in, memory-safety checks, kernel calls.
#include <c10/core/GradMode.h>

#include "cuda/call.h"
#include "host.h"
#include "lstm.h"
#include "tensors.h"

namespace hg {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::f64;
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float64, float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

// Holds every tensor of a call to the first one's dtype and device; copies what is not contiguous.
class Like {
 public:
  Like(const char* name, const Tensor& t) : name_(name), options_(t.options().requires_grad(false)) {
    TORCH_CHECK_VALUE(t.is_cpu() || t.is_cuda(), name, " must be on a CPU or CUDA device, got ", t.device());
  }

  Tensor operator()(const char* name, const Tensor& t, at::IntArrayRef sizes) const {
    TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == options_.dtype(), name, " must be ", options_.dtype(), " like ", name_,
                     ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == options_.device(), name, " must be on ", options_.device(), " like ", name_,
                      ", got ", t.device());
    // Autograd does not see the kernel.
    TORCH_CHECK_VALUE(!t.requires_grad() || !c10::GradMode::is_enabled(), name, kRequiresGrad);
    return t.contiguous();
  }

  Tensor empty(at::IntArrayRef sizes) const { return hg::empty(sizes, options_); }

 private:
  const char* name_;
  at::TensorOptions options_;
};

const void* data_of(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

template <class Data>
void run_cell(const char* op, const Tensor& c, const LstmSize& size, const Data& data) {
  if (cuda::for_cpu(c)) return cpu::lstm_cell(size, data);
  cuda::call(op, c.device(), [&](const auto&, auto stream) { return cuda::lstm_cell(size, data, stream); });
}

// What the kernels of a single step and of a layer share. c fixes shape, dtype and device.
struct CellShapes {
  LstmSize size;
  std::array<int64_t, 2> state, gates;

  explicit CellShapes(const Tensor& c) {
    TORCH_CHECK_VALUE(c.dim() == 2, "c must have shape (rows, units), got ", c.sizes());
    size = {dtype_of("c", c), c.size(0), c.size(1)};
    state = {size.rows, size.units}, gates = {size.rows, 4 * size.units};
  }
};

struct LayerShapes {
  LstmLayerSize size;
  std::array<int64_t, 2> state, weight;
  std::array<int64_t, 3> states, gates;

  LayerShapes(const char* name, const Tensor& sequence, const Tensor& c0) {
    TORCH_CHECK_VALUE(c0.dim() == 2, "c0 must have shape (batch, units), got ", c0.sizes());
    TORCH_CHECK_VALUE(sequence.dim() == 3 && sequence.size(0) > 0, name,
                      " must have shape (steps, batch, 4 units) with at least one step, got ", sequence.sizes());
    size = {dtype_of("c0", c0), sequence.size(0), c0.size(0), c0.size(1)};
    state = {size.batch, size.units}, weight = {4 * size.units, size.units};
    states = {size.steps, size.batch, size.units}, gates = {size.steps, size.batch, 4 * size.units};
  }

  // Else the layer is a loop of matrix products and cells: on a GPU, and in half precision.
  bool whole(const Tensor& c0) const {
    return cuda::for_cpu(c0) && (size.dtype == DType::f64 || size.dtype == DType::f32);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& gates_, const Tensor& c_) {
  const CellShapes shapes(c_);
  const Like like("c", c_);
  const Tensor c = like("c", c_, shapes.state), gates = like("gates", gates_, shapes.gates);
  const Tensor h = empty_like(c), c_next = empty_like(c), activations = empty_like(gates);
  run_cell("lstm_cell", c, shapes.size,
           LstmForward{gates.const_data_ptr(), c.const_data_ptr(), h.mutable_data_ptr(), c_next.mutable_data_ptr(),
                       activations.mutable_data_ptr()});
  return {h, c_next, activations};
}

std::tuple<Tensor, Tensor> lstm_cell_backward(const Tensor& activations_, const Tensor& c_, const Tensor& c_next_,
                                              const Tensor& grad_h_, const Tensor& grad_c_,
                                              const Optional& grad_activations_) {
  const CellShapes shapes(c_);
  const Like like("c", c_);
  const Tensor c = like("c", c_, shapes.state), activations = like("activations", activations_, shapes.gates);
  const Tensor c_next = like("c_next", c_next_, shapes.state), grad_h = like("grad_h", grad_h_, shapes.state);
  const Tensor grad_c = like("grad_c", grad_c_, shapes.state);
  Optional grad_activations;
  if (grad_activations_) grad_activations = like("grad_activations", *grad_activations_, shapes.gates);
  const Tensor grad_gates = empty_like(activations), grad_c_prev = empty_like(c);
  run_cell("lstm_cell_backward", c, shapes.size,
           LstmBackward{activations.const_data_ptr(), c.const_data_ptr(), c_next.const_data_ptr(),
                        grad_h.const_data_ptr(), grad_c.const_data_ptr(), data_of(grad_activations),
                        grad_gates.mutable_data_ptr(), grad_c_prev.mutable_data_ptr()});
  return {grad_gates, grad_c_prev};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_double_backward(
    const Tensor& activations_, const Tensor& c_, const Tensor& c_next_, const Tensor& grad_h_, const Tensor& grad_c_,
    const Tensor& v_gates_, const Tensor& v_c_) {
  const CellShapes shapes(c_);
  const Like like("c", c_);
  const Tensor c = like("c", c_, shapes.state), activations = like("activations", activations_, shapes.gates);
  const Tensor c_next = like("c_next", c_next_, shapes.state), grad_h = like("grad_h", grad_h_, shapes.state);
  const Tensor grad_c = like("grad_c", grad_c_, shapes.state), v_gates = like("v_gates", v_gates_, shapes.gates);
  const Tensor v_c = like("v_c", v_c_, shapes.state);
  const Tensor by_activations = empty_like(activations), by_c = empty_like(c), by_c_next = empty_like(c);
  const Tensor by_grad_h = empty_like(c), by_grad_c = empty_like(c);
  run_cell(
      "lstm_cell_double_backward", c, shapes.size,
      LstmDoubleBackward{activations.const_data_ptr(), c.const_data_ptr(), c_next.const_data_ptr(),
                         grad_h.const_data_ptr(), grad_c.const_data_ptr(), v_gates.const_data_ptr(),
                         v_c.const_data_ptr(), by_activations.mutable_data_ptr(), by_c.mutable_data_ptr(),
                         by_c_next.mutable_data_ptr(), by_grad_h.mutable_data_ptr(), by_grad_c.mutable_data_ptr()});
  return {by_activations, by_c, by_c_next, by_grad_h, by_grad_c};
}

std::tuple<Tensor, Tensor, Tensor> lstm_layer(const Tensor& x_gates_, const Tensor& w_hh_, const Tensor& h0_,
                                              const Tensor& c0_) {
  const LayerShapes shapes("x_gates", x_gates_, c0_);
  const Like like("c0", c0_);
  const Tensor c0 = like("c0", c0_, shapes.state), x_gates = like("x_gates", x_gates_, shapes.gates);
  const Tensor w_hh = like("w_hh", w_hh_, shapes.weight), h0 = like("h0", h0_, shapes.state);
  const Tensor h = like.empty(shapes.states), c = like.empty(shapes.states), activations = like.empty(shapes.gates);
  if (shapes.whole(c0)) {
    cpu::lstm_layer(shapes.size, LstmLayerForward{x_gates.const_data_ptr(), w_hh.const_data_ptr(), h0.const_data_ptr(),
                                                  c0.const_data_ptr(), h.mutable_data_ptr(), c.mutable_data_ptr(),
                                                  activations.mutable_data_ptr()});
    return {h, c, activations};
  }
  const c10::AutoGradMode no_grad(false);
  const LstmSize cell{shapes.size.dtype, shapes.size.batch, shapes.size.units};
  for (int64_t t = 0; t < shapes.size.steps; ++t) {
    const Tensor gates = activations[t];
    gates.copy_(x_gates[t]);
    gates.addmm_(t ? h[t - 1] : h0, w_hh.t());
    run_cell("lstm_layer", c0, cell,
             LstmForward{gates.const_data_ptr(), (t ? c[t - 1] : c0).const_data_ptr(), h[t].mutable_data_ptr(),
                         c[t].mutable_data_ptr(), gates.mutable_data_ptr()});
  }
  return {h, c, activations};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_layer_backward(const Tensor& activations_, const Tensor& c_,
                                                               const Tensor& c0_, const Tensor& w_hh_,
                                                               const Tensor& grad_h_, const Optional& grad_c_,
                                                               const Optional& grad_activations_) {
  const LayerShapes shapes("activations", activations_, c0_);
  const Like like("c0", c0_);
  const Tensor c0 = like("c0", c0_, shapes.state), c = like("c", c_, shapes.states);
  const Tensor activations = like("activations", activations_, shapes.gates), w_hh = like("w_hh", w_hh_, shapes.weight);
  const Tensor grad_h = like("grad_h", grad_h_, shapes.states);
  Optional grad_activations;
  if (grad_activations_) grad_activations = like("grad_activations", *grad_activations_, shapes.gates);
  const Tensor dc = grad_c_ ? like("grad_c", *grad_c_, shapes.states).clone() : zeros(shapes.states, c.options());
  const Tensor grad_gates = like.empty(shapes.gates), grad_c0 = empty_like(c0), dh = like.empty(shapes.states);
  if (shapes.whole(c0)) {
    cpu::lstm_layer(
        shapes.size,
        LstmLayerBackward{activations.const_data_ptr(), c.const_data_ptr(), c0.const_data_ptr(), w_hh.const_data_ptr(),
                          grad_h.const_data_ptr(), data_of(grad_activations), grad_gates.mutable_data_ptr(),
                          grad_c0.mutable_data_ptr(), dh.mutable_data_ptr(), dc.mutable_data_ptr()});
    return {grad_gates, grad_c0, dh, dc};
  }
  const c10::AutoGradMode no_grad(false);
  const LstmSize cell{shapes.size.dtype, shapes.size.batch, shapes.size.units};
  const Tensor grad_c_prev = empty_like(c0);
  dh[-1].copy_(grad_h[-1]);
  for (int64_t t = shapes.size.steps - 1; t >= 0; --t) {
    const Tensor& out = t ? grad_c_prev : grad_c0;
    const Optional more = grad_activations ? Optional((*grad_activations)[t]) : std::nullopt;
    run_cell("lstm_layer_backward", c0, cell,
             LstmBackward{activations[t].const_data_ptr(), (t ? c[t - 1] : c0).const_data_ptr(), c[t].const_data_ptr(),
                          dh[t].const_data_ptr(), dc[t].const_data_ptr(), data_of(more),
                          grad_gates[t].mutable_data_ptr(), out.mutable_data_ptr()});
    if (t == 0) break;
    dc[t - 1].add_(out);
    dh[t - 1].copy_(grad_h[t - 1]);
    dh[t - 1].addmm_(grad_gates[t], w_hh);
  }
  return {grad_gates, grad_c0, dh, dc};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_double_backward(
    const Tensor& activations_, const Tensor& c_, const Tensor& c0_, const Tensor& w_hh_, const Tensor& dh_,
    const Tensor& dc_, const Tensor& v_gates_, const Tensor& v_h0_, const Tensor& v_c0_) {
  const LayerShapes shapes("activations", activations_, c0_);
  const Like like("c0", c0_);
  const Tensor c0 = like("c0", c0_, shapes.state), c = like("c", c_, shapes.states);
  const Tensor activations = like("activations", activations_, shapes.gates), w_hh = like("w_hh", w_hh_, shapes.weight);
  const Tensor dh = like("dh", dh_, shapes.states), dc = like("dc", dc_, shapes.states);
  const Tensor v_gates = like("v_gates", v_gates_, shapes.gates), v_h0 = like("v_h0", v_h0_, shapes.state);
  const Tensor v_c0 = like("v_c0", v_c0_, shapes.state);
  const Tensor by_activations = like.empty(shapes.gates), by_c = like.empty(shapes.states), by_c0 = empty_like(c0);
  const Tensor by_grad_h = like.empty(shapes.states), by_grad_c = like.empty(shapes.states);
  if (shapes.whole(c0)) {
    cpu::lstm_layer(shapes.size,
                    LstmLayerDoubleBackward{
                        activations.const_data_ptr(), c.const_data_ptr(), c0.const_data_ptr(), w_hh.const_data_ptr(),
                        dh.const_data_ptr(), dc.const_data_ptr(), v_gates.const_data_ptr(), v_h0.const_data_ptr(),
                        v_c0.const_data_ptr(), by_activations.mutable_data_ptr(), by_c.mutable_data_ptr(),
                        by_c0.mutable_data_ptr(), by_grad_h.mutable_data_ptr(), by_grad_c.mutable_data_ptr()});
    return {by_activations, by_c, by_c0, by_grad_h, by_grad_c};
  }
  const c10::AutoGradMode no_grad(false);
  const LstmSize cell{shapes.size.dtype, shapes.size.batch, shapes.size.units};
  const Tensor by_c_prev = empty_like(c0);
  for (int64_t t = 0; t < shapes.size.steps; ++t) {
    const Tensor v = v_gates[t].addmm(t ? by_grad_h[t - 1] : v_h0, w_hh.t());
    const Tensor v_c = t ? by_grad_c[t - 1] : v_c0;
    const Tensor& out = t ? by_c_prev : by_c0;
    run_cell(
        "lstm_layer_double_backward", c0, cell,
        LstmDoubleBackward{activations[t].const_data_ptr(), (t ? c[t - 1] : c0).const_data_ptr(), c[t].const_data_ptr(),
                           dh[t].const_data_ptr(), dc[t].const_data_ptr(), v.const_data_ptr(), v_c.const_data_ptr(),
                           by_activations[t].mutable_data_ptr(), out.mutable_data_ptr(), by_c[t].mutable_data_ptr(),
                           by_grad_h[t].mutable_data_ptr(), by_grad_c[t].mutable_data_ptr()});
    if (t) by_c[t - 1].add_(out);
  }
  return {by_activations, by_c, by_c0, by_grad_h, by_grad_c};
}

}  // namespace hg
