// One iteration of MINRES on the CPU in two fused passes: v.Hv, then all vectors. x advances by a direction only when
// the next is formed, because its length depends on the norm that the second pass sums up.
#include "../kernels.h"
#include "dispatch.h"

namespace hg::cpu {
namespace {

template <class State, class Product>
struct DotPiece {
  static HG_INLINE void run(const char* v_, const char* hv_, int64_t n, double damping_, double* sum) {
    const State* v = reinterpret_cast<const State*>(v_);
    const Product* hv = reinterpret_cast<const Product*>(hv_);
    const State damping = static_cast<State>(damping_);
    sum_elements<State, 1>(n, sum, [&](int64_t i, State* term) HG_LAMBDA_INLINE {
      term[0] = v[i] * damped<State>(widen(hv[i]), v[i], damping);
    });
  }
};

template <class State, class Product>
struct VectorsPiece {
  static HG_INLINE void run(char* x_, const char* v_, char* v_old_, const char* w_, char* w_old_, const char* hv_,
                            int64_t n, const MinresFactors* factors, double damping_, double* sum) {
    State* x = reinterpret_cast<State*>(x_);
    const State* v = reinterpret_cast<const State*>(v_);
    State* v_old = reinterpret_cast<State*>(v_old_);
    const State* w = reinterpret_cast<const State*>(w_);
    State* w_old = reinterpret_cast<State*>(w_old_);
    const Product* hv = reinterpret_cast<const Product*>(hv_);
    const MinresFactorsAs<State> f(*factors);
    const State damping = static_cast<State>(damping_);
    sum_elements<State, 1>(n, sum, [&](int64_t i, State* square) HG_LAMBDA_INLINE {
      x[i] += f.step * w[i];
      w_old[i] = minres_direction(v[i], w[i], w_old[i], f);
      v_old[i] = minres_vector<State>(widen(hv[i]), v[i], v_old[i], f, damping);
      square[0] = v_old[i] * v_old[i];
    });
  }
};

template <class State, class>
struct ClosePiece {
  static HG_INLINE void run(char* x_, const char* w_, int64_t n, double step_) {
    State* x = reinterpret_cast<State*>(x_);
    const State* w = reinterpret_cast<const State*>(w_);
    const State step = static_cast<State>(step_);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) x[i] += step * w[i];
  }
};

}  // namespace

void minres_step(const VectorList& x, const VectorList& v, const VectorList& v_old, const VectorList& w,
                 const VectorList& w_old, const VectorList& hv, int64_t rows, double* state, double damping) {
  const AlignedPieces<6> pieces({x, v, v_old, w, w_old, hv});
  const double eps = epsilon(x.dtype);
  const auto scalars = [&](int64_t row) { return MinresScalars{state + row * kMinresState}; };
  const auto running = [&](int64_t row) { return scalars(row).running(); };
  std::vector<MinresFactors> factors(rows);

  const auto dot = for_dtypes<DotPiece, const char*, const char*, int64_t, double, double*>(x.dtype, hv.dtype);
  const auto dots = for_each_block<1>(pieces, rows, running, [&](int64_t, const auto& at, int64_t n, double* out) {
    dot(at[1], at[5], n, damping, out);
  });
  for (int64_t row = 0; row < rows; ++row)
    if (running(row)) factors[row] = scalars(row).lanczos(dots[row][0]);

  const auto vectors = for_dtypes<VectorsPiece, char*, const char*, char*, const char*, char*, const char*, int64_t,
                                  const MinresFactors*, double, double*>(x.dtype, hv.dtype);
  const auto squares =
      for_each_block<1>(pieces, rows, running, [&](int64_t row, const auto& at, int64_t n, double* out) {
        vectors(at[0], at[1], at[2], at[3], at[4], at[5], n, &factors[row], damping, out);
      });
  for (int64_t row = 0; row < rows; ++row)
    if (running(row)) scalars(row).rotation(squares[row][0], eps);

  const auto closing = [&](int64_t row) { return scalars(row).closing(); };
  const auto close = for_dtypes<ClosePiece, char*, const char*, int64_t, double>(x.dtype, x.dtype);
  for_each_block<1>(pieces, rows, closing, [&](int64_t row, const auto& at, int64_t n, double*) {
    close(at[0], at[4], n, state[row * kMinresState + kStep]);
  });
  for (int64_t row = 0; row < rows; ++row)
    if (closing(row)) state[row * kMinresState + kStep] = 0;
}

}  // namespace hg::cpu
