// One iteration of conjugate gradients on the CPU in three fused passes: the dot products, x and r
// with r.r, then p. Scalars stay in `state`, each right-hand side stops by itself.
#include "../kernels.h"
#include "dispatch.h"

namespace hg::cpu {
namespace {

enum Dots : int { kPHp, kPP, kHpHp, kDots };

template <class State, class Product>
struct DotsPiece {
  static HG_INLINE void run(const char* p_, const char* hp_, int64_t n, double damping_, double* sums) {
    const State* p = reinterpret_cast<const State*>(p_);
    const Product* hp = reinterpret_cast<const Product*>(hp_);
    const State damping = static_cast<State>(damping_);
    sum_elements<State, kDots>(n, sums, [&](int64_t i, State* terms) HG_LAMBDA_INLINE {
      const State a = p[i], b = damped<State>(widen(hp[i]), a, damping);
      terms[kPHp] = a * b;
      terms[kPP] = a * a;
      terms[kHpHp] = b * b;
    });
  }
};

template <class State, class Product>
struct AdvancePiece {
  static HG_INLINE void run(char* x_, char* r_, const char* p_, const char* hp_, int64_t n, double alpha_,
                            double damping_, double* sums) {
    State* x = reinterpret_cast<State*>(x_);
    State* r = reinterpret_cast<State*>(r_);
    const State* p = reinterpret_cast<const State*>(p_);
    const Product* hp = reinterpret_cast<const Product*>(hp_);
    const State alpha = static_cast<State>(alpha_), damping = static_cast<State>(damping_);
    sum_elements<State, 1>(n, sums, [&](int64_t i, State* square) HG_LAMBDA_INLINE {
      x[i] = cg_solution(x[i], p[i], alpha);
      const State residual = cg_residual<State>(r[i], widen(hp[i]), p[i], alpha, damping);
      r[i] = residual;
      square[0] = residual * residual;
    });
  }
};

template <class State, class>
struct DirectionPiece {
  static HG_INLINE void run(const char* r_, char* p_, int64_t n, double beta_) {
    const State* r = reinterpret_cast<const State*>(r_);
    State* p = reinterpret_cast<State*>(p_);
    const State beta = static_cast<State>(beta_);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) p[i] = cg_direction(r[i], p[i], beta);
  }
};

}  // namespace

void cg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp, int64_t rows,
             double* state, double damping) {
  const AlignedPieces<4> pieces({x, r, p, hp});
  const double eps = epsilon(x.dtype);
  const auto scalars = [&](int64_t row) { return CgScalars{state + row * kCgState}; };
  const auto running = [&](int64_t row) { return scalars(row).running(); };
  std::vector<double> factor(rows, 0);

  const auto dots = for_dtypes<DotsPiece, const char*, const char*, int64_t, double, double*>(x.dtype, hp.dtype);
  const auto products = for_each_block<kDots>(
      pieces, rows, running,
      [&](int64_t, const auto& at, int64_t n, double* out) { dots(at[2], at[3], n, damping, out); });
  for (int64_t row = 0; row < rows; ++row)
    if (running(row))
      factor[row] = scalars(row).step_length(products[row][kPHp], products[row][kPP], products[row][kHpHp], eps);

  const auto advance =
      for_dtypes<AdvancePiece, char*, char*, const char*, const char*, int64_t, double, double, double*>(x.dtype,
                                                                                                         hp.dtype);
  const auto squares =
      for_each_block<1>(pieces, rows, running, [&](int64_t row, const auto& at, int64_t n, double* out) {
        advance(at[0], at[1], at[2], at[3], n, factor[row], damping, out);
      });
  for (int64_t row = 0; row < rows; ++row)
    if (running(row)) factor[row] = scalars(row).conjugation(squares[row][0]);

  const auto direction = for_dtypes<DirectionPiece, const char*, char*, int64_t, double>(x.dtype, x.dtype);
  for_each_block<1>(pieces, rows, running,
                    [&](int64_t row, const auto& at, int64_t n, double*) { direction(at[1], at[2], n, factor[row]); });
}

}  // namespace hg::cpu
