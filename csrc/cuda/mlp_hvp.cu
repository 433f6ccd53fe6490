// Hessian-vector products of small multilayer perceptrons: one launch per layer forward and two back, each with the
// matrix products of both terms, what follows them, and all vectors. Time goes by launches here, not by arithmetic.
#include <algorithm>
#include <vector>

#include "../mlp.h"
#include "launch.h"
#include "mlp_gemm.cuh"

namespace hg::cuda {
namespace {

using namespace mlp;

// Vectors that one launch takes side by side; blocks loop over the others.
constexpr int64_t kMaxGrid = 65535;

template <class Real>
struct Shared {
  const Real* data;
  int64_t stride;

  Shared(const Rows& rows) : data(static_cast<const Real*>(rows.data)), stride(rows.stride) {}
  __device__ __forceinline__ Real at(int i, int j) const { return data[i * stride + j]; }
};

// Ra = sum + bias; Rh = act'(a) Ra, and what the way back needs, act''(a) dL/dh Ra. In the last layer, Ra itself.
template <class Real>
struct ThroughActivation {
  static constexpr bool kOnes = false;
  const Real* bias;
  int64_t bias_stride;
  Shared<Real> slope, bend;
  Real *tangent, *curved;
  int64_t n, width;

  __device__ __forceinline__ void operator()(int64_t vector, int i, int j, Real a) const {
    const int64_t at = (vector * n + i) * width + j;
    if (bias) a += bias[vector * bias_stride + j];
    tangent[at] = slope.data ? slope.at(i, j) * a : a;
    if (bend.data) curved[at] = bend.at(i, j) * a;
  }
};

// R(dL/da) = act'(a) sum + act''(a) dL/dh Ra.
template <class Real>
struct BackThroughActivation {
  static constexpr bool kOnes = false;
  Shared<Real> slope;
  const Real* curved;
  Real* out;
  int64_t n, width;

  __device__ __forceinline__ void operator()(int64_t vector, int i, int j, Real e) const {
    const int64_t at = (vector * n + i) * width + j;
    e *= slope.at(i, j);
    out[at] = curved ? e + curved[at] : e;
  }
};

// H v of one layer. The bias is one more input, of ones.
template <class Real>
struct Gradient {
  static constexpr bool kOnes = true;
  const Real* v;  // of the layer
  Real* out;
  int64_t stride, in, size;  // size: of the weight, before the bias
  bool biases;
  Real l2;

