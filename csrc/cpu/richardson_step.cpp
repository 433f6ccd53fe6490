// The fused Richardson step on the CPU: residual, update and norms in one pass over 16 bytes per float32 weight.
#include "../kernels.h"
#include "dispatch.h"
#include "residual_sums.h"

namespace hg::cpu {
namespace {

template <bool Preconditioned>
struct Richardson {
  template <class State, class Product>
  struct Piece {
    static HG_INLINE void run(char* x_, const char* hx_, const char* b_, const char* m_, int64_t n, double alpha_,
                              double damping_, double* sums) {
      State* x = reinterpret_cast<State*>(x_);
      const Product* hx = reinterpret_cast<const Product*>(hx_);
      const State* b = reinterpret_cast<const State*>(b_);
      const State* m = reinterpret_cast<const State*>(m_);
      const State alpha = static_cast<State>(alpha_), damping = static_cast<State>(damping_);
      add_residual_sums<State, Preconditioned>(n, x, sums, [&](int64_t i, State* terms) HG_LAMBDA_INLINE {
        const State r = residual_of<State>(b[i], widen(hx[i]), x[i], damping);
        const State z = Preconditioned ? m[i] * r : r;
        x[i] += alpha * z;
        residual_terms<State, Preconditioned>(r, z, x[i], terms);
      });
    }
  };
};

template <bool Preconditioned>
void run(const AlignedPieces<4>& pieces, DType state, DType product, int64_t rows, double* stats, double alpha,
         double damping) {
  const auto step = for_dtypes<Richardson<Preconditioned>::template Piece, char*, const char*, const char*, const char*,
                               int64_t, double, double, double*>(state, product);
  const auto sums = for_each_block<kResidualStats>(
      pieces, rows, [](int64_t) { return true; },
      [&](int64_t, const auto& at, int64_t n, double* out) {
        step(at[0], at[1], at[2], at[3], n, alpha, damping, out);
      });
  write_residual_stats(sums, stats);
}

}  // namespace

void richardson_step(const VectorList& x, const VectorList& hx, const VectorList& b, const VectorList* m, int64_t rows,
                     double* stats, double alpha, double damping) {
  // Without m the kernel never looks at the fourth list.
  const AlignedPieces<4> pieces({x, hx, b, m ? *m : b});
  (m ? run<true> : run<false>)(pieces, x.dtype, hx.dtype, rows, stats, alpha, damping);
}

}  // namespace hg::cpu
