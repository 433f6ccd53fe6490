// An LSTM's recurrence and its first two derivatives: the formulas of one unit, shared by CPU and CUDA, and
// what the host functions call. Torch-free.
#pragma once

#include <cstdint>

#include "update.h"
#include "vector_list.h"

namespace hg {

// One value per gate of a unit: input, forget, cell and output gate, in torch's order.
template <class V>
struct LstmGates {
  V i, f, g, o;
};

// A unit between the passes: its activations, the memory c before the step, and tanh of the memory after it.
template <class V>
struct LstmUnit {
  LstmGates<V> a;
  V c, t;
};

// c' = f c + i g; then h' = o tanh(c')
template <class V>
HG_HD V lstm_memory(const LstmGates<V>& a, V c) {
  return a.f * c + a.i * a.g;
}

// Derivatives of sigmoid and tanh, from their values.
template <class Real, class V>
HG_HD LstmGates<V> lstm_slopes(const LstmGates<V>& a) {
  const Real one = 1;
  return {a.i * (one - a.i), a.f * (one - a.f), one - a.g * a.g, a.o * (one - a.o)};
}

// dL/dc' through both outputs.
template <class Real, class V>
HG_HD V lstm_grad_memory(const LstmUnit<V>& u, V grad_h, V grad_c) {
  return grad_c + grad_h * u.a.o * (Real(1) - u.t * u.t);
}

// dL/d activations, given d = dL/dc'. Times the slopes it is dL/d gates; d f is dL/dc.
template <class V>
HG_HD LstmGates<V> lstm_grad_activations(const LstmUnit<V>& u, V grad_h, V d) {
  return {d * u.a.g, d * u.c, d * u.a.i, grad_h * u.t};
}

// What the backward pass takes, once more differentiated.
template <class V>
struct LstmSecond {
  LstmGates<V> a;
  V c, c_next, grad_h, grad_c;
};

// Gradient of <v, dL/d gates> + v_c dL/dc.
template <class Real, class V>
HG_HD LstmSecond<V> lstm_double_backward(const LstmUnit<V>& u, V grad_h, V grad_c, const LstmGates<V>& v, V v_c) {
  const Real one = 1, two = 2;
  const LstmGates<V>& a = u.a;
  const LstmGates<V> slope = lstm_slopes<Real>(a);
  const V d = lstm_grad_memory<Real>(u, grad_h, grad_c), slope_t = one - u.t * u.t;
  const LstmGates<V> grad = lstm_grad_activations(u, grad_h, d);
  const LstmGates<V> w{v.i * slope.i, v.f * slope.f, v.g * slope.g, v.o * slope.o};
  // By d, which is the change of c' when the gates change by v and c by v_c.
  const V by_d = a.g * w.i + u.c * w.f + a.i * w.g + v_c * a.f;
  LstmSecond<V> out;
  out.a.i = grad.i * v.i * (one - two * a.i) + d * w.g;
  out.a.f = grad.f * v.f * (one - two * a.f) + d * v_c;
  out.a.g = d * w.i - two * a.g * grad.g * v.g;
  out.a.o = grad.o * v.o * (one - two * a.o) + by_d * grad_h * slope_t;
  out.c = d * w.f;
  out.c_next = grad_h * (w.o - two * u.t * a.o * by_d) * slope_t;
  out.grad_h = by_d * a.o * slope_t + u.t * w.o;
  out.grad_c = by_d;
  return out;
}

// Everything is contiguous and of one dtype. gates and activations: rows x 4 units, the gates one after another;
// everything else: rows x units. What is written may be what is read.
struct LstmSize {
  DType dtype;
  int64_t rows, units;
};

struct LstmForward {
  const void *gates, *c;
  void *h, *c_next, *activations;
};

struct LstmBackward {
  const void *activations, *c, *c_next, *grad_h, *grad_c;
  const void* grad_activations;  // or null
  void *grad_gates, *grad_c_prev;
};

struct LstmDoubleBackward {
  const void *activations, *c, *c_next, *grad_h, *grad_c, *v_gates, *v_c;
  void *by_activations, *by_c, *by_c_next, *by_grad_h, *by_grad_c;
};

// A whole layer: sequences of steps x batch x units (or x 4 units), c0, h0 and the like batch x units, w_hh 4 units x
// units; f64 or f32.
struct LstmLayerSize {
  DType dtype;
  int64_t steps, batch, units;
};

struct LstmLayerForward {
  const void *x_gates, *w_hh, *h0, *c0;
  void *h, *c, *activations;
};

// dh, dc: what reaches h and c of every step from outside and from the steps after it; the second derivative
// starts from them. dc holds what reaches c from outside when the call begins.
struct LstmLayerBackward {
  const void *activations, *c, *c0, *w_hh, *grad_h;
  const void* grad_activations;  // or null
  void *grad_gates, *grad_c0, *dh, *dc;
};

struct LstmLayerDoubleBackward {
  const void *activations, *c, *c0, *w_hh, *dh, *dc, *v_gates, *v_h0, *v_c0;
  void *by_activations, *by_c, *by_c0, *by_grad_h, *by_grad_c;
};

namespace cpu {

void lstm_cell(const LstmSize& size, const LstmForward& data);
void lstm_cell(const LstmSize& size, const LstmBackward& data);
void lstm_cell(const LstmSize& size, const LstmDoubleBackward& data);

void lstm_layer(const LstmLayerSize& size, const LstmLayerForward& data);
void lstm_layer(const LstmLayerSize& size, const LstmLayerBackward& data);
void lstm_layer(const LstmLayerSize& size, const LstmLayerDoubleBackward& data);

}  // namespace cpu
}  // namespace hg

struct CUstream_st;

namespace hg::cuda {

// nullptr, or what CUDA says went wrong.
const char* lstm_cell(const LstmSize& size, const LstmForward& data, CUstream_st* stream);
const char* lstm_cell(const LstmSize& size, const LstmBackward& data, CUstream_st* stream);
const char* lstm_cell(const LstmSize& size, const LstmDoubleBackward& data, CUstream_st* stream);

}  // namespace hg::cuda
