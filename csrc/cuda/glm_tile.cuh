// What one block does with a tile of rows of X in its shared memory: Z = X V^T, Z <- D Z, G += Z^T X. The tile comes
// from global memory once and serves both products.
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
  __host__ __device__ explicit Arena(char* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  __host__ __device__ T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(base_ + size_);
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), 32);
    return at;
  }
  __host__ __device__ int64_t size() const { return size_; }

 private:
  uintptr_t base_;
  int64_t size_ = 0;
};

// One halving of the sums of a warp: lanes that differ in `Bit` give each other the half that they do not keep.
template <int Half, int Bit, int N, class Real>
__device__ __forceinline__ void fold_sums(Real (&sums)[N], int& which) {
  const bool upper = threadIdx.x & Bit;
#pragma unroll
  for (int i = 0; i < (Half > 0 ? Half : 1); ++i) {
    const Real mine = Half > 0 && upper ? sums[i + Half] : sums[i], other = upper ? sums[i] : sums[i + Half];
    sums[i] = mine + __shfl_xor_sync(0xffffffffu, other, Bit);
  }
  if (upper) which += Half;
  if constexpr (Bit < 16) fold_sums<Half / 2, 2 * Bit>(sums, which);
}

// Adds each of N sums over the warp in N + 4 - log2(N) shuffles. Returns the total of sum `which` of this lane.
template <int N, class Real>
__device__ __forceinline__ Real warp_sums(Real (&sums)[N], int& which) {
  static_assert(N <= 32 && (N & (N - 1)) == 0, "a power of two, at most one sum per lane");
  which = 0;
  fold_sums<N / 2, 1>(sums, which);
  return sums[0];
}

// The block's part of the product.
template <class X, class Real>
class GlmBlock {
 public:
  using Problem = GlmProblem<X, Real>;
  static constexpr int P = Problem::P;

  Real* v;  // columns x pitch
  Real* g;  // groups x columns x pitch

  __host__ __device__ GlmBlock(const Problem& problem, Arena& arena) : problem_(problem) {
    v = arena.take<Real>(problem.elements());
    g = arena.take<Real>(static_cast<int64_t>(problem.groups) * problem.elements());
    z_ = arena.take<Real>(static_cast<int64_t>(problem.columns) * problem.z_pitch());
    weights_ = arena.take<Real>(static_cast<int64_t>(problem.stages) * problem.tile * problem.classes);
    x_ = arena.take<X>(static_cast<int64_t>(problem.stages) * problem.tile * problem.pitch);
  }

  // The block's rows, and the padding of its tiles, which copies leave as it is.
  __device__ void begin(int64_t first, int64_t last) {
    first_ = first, last_ = last;
    const int padding = problem_.pitch - problem_.d;
    for (int i = threadIdx.x; i < problem_.stages * problem_.tile * padding; i += kThreads) {
      const int row = i / padding, j = i % padding;
      x_[row * problem_.pitch + problem_.d + j] = narrow<X>(problem_.intercept && j == 0 ? 1.f : 0.f);
    }
  }

  __device__ void load_v(const Real* from) {
    for (int e = threadIdx.x; e < problem_.elements(); e += kThreads) {
      const int64_t at = problem_.place(e);
      v[e] = at < 0 ? 0 : from[at];
    }
  }

  // Whether all of the block's rows are in shared memory at once.
  __device__ bool resident() const { return problem_.stages == 1; }

  // Sends for the first tiles.
  __device__ void prefetch() {
#pragma unroll 1
    for (int s = 0; s < (resident() ? 1 : kStages - 1); ++s) fetch(s);
  }

  // G = X^T D X V over the block's rows, the copies of G added. Expects `prefetch` before; ends with a barrier.
  __device__ void multiply() {
    for (int e = threadIdx.x; e < problem_.groups * problem_.elements(); e += kThreads) g[e] = 0;
    const int tiles = static_cast<int>((last_ - first_ + problem_.tile - 1) / problem_.tile);
    for (int i = 0; i < tiles; ++i) {
      if (resident())
        wait_copies<0>();
      else
        wait_copies<kStages - 2>();
      // All have the tile, and are done with the one whose place the next copy takes.
      __syncthreads();
      if (!resident()) fetch(i + kStages - 1);
      const int64_t left = last_ - first_ - static_cast<int64_t>(i) * problem_.tile;
      use(resident() ? 0 : i % kStages, static_cast<int>(left < problem_.tile ? left : problem_.tile));
    }
    __syncthreads();
    if (problem_.groups == 1) return;
    for (int e = threadIdx.x; e < problem_.elements(); e += kThreads)
      for (int group = 1; group < problem_.groups; ++group) g[e] += g[group * problem_.elements() + e];
    __syncthreads();
  }

