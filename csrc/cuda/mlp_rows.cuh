// A block that takes some rows of a batch through all layers of a small network and back. Tangents stay in shared
// memory; while one layer is used, the next one's matrices are on their way there.
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
class Block {
 public:
  static constexpr int P = 16 / sizeof(Real), R = kMlpRowTile;
  using Packed = Pack<Real, P>;

  __device__ Block(const Problem<Real>& problem, char* memory)
      : p_(problem), tangents_(reinterpret_cast<Real*>(memory)) {
    const MlpLaunch& launch = p_.launch;
    const bool curved = p_.count > 1 && p_.layers[0].bend;
    curved_ = curved ? tangents_ + launch.tangents : nullptr;
    deltas_ = tangents_ + launch.tangents * (1 + curved);
    stages_ = deltas_ + 2 * launch.out_rows;
    first_ = static_cast<int64_t>(blockIdx.x % launch.row_blocks) * launch.rows;
    const int64_t left = p_.n - first_;
    valid_ = static_cast<int>(left < launch.rows ? left : launch.rows);
    // What is never written: a tangent of the column of ones, which is 0, and padding.
    for (int i = threadIdx.x; i < launch.tangents; i += kThreads) tangents_[i] = 0;
  }

  // H v of the vector over the block's rows.
  __device__ void product(int64_t vector) {
    const int layers = p_.count;
    Place<Real> at(p_);
    send(at, false, 0, vector);
#pragma unroll 1
    for (int phase = 0; phase < 2 * layers; ++phase) {
      wait_copies<0>();
      // All have this layer's matrices and the tangents before it, and are done with the layer before it.
      __syncthreads();
      const Place<Real> now = at;
      if (phase + 1 < 2 * layers) {
        if (phase + 1 < layers) at.next(p_);
        if (phase + 1 > layers) at.previous(p_);
        send(at, phase + 1 >= layers, (phase + 1) % 2, vector);
      }
      if (phase < layers) {
        forward(now, stage(phase % 2));
      } else {
        if (phase == layers) {
          loss(now);
          __syncthreads();
        }
        backward(now, stage(phase % 2), vector, (phase - layers) % 2);
      }
    }
  }

