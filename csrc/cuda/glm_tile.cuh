// What one block does with a tile of rows of X in its shared memory: Z = X V^T, Z <- D Z, G += Z^T X. The tile comes
// from global memory once and serves both products.
#pragma once

#include "glm_stream.cuh"

namespace hg::cuda {

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

  GlmTiles<X, Real> tiles;

  __host__ __device__ GlmBlock(const Problem& problem, Arena& arena) : tiles(problem, arena), problem_(problem) {
    v = arena.take<Real>(problem.elements());
    g = arena.take<Real>(static_cast<int64_t>(problem.groups) * problem.elements());
    z_ = arena.take<Real>(static_cast<int64_t>(problem.columns) * problem.z_pitch());
  }

  __device__ void load_v(const Real* from) {
    for (int e = threadIdx.x; e < problem_.elements(); e += kThreads) {
      const int64_t at = problem_.place(e);
      v[e] = at < 0 ? 0 : from[at];
    }
  }

  // G = X^T D X V over the block's rows, the copies of G added. Expects `prefetch` before; ends with a barrier.
  __device__ void multiply() {
    for (int e = threadIdx.x; e < problem_.groups * problem_.elements(); e += kThreads) g[e] = 0;
    for (int i = 0; i < tiles.count(); ++i) {
      const int stage = tiles.take();
      // All have the tile, and are done with the one whose place the next copy takes.
      __syncthreads();
      tiles.fetch_after(i);
      use(tiles.x(stage), tiles.weights(stage), tiles.rows(i));
    }
    __syncthreads();
    if (problem_.groups == 1) return;
    for (int e = threadIdx.x; e < problem_.elements(); e += kThreads)
      for (int group = 1; group < problem_.groups; ++group) g[e] += g[group * problem_.elements() + e];
    __syncthreads();
  }

 private:
  __device__ void use(const X* x, const Real* weights, int rows) {
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
  Real* z_;  // columns x z_pitch
};

}  // namespace hg::cuda
