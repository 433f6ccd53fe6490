// Generalised linear models: H = scale X^T D X + diag(l2). Torch-free.
#pragma once

#include <cstdint>

#include "vector_list.h"

namespace hg {

struct GlmData {
  const void* x;  // n x d, rows `stride` elements apart; f64, f32, or bf16 beside f32 vectors
  DType x_dtype;
  int64_t n, d, stride;
  const void* weights;  // n x classes: the diagonal of D if classes is 1, else probabilities p, D = diag(p) - p p^T
  int64_t classes;
  bool intercept;  // one more feature that is 1 everywhere
  double scale;    // usually 1/n
  const void* l2;  // diagonal of the penalty's Hessian, one number per weight, or null
};

namespace cpu {

// out = H v. v, out: k vectors of classes x d weights, then, if there is an intercept, classes more.
void glm_hvp(const GlmData& data, const void* v, int64_t k, void* out);

}  // namespace cpu
}  // namespace hg
