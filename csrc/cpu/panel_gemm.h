// A matrix product by panels on one thread, for those that share the work.
#pragma once

#include <cstdint>

namespace hg::cpu {

// Columns are shared in groups of so many bytes, one panel with AVX-512, several with other sets.
constexpr int64_t kGroupBytes = 256;

// out (+)= a diag(scale) b for one matrix of a batch, or a part of its rows and columns; element (i, t) of a at
// i * a_row + t * a_depth, and so on. With a scale b has dense rows.
template <class Real>
struct Part {
  const Real* a;
  int64_t a_row, a_depth;
  const Real* b;
  int64_t b_depth, b_column;
  Real* out;
  int64_t out_row, rows, columns, depth;
  bool accumulate;
  const Real* scale = nullptr;
  int64_t scale_step = 0;
};

template <class Real>
void multiply_part(const Part<Real>& part);

}  // namespace hg::cpu
