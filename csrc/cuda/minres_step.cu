// One iteration of MINRES on a CUDA device in the two passes of the CPU kernel, with the scalar recurrences on the
// device in between; rows that stop take their last direction in a third, which the others skip.
#include "../kernels.h"
#include "list_pass.cuh"

namespace hg::cuda {
namespace {

enum List : int { kX, kV, kVOld, kW, kWOld, kHv };

// What all passes and scalar updates know: the state of every row, and the factors of the pass to come.
struct Rows {
  double* state;
  MinresFactors* factors;

  __device__ MinresScalars scalars(int64_t row) const { return MinresScalars{state + row * kMinresState}; }
  __device__ bool live(int64_t row) const { return scalars(row).running(); }
};

template <class State, class Product>
struct DotPass {
  static constexpr int kLists = 2, kSums = 1, kWidth = 16 / sizeof(State);
  template <int W>
  struct Items {
    Pack<State, W> v;
    Pack<Product, W> hv;
  };

  Rows rows;
  State damping;

  static constexpr std::array<int, kLists> lists() { return {kV, kHv}; }
  static constexpr __host__ __device__ int item_size(int list) { return list == 0 ? sizeof(State) : sizeof(Product); }
  __device__ bool enter(int64_t row) const { return rows.live(row); }

  template <int W>
  __device__ __forceinline__ void load(Items<W>& items, const Cursor<kLists>& at, int64_t i) const {
    items.v = at.template load<State, W>(0, i);
    items.hv = at.template load<Product, W>(1, i);
  }

  template <int W>
  __device__ __forceinline__ void update(const Items<W>& items, const Cursor<kLists>&, int64_t, double* sums) const {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const double v = items.v.at[w];
      sums[0] += v * static_cast<double>(damped<State>(widen(items.hv.at[w]), items.v.at[w], damping));
    }
  }
};

template <class State, class Product>
struct VectorsPass {
  static constexpr int kLists = 6, kSums = 1, kWidth = 16 / sizeof(State);
  template <int W>
  struct Items {
    Pack<State, W> x, v, v_old, w, w_old;
    Pack<Product, W> hv;
  };

  Rows rows;
  State damping;
  MinresFactorsAs<State> factors;

  static constexpr std::array<int, kLists> lists() { return {kX, kV, kVOld, kW, kWOld, kHv}; }
  static constexpr __host__ __device__ int item_size(int list) { return list < kHv ? sizeof(State) : sizeof(Product); }
  __device__ bool enter(int64_t row) {
    if (!rows.live(row)) return false;
    factors = MinresFactorsAs<State>(rows.factors[row]);
    return true;
  }

  template <int W>
  __device__ __forceinline__ void load(Items<W>& items, const Cursor<kLists>& at, int64_t i) const {
    items.x = at.template load<State, W>(kX, i);
    items.v = at.template load<State, W>(kV, i);
    items.v_old = at.template load<State, W>(kVOld, i);
    items.w = at.template load<State, W>(kW, i);
    items.w_old = at.template load<State, W>(kWOld, i);
    items.hv = at.template load<Product, W>(kHv, i);
  }

  template <int W>
  __device__ __forceinline__ void update(Items<W>& items, const Cursor<kLists>& at, int64_t i, double* sums) const {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const State v = items.v.at[w];
      items.x.at[w] += factors.step * items.w.at[w];
      items.w_old.at[w] = minres_direction(v, items.w.at[w], items.w_old.at[w], factors);
      items.v_old.at[w] = minres_vector<State>(widen(items.hv.at[w]), v, items.v_old.at[w], factors, damping);
      const double wide = items.v_old.at[w];
      sums[0] += wide * wide;
    }
    at.store(kX, i, items.x);
    at.store(kVOld, i, items.v_old);
    at.store(kWOld, i, items.w_old);
  }
};

template <class State>
struct ClosePass {
  static constexpr int kLists = 2, kSums = 0, kWidth = 16 / sizeof(State);
  template <int W>
  struct Items {
    Pack<State, W> x, w;
  };

  Rows rows;
  State step;

  static constexpr std::array<int, kLists> lists() { return {kX, kWOld}; }
  static constexpr __host__ __device__ int item_size(int) { return sizeof(State); }
  __device__ bool enter(int64_t row) {
    if (!rows.scalars(row).closing()) return false;
    step = static_cast<State>(rows.state[row * kMinresState + kStep]);
    return true;
  }

  template <int W>
  __device__ __forceinline__ void load(Items<W>& items, const Cursor<kLists>& at, int64_t i) const {
    items.x = at.template load<State, W>(0, i);
    items.w = at.template load<State, W>(1, i);
  }

  template <int W>
  __device__ __forceinline__ void update(Items<W>& items, const Cursor<kLists>& at, int64_t i, double*) const {
#pragma unroll
    for (int w = 0; w < W; ++w) items.x.at[w] += step * items.w.at[w];
    at.store(0, i, items.x);
  }
};

struct Lanczos : Rows {
  static constexpr int kSums = 1;
  __device__ void operator()(int64_t row, const double* vhv) const { factors[row] = scalars(row).lanczos(vhv[0]); }
};

struct Rotation : Rows {
  static constexpr int kSums = 1;
  double eps;
  __device__ void operator()(int64_t row, const double* square) const { scalars(row).rotation(square[0], eps); }
};

__global__ void closed(Rows shared, int64_t rows) {
  for (int64_t row = blockIdx.x * blockDim.x + threadIdx.x; row < rows; row += gridDim.x * blockDim.x)
    if (shared.scalars(row).closing()) shared.state[row * kMinresState + kStep] = 0;
}

}  // namespace

const char* minres_step(const VectorList& x, const VectorList& v, const VectorList& v_old, const VectorList& w,
                        const VectorList& w_old, const VectorList& hv, int64_t rows, double* state, double damping,
                        const Scratch& scratch, Stream stream) {
  if (rows == 0) return nullptr;
  const AlignedPieces<6> pieces({x, v, v_old, w, w_old, hv});
  const Tiling<6> tiling(pieces, rows);
  double* memory = scratch(rows * (kMinresFactors + tiling.blocks));
  double* partial = memory + rows * kMinresFactors;
  const Rows shared{state, reinterpret_cast<MinresFactors*>(memory)};
  const cudaError_t error = for_dtypes(x.dtype, hv.dtype, [&](auto state_type, auto product_type) {
    using State = decltype(state_type);
    using Product = decltype(product_type);
    const State damping_ = static_cast<State>(damping);
    const auto pass = [&](const auto& body) { return run_pass(pieces, tiling, rows, body, partial, stream); };
    const auto finish = [&](const auto& body) { return run_finish(rows, tiling.blocks, partial, body, stream); };

    cudaError_t e = pass(DotPass<State, Product>{shared, damping_});
    if (e == cudaSuccess) e = finish(Lanczos{{shared}});
    if (e == cudaSuccess) e = pass(VectorsPass<State, Product>{shared, damping_, {}});
    if (e == cudaSuccess) e = finish(Rotation{{shared}, epsilon(x.dtype)});
    if (e == cudaSuccess) e = pass(ClosePass<State>{shared, 0});
    const int64_t blocks = std::min<int64_t>((rows + kThreads - 1) / kThreads, kMaxGridRows);
    if (e == cudaSuccess) e = launch(closed, static_cast<unsigned>(blocks), kThreads, 0, stream, shared, rows);
    return e;
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hg::cuda
