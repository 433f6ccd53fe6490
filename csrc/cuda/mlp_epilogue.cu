// What is between the matrix products of a multilayer perceptron's Hessian: bias, activation and loss, in one pass
// each.
#include <algorithm>

#include "../mlp.h"
#include "launch.h"
#include "pack.cuh"

namespace hg::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32;
// Grid dimensions end here; the kernels' loops go on from there.
constexpr int64_t kMaxGrid = 65535;

// Rows that hold the same for all vectors (slopes, ...), or null.
template <class Real>
struct Shared {
  const Real* data;
  int64_t stride;

  Shared(const Rows& rows) : data(static_cast<const Real*>(rows.data)), stride(rows.stride) {}
  template <int W>
  __device__ __forceinline__ Pack<Real, W> load(int64_t row, int64_t column) const {
    return *reinterpret_cast<const Pack<Real, W>*>(data + row * stride + column);
  }
};

template <class Real, int W>
__device__ __forceinline__ Pack<Real, W>& pack_at(Real* data, int64_t i) {
  return *reinterpret_cast<Pack<Real, W>*>(data + i);
}

template <class Real>
struct Forward {
  Shared<Real> slope, bend;
  const Real* bias;
  int64_t bias_stride;
  Real *product, *tangent;

  template <int W>
  __device__ __forceinline__ void operator()(int64_t vector, int64_t row, int64_t column, int64_t i) const {
    Pack<Real, W> a = pack_at<Real, W>(product, i), h = slope.template load<W>(row, column);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      // Biases are wherever the weights before them end: no 16-byte loads.
      if (bias) a.at[w] += bias[vector * bias_stride + column + w];
      h.at[w] *= a.at[w];
    }
    pack_at<Real, W>(tangent, i) = h;
    if (!bend.data) return;
    const Pack<Real, W> by = bend.template load<W>(row, column);
#pragma unroll
    for (int w = 0; w < W; ++w) a.at[w] *= by.at[w];
    pack_at<Real, W>(product, i) = a;
  }
};

template <class Real>
struct Backward {
  Shared<Real> slope;
  const Real* curved;
  Real* product;

  template <int W>
  __device__ __forceinline__ void operator()(int64_t, int64_t row, int64_t column, int64_t i) const {
    Pack<Real, W> e = pack_at<Real, W>(product, i);
    const Pack<Real, W> by = slope.template load<W>(row, column);
    Pack<Real, W> plus = {};
    if (curved) plus = *reinterpret_cast<const Pack<Real, W>*>(curved + i);
#pragma unroll
    for (int w = 0; w < W; ++w) e.at[w] = e.at[w] * by.at[w] + plus.at[w];
    pack_at<Real, W>(product, i) = e;
  }
};

// f for every W elements of every row: x runs over a row, so that a warp's accesses are neighbours.
template <int W, class F>
__global__ void __launch_bounds__(kThreads) each(int64_t k, int64_t n, int64_t width, F f) {
  for (int64_t vector = blockIdx.z; vector < k; vector += gridDim.z)
    for (int64_t row = blockIdx.x * blockDim.y + threadIdx.y; row < n; row += gridDim.x * blockDim.y)
      for (int64_t column = (blockIdx.y * blockDim.x + threadIdx.x) * W; column < width;
           column += gridDim.y * blockDim.x * W)
        f.template operator()<W>(vector, row, column, (vector * n + row) * width + column);
}

// One warp per row.
template <class Real>
__global__ void __launch_bounds__(kThreads) loss_rows(int64_t k, int64_t n, int64_t classes, const Real* bias,
                                                      int64_t bias_stride, Shared<Real> p, Real scale, Real* product) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t at = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp; at < k * n; at += step) {
    const int64_t vector = at / n, row = at % n;
    const Real* shift = bias ? bias + vector * bias_stride : nullptr;
    Real *z = product + at * classes, mean = 0;
    for (int64_t c = lane; c < classes; c += kWarp) {
      if (shift) z[c] += shift[c];
      if (p.data) mean += p.data[row * p.stride + c] * z[c];
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) mean += __shfl_xor_sync(0xffffffffu, mean, offset);
    // Every lane reads what it has written itself.
    for (int64_t c = lane; c < classes; c += kWarp)
      z[c] = scale * (p.data ? p.data[row * p.stride + c] * (z[c] - mean) : z[c]);
  }
}

