// The matrix products of a small multilayer perceptron: tiles that end in what the network does with the product.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "pack.cuh"

namespace hg::cuda::mlp {

// Tiles of the result, and slices of the depth, which groups of threads add up side by side: a small product has too
// few tiles to fill the device, and each of them a long way to go.
constexpr int kTile = 32, kSlices = 4, kGroup = 64, kThreads = kSlices * kGroup;

// A matrix by its strides, in elements; `vector` is 0 where all vectors have the same. Small networks have small
// matrices: 32 bits hold all distances within one, and half the registers all addresses.
template <class Real>
struct Matrix {
  const Real* data;
  int outer, depth;
  int64_t vector;
};

// One term of a product: the sum over t < depth of a(i, t) b(j, t).
template <class Real>
struct Term {
  Matrix<Real> a, b;
  int depth;
};

// a(i, t) and b(j, t) are contiguous along t, or else along i and j.
template <class Real, class Finish, bool kAlongA, bool kAlongB>
struct Product {
  // Depth of a tile in shared memory, and of what is in registers at a time, which have to do for two blocks.
  static constexpr int kDepth = 16, kUnroll = sizeof(Real) == 8 ? 2 : 4, kLoads = kTile * kDepth / kGroup;
  using Quad = Pack<Real, 4>;
  // Rows of a tile are 4 elements apart from being a multiple of the banks.
  using Tiles = Quad[2][kSlices][kDepth][kTile / 4 + 1];

  Term<Real> terms[2];
  int count, rows, columns;
  Finish finish;

  // The thread's share of a tile of a or b, zero outside; the column of ones, if any, is past the matrix.
  template <bool kAlong>
  __device__ __forceinline__ static void fetch(const Matrix<Real>& m, int64_t vector, int outer, int outer_end, int t,
                                               int t_end, bool ones, Real (&out)[kLoads]) {
    const Real* data = m.data + vector * m.vector;
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int e = l * kGroup + threadIdx.x % kGroup;
      const int i = outer + (kAlong ? e / kDepth : e % kTile), s = t + (kAlong ? e % kDepth : e / kTile);
      Real value = 0;
      if (s < t_end && i < outer_end) value = data[i * m.outer + s * m.depth];
      if (ones && s < t_end && i == outer_end) value = 1;
      out[l] = value;
    }
  }

  template <bool kAlong>
  __device__ __forceinline__ static void put(const Real (&values)[kLoads], Quad (*tile)[kTile / 4 + 1]) {
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int e = l * kGroup + threadIdx.x % kGroup;
      const int i = kAlong ? e / kDepth : e % kTile, s = kAlong ? e % kDepth : e / kTile;
      tile[s][i / 4].at[i % 4] = values[l];
    }
  }

  __device__ __forceinline__ void run(int64_t vector, int row, int column, Tiles& tiles) const {
    const int slice = threadIdx.x / kGroup, y = threadIdx.x % kGroup / 8, x = threadIdx.x % 8;
    const int first = (terms[0].depth + kDepth - 1) / kDepth;
    const int all = first + (count > 1 ? (terms[1].depth + kDepth - 1) / kDepth : 0);
    const int width = columns - Finish::kOnes;
    Real a[kLoads], b[kLoads], sums[4][4] = {};
    const auto load = [&](int tile) {
      const bool second = tile >= first;
      const Term<Real>& term = terms[second];
      // Past the last tile everything is outside.
      const int t = (second ? tile - first : tile) * kDepth, end = tile < all ? term.depth : 0;
      fetch<kAlongA>(term.a, vector, row, rows, t, end, false, a);
      fetch<kAlongB>(term.b, vector, column, width, t, end, Finish::kOnes && !second, b);
    };
    load(slice);
    for (int tile = slice; tile - slice < all; tile += kSlices) {
      put<kAlongA>(a, tiles[0][slice]);
      put<kAlongB>(b, tiles[1][slice]);
      __syncthreads();
      load(tile + kSlices);
#pragma unroll kUnroll
      for (int s = 0; s < kDepth; ++s) {
        const Quad by_row = tiles[0][slice][s][y], by_column = tiles[1][slice][s][x];
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[r][c] += by_row.at[r] * by_column.at[c];
      }
      __syncthreads();
    }

    // The slices' sums, in the same order in every run, by all threads.
    Real* partial = reinterpret_cast<Real*>(&tiles);
    static_assert(sizeof(Tiles) >= kSlices * kTile * kTile * sizeof(Real), "the sums take the place of the tiles");
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) partial[(slice * kTile + 4 * y + r) * kTile + 4 * x + c] = sums[r][c];
    __syncthreads();
    for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) {
      const int i = row + e / kTile, j = column + e % kTile;
      Real sum = 0;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) sum += partial[s * kTile * kTile + e];
      if (i < rows && j < columns) finish(vector, i, j, sum);
    }
    // The next vector's tiles take the place of the sums.
    __syncthreads();
  }
};

template <class P>
__global__ void __launch_bounds__(kThreads, 2) multiply(P product, int64_t k) {
  using Tiles = typename P::Tiles;
  HG_SHARED(Tiles, tiles, );
  const int across = (product.columns + kTile - 1) / kTile;
  for (int64_t vector = blockIdx.y; vector < k; vector += gridDim.y)
    product.run(vector, blockIdx.x / across * kTile, blockIdx.x % across * kTile, tiles);
}

}  // namespace hg::cuda::mlp
