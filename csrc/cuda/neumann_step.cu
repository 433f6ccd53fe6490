// The fused Neumann step on a CUDA device: one pass over the lists, then the norm.
#include "../kernels.h"
#include "list_pass.cuh"

namespace hg::cuda {
namespace {

template <class State, class Product>
struct NeumannPass {
  static constexpr int kLists = 3, kSums = kNeumannStats, kWidth = 16 / sizeof(State);
  enum List : int { kV, kP, kHv };
  template <int W>
  struct Items {
    Pack<State, W> v, p;
    Pack<Product, W> hv;
  };

  State alpha, damping;
  const int* running;

  static constexpr std::array<int, kLists> lists() { return {kV, kP, kHv}; }
  static constexpr __host__ __device__ int item_size(int list) { return list < kHv ? sizeof(State) : sizeof(Product); }
  __device__ bool enter(int64_t) const { return !running || *running; }

  template <int W>
  __device__ __forceinline__ void load(Items<W>& items, const Cursor<kLists>& at, int64_t i) const {
    items.v = at.template load<State, W>(kV, i);
    items.p = at.template load<State, W>(kP, i);
    items.hv = at.template load<Product, W>(kHv, i);
  }

  template <int W>
  __device__ __forceinline__ void update(Items<W>& items, const Cursor<kLists>& at, int64_t i, double* sums) const {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const State term = neumann_term<State>(items.v.at[w], widen(items.hv.at[w]), alpha, damping);
      items.v.at[w] = term;
      items.p.at[w] += term;
      // In double, where the square of a float does not overflow.
      sums[kNormSquared] += static_cast<double>(term) * static_cast<double>(term);
      if (!finite(term)) sums[kNonFinite] = 1;
    }
    at.store(kV, i, items.v);
    at.store(kP, i, items.p);
  }
};

struct NeumannFinish {
  static constexpr int kSums = kNeumannStats;
  double* stats;
  const int* running;

  __device__ bool live(int64_t) const { return !running || *running; }
  __device__ void operator()(int64_t row, const double* sums) const {
    stats[row * kNeumannStats + kNormSquared] = sums[kNormSquared];
    stats[row * kNeumannStats + kNonFinite] = sums[kNonFinite] != 0;
  }
};

}  // namespace

const char* neumann_step(const VectorList& v, const VectorList& p, const VectorList& hv, int64_t rows, double* stats,
                         double alpha, double damping, const Scratch& scratch, Stream stream, const int* running) {
  if (rows == 0) return nullptr;
  const AlignedPieces<3> pieces({v, p, hv});
  const Tiling<3> tiling(pieces, rows);
  double* partial = scratch(rows * tiling.blocks * kNeumannStats);
  cudaError_t error = for_dtypes(v.dtype, hv.dtype, [&](auto state, auto product) {
    using State = decltype(state);
    const NeumannPass<State, decltype(product)> pass{static_cast<State>(alpha), static_cast<State>(damping), running};
    return run_pass(pieces, tiling, rows, pass, partial, stream);
  });
  if (error == cudaSuccess) error = run_finish(rows, tiling.blocks, partial, NeumannFinish{stats, running}, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hg::cuda
