// Host functions: tensors in, memory-safety checks, then one kernel call. Each is bound by pybind11
// (the 1 us path of eager solvers) and registered with the dispatcher (for torch.compile).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "chip.h"

namespace hg {

// Norm of a vector in parts, (), or of every row of its parts, (rows,); float64. On the CPU.
at::Tensor norms(at::TensorList x, std::optional<int64_t> rows);

// Shapes: every tensor of a list has `stats.size(0)` rows when stats is (k, 2), else stats is (2,).
void neumann_step_(at::TensorList v, at::TensorList p, at::TensorList hv, const at::Tensor& stats, double alpha,
                   double damping);

// state is (4,) or (k, 4), laid out as CgState.
void cg_step_(at::TensorList x, at::TensorList r, at::TensorList p, at::TensorList hp, const at::Tensor& state,
              double damping);

// The same for M (H + damping I), M the diagonal matrix m: one row for all. state is (5,) or (k, 5).
void pcg_step_(at::TensorList x, at::TensorList r, at::TensorList p, at::TensorList hp, at::TensorList m,
               const at::Tensor& state, double damping);

// stats is (3,) or (k, 3), laid out as ResidualStats; m is one row for all, or empty for M = I.
void richardson_step_(at::TensorList x, at::TensorList hx, at::TensorList b, at::TensorList m, const at::Tensor& stats,
                      double alpha, double damping);
void chebyshev_step_(at::TensorList x_old, at::TensorList x, at::TensorList hx, at::TensorList b, at::TensorList m,
                     const at::Tensor& stats, double alpha, double momentum, double damping);

// state is (16,) or (k, 16), laid out as MinresState.
void minres_step_(at::TensorList x, at::TensorList v, at::TensorList v_old, at::TensorList w, at::TensorList w_old,
                  at::TensorList hv, const at::Tensor& state, double damping);

// Generalised linear models, H = scale x^T D x + diag(l2). x: (n, d); weights: (n,) for a diagonal D, or
// probabilities (n, classes); v and b: (k, weights of the model), the intercepts last; l2: like one row of v.
at::Tensor glm_hvp(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& v,
                   const std::optional<at::Tensor>& l2, double scale, bool intercept);

// The whole Neumann series; stop: (k,), squared norms. Returns x and the stats of every step, (steps, k, 2),
// -1 for steps not taken.
std::tuple<at::Tensor, at::Tensor> glm_neumann_solve(const at::Tensor& x, const at::Tensor& weights,
                                                     const at::Tensor& b, const std::optional<at::Tensor>& l2,
                                                     double scale, bool intercept, double alpha, double damping,
                                                     int64_t steps, const at::Tensor& stop);

// How the latter runs on the device of its tensors.
Plan glm_neumann_plan(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& b,
                      const std::optional<at::Tensor>& l2, double scale, bool intercept);

// Conjugate gradients; state: (k, 4) as for cg_step_. Returns x, the final state, and the number of steps taken.
std::tuple<at::Tensor, at::Tensor, at::Tensor> glm_cg_solve(const at::Tensor& x, const at::Tensor& weights,
                                                            const at::Tensor& b, const std::optional<at::Tensor>& l2,
                                                            double scale, bool intercept, double damping, int64_t steps,
                                                            const at::Tensor& state);

// X^T diag(weights[:, c]) X for every column c of the weights, (m, d, d). x: (n, d); weights: (n, m), of one dtype,
// both on the CPU.
at::Tensor glm_gram(const at::Tensor& x, const at::Tensor& weights);

// Products with the Hessian of cross-entropy in the logits, scale weights p (u - <p, u>), p = softmax(logits).
// logits: (rows, classes); u: the same, or (k, rows, classes); weights: (rows,). The second form overwrites u.
at::Tensor softmax_hessian(const at::Tensor& logits, const at::Tensor& u, double scale,
                           const std::optional<at::Tensor>& weights);
void softmax_hessian_(const at::Tensor& logits, const at::Tensor& u, double scale,
                      const std::optional<at::Tensor>& weights);

// Multilayer perceptrons. weights: W of every layer, (out, in); hidden: what goes into it, (n, in); slopes: act'(a)
// of every layer but the last, (n, out); bends: act''(a) dL/dh likewise, or empty; deltas: dL/da of every layer but
// the first, (n, out); probabilities: (n, classes), or none for squared error; v: (k, parameters).
at::Tensor mlp_hvp(at::TensorList weights, at::TensorList hidden, at::TensorList slopes, at::TensorList bends,
                   at::TensorList deltas, const std::optional<at::Tensor>& probabilities, const at::Tensor& v,
                   double scale, bool biases, double l2);

// How that runs on a GPU, the current device or another: "one_launch", "launches" per layer, or matrix "products".
// sizes: of the inputs, and of what comes out of every layer; curved: with bends.
Plan mlp_hvp_plan(const std::vector<int64_t>& sizes, int64_t n, int64_t k, int64_t itemsize, bool curved,
                  std::optional<Chip> chip);

// Whole solves on the CPU, as those of the GLM family.
std::tuple<at::Tensor, at::Tensor> mlp_neumann_solve(at::TensorList weights, at::TensorList hidden,
                                                     at::TensorList slopes, at::TensorList bends, at::TensorList deltas,
                                                     const std::optional<at::Tensor>& probabilities,
                                                     const at::Tensor& b, double scale, bool biases, double l2,
                                                     double alpha, double damping, int64_t steps,
                                                     const at::Tensor& stop);
std::tuple<at::Tensor, at::Tensor, at::Tensor> mlp_cg_solve(at::TensorList weights, at::TensorList hidden,
                                                            at::TensorList slopes, at::TensorList bends,
                                                            at::TensorList deltas,
                                                            const std::optional<at::Tensor>& probabilities,
                                                            const at::Tensor& b, double scale, bool biases, double l2,
                                                            double damping, int64_t steps, const at::Tensor& state);

// The same for a symmetric matrix, (n, n), given by its entries.
std::tuple<at::Tensor, at::Tensor> dense_neumann_solve(const at::Tensor& matrix, const at::Tensor& b, double alpha,
                                                       double damping, int64_t steps, const at::Tensor& stop);
std::tuple<at::Tensor, at::Tensor, at::Tensor> dense_cg_solve(const at::Tensor& matrix, const at::Tensor& b,
                                                              double damping, int64_t steps, const at::Tensor& state);

// The pointwise part of an LSTM step. gates, activations: (rows, 4 units); everything else: (rows, units). Returns h,
// the next c and the activations.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& gates, const at::Tensor& c);
// Gradients by gates and c, from those by h, the next c and the activations.
std::tuple<at::Tensor, at::Tensor> lstm_cell_backward(const at::Tensor& activations, const at::Tensor& c,
                                                      const at::Tensor& c_next, const at::Tensor& grad_h,
                                                      const at::Tensor& grad_c,
                                                      const std::optional<at::Tensor>& grad_activations);
// Gradients of <v, what lstm_cell_backward returns> by its first five arguments.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lstm_cell_double_backward(
    const at::Tensor& activations, const at::Tensor& c, const at::Tensor& c_next, const at::Tensor& grad_h,
    const at::Tensor& grad_c, const at::Tensor& v_gates, const at::Tensor& v_c);

// The recurrence of an LSTM layer over all steps. x_gates, activations: (steps, batch, 4 units); h, c: (steps, batch,
// units); h0, c0: (batch, units); w_hh: (4 units, units). Returns h, c and the activations.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_layer(const at::Tensor& x_gates, const at::Tensor& w_hh,
                                                          const at::Tensor& h0, const at::Tensor& c0);
// Gradients by x_gates and c0, and what reached h and c of every step.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lstm_layer_backward(
    const at::Tensor& activations, const at::Tensor& c, const at::Tensor& c0, const at::Tensor& w_hh,
    const at::Tensor& grad_h, const std::optional<at::Tensor>& grad_c,
    const std::optional<at::Tensor>& grad_activations);
// Gradients of <v, (grad_gates, the gradient that leaves by h0, grad_c0)> by activations, c, c0, grad_h and grad_c.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lstm_layer_double_backward(
    const at::Tensor& activations, const at::Tensor& c, const at::Tensor& c0, const at::Tensor& w_hh,
    const at::Tensor& dh, const at::Tensor& dc, const at::Tensor& v_gates, const at::Tensor& v_h0,
    const at::Tensor& v_c0);

}  // namespace hg
