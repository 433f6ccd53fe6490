// Norms, in float64 whatever the elements: a float32 vector's is finite exactly where all of it is.
#include <cmath>

#include "../kernels.h"
#include "dispatch.h"

namespace hg::cpu {
namespace {

template <class Real, class>
struct SquaresPiece {
  static HG_INLINE void run(const char* x_, int64_t n, double* sum) {
    const Real* x = reinterpret_cast<const Real*>(x_);
    sum_elements<double, 1>(n, sum, [&](int64_t i, double* square) HG_LAMBDA_INLINE {
      const double value = static_cast<double>(x[i]);
      square[0] = value * value;
    });
  }
};

}  // namespace

void norms(const VectorList& x, int64_t rows, double* result) {
  const AlignedPieces<1> pieces({x});
  const auto add = for_dtypes<SquaresPiece, const char*, int64_t, double*>(x.dtype, x.dtype);
  const auto sums = for_each_block<1>(
      pieces, rows, [](int64_t) { return true; },
      [&](int64_t, const auto& at, int64_t n, double* out) { add(at[0], n, out); });
  for (int64_t row = 0; row < rows; ++row) result[row] = std::sqrt(sums[row][0]);
}

}  // namespace hg::cpu
