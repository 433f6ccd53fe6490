// A whole LSTM layer on the CPU. A thread takes some rows of the batch through all steps: nobody waits for
// anybody, and the recurrent weights, packed once, stay in the cache.
#include "buffer.h"
#include "lstm_rows.h"
#include "packed_gemm.h"
#include "share.h"

namespace hg::cpu {
namespace {

// Multiplications per thread below which a second thread costs more than it saves.
constexpr int64_t kGrainProducts = 1 << 20;

// Every pass multiplies by the weights; called by pointer, the tiles of the product are compiled once.
template <class Real>
using Multiply = void (*)(const Packed<Real>&, const Multiplied<Real>&);

// w: w_hh transposed for passes that run forward in time, else w_hh itself.
template <class Real, class Data>
struct Layer {
  LstmLayerSize size;
  Data data;
  Packed<Real> w;
  Multiply<Real> multiply;
};

template <class Real, class Tiles>
struct LayerRows {
  using Gemm = PackedGemm<Real, Tiles>;
  using Cell = LstmRows<Real, Real, Tiles>;

  static HG_INLINE void run(const Packed<Real>& w, int64_t group) { Gemm::pack(w, group); }
  static HG_INLINE void run(const Packed<Real>& w, const Multiplied<Real>& rows) { Gemm::multiply(w, rows); }

  static HG_INLINE void run(const Layer<Real, LstmLayerForward>& layer, int64_t first, int64_t last) {
    const auto& [size, data, w, multiply] = layer;
    const int64_t rows = last - first, n = size.units;
    for (int64_t t = 0; t < size.steps; ++t) {
      const int64_t now = (t * size.batch + first) * n, before = now - size.batch * n;
      const Real* h = t ? at(data.h, before) : at(data.h0, first * n);
      const Real* c = t ? at(data.c, before) : at(data.c0, first * n);
      Real* gates = at(data.activations, 4 * now);
      multiply(w, {h, n, rows, at(data.x_gates, 4 * now), gates, 4 * n});
      Cell::run({size.dtype, rows, n}, LstmForward{gates, c, at(data.h, now), at(data.c, now), gates}, 0, rows);
    }
  }

  static HG_INLINE void run(const Layer<Real, LstmLayerBackward>& layer, int64_t first, int64_t last) {
    const auto& [size, data, w, multiply] = layer;
    const int64_t rows = last - first, n = size.units, step = size.batch * n;
    const Buffer<Real> memory(rows * n);
    for (int64_t t = size.steps - 1; t >= 0; --t) {
      const int64_t now = t * step + first * n;
      Real *dh = at(data.dh, now), *dc = at(data.dc, now);
      const Real* grad_h = at(data.grad_h, now);
      if (t + 1 < size.steps)
        multiply(w, {at(data.grad_gates, 4 * (now + step)), 4 * n, rows, grad_h, dh, n});
      else
        std::memcpy(dh, grad_h, rows * n * sizeof(Real));
      LstmBackward cell{at(data.activations, 4 * now),
                        t ? at(data.c, now - step) : at(data.c0, first * n),
                        at(data.c, now),
                        dh,
                        dc,
                        nullptr,
                        at(data.grad_gates, 4 * now),
                        t ? memory.get() : at(data.grad_c0, first * n)};
      if (data.grad_activations) cell.grad_activations = at(data.grad_activations, 4 * now);
      Cell::run({size.dtype, rows, n}, cell, 0, rows);
      if (t) add(memory.get(), dc - step, rows * n);
    }
  }

  static HG_INLINE void run(const Layer<Real, LstmLayerDoubleBackward>& layer, int64_t first, int64_t last) {
    const auto& [size, data, w, multiply] = layer;
    const int64_t rows = last - first, n = size.units, step = size.batch * n;
    const Buffer<Real> memory(5 * rows * n);
    Real *v_gates = memory.get(), *by_c = v_gates + 4 * rows * n;
    for (int64_t t = 0; t < size.steps; ++t) {
      const int64_t now = t * step + first * n;
      const Real* v_h = t ? at(data.by_grad_h, now - step) : at(data.v_h0, first * n);
      const Real* v_c = t ? at(data.by_grad_c, now - step) : at(data.v_c0, first * n);
      multiply(w, {v_h, n, rows, at(data.v_gates, 4 * now), v_gates, 4 * n});
      Cell::run({size.dtype, rows, n},
                LstmDoubleBackward{at(data.activations, 4 * now), t ? at(data.c, now - step) : at(data.c0, first * n),
                                   at(data.c, now), at(data.dh, now), at(data.dc, now), v_gates, v_c,
                                   at(data.by_activations, 4 * now), t ? by_c : at(data.by_c0, first * n),
                                   at(data.by_c, now), at(data.by_grad_h, now), at(data.by_grad_c, now)},
                0, rows);
      if (t) add(by_c, at(data.by_c, now - step), rows * n);
    }
  }

 private:
  static HG_INLINE const Real* at(const void* data, int64_t i) { return static_cast<const Real*>(data) + i; }
  static HG_INLINE Real* at(void* data, int64_t i) { return static_cast<Real*>(data) + i; }
  static HG_INLINE void add(const Real* x, Real* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] += x[i];
  }
};

template <class Real>
struct Of {
  template <class Tiles>
  using Body = LayerRows<Real, Tiles>;
};

template <class Real, class Data>
void run(const LstmLayerSize& size, const Data& data, bool forward_in_time) {
  if (size.batch * size.units == 0) return;
  const int64_t n = size.units;
  Packed<Real> w{static_cast<const Real*>(data.w_hh), 1, n, n, 4 * n, nullptr};
  if (!forward_in_time) w = {static_cast<const Real*>(data.w_hh), n, 1, 4 * n, n, nullptr};
  const Buffer<Real> panels(w.size());
  w.panels = panels.get();
  static const auto pack = ForTiles<Of<Real>::template Body, const Packed<Real>&, int64_t>::get();
  static const auto rows = ForTiles<Of<Real>::template Body, const Layer<Real, Data>&, int64_t, int64_t>::get();
  const Team team = team_for(size.steps * size.batch * 4 * n * n, kGrainProducts);
  static const Multiply<Real> multiply =
      ForTiles<Of<Real>::template Body, const Packed<Real>&, const Multiplied<Real>&>::get();
  const Layer<Real, Data> layer{size, data, w, multiply};
  share(w.groups(), team, [&](int64_t group) { pack(w, group); });
  const int64_t ranges = team.ranges(size.batch, 1);
  share(ranges, team,
        [&](int64_t range) { rows(layer, range * size.batch / ranges, (range + 1) * size.batch / ranges); });
}

template <class Data>
void for_dtype(const LstmLayerSize& size, const Data& data, bool forward_in_time) {
  if (size.dtype == DType::f64) return run<double>(size, data, forward_in_time);
  run<float>(size, data, forward_in_time);
}

}  // namespace

void lstm_layer(const LstmLayerSize& size, const LstmLayerForward& data) { for_dtype(size, data, true); }
void lstm_layer(const LstmLayerSize& size, const LstmLayerBackward& data) { for_dtype(size, data, false); }
void lstm_layer(const LstmLayerSize& size, const LstmLayerDoubleBackward& data) { for_dtype(size, data, true); }

}  // namespace hg::cpu
