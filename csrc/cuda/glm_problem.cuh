// A generalised linear model's product as the kernels see it, and the shared memory that they divide among them.
#pragma once

#include "../glm.h"
#include "device.cuh"
#include "pack.cuh"
#include "sums.cuh"

namespace hg::cuda {

constexpr int kWarps = kThreads / 32;
// Rows and columns of Z that a warp, and columns of G that a thread, works on at once.
constexpr int kTileRows = 4, kTileColumns = 4;

__host__ __device__ constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// The product as the kernels see it. There are K = k * classes columns. In shared memory every row of X and every
// column of V and G has `pitch` elements: d, a feature that is 1 everywhere if there is an intercept, then zeros.
template <class X, class Real>
struct GlmProblem {
  static constexpr int P = 16 / sizeof(Real);  // elements of a pack

  const X* x;
  const Real* weights;
  const Real* l2;
  int64_t n, stride;
  int k, classes, columns, d, pitch;
  bool intercept;
  Real scale;
  // Rows of X in shared memory at a time, and how many such tiles; copies of G, each with rows of its own.
  int tile, stages, groups;
  // Whether tiles come by bulk copies; see GlmLaunch::no_bulk for what that takes.
  bool bulk = false;

  GlmProblem(const GlmData& data, int64_t vectors)
      : x(static_cast<const X*>(data.x)),
        weights(static_cast<const Real*>(data.weights)),
        l2(static_cast<const Real*>(data.l2)),
        n(data.n),
        stride(data.stride),
        k(static_cast<int>(vectors)),
        classes(static_cast<int>(data.classes)),
        columns(k * classes),
        d(static_cast<int>(data.d)),
        pitch(static_cast<int>(round_up(data.d + data.intercept, 16 / sizeof(X)))),
        intercept(data.intercept),
        scale(static_cast<Real>(data.scale)) {
    const int items = (columns + kTileColumns - 1) / kTileColumns * (pitch / P);
    groups = items == 0 || items > kThreads ? 1 : kThreads / items;
  }

  __host__ __device__ int elements() const { return columns * pitch; }
  __host__ __device__ int z_pitch() const { return static_cast<int>(round_up(tile, kTileRows)); }

  // Where element e of the columns in shared memory is in the caller's vectors; -1 if it is padding.
  __device__ int64_t place(int e) const {
    const int column = e / pitch, j = e % pitch;
    const int64_t row = column / classes, c = column % classes;
    const int64_t at = row * classes * (d + intercept);
    if (j < d) return at + c * d + j;
    return intercept && j == d ? at + static_cast<int64_t>(classes) * d + c : -1;
  }
};

// Hands out shared memory. With a null base it only counts.
class Arena {
 public:
  __host__ __device__ explicit Arena(char* base) : base_(base) {}
  template <class T>
  __host__ __device__ T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(next());
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), 32);
    return at;
  }
  __host__ __device__ int64_t size() const { return size_; }

 private:
  // On the device a pointer all the way, without a null: else the compiler could not tell that it is to shared memory.
  __host__ __device__ char* next() const {
#if defined(__CUDA_ARCH__)
    return base_ + size_;
#else
    return base_ ? base_ + size_ : nullptr;
#endif
  }

  char* base_;
  int64_t size_ = 0;
};

}  // namespace hg::cuda