template <class Real>
bool packs(int64_t width, std::initializer_list<const void*> contiguous, std::initializer_list<Rows> shared) {
  constexpr int64_t kWidth = 16 / sizeof(Real);
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  bool fits = width % kWidth == 0;
  for (const void* data : contiguous) fits &= aligned(data);
  for (const Rows& rows : shared) fits &= !rows.data || (aligned(rows.data) && rows.stride % kWidth == 0);
  return fits;
}

template <class Real, class F>
const char* run(const MlpTangents& shape, bool in_packs, const F& f, Stream stream) {
  if (shape.k == 0 || shape.n == 0) return nullptr;
  constexpr int kWidth = 16 / sizeof(Real);
  const int64_t columns = in_packs ? shape.width / kWidth : shape.width;
  dim3 block(1, kThreads);
  while (block.x < columns && block.x < kThreads) block.x *= 2, block.y /= 2;
  const auto blocks = [](int64_t size, int64_t each) {
    return static_cast<unsigned>(std::min((size + each - 1) / each, kMaxGrid));
  };
  const dim3 grid(blocks(shape.n, block.y), blocks(columns, block.x), blocks(shape.k, 1));
  const cudaError_t error =
      launch(in_packs ? each<kWidth, F> : each<1, F>, grid, block, 0, stream, shape.k, shape.n, shape.width, f);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls f with a value of the tangents' type.
template <class F>
const char* for_dtype(DType dtype, const F& f) {
  return dtype == DType::f64 ? f(double{}) : f(float{});
}

}  // namespace

const char* mlp_forward(const MlpTangents& shape, const void* bias, int64_t bias_stride, const Rows& slope,
                        const Rows& bend, void* product, void* tangent, Stream stream) {
  return for_dtype(shape.dtype, [&](auto zero) {
    using Real = decltype(zero);
    const Forward<Real> f{slope,
                          bend,
                          static_cast<const Real*>(bias),
                          bias_stride,
                          static_cast<Real*>(product),
                          static_cast<Real*>(tangent)};
    return run<Real>(shape, packs<Real>(shape.width, {product, tangent}, {slope, bend}), f, stream);
  });
}

const char* mlp_loss(const MlpTangents& shape, const void* bias, int64_t bias_stride, const Rows& probabilities,
                     double scale, void* product, Stream stream) {
  if (shape.k == 0 || shape.n == 0) return nullptr;
  return for_dtype(shape.dtype, [&](auto zero) {
    using Real = decltype(zero);
    const int64_t blocks = (shape.k * shape.n + kThreads / kWarp - 1) / (kThreads / kWarp);
    const unsigned grid = static_cast<unsigned>(std::min(blocks, kMaxGrid));
    const cudaError_t error =
        launch(loss_rows<Real>, dim3(grid), dim3(kThreads), 0, stream, shape.k, shape.n, shape.width,
               static_cast<const Real*>(bias), bias_stride, Shared<Real>(probabilities), static_cast<Real>(scale),
               static_cast<Real*>(product));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  });
}

const char* mlp_backward(const MlpTangents& shape, const Rows& slope, const void* curved, void* product,
                         Stream stream) {
  return for_dtype(shape.dtype, [&](auto zero) {
    using Real = decltype(zero);
    const Backward<Real> f{slope, static_cast<const Real*>(curved), static_cast<Real*>(product)};
    return run<Real>(shape, packs<Real>(shape.width, {product, curved}, {slope}), f, stream);
  });
}

}  // namespace hg::cuda
