// One iteration of conjugate gradients on a CUDA device in the three passes of the CPU kernel, with the
// scalar recurrences on the device in between: the host never waits. Each right-hand side stops by itself.
#include "../kernels.h"
#include "list_pass.cuh"

namespace hg::cuda {
namespace {

enum List : int { kX, kR, kP, kHp };
enum Dots : int { kPHp, kPP, kHpHp, kDots };

// What all passes and scalar updates know: the state of every row, and the factor of the pass to come.
struct Rows {
  double* state;
  double* factor;

  __device__ CgScalars scalars(int64_t row) const { return CgScalars{state + row * kCgState}; }
  __device__ bool live(int64_t row) const { return scalars(row).running(); }
};

template <class State, class Product>
struct DotsPass {
  static constexpr int kLists = 2, kSums = kDots, kWidth = 16 / sizeof(State);
  template <int W>
  struct Items {
    Pack<State, W> p;
    Pack<Product, W> hp;
  };

  Rows rows;
  State damping;

  static constexpr std::array<int, kLists> lists() { return {kP, kHp}; }
  static constexpr __host__ __device__ int item_size(int list) { return list == 0 ? sizeof(State) : sizeof(Product); }
  __device__ bool enter(int64_t row) const { return rows.live(row); }

  template <int W>
  __device__ __forceinline__ void load(Items<W>& items, const Cursor<kLists>& at, int64_t i) const {
    items.p = at.template load<State, W>(0, i);
    items.hp = at.template load<Product, W>(1, i);
  }

  template <int W>
  __device__ __forceinline__ void update(const Items<W>& items, const Cursor<kLists>&, int64_t, double* sums) const {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const double p = items.p.at[w];
      const double hp = damped<State>(widen(items.hp.at[w]), items.p.at[w], damping);
      sums[kPHp] += p * hp;
      sums[kPP] += p * p;
      sums[kHpHp] += hp * hp;
    }
  }
};

template <class State, class Product>
struct AdvancePass {
  static constexpr int kLists = 4, kSums = 1, kWidth = 16 / sizeof(State);
  template <int W>
  struct Items {
    Pack<State, W> x, r, p;
    Pack<Product, W> hp;
  };

  Rows rows;
  State damping, alpha;

  static constexpr std::array<int, kLists> lists() { return {kX, kR, kP, kHp}; }
  static constexpr __host__ __device__ int item_size(int list) { return list < kHp ? sizeof(State) : sizeof(Product); }
  __device__ bool enter(int64_t row) {
    if (!rows.live(row)) return false;
    alpha = static_cast<State>(rows.factor[row]);
    return true;
  }

  template <int W>
  __device__ __forceinline__ void load(Items<W>& items, const Cursor<kLists>& at, int64_t i) const {
    items.x = at.template load<State, W>(kX, i);
    items.r = at.template load<State, W>(kR, i);
    items.p = at.template load<State, W>(kP, i);
    items.hp = at.template load<Product, W>(kHp, i);
  }

  template <int W>
  __device__ __forceinline__ void update(Items<W>& items, const Cursor<kLists>& at, int64_t i, double* sums) const {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const State p = items.p.at[w];
      items.x.at[w] = cg_solution(items.x.at[w], p, alpha);
      const State residual = cg_residual<State>(items.r.at[w], widen(items.hp.at[w]), p, alpha, damping);
      items.r.at[w] = residual;
      sums[0] += static_cast<double>(residual) * static_cast<double>(residual);
    }
    at.store(kX, i, items.x);
    at.store(kR, i, items.r);
  }
};

template <class State>
struct DirectionPass {
  static constexpr int kLists = 2, kSums = 0, kWidth = 16 / sizeof(State);
  template <int W>
  struct Items {
    Pack<State, W> r, p;
  };

  Rows rows;
  State beta;

  static constexpr std::array<int, kLists> lists() { return {kR, kP}; }
  static constexpr __host__ __device__ int item_size(int) { return sizeof(State); }
  __device__ bool enter(int64_t row) {
    if (!rows.live(row)) return false;
    beta = static_cast<State>(rows.factor[row]);
    return true;
  }

  template <int W>
  __device__ __forceinline__ void load(Items<W>& items, const Cursor<kLists>& at, int64_t i) const {
    items.r = at.template load<State, W>(0, i);
    items.p = at.template load<State, W>(1, i);
  }

  template <int W>
  __device__ __forceinline__ void update(Items<W>& items, const Cursor<kLists>& at, int64_t i, double*) const {
#pragma unroll
    for (int w = 0; w < W; ++w) items.p.at[w] = cg_direction(items.r.at[w], items.p.at[w], beta);
    at.store(1, i, items.p);
  }
};

struct StepLength : Rows {
  static constexpr int kSums = kDots;
  double eps;

  __device__ void operator()(int64_t row, const double* dots) const {
    factor[row] = scalars(row).step_length(dots[kPHp], dots[kPP], dots[kHpHp], eps);
  }
};

struct Conjugation : Rows {
  static constexpr int kSums = 1;

  __device__ void operator()(int64_t row, const double* square) const {
    factor[row] = scalars(row).conjugation(square[0]);
  }
};

}  // namespace

const char* cg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp, int64_t rows,
                    double* state, double damping, const Scratch& scratch, Stream stream) {
  if (rows == 0) return nullptr;
  const AlignedPieces<4> pieces({x, r, p, hp});
  const Tiling<4> tiling(pieces, rows);
  double* factor = scratch(rows * (1 + tiling.blocks * kDots));
  double* partial = factor + rows;
  const Rows shared{state, factor};
  const cudaError_t error = for_dtypes(x.dtype, hp.dtype, [&](auto state_type, auto product_type) {
    using State = decltype(state_type);
    using Product = decltype(product_type);
    const State damping_ = static_cast<State>(damping);
    const auto pass = [&](const auto& body) { return run_pass(pieces, tiling, rows, body, partial, stream); };
    const auto finish = [&](const auto& body) { return run_finish(rows, tiling.blocks, partial, body, stream); };

    cudaError_t e = pass(DotsPass<State, Product>{shared, damping_});
    if (e == cudaSuccess) e = finish(StepLength{{shared}, epsilon(x.dtype)});
    if (e == cudaSuccess) e = pass(AdvancePass<State, Product>{shared, damping_, 0});
    if (e == cudaSuccess) e = finish(Conjugation{{shared}});
    if (e == cudaSuccess) e = pass(DirectionPass<State>{shared, 0});
    return e;
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hg::cuda
