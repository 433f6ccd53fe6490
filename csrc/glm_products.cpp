// The product of a generalised linear model by torch's matrix products, a part of the rows at a time.
#include "glm_products.h"

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

#include "tensors.h"

namespace hg {
namespace {

// Rows of a part at least: fewer would be multiplied slowly, however many bytes they are.
constexpr int64_t kLeastRows = 256;

}  // namespace

void two_products(const GlmProblem& problem, const at::Tensor& v, const at::Tensor& out, int64_t bytes) {
  // X may belong to a graph, and autocast may be on, neither of which has any business here.
  const c10::impl::ExcludeDispatchKeyGuard below_autograd(c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                                          c10::autocast_dispatch_keyset);
  const GlmData& data = problem.data;
  const int64_t k = v.size(0), columns = k * data.classes;
  const at::Tensor v_weights = v.narrow(1, 0, data.classes * data.d).reshape({columns, data.d});
  const at::Tensor g = zeros({columns, data.d}, v.options());
  const at::Tensor v_bias =
      data.intercept ? v.narrow(1, data.classes * data.d, data.classes).reshape({1, columns}) : at::Tensor();
  at::Tensor g_bias = data.intercept ? zeros({columns}, v.options()) : at::Tensor();
  const int64_t row_bytes = v.element_size() * (columns + (problem.x.dtype() == v.dtype() ? 0 : data.d));
  const int64_t chunk = std::max(kLeastRows, bytes / std::max<int64_t>(1, row_bytes));
  for (int64_t row = 0; row < data.n; row += chunk) {
    const int64_t rows = std::min(chunk, data.n - row);
    // bf16 data are read exactly, as in the kernels: a product in bf16 would round the vectors.
    const at::Tensor x = problem.x.narrow(0, row, rows).to(v.scalar_type());
    at::Tensor z = data.intercept ? v_bias.addmm(x, v_weights.t()) : x.mm(v_weights.t());
    if (data.classes == 1) {
      z.mul_(problem.weights.narrow(0, row, rows).unsqueeze(1));
    } else {
      const at::Tensor p = problem.weights.narrow(0, row, rows).unsqueeze(1);
      const at::Tensor z3 = z.view({rows, k, data.classes});
      z3.mul_(p);
      z3.addcmul_(p, z3.sum(2, /*keepdim=*/true), -1);
    }
    g.addmm_(z.t(), x);
    if (data.intercept) g_bias.add_(z.sum(0));
  }
  out.narrow(1, 0, data.classes * data.d).copy_(g.view({k, -1}));
  if (data.intercept) out.narrow(1, data.classes * data.d, data.classes).copy_(g_bias.view({k, -1}));
  out.mul_(data.scale);
  if (problem.l2) out.addcmul_(problem.l2->view({1, -1}), v);
}

}  // namespace hg
