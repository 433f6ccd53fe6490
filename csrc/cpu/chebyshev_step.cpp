// The fused Chebyshev step on the CPU: the three-term recurrence writes one vector, over the iterate before the last,
// and so moves 20 bytes per float32 weight where a stored direction would cost 24.
#include "../kernels.h"
#include "dispatch.h"
#include "residual_sums.h"

namespace hg::cpu {
namespace {

template <bool Preconditioned>
struct Chebyshev {
  template <class State, class Product>
  struct Piece {
    static HG_INLINE void run(char* x_old_, const char* x_, const char* hx_, const char* b_, const char* m_, int64_t n,
                              double alpha_, double momentum_, double damping_, double* sums) {
      State* x_old = reinterpret_cast<State*>(x_old_);
      const State* x = reinterpret_cast<const State*>(x_);
      const Product* hx = reinterpret_cast<const Product*>(hx_);
      const State* b = reinterpret_cast<const State*>(b_);
      const State* m = reinterpret_cast<const State*>(m_);
      const State alpha = static_cast<State>(alpha_), momentum = static_cast<State>(momentum_);
      const State damping = static_cast<State>(damping_);
      add_residual_sums<State, Preconditioned>(n, x_old, sums, [&](int64_t i, State* terms) HG_LAMBDA_INLINE {
        const State r = residual_of<State>(b[i], widen(hx[i]), x[i], damping);
        const State z = Preconditioned ? m[i] * r : r;
        x_old[i] = chebyshev_solution(x[i], x_old[i], z, alpha, momentum);
        residual_terms<State, Preconditioned>(r, z, x_old[i], terms);
      });
    }
  };
};

template <bool Preconditioned>
void run(const AlignedPieces<5>& pieces, DType state, DType product, int64_t rows, double* stats, double alpha,
         double momentum, double damping) {
  const auto step = for_dtypes<Chebyshev<Preconditioned>::template Piece, char*, const char*, const char*, const char*,
                               const char*, int64_t, double, double, double, double*>(state, product);
  const auto sums = for_each_block<kResidualStats>(
      pieces, rows, [](int64_t) { return true; },
      [&](int64_t, const auto& at, int64_t n, double* out) {
        step(at[0], at[1], at[2], at[3], at[4], n, alpha, momentum, damping, out);
      });
  write_residual_stats(sums, stats);
}

}  // namespace

void chebyshev_step(const VectorList& x_old, const VectorList& x, const VectorList& hx, const VectorList& b,
                    const VectorList* m, int64_t rows, double* stats, double alpha, double momentum, double damping) {
  // Without m the kernel never looks at the fifth list.
  const AlignedPieces<5> pieces({x_old, x, hx, b, m ? *m : b});
  (m ? run<true> : run<false>)(pieces, x.dtype, hx.dtype, rows, stats, alpha, momentum, damping);
}

}  // namespace hg::cpu
