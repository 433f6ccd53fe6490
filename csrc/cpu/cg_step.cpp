// One iteration of conjugate gradients on the CPU in three fused passes: the dot products, x and r
// with r.r and r.Mr, then p. Scalars stay in `state`, each right-hand side stops by itself.
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

template <bool Preconditioned>
struct Advance {
  template <class State, class Product>
  struct Piece {
    static HG_INLINE void run(char* x_, char* r_, const char* p_, const char* hp_, const char* m_, int64_t n,
                              double alpha_, double damping_, double* sums) {
      State* x = reinterpret_cast<State*>(x_);
      State* r = reinterpret_cast<State*>(r_);
      const State* p = reinterpret_cast<const State*>(p_);
      const Product* hp = reinterpret_cast<const Product*>(hp_);
      const State* m = reinterpret_cast<const State*>(m_);
      const State alpha = static_cast<State>(alpha_), damping = static_cast<State>(damping_);
      sum_elements<State, 1 + Preconditioned>(n, sums, [&](int64_t i, State* terms) HG_LAMBDA_INLINE {
        x[i] = cg_solution(x[i], p[i], alpha);
        const State residual = cg_residual<State>(r[i], widen(hp[i]), p[i], alpha, damping);
        r[i] = residual;
        terms[0] = residual * residual;
        if constexpr (Preconditioned) terms[1] = m[i] * residual * residual;
      });
    }
  };
};

template <bool Preconditioned>
struct Direction {
  template <class State, class>
  struct Piece {
    static HG_INLINE void run(const char* r_, char* p_, const char* m_, int64_t n, double beta_) {
      const State* r = reinterpret_cast<const State*>(r_);
      State* p = reinterpret_cast<State*>(p_);
      const State* m = reinterpret_cast<const State*>(m_);
      const State beta = static_cast<State>(beta_);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) p[i] = cg_direction(Preconditioned ? m[i] * r[i] : r[i], p[i], beta);
    }
  };
};

// The lists are x, r, p, hp, m; without preconditioner the last is not looked at.
template <bool Preconditioned>
void iterate(const AlignedPieces<5>& pieces, DType x, DType hp, int64_t rows, double* state, double damping) {
  constexpr int kColumns = Preconditioned ? kPcgState : kCgState;
  const double eps = epsilon(x);
  const auto scalars = [&](int64_t row) { return CgScalars{state + row * kColumns, Preconditioned}; };
  const auto running = [&](int64_t row) { return scalars(row).running(); };
  std::vector<double> factor(rows, 0);

  const auto dots = for_dtypes<DotsPiece, const char*, const char*, int64_t, double, double*>(x, hp);
  const auto products = for_each_block<kDots>(
      pieces, rows, running,
      [&](int64_t, const auto& at, int64_t n, double* out) { dots(at[2], at[3], n, damping, out); });
  for (int64_t row = 0; row < rows; ++row)
    if (running(row))
      factor[row] = scalars(row).step_length(products[row][kPHp], products[row][kPP], products[row][kHpHp], eps);

  const auto advance = for_dtypes<Advance<Preconditioned>::template Piece, char*, char*, const char*, const char*,
                                  const char*, int64_t, double, double, double*>(x, hp);
  const auto squares = for_each_block<1 + Preconditioned>(
      pieces, rows, running, [&](int64_t row, const auto& at, int64_t n, double* out) {
        advance(at[0], at[1], at[2], at[3], at[4], n, factor[row], damping, out);
      });
  for (int64_t row = 0; row < rows; ++row)
    if (running(row)) factor[row] = scalars(row).conjugation(squares[row][0], squares[row][Preconditioned]);

  const auto direction =
      for_dtypes<Direction<Preconditioned>::template Piece, const char*, char*, const char*, int64_t, double>(x, x);
  for_each_block<1>(pieces, rows, running, [&](int64_t row, const auto& at, int64_t n, double*) {
    direction(at[1], at[2], at[4], n, factor[row]);
  });
}

}  // namespace

void cg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp, int64_t rows,
             double* state, double damping) {
  iterate<false>(AlignedPieces<5>({x, r, p, hp, r}), x.dtype, hp.dtype, rows, state, damping);
}

void pcg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp, const VectorList& m,
              int64_t rows, double* state, double damping) {
  iterate<true>(AlignedPieces<5>({x, r, p, hp, m}), x.dtype, hp.dtype, rows, state, damping);
}

}  // namespace hg::cpu
