// The scalar recurrences of MINRES (Paige, Saunders 1975) for one right-hand side, shared by the CPU and the CUDA
// kernels. The vector passes in between are the caller's: the product of v and Hv, then all vectors at once.
//
// Vectors are stored up to a factor, so that none has to be rewritten when its norm is known: the Lanczos vector is
// v / norm, the direction w / gamma. With `scale` they stay in range whatever the units of H are.
#pragma once

#include "update.h"

namespace hg {

// Columns of the float64 `state` row that minres_step_ reads and updates.
enum MinresState : int {
  kMinresResidual = 0,  // |b - (H + dI) x| once x has caught up
  kMinresStop = 1,      // stop once that is at most this
  kMinresFlag = 2,      // kRunning, kConverged, kBroken or kSingular
  kStep = 3,            // x is still to advance by this times w
  kScale = 4,           // of the order of |Hv| / |v|; set by the caller
  kNorm = 5,            // of v
  kNormOld = 6,         // of v_old
  kBeta = 7,            // off-diagonal of the Lanczos matrix between the two
  kCosine = 8,          // the last plane rotation
  kSine = 9,
  kDeltaBar = 10,  // what rotations have left of the next row and column
  kGammaBar = 11,
  kEpsilon = 12,
  kGamma = 13,     // of w
  kGammaOld = 14,  // of w_old
  kOperatorNorm = 15,
  kMinresState = 16,
};
// In place of kNonPositiveCurvature: no step makes the residual smaller.
constexpr double kSingular = 4;

// Factors of the vector pass: of the next Lanczos vector, of the next direction, and the step along the last one.
template <class A>
struct MinresFactorsAs {
  A product, v, v_old, direction, w, w_old, step;

  MinresFactorsAs() = default;
  template <class B>
  HG_HD explicit MinresFactorsAs(const MinresFactorsAs<B>& f)
      : product(static_cast<A>(f.product)),
        v(static_cast<A>(f.v)),
        v_old(static_cast<A>(f.v_old)),
        direction(static_cast<A>(f.direction)),
        w(static_cast<A>(f.w)),
        w_old(static_cast<A>(f.w_old)),
        step(static_cast<A>(f.step)) {}
};
using MinresFactors = MinresFactorsAs<double>;
constexpr int kMinresFactors = sizeof(MinresFactors) / sizeof(double);

template <class A>
HG_HD A minres_vector(A hv, A v, A v_old, const MinresFactorsAs<A>& f, A damping) {
  return f.product * damped(hv, v, damping) + f.v * v + f.v_old * v_old;
}
template <class A>
HG_HD A minres_direction(A v, A w, A w_old, const MinresFactorsAs<A>& f) {
  return f.direction * v + f.w * w + f.w_old * w_old;
}

struct MinresScalars {
  double* state;

  HG_HD bool running() const { return state[kMinresFlag] == kRunning; }
  // Stopped, and x one direction behind.
  HG_HD bool closing() const { return !running() && state[kStep] != 0; }

  // From v.(H + damping I)v: the factors of the vector pass. Sets the flag if the product is not finite.
  HG_HD MinresFactors lanczos(double vhv) const {
    const double norm = state[kNorm], alpha = vhv / norm / norm;
    if (!finite(alpha)) {
      state[kMinresFlag] = kBroken;
      state[kStep] = 0;
      return MinresFactors();
    }
    const double delta = state[kCosine] * state[kDeltaBar] + state[kSine] * alpha;
    state[kGammaBar] = state[kSine] * state[kDeltaBar] - state[kCosine] * alpha;
    grow_norm(alpha < 0 ? -alpha : alpha);
    MinresFactors f;
    f.product = 1 / norm / state[kScale];
    f.v = -alpha / norm / state[kScale];
    f.v_old = -state[kBeta] / state[kNormOld] / state[kScale];
    f.direction = 1 / norm;
    f.w = -delta / state[kGamma];
    f.w_old = -state[kEpsilon] / state[kGammaOld];
    f.step = state[kStep];
    return f;
  }

  // From v_new.v_new: the next rotation and the step that x is to advance. Sets the flag when the solve is over.
  HG_HD void rotation(double square, double eps) const {
    state[kStep] = 0;
    if (!finite(square)) {
      state[kMinresFlag] = kBroken;
      return;
    }
    const double norm = ::sqrt(square), beta = norm * state[kScale], gamma_bar = state[kGammaBar];
    grow_norm(beta);
    state[kDeltaBar] = -state[kCosine] * beta;
    state[kEpsilon] = state[kSine] * beta;
    // |(H + dI) r| / |r| for the residual before this step; zero if it is in the null space.
    if (::hypot(gamma_bar, state[kDeltaBar]) <= 10 * eps * state[kOperatorNorm]) {
      state[kMinresFlag] = kSingular;
      return;
    }
    const double gamma = ::hypot(gamma_bar, beta);
    state[kCosine] = gamma_bar / gamma;
    state[kSine] = beta / gamma;
    state[kStep] = state[kCosine] * state[kMinresResidual] / gamma;
    state[kMinresResidual] *= state[kSine];
    state[kGammaOld] = state[kGamma];
    state[kGamma] = gamma;
    state[kNormOld] = state[kNorm];
    state[kNorm] = norm;
    state[kBeta] = beta;
    if (state[kMinresResidual] <= state[kMinresStop]) state[kMinresFlag] = kConverged;
  }

 private:
  HG_HD void grow_norm(double x) const {
    if (x > state[kOperatorNorm]) state[kOperatorNorm] = x;
  }
};

}  // namespace hg