  __device__ __forceinline__ void operator()(int64_t vector, int i, int j, Real sum) const {
    const int64_t at = vector * stride + i * in + j;
    if (j < in)
      out[at] = l2 == 0 ? sum : sum + 2 * l2 * v[at];
    else if (biases)
      out[vector * stride + size + i] = sum;
  }
};

template <bool kAlongA, bool kAlongB, class Real, class Finish>
cudaError_t run(const Term<Real>& first, const Term<Real>* second, int rows, int columns, int64_t k,
                const Finish& finish, Stream stream) {
  using P = Product<Real, Finish, kAlongA, kAlongB>;
  const P product{{first, second ? *second : first}, second ? 2 : 1, rows, columns, finish};
  const int tiles = (rows + kTile - 1) / kTile * ((columns + kTile - 1) / kTile);
  if (tiles == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min(k, kMaxGrid)));
  return launch(multiply<P>, grid, dim3(kThreads), 0, stream, product, k);
}

template <class Real>
const char* hvp(const MlpData& data, const Real* v, int64_t k, Real* out, const Scratch& scratch, Stream stream) {
  const int rows = static_cast<int>(data.n);
  const int64_t n = data.n, last = static_cast<int64_t>(data.layers.size()) - 1;
  std::vector<int64_t> before(last + 1), tangents(last + 1), curved(last + 1);
  int64_t numel = 0, size = 0, widest = 0;
  // Every part starts at a cache line.
  const auto take = [&](int64_t width) {
    const int64_t at = size;
    size += (k * n * width + 31) / 32 * 32;
    return at;
  };
  for (int64_t l = 0; l <= last; ++l) {
    const MlpLayer& layer = data.layers[l];
    before[l] = numel, numel += layer.out * (layer.in + data.biases);
    tangents[l] = take(layer.out), curved[l] = layer.bend.data ? take(layer.out) : 0;
    widest = std::max(widest, layer.out);
  }
  const int64_t other = take(widest), another = take(widest);
  Real* memory = reinterpret_cast<Real*>(scratch((size * sizeof(Real) + 7) / 8));
  // Rows of matrices are contiguous: along the depth, or else along the result.
  const auto matrix = [](const Real* m, int64_t stride, bool along, int64_t vector) {
    const int rows = static_cast<int>(stride);
    return Matrix<Real>{m, along ? rows : 1, along ? 1 : rows, vector};
  };
  const auto shared = [&](const Rows& m, bool along) {
    return matrix(static_cast<const Real*>(m.data), m.stride, along, 0);
  };
  const auto own = [&](const Real* m, int64_t width, bool along) { return matrix(m, width, along, n * width); };

  cudaError_t error = cudaSuccess;
  for (int64_t l = 0; l <= last && error == cudaSuccess; ++l) {
    const MlpLayer& layer = data.layers[l];
    const int in = static_cast<int>(layer.in);
    const Real* weight = v + before[l];
    const Term<Real> by_v{shared(layer.hidden, true), matrix(weight, layer.in, true, numel), in};
    Term<Real> by_w{};
    if (l > 0) by_w = {own(memory + tangents[l - 1], layer.in, true), shared(layer.weight, true), in};
    const ThroughActivation<Real> finish{data.biases ? weight + layer.in * layer.out : nullptr,
                                         numel,
                                         layer.slope,
                                         layer.bend,
                                         memory + tangents[l],
                                         memory + curved[l],
                                         n,
                                         layer.out};
    error = run<true, true>(by_v, l > 0 ? &by_w : nullptr, rows, static_cast<int>(layer.out), k, finish, stream);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  Real* delta = memory + tangents[last];
  const MlpTangents outputs{data.dtype, k, n, data.layers[last].out};
  if (const char* text = mlp_loss(outputs, nullptr, 0, data.probabilities, data.scale, delta, stream)) return text;

  for (int64_t l = last; l >= 0 && error == cudaSuccess; --l) {
    const MlpLayer& layer = data.layers[l];
    const int in = static_cast<int>(layer.in), width = static_cast<int>(layer.out);
    const Real* weight = v + before[l];
    const Gradient<Real> finish{weight,      out + before[l],           numel, layer.in, layer.in * layer.out,
                                data.biases, static_cast<Real>(data.l2)};
    const Term<Real> of_delta{own(delta, layer.out, false), shared(layer.hidden, false), rows};
    if (l == 0) {
      error = run<false, false, Real>(of_delta, nullptr, width, in + 1, k, finish, stream);
      break;
    }
    const Term<Real> of_tangent{shared(layer.delta, false), own(memory + tangents[l - 1], layer.in, false), rows};
    error = run<false, false>(of_delta, &of_tangent, width, in + 1, k, finish, stream);
    if (error != cudaSuccess) break;
    const MlpLayer& previous = data.layers[l - 1];
    const Term<Real> by_w{own(delta, layer.out, true), shared(layer.weight, false), width};
    const Term<Real> by_v{shared(layer.delta, true), matrix(weight, layer.in, false, numel), width};
    Real* next = memory + (delta == memory + other ? another : other);
    const BackThroughActivation<Real> back{previous.slope, previous.bend.data ? memory + curved[l - 1] : nullptr, next,
                                           n, layer.in};
    error = run<true, false>(by_w, &by_v, rows, in, k, back, stream);
    delta = next;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* mlp_hvp(const MlpData& data, const void* v, int64_t k, void* out, const Scratch& scratch, Stream stream) {
  if (k == 0) return nullptr;
  if (data.dtype == DType::f64)
    return hvp(data, static_cast<const double*>(v), k, static_cast<double*>(out), scratch, stream);
  return hvp(data, static_cast<const float*>(v), k, static_cast<float*>(out), scratch, stream);
}

}  // namespace hg::cuda
