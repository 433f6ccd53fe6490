// The fused Richardson step on a CUDA device: one pass over the lists, then the sums.
#include "../kernels.h"
#include "list_pass.cuh"
#include "residual_sums.cuh"

namespace hg::cuda {
namespace {

enum List : int { kX, kB, kHx, kM };

// Without preconditioner the pass has three lists, and m is not read.
template <class State, class Product, bool Preconditioned>
struct RichardsonPass {
  static constexpr int kLists = 3 + Preconditioned, kSums = kResidualStats, kWidth = 16 / sizeof(State);
  template <int W>
  struct Items {
    Pack<State, W> x, b, m;
    Pack<Product, W> hx;
  };

  State alpha, damping;

  static constexpr std::array<int, kLists> lists() {
    if constexpr (Preconditioned)
      return {kX, kB, kHx, kM};
    else
      return {kX, kB, kHx};
  }
  static constexpr __host__ __device__ int item_size(int list) { return list == kHx ? sizeof(Product) : sizeof(State); }
  __device__ bool enter(int64_t) const { return true; }

  template <int W>
  __device__ __forceinline__ void load(Items<W>& items, const Cursor<kLists>& at, int64_t i) const {
    items.x = at.template load<State, W>(kX, i);
    items.b = at.template load<State, W>(kB, i);
    items.hx = at.template load<Product, W>(kHx, i);
    if constexpr (Preconditioned) items.m = at.template load<State, W>(kM, i);
  }

  template <int W>
  __device__ __forceinline__ void update(Items<W>& items, const Cursor<kLists>& at, int64_t i, double* sums) const {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const State r = residual_of<State>(items.b.at[w], widen(items.hx.at[w]), items.x.at[w], damping);
      const State z = Preconditioned ? items.m.at[w] * r : r;
      items.x.at[w] += alpha * z;
      add_residual_sums(r, z, items.x.at[w], sums);
    }
    at.store(kX, i, items.x);
  }
};

}  // namespace

const char* richardson_step(const VectorList& x, const VectorList& hx, const VectorList& b, const VectorList* m,
                            int64_t rows, double* stats, double alpha, double damping, const Scratch& scratch,
                            Stream stream) {
  if (rows == 0) return nullptr;
  const AlignedPieces<4> pieces({x, b, hx, m ? *m : b});
  const Tiling<4> tiling(pieces, rows);
  double* partial = scratch(rows * tiling.blocks * kResidualStats);
  cudaError_t error = for_dtypes(x.dtype, hx.dtype, [&](auto state, auto product) {
    using State = decltype(state);
    using Product = decltype(product);
    const State alpha_ = static_cast<State>(alpha), damping_ = static_cast<State>(damping);
    const auto pass = [&](const auto& body) { return run_pass(pieces, tiling, rows, body, partial, stream); };
    return m ? pass(RichardsonPass<State, Product, true>{alpha_, damping_})
             : pass(RichardsonPass<State, Product, false>{alpha_, damping_});
  });
  if (error == cudaSuccess) error = run_finish(rows, tiling.blocks, partial, ResidualFinish{stats}, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hg::cuda
