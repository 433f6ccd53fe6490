// A block that takes some rows of a batch through all layers of a small network and back. Tangents stay in shared
// memory; while one layer is used, the next one's matrices are on their way there.
#pragma once

#include "mlp_stages.cuh"

namespace hg::cuda::rows {

template <class Real>
class Block {
 public:
  static constexpr int P = Stages<Real>::P, R = kMlpRowTile;
  using Packed = Pack<Real, P>;
  using Stage = typename Stages<Real>::Stage;

  __device__ Block(const Problem<Real>& problem, char* memory)
      : p_(problem),
        tangents_(reinterpret_cast<Real*>(memory)),
        curved_(problem.curved() ? tangents_ + problem.launch.tangents : nullptr),
        deltas_(tangents_ + problem.launch.tangents * (1 + problem.curved())),
        stages_(problem, deltas_ + 2 * problem.launch.out_rows) {
    const MlpLaunch& launch = p_.launch;
    // What is never written: a tangent of the column of ones, which is 0, and padding.
    for (int i = threadIdx.x; i < launch.tangents; i += kThreads) tangents_[i] = 0;
  }

  // H v of the vector over the block's rows.
  __device__ void product(int64_t vector) {
    const int layers = p_.count;
    Place<Real> at(p_);
    stages_.send(at, false, 0, vector);
#pragma unroll 1
    for (int phase = 0; phase < 2 * layers; ++phase) {
      wait_copies<0>();
      // All have this layer's matrices and the tangents before it, and are done with the layer before it.
      __syncthreads();
      const Place<Real> now = at;
      if (phase + 1 < 2 * layers) {
        if (phase + 1 < layers) at.next(p_);
        if (phase + 1 > layers) at.previous(p_);
        stages_.send(at, phase + 1 >= layers, (phase + 1) % 2, vector);
      }
      if (phase < layers) {
        forward(now, stages_[phase % 2]);
      } else {
        if (phase == layers) {
          loss(now);
          __syncthreads();
        }
        backward(now, stages_[phase % 2], vector, (phase - layers) % 2);
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
      const Real* p = p_.probabilities ? p_.probabilities + (stages_.first() + r) * p_.probabilities_stride : nullptr;
      Real *z = deltas_ + r * pitch, mean = 0;
      for (int c = lane; p && r < stages_.valid() && c < at.out; c += 32) mean += p[c] * z[c];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) mean += __shfl_xor_sync(0xffffffffu, mean, offset);
      for (int c = lane; c < at.out; c += 32)
        z[c] = r < stages_.valid() ? p_.scale * (p ? p[c] * (z[c] - mean) : z[c]) : Real(0);
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
  Real *tangents_, *curved_, *deltas_;
  Stages<Real> stages_;
};

}  // namespace hg::cuda::rows