  static constexpr int kStages = 3;

 private:
  // Sends for tile i, or for nothing if there is none: batches are counted.
  __device__ __forceinline__ void fetch(int i) {
    const int64_t row = first_ + static_cast<int64_t>(i) * problem_.tile;
    if (row < last_) {
      const int rows = static_cast<int>(last_ - row < problem_.tile ? last_ - row : problem_.tile);
      const int stage = resident() ? 0 : i % kStages;
      const X* from = problem_.x + row * problem_.stride;
      X* to = x_ + stage * problem_.tile * problem_.pitch;
      const uintptr_t misplaced = reinterpret_cast<uintptr_t>(problem_.x) | (problem_.stride * sizeof(X));
      // Pairs of bf16: a copy has at least 4 bytes.
      constexpr int kSmall = sizeof(X) < 4 ? 4 : sizeof(X);
      if (misplaced % 16 == 0)
        fetch_rows<16>(from, to, rows);
      else if (misplaced % kSmall == 0)
        fetch_rows<kSmall>(from, to, rows);
      else
        fetch_rows<0>(from, to, rows);
      const Real* weights = problem_.weights + row * problem_.classes;
      Real* place = weights_ + stage * problem_.tile * problem_.classes;
      for (int e = threadIdx.x; e < rows * problem_.classes; e += kThreads)
        copy_async<sizeof(Real)>(place + e, weights + e);
    }
    end_copies();
  }

  // Copies in units of so many bytes, which the rows' addresses allow, if any, then what is left of each row.
  template <int Bytes>
  __device__ __forceinline__ void fetch_rows(const X* from, X* to, int rows) {
    int copied = 0;
    if constexpr (Bytes > 0) {
      constexpr int kUnit = Bytes / sizeof(X);
      if (const int units = problem_.d / kUnit; units > 0) {
        copied = units * kUnit;
        int row = threadIdx.x / units, unit = threadIdx.x % units;
#pragma unroll 1
        while (row < rows) {
          copy_async<Bytes>(to + row * problem_.pitch + unit * kUnit, from + row * problem_.stride + unit * kUnit);
          row += kThreads / units, unit += kThreads % units;
          if (unit >= units) ++row, unit -= units;
        }
      }
    }
    const int rest = problem_.d - copied;
    for (int i = threadIdx.x; i < rows * rest; i += kThreads) {
      const int row = i / rest, j = copied + i % rest;
      to[row * problem_.pitch + j] = from[row * problem_.stride + j];
    }
  }

  __device__ void use(int stage, int rows) {
    const X* x = x_ + stage * problem_.tile * problem_.pitch;
    const Real* weights = weights_ + stage * problem_.tile * problem_.classes;
    const int column_tiles = (problem_.columns + kTileColumns - 1) / kTileColumns;
    const int row_tiles = (rows + kTileRows - 1) / kTileRows;
    for (int i = threadIdx.x / 32; i < row_tiles * column_tiles; i += kWarps) {
      const int row = i / column_tiles * kTileRows, column = i % column_tiles * kTileColumns;
      const int count = problem_.columns - column;
      if (count == 1)
        dots<1>(x, weights, row, rows, column);
      else if (count == 2)
        dots<2>(x, weights, row, rows, column);
      else
        dots<4>(x, weights, row, rows, column);
    }
    __syncthreads();
    if (problem_.classes > 1) {
      center(weights, rows);
      __syncthreads();
    }
    const int packs = problem_.pitch / P, items = column_tiles * packs;
    for (int i = threadIdx.x; i < items * problem_.groups; i += kThreads) {
      const int group = i / items, column = i % items / packs * kTileColumns, j = i % packs * P;
      const int count = problem_.columns - column;
      if (count == 1)
        outer<1>(x, group, rows, column, j);
      else if (count == 2)
        outer<2>(x, group, rows, column, j);
      else
        outer<4>(x, group, rows, column, j);
    }
  }

