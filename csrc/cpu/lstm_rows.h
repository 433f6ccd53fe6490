// The pointwise part of LSTM steps for some rows, whole registers first, then unit by unit.
#pragma once

#include "../lstm.h"
#include "activations.h"
#include "simd.h"

namespace hg::cpu {

// Simd's interface for a single number.
template <class Real>
struct Single {
  using V = Real;
  using Bits = typename ExpConstants<Real>::Bits;
  static constexpr int width = 1;
  template <class T>
  static HG_INLINE V load(const T* at) {
    return widen(*at);
  }
  template <class T>
  static HG_INLINE void store(T* at, V x) {
    cpu::store(at, x);
  }
};

template <class Real, int Bytes>
struct Register : Simd<Real, Bytes> {
  using Bits = typename Vector<typename ExpConstants<Real>::Bits, Bytes>::type;
};

template <class T, class Real, class Tiles>
struct LstmRows {
  static HG_INLINE void run(const LstmSize& size, const LstmForward& data, int64_t first, int64_t last) {
    each(size, first, last,
         [&](auto unit, int64_t row, int64_t j) HG_LAMBDA_INLINE { step(unit, size, data, row, j); });
  }
  static HG_INLINE void run(const LstmSize& size, const LstmBackward& data, int64_t first, int64_t last) {
    each(size, first, last,
         [&](auto unit, int64_t row, int64_t j) HG_LAMBDA_INLINE { step(unit, size, data, row, j); });
  }
  static HG_INLINE void run(const LstmSize& size, const LstmDoubleBackward& data, int64_t first, int64_t last) {
    each(size, first, last,
         [&](auto unit, int64_t row, int64_t j) HG_LAMBDA_INLINE { step(unit, size, data, row, j); });
  }

 private:
  template <class F>
  static HG_INLINE void each(const LstmSize& size, int64_t first, int64_t last, const F& f) {
    using Wide = Register<Real, Tiles::bytes>;
    for (int64_t row = first; row < last; ++row) {
      int64_t j = 0;
      for (; j + Wide::width <= size.units; j += Wide::width) f(Wide(), row, j);
      for (; j < size.units; ++j) f(Single<Real>(), row, j);
    }
  }

  template <class S>
  static HG_INLINE typename S::V load(const void* data, int64_t at) {
    return S::load(static_cast<const T*>(data) + at);
  }
  template <class S>
  static HG_INLINE void store(void* data, int64_t at, typename S::V x) {
    S::store(static_cast<T*>(data) + at, x);
  }
  // The four gates of a unit are `units` elements apart.
  template <class S>
  static HG_INLINE LstmGates<typename S::V> load_gates(const void* data, int64_t at, int64_t units) {
    return {load<S>(data, at), load<S>(data, at + units), load<S>(data, at + 2 * units), load<S>(data, at + 3 * units)};
  }
  template <class S>
  static HG_INLINE void store_gates(void* data, int64_t at, int64_t units, const LstmGates<typename S::V>& x) {
    store<S>(data, at, x.i);
    store<S>(data, at + units, x.f);
    store<S>(data, at + 2 * units, x.g);
    store<S>(data, at + 3 * units, x.o);
  }
  // Activations, memory, and tanh of the memory after the step, which is cheaper computed than kept.
  template <class S, class Data>
  static HG_INLINE LstmUnit<typename S::V> load_unit(const Data& data, int64_t at, int64_t gates_at, int64_t units) {
    return {load_gates<S>(data.activations, gates_at, units), load<S>(data.c, at),
            tanh<Real, typename S::Bits>(load<S>(data.c_next, at))};
  }

  template <class S>
  static HG_INLINE void step(S, const LstmSize& size, const LstmForward& data, int64_t row, int64_t j) {
    using Bits = typename S::Bits;
    const int64_t at = row * size.units + j, gates_at = 4 * row * size.units + j;
    auto a = load_gates<S>(data.gates, gates_at, size.units);
    a.i = sigmoid<Real, Bits>(a.i), a.f = sigmoid<Real, Bits>(a.f);
    a.g = tanh<Real, Bits>(a.g), a.o = sigmoid<Real, Bits>(a.o);
    const auto c = lstm_memory(a, load<S>(data.c, at));
    store_gates<S>(data.activations, gates_at, size.units, a);
    store<S>(data.c_next, at, c);
    store<S>(data.h, at, a.o * tanh<Real, Bits>(c));
  }

  template <class S>
  static HG_INLINE void step(S, const LstmSize& size, const LstmBackward& data, int64_t row, int64_t j) {
    const int64_t at = row * size.units + j, gates_at = 4 * row * size.units + j;
    const auto u = load_unit<S>(data, at, gates_at, size.units);
    const auto grad_h = load<S>(data.grad_h, at);
    const auto d = lstm_grad_memory<Real>(u, grad_h, load<S>(data.grad_c, at));
    auto grad = lstm_grad_activations(u, grad_h, d);
    if (data.grad_activations) {
      const auto more = load_gates<S>(data.grad_activations, gates_at, size.units);
      grad.i += more.i, grad.f += more.f, grad.g += more.g, grad.o += more.o;
    }
    const auto slope = lstm_slopes<Real>(u.a);
    store_gates<S>(data.grad_gates, gates_at, size.units,
                   {grad.i * slope.i, grad.f * slope.f, grad.g * slope.g, grad.o * slope.o});
    store<S>(data.grad_c_prev, at, d * u.a.f);
  }

  template <class S>
  static HG_INLINE void step(S, const LstmSize& size, const LstmDoubleBackward& data, int64_t row, int64_t j) {
    const int64_t at = row * size.units + j, gates_at = 4 * row * size.units + j;
    const auto u = load_unit<S>(data, at, gates_at, size.units);
    const auto out =
        lstm_double_backward<Real>(u, load<S>(data.grad_h, at), load<S>(data.grad_c, at),
                                   load_gates<S>(data.v_gates, gates_at, size.units), load<S>(data.v_c, at));
    store_gates<S>(data.by_activations, gates_at, size.units, out.a);
    store<S>(data.by_c, at, out.c);
    store<S>(data.by_c_next, at, out.c_next);
    store<S>(data.by_grad_h, at, out.grad_h);
    store<S>(data.by_grad_c, at, out.grad_c);
  }
};

}  // namespace hg::cpu
