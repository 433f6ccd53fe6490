// One iteration of conjugate gradients on a CUDA device in the three passes of the CPU kernel, with the
// scalar recurrences on the device in between: the host never waits. Each right-hand side stops by itself.
#include "../kernels.h"
#include "list_pass.cuh"

namespace hg::cuda {
namespace {

enum List : int { kX, kR, kP, kHp, kM };
enum Dots : int { kPHp, kPP, kHpHp, kDots };

// What all passes and scalar updates know: the state of every row, and the factor of the pass to come.
struct Rows {
  double* state;
  double* factor;
  bool preconditioned;

  __device__ CgScalars scalars(int64_t row) const {
    return CgScalars{state + row * (preconditioned ? kPcgState : kCgState), preconditioned};
  }
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

template <class State, class Product, bool Preconditioned>
struct AdvancePass {
  static constexpr int kLists = 4 + Preconditioned, kSums = 1 + Preconditioned, kWidth = 16 / sizeof(State);
  template <int W>
  struct Items {
    Pack<State, W> x, r, p, m;
    Pack<Product, W> hp;
  };

  Rows rows;
  State damping, alpha;

  static constexpr std::array<int, kLists> lists() {
    if constexpr (Preconditioned)
      return {kX, kR, kP, kHp, kM};
    else
      return {kX, kR, kP, kHp};
  }
  static constexpr __host__ __device__ int item_size(int list) { return list == kHp ? sizeof(Product) : sizeof(State); }
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
    if constexpr (Preconditioned) items.m = at.template load<State, W>(kM, i);
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
      if constexpr (Preconditioned)
        sums[1] += static_cast<double>(items.m.at[w] * residual) * static_cast<double>(residual);
    }
    at.store(kX, i, items.x);
    at.store(kR, i, items.r);
  }
};

template <class State, bool Preconditioned>
struct DirectionPass {
  static constexpr int kLists = 2 + Preconditioned, kSums = 0, kWidth = 16 / sizeof(State);
  template <int W>
  struct Items {
    Pack<State, W> r, p, m;
  };

  Rows rows;
  State beta;

  static constexpr std::array<int, kLists> lists() {
    if constexpr (Preconditioned)
      return {kR, kP, kM};
    else
      return {kR, kP};
  }
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
    if constexpr (Preconditioned) items.m = at.template load<State, W>(2, i);
  }

  template <int W>
  __device__ __forceinline__ void update(Items<W>& items, const Cursor<kLists>& at, int64_t i, double*) const {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const State z = Preconditioned ? items.m.at[w] * items.r.at[w] : items.r.at[w];
      items.p.at[w] = cg_direction(z, items.p.at[w], beta);
    }
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

template <bool Preconditioned>
struct Conjugation : Rows {
  static constexpr int kSums = 1 + Preconditioned;

  __device__ void operator()(int64_t row, const double* squares) const {
    factor[row] = scalars(row).conjugation(squares[0], squares[Preconditioned]);
  }
};

// The lists are x, r, p, hp, m; without preconditioner the last is not looked at.
template <bool Preconditioned>
const char* iterate(const AlignedPieces<5>& pieces, DType x, DType hp, int64_t rows, double* state, double damping,
                    const Scratch& scratch, Stream stream) {
  if (rows == 0) return nullptr;
  const Tiling<5> tiling(pieces, rows);
  double* factor = scratch(rows * (1 + tiling.blocks * kDots));
  double* partial = factor + rows;
  const Rows shared{state, factor, Preconditioned};
  const cudaError_t error = for_dtypes(x, hp, [&](auto state_type, auto product_type) {
    using State = decltype(state_type);
    using Product = decltype(product_type);
    const State damping_ = static_cast<State>(damping);
    const auto pass = [&](const auto& body) { return run_pass(pieces, tiling, rows, body, partial, stream); };
    const auto finish = [&](const auto& body) { return run_finish(rows, tiling.blocks, partial, body, stream); };

    cudaError_t e = pass(DotsPass<State, Product>{shared, damping_});
    if (e == cudaSuccess) e = finish(StepLength{{shared}, epsilon(x)});
    if (e == cudaSuccess) e = pass(AdvancePass<State, Product, Preconditioned>{shared, damping_, 0});
    if (e == cudaSuccess) e = finish(Conjugation<Preconditioned>{{shared}});
    if (e == cudaSuccess) e = pass(DirectionPass<State, Preconditioned>{shared, 0});
    return e;
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* cg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp, int64_t rows,
                    double* state, double damping, const Scratch& scratch, Stream stream) {
  const AlignedPieces<5> pieces({x, r, p, hp, r});
  return iterate<false>(pieces, x.dtype, hp.dtype, rows, state, damping, scratch, stream);
}

const char* pcg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp,
                     const VectorList& m, int64_t rows, double* state, double damping, const Scratch& scratch,
                     Stream stream) {
  const AlignedPieces<5> pieces({x, r, p, hp, m});
  return iterate<true>(pieces, x.dtype, hp.dtype, rows, state, damping, scratch, stream);
}

}  // namespace hg::cuda