  // H v of `vectors` vectors from `first` on: the sums of all blocks, in the same order in every run.
  __device__ void add_up(int64_t first, int64_t vectors) {
    const int64_t packs = p_.launch.padded / P;
    Place<Real> at(p_);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < vectors * packs;
         i += static_cast<int64_t>(gridDim.x) * kThreads) {
      const int e = static_cast<int>(i % packs) * P;
      if (e < at.padded) at = Place<Real>(p_);
      while (e >= at.end()) at.next(p_);
      const Real* from = p_.partial + i / packs * p_.launch.row_blocks * p_.launch.padded + e;
      Packed sum = {};
#pragma unroll 4
      for (int b = 0; b < p_.launch.row_blocks; ++b) {
        // Around the first cache, which is not kept in step with other multiprocessors.
        const int4 bits = __ldcg(reinterpret_cast<const int4*>(from + static_cast<int64_t>(b) * p_.launch.padded));
        const Packed part = reinterpret_cast<const Packed&>(bits);
#pragma unroll
        for (int w = 0; w < P; ++w) sum.at[w] += part.at[w];
      }
      finish(at, first + i / packs, (e - at.padded) / at.pitch, (e - at.padded) % at.pitch, sum);
    }
  }

 private:
  // One layer's matrices: W and V, rows `pitch` apart, the biases of V as one more column; h with a column of ones;
  // act' of this layer and act''(a) dL/dh on the way forward, act' of the one before and dL/da on the way back.
  struct Stage {
    Real *weight, *vector, *hidden, *slope, *other;
  };
  __device__ Stage stage(int which) const {
    const MlpLaunch& launch = p_.launch;
    Real* weight = stages_ + which * (2 * launch.matrix + launch.in_rows + 2 * launch.out_rows);
    Real* hidden = weight + 2 * launch.matrix;
    Real* slope = hidden + launch.in_rows;
    return {weight, weight + launch.matrix, hidden, slope, slope + launch.out_rows};
  }

  __device__ void send(const Place<Real>& at, bool back, int which, int64_t vector) {
    const Layer<Real>& layer = p_.layers[at.l];
    const Stage to = stage(which);
    const Real* v = p_.v + vector * p_.numel + at.before;
    const Real* bias = p_.biases ? v + static_cast<int64_t>(at.out) * at.in : nullptr;
    const auto none = [](int) { return Real(0); };
    copy(to.vector, at.pitch, at.out, v, at.in, at.out, at.in, [&](int i) { return bias ? bias[i] : Real(0); });
    if (at.l > 0) copy(to.weight, at.pitch, at.out, layer.weight, layer.weight_stride, at.out, at.in, none);
    batch(to.hidden, at.pitch, layer.hidden, layer.hidden_stride, at.in, [&](int r) { return Real(r < valid_); });
    if (!back && at.l + 1 < p_.count) {
      const int pitch = at.pitch_of(at.out);
      batch(to.slope, pitch, layer.slope, layer.slope_stride, at.out, none);
      if (curved_) batch(to.other, pitch, layer.bend, layer.bend_stride, at.out, none);
    }
    if (back && at.l > 0) {
      const Layer<Real>& before = p_.layers[at.l - 1];
      batch(to.slope, at.pitch, before.slope, before.slope_stride, at.in, none);
      batch(to.other, at.pitch_of(at.out), layer.delta, layer.delta_stride, at.out, none);
    }
    end_copies();
  }

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

  __device__ static Packed load(const Real* at) { return *reinterpret_cast<const Packed*>(at); }

  // Ra = h V^T + Rh W^T; Rh = act'(a) Ra, and for the way back act''(a) dL/dh Ra. In the last layer, Ra itself.
  __device__ void forward(const Place<Real>& at, const Stage& s) {
    const Real* before = tangents_ + at.tangent - p_.launch.rows * at.pitch;
    const int pitch = at.pitch_of(at.out);
    for (int i = threadIdx.x; i < p_.launch.rows / R * at.out; i += kThreads) {
      const int j = i % at.out, row = i / at.out * R;
      Real sums[R] = {};
#pragma unroll 2
      for (int t = 0; t < at.pitch; t += P) {
        const Packed v = load(s.vector + j * at.pitch + t);
#pragma unroll
        for (int r = 0; r < R; ++r) add(sums[r], load(s.hidden + (row + r) * at.pitch + t), v);
        if (at.l == 0) continue;
        const Packed w = load(s.weight + j * at.pitch + t);
#pragma unroll
        for (int r = 0; r < R; ++r) add(sums[r], load(before + (row + r) * at.pitch + t), w);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int e = (row + r) * pitch + j;
        if (at.l + 1 == p_.count) {
          deltas_[e] = sums[r];
        } else {
          tangents_[at.tangent + e] = s.slope[e] * sums[r];
          if (curved_) curved_[at.tangent + e] = s.other[e] * sums[r];
        }
      }
    }
  }
  __device__ static void add(Real& sum, const Packed& a, const Packed& b) {
#pragma unroll
    for (int w = 0; w < P; ++w) sum += a.at[w] * b.at[w];
  }

  // R(dL/dz) = scale p (Rz - <p, Rz>), or scale Rz; a warp per row.
  __device__ void loss(const Place<Real>& at) {
    const int pitch = at.pitch_of(at.out), lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < p_.launch.rows; r += kThreads / 32) {
      const Real* p = p_.probabilities ? p_.probabilities + (first_ + r) * p_.probabilities_stride : nullptr;
      Real *z = deltas_ + r * pitch, mean = 0;
      for (int c = lane; p && r < valid_ && c < at.out; c += 32) mean += p[c] * z[c];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) mean += __shfl_xor_sync(0xffffffffu, mean, offset);
      for (int c = lane; c < at.out; c += 32)
        z[c] = r < valid_ ? p_.scale * (p ? p[c] * (z[c] - mean) : z[c]) : Real(0);
    }
  }

  // From R(dL/da) of a layer that of the layer before, act'(a) (R(dL/da) W + dL/da V) + act''(a) dL/dh Ra, and H v of
  // the layer, R(dL/da)^T h + dL/da^T Rh, over the block's rows.
  __device__ void backward(const Place<Real>& at, const Stage& s, int64_t vector, int which) {
    const Real* delta = deltas_ + which * p_.launch.out_rows;
    Real* next = deltas_ + (1 - which) * p_.launch.out_rows;
    const int packs = at.pitch / P, back = at.l > 0 ? p_.launch.rows / R * packs : 0;
    for (int i = threadIdx.x; i < back + at.out * packs; i += kThreads) {
      if (i < back)
        through_weights(at, s, delta, next, i / packs * R, i % packs * P);
      else
        gradient(at, s, delta, vector, (i - back) / packs, i % packs * P);
    }
  }

  __device__ void through_weights(const Place<Real>& at, const Stage& s, const Real* delta, Real* next, int row,
                                  int j) {
    const int pitch = at.pitch_of(at.out), before = at.tangent - p_.launch.rows * at.pitch;
    Real sums[R][P] = {};
#pragma unroll 2
    for (int i = 0; i < at.out; ++i) {
      const Packed w = load(s.weight + i * at.pitch + j), v = load(s.vector + i * at.pitch + j);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Real a = delta[(row + r) * pitch + i], b = s.other[(row + r) * pitch + i];
#pragma unroll
        for (int c = 0; c < P; ++c) sums[r][c] += a * w.at[c] + b * v.at[c];
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < P; ++c) {
        const int e = (row + r) * at.pitch + j + c;
        if (j + c >= at.in) continue;
        const Real sum = s.slope[e] * sums[r][c];
        next[e] = curved_ ? sum + curved_[before + e] : sum;
      }
  }

  __device__ void gradient(const Place<Real>& at, const Stage& s, const Real* delta, int64_t vector, int i, int j) {
    const int pitch = at.pitch_of(at.out);
    const Real* tangent = tangents_ + at.tangent - p_.launch.rows * at.pitch;
    Packed sum = {};
#pragma unroll 2
    for (int r = 0; r < p_.launch.rows; ++r) {
      const Packed h = load(s.hidden + r * at.pitch + j);
      const Real a = delta[r * pitch + i];
#pragma unroll
      for (int c = 0; c < P; ++c) sum.at[c] += a * h.at[c];
      if (at.l == 0) continue;
      const Packed t = load(tangent + r * at.pitch + j);
      const Real b = s.other[r * pitch + i];
#pragma unroll
      for (int c = 0; c < P; ++c) sum.at[c] += b * t.at[c];
    }
    if (p_.launch.row_blocks == 1) return finish(at, vector, i, j, sum);
    Real* to = p_.partial + static_cast<int64_t>(blockIdx.x) * p_.launch.padded + at.padded + i * at.pitch + j;
    *reinterpret_cast<Packed*>(to) = sum;
  }

  // Output i, inputs from j on, of H v.
  __device__ void finish(const Place<Real>& at, int64_t vector, int i, int j, const Packed& sum) {
    const int64_t layer = vector * p_.numel + at.before;
#pragma unroll
    for (int c = 0; c < P; ++c) {
      const int64_t e = layer + static_cast<int64_t>(i) * at.in + j + c;
      if (j + c < at.in)
        p_.out[e] = p_.l2 == 0 ? sum.at[c] : sum.at[c] + 2 * p_.l2 * p_.v[e];
      else if (j + c == at.in && p_.biases)
        p_.out[layer + static_cast<int64_t>(at.out) * at.in + i] = sum.at[c];
    }
  }

  const Problem<Real>& p_;
  Real *tangents_, *curved_, *deltas_, *stages_;
  int64_t first_;
  int valid_;  // rows that the batch has
};

}  // namespace hg::cuda::rows
