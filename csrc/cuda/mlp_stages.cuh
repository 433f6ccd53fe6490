// A small network's layers on their way from global to shared memory, for a block that takes some rows of the batch
// through all of them: while one is used, the next one comes.
#pragma once

#include "../mlp_plan.h"
#include "device.cuh"
#include "pack.cuh"
#include "sums.cuh"

namespace hg::cuda::rows {

template <class Real>
struct Layer {
  const Real *weight, *hidden, *delta, *slope, *bend;
  int out, weight_stride, hidden_stride, delta_stride, slope_stride, bend_stride;
};

template <class Real>
struct Problem {
  Layer<Real> layers[kMlpLaunchLayers];
  MlpLaunch launch;
  int count, inputs, biases;
  int64_t n, k, numel;
  const Real* probabilities;
  int64_t probabilities_stride;
  const Real* v;
  Real *out, *partial;  // partial: blocks x padded
  unsigned* arrived;
  Real scale, l2;

  __device__ bool curved() const { return count > 1 && layers[0].bend; }
};

// A layer, and what lies before it: elements of v, of a block's sums, of the tangents in shared memory.
template <class Real>
struct Place {
  int l = 0, in, out, pitch, padded = 0, tangent = 0;
  int64_t before = 0;

  __device__ explicit Place(const Problem<Real>& p) : in(p.inputs), out(p.layers[0].out), pitch(pitch_of(in)) {}
  __device__ static int pitch_of(int width) { return mlp_pitch(width, sizeof(Real)); }
  __device__ int end() const { return padded + out * pitch; }

  __device__ void next(const Problem<Real>& p) {
    before += static_cast<int64_t>(out) * (in + p.biases), padded += out * pitch;
    tangent += p.launch.rows * pitch_of(out);
    in = out, out = p.layers[++l].out, pitch = pitch_of(in);
  }
  __device__ void previous(const Problem<Real>& p) {
    out = in, in = --l > 0 ? p.layers[l - 1].out : p.inputs, pitch = pitch_of(in);
    before -= static_cast<int64_t>(out) * (in + p.biases), padded -= out * pitch;
    tangent -= p.launch.rows * pitch_of(out);
  }
};

template <class Real>
class Stages {
 public:
  static constexpr int P = 16 / sizeof(Real);

  __device__ Stages(const Problem<Real>& problem, Real* memory)
      : p_(problem),
        memory_(memory),
        first_(static_cast<int64_t>(blockIdx.x % problem.launch.row_blocks) * problem.launch.rows) {
    const int64_t left = p_.n - first_;
    valid_ = static_cast<int>(left < p_.launch.rows ? left : p_.launch.rows);
  }

  // The block's first row, and how many rows of its own the batch has.
  __device__ int64_t first() const { return first_; }
  __device__ int valid() const { return valid_; }

  // One layer's matrices: W and V, rows `pitch` apart, the biases of V as one more column; h with a column of ones;
  // act' of this layer and act''(a) dL/dh on the way forward, act' of the one before and dL/da on the way back.
  struct Stage {
    Real *weight, *vector, *hidden, *slope, *other;
  };
  __device__ Stage operator[](int which) const {
    const MlpLaunch& launch = p_.launch;
    Real* weight = memory_ + which * (2 * launch.matrix + launch.in_rows + 2 * launch.out_rows);
    Real* hidden = weight + 2 * launch.matrix;
    Real* slope = hidden + launch.in_rows;
    return {weight, weight + launch.matrix, hidden, slope, slope + launch.out_rows};
  }

  // Sends for a layer's matrices; there after wait_copies and a barrier.
  __device__ void send(const Place<Real>& at, bool back, int which, int64_t vector) {
    const Layer<Real>& layer = p_.layers[at.l];
    const Stage to = (*this)[which];
    const Real* v = p_.v + vector * p_.numel + at.before;
    const Real* bias = p_.biases ? v + static_cast<int64_t>(at.out) * at.in : nullptr;
    const auto none = [](int) { return Real(0); };
    copy(to.vector, at.pitch, at.out, v, at.in, at.out, at.in, [&](int i) { return bias ? bias[i] : Real(0); });
    if (at.l > 0) copy(to.weight, at.pitch, at.out, layer.weight, layer.weight_stride, at.out, at.in, none);
    batch(to.hidden, at.pitch, layer.hidden, layer.hidden_stride, at.in, [&](int r) { return Real(r < valid_); });
    if (!back && at.l + 1 < p_.count) {
      const int pitch = at.pitch_of(at.out);
      batch(to.slope, pitch, layer.slope, layer.slope_stride, at.out, none);
      if (p_.curved()) batch(to.other, pitch, layer.bend, layer.bend_stride, at.out, none);
    }
    if (back && at.l > 0) {
      const Layer<Real>& before = p_.layers[at.l - 1];
      batch(to.slope, at.pitch, before.slope, before.slope_stride, at.in, none);
      batch(to.other, at.pitch_of(at.out), layer.delta, layer.delta_stride, at.out, none);
    }
    end_copies();
  }

 private:
  // The block's rows of a matrix with a row per row of the batch.
  template <class Edge>
  __device__ void batch(Real* to, int pitch, const Real* from, int stride, int width, const Edge& edge) {
    copy(to, pitch, p_.launch.rows, from + first_ * stride, stride, valid_, width, edge);
  }

  // Sends for `valid` rows; zeros in the other rows and beyond the width, but for the first column there.
  template <class Edge>
  __device__ void copy(Real* to, int pitch, int rows, const Real* from, int64_t stride, int valid, int width,
                       const Edge& edge) {
    const bool aligned = (reinterpret_cast<uintptr_t>(from) | stride * sizeof(Real)) % 16 == 0;
    const int packed = aligned ? width / P : 0, rest = width - packed * P, padding = pitch - width;
    for (int i = threadIdx.x; i < valid * packed; i += kThreads) {
      const int r = i / packed, c = i % packed * P;
      copy_async<16>(to + r * pitch + c, from + r * stride + c);
    }
    for (int i = threadIdx.x; i < valid * rest; i += kThreads) {
      const int r = i / rest, c = packed * P + i % rest;
      copy_async<sizeof(Real)>(to + r * pitch + c, from + r * stride + c);
    }
    for (int i = threadIdx.x; i < rows * padding; i += kThreads) {
      const int r = i / padding, c = i % padding;
      to[r * pitch + width + c] = c == 0 ? edge(r) : Real(0);
    }
    for (int i = threadIdx.x; i < (rows - valid) * width; i += kThreads)
      to[(valid + i / width) * pitch + i % width] = 0;
  }

  const Problem<Real>& p_;
  Real* memory_;
  int64_t first_;
  int valid_;
};

}  // namespace hg::cuda::rows
