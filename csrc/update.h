// The update formulas, written once and shared by the CPU and the CUDA kernels,
// so that the CPU tests exercise the arithmetic that runs on the GPU.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define HG_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)  // see HG_INLINE
#define HG_HD inline __attribute__((always_inline))
#else
#define HG_HD inline
#endif

namespace hg {

// Columns of the float64 `stats` row that neumann_step_ fills.
enum NeumannStats : int { kNormSquared = 0, kNonFinite = 1, kNeumannStats = 2 };

// Columns of the float64 `stats` row that richardson_step_ and chebyshev_step_ fill, r = b - (H + dI) x.
enum ResidualStats : int {
  kResidualSquared = 0,    // r.r
  kSolutionNonFinite = 1,  // any element of the new x not finite
  kResidualEnergy = 2,     // r.Mr; no step lets it grow while the method converges
  kResidualStats = 3,
};

// Columns of the float64 `state` row that cg_step_ reads and updates.
enum CgState : int {
  kResidual = 0,   // r.r
  kStop = 1,       // stop once r.r <= this
  kCurvature = 2,  // p.(H + dI)p / p.p of the last step
  kFlag = 3,       // one of the values below
  kCgState = 4,
  kEnergy = 4,  // r.Mr, in the state of pcg_step_ alone
  kPcgState = 5,
};
// Values of state[kFlag].
constexpr double kRunning = 0, kConverged = 1, kNonPositiveCurvature = 2, kBroken = 3;

// NaN and infinities have no difference with themselves.
template <class A>
HG_HD bool finite(A x) {
  return x - x == 0;
}

// One element of (H + damping I) v.
template <class A>
HG_HD A damped(A hv, A v, A damping) {
  return hv + damping * v;
}

// v <- v - alpha (Hv + damping v)
template <class A>
HG_HD A neumann_term(A v, A hv, A alpha, A damping) {
  return v - alpha * damped(hv, v, damping);
}

// b - (Hx + damping x)
template <class A>
HG_HD A residual_of(A b, A hx, A x, A damping) {
  return b - damped(hx, x, damping);
}

// x + momentum (x - x_old) + alpha z, where z is the residual or M times it
template <class A>
HG_HD A chebyshev_solution(A x, A x_old, A z, A alpha, A momentum) {
  return x + (momentum * (x - x_old) + alpha * z);
}

// Conjugate gradients: x <- x + alpha p, r <- r - alpha (Hp + damping p), p <- r + beta p
template <class A>
HG_HD A cg_solution(A x, A p, A alpha) {
  return x + alpha * p;
}
template <class A>
HG_HD A cg_residual(A r, A hp, A p, A alpha, A damping) {
  return r - alpha * damped(hp, p, damping);
}
template <class A>
HG_HD A cg_direction(A r, A p, A beta) {
  return r + beta * p;
}

// The scalar recurrences of conjugate gradients for one right-hand side. The vector passes in
// between are the caller's: dots, then x and r, then p. Every test is relative, so that scaling
// H or b by any constant changes nothing.
struct CgScalars {
  double* state;
  // Of pcg_step_: the recurrences then run on r.Mr, and r.r only decides when to stop.
  bool preconditioned = false;

  HG_HD bool running() const { return state[kFlag] == kRunning; }

  // From p.Hp, p.p and Hp.Hp: the step length alpha. Returns 0 and sets the flag where there is none.
  HG_HD double step_length(double php, double pp, double hphp, double eps) const {
    // A product that is not finite shows in p.Hp; Hp.Hp may overflow by itself where H is large, p.p where M is.
    if (!isfinite_(php)) {
      state[kFlag] = kBroken;
      return 0;
    }
    state[kCurvature] = pp > 0 ? php / pp : 0;
    const double rounding = isfinite_(pp) && isfinite_(hphp) ? eps * sqrt_(pp) * sqrt_(hphp) : 0;
    if (php <= rounding) {
      state[kFlag] = kNonPositiveCurvature;
      return 0;
    }
    return energy() / php;
  }

  // From the new r.r and r.Mr: the conjugation factor beta. Sets the flag when the solve is over.
  HG_HD double conjugation(double rr, double rz) const {
    double beta = rz / energy();
    energy() = rz;
    state[kResidual] = rr;
    if (!isfinite_(rr) || !isfinite_(rz))
      state[kFlag] = kBroken;
    else if (rr <= state[kStop])
      state[kFlag] = kConverged;
    else if (rz <= 0)  // M is not positive definite
      state[kFlag] = kNonPositiveCurvature;
    return beta;
  }

 private:
  HG_HD double& energy() const { return state[preconditioned ? kEnergy : kResidual]; }
  HG_HD static bool isfinite_(double x) { return x - x == 0; }
  HG_HD static double sqrt_(double x) { return ::sqrt(x); }
};

}  // namespace hg