  // Z = X V^T for kTileRows rows and C columns, one warp; weighted where D is diagonal.
  template <int C>
  __device__ __forceinline__ void dots(const X* x, const Real* weights, int row, int rows, int column) {
    constexpr int R = kTileRows;
    int x_row[R], v_column[C];
    // Rows and columns beyond the last repeat it, and are not stored.
#pragma unroll
    for (int r = 0; r < R; ++r) x_row[r] = (row + r < rows ? row + r : rows - 1) * problem_.pitch;
#pragma unroll
    for (int c = 0; c < C; ++c) v_column[c] = last_column(column + c) * problem_.pitch;
    Real sums[R * C] = {};
#pragma unroll 1
    for (int j = threadIdx.x % 32 * P; j < problem_.pitch; j += 32 * P) {
      Pack<X, P> xs[R];
#pragma unroll
      for (int r = 0; r < R; ++r) xs[r] = load(x + x_row[r] + j);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const Pack<Real, P> vs = load(v + v_column[c] + j);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int w = 0; w < P; ++w) sums[r * C + c] += static_cast<Real>(widen(xs[r].at[w])) * vs.at[w];
      }
    }
    int which;
    const Real total = warp_sums(sums, which);
    const int r = row + which / C, c = column + which % C;
    if (threadIdx.x % 32 < R * C && r < rows && c < problem_.columns)
      z_[c * problem_.z_pitch() + r] = problem_.classes == 1 ? weights[r] * total : total;
  }

  // z <- p (z - <p, z>) for every row and vector.
  __device__ __forceinline__ void center(const Real* weights, int rows) {
    const int pitch = problem_.z_pitch();
    for (int i = threadIdx.x; i < rows * problem_.k; i += kThreads) {
      const int row = i % rows;
      const Real* p = weights + row * problem_.classes;
      Real* z = z_ + i / rows * problem_.classes * pitch + row;
      Real mean = 0;
      for (int c = 0; c < problem_.classes; ++c) mean += p[c] * z[c * pitch];
      for (int c = 0; c < problem_.classes; ++c) z[c * pitch] = p[c] * (z[c * pitch] - mean);
    }
  }

  // G += Z^T X for C columns and P elements of each, over the rows of one group, one thread.
  template <int C>
  __device__ __forceinline__ void outer(const X* x, int group, int rows, int column, int j) {
    constexpr int R = kTileRows;
    int z[C];
#pragma unroll
    for (int c = 0; c < C; ++c) z[c] = last_column(column + c) * problem_.z_pitch();
    Real sums[C][P] = {};
    x += j;
#pragma unroll 1
    for (int row = group * R; row < rows; row += problem_.groups * R) {
      if (row + R <= rows) {
        Pack<X, P> xs[R];
#pragma unroll
        for (int r = 0; r < R; ++r) xs[r] = load(x + (row + r) * problem_.pitch);
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const auto zs = *reinterpret_cast<const Pack<Real, R>*>(z_ + z[c] + row);
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int w = 0; w < P; ++w) sums[c][w] += zs.at[r] * static_cast<Real>(widen(xs[r].at[w]));
        }
      } else {
#pragma unroll 1
        for (int r = row; r < rows; ++r) {
          const Pack<X, P> xs = load(x + r * problem_.pitch);
#pragma unroll
          for (int c = 0; c < C; ++c)
#pragma unroll
            for (int w = 0; w < P; ++w) sums[c][w] += z_[z[c] + r] * static_cast<Real>(widen(xs.at[w]));
        }
      }
    }
    // No other thread has these elements of this copy, in any tile.
#pragma unroll
    for (int c = 0; c < C; ++c)
      if (column + c < problem_.columns) {
        Real* to = g + (static_cast<int64_t>(group) * problem_.columns + column + c) * problem_.pitch + j;
#pragma unroll
        for (int w = 0; w < P; ++w) to[w] += sums[c][w];
      }
  }

  // The column, or the last one if there is no such column.
  __device__ int last_column(int column) const { return column < problem_.columns ? column : problem_.columns - 1; }

  template <class T>
  static __device__ __forceinline__ Pack<T, P> load(const T* at) {
    return *reinterpret_cast<const Pack<T, P>*>(at);
  }

  const Problem& problem_;
  Real* z_;        // columns x z_pitch
  Real* weights_;  // stages x tile x classes
  X* x_;           // stages x tile x pitch
  int64_t first_ = 0, last_ = 0;
};

}  // namespace hg::cuda
