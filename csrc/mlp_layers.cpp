#include "mlp_layers.h"

#if defined(HG_WITH_CUDA)
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <vector>

namespace hg {
namespace {

// The tangents of one call in a single allocation, of which every part starts at a cache line.
class Workspace {
 public:
  explicit Workspace(int64_t rows) : rows_(rows) {}

  // Place for rows of so many elements, as long as `reserve` has not been called.
  int64_t plan(int64_t width) {
    constexpr int64_t kUnit = 32;
    const int64_t size = (rows_ * width + kUnit - 1) / kUnit * kUnit;
    return (size_ += size) - size;
  }
  void reserve(const at::Tensor& like) { memory_ = at::empty({size_}, like.options().requires_grad(false)); }
  at::Tensor rows(int64_t at, int64_t width) const { return memory_.narrow(0, at, rows_ * width).view({rows_, width}); }

 private:
  int64_t rows_, size_ = 0;
  at::Tensor memory_;
};

// All vectors' share of one layer, in v or in H v.
struct Part {
  int64_t weight, bias;  // elements before it

  static at::Tensor matrices(const at::Tensor& v, int64_t first, const MlpLayer& layer) {
    return v.as_strided({v.size(0), layer.out, layer.in}, {v.stride(0), layer.in, 1}, v.storage_offset() + first);
  }
  static at::Tensor biases(const at::Tensor& v, int64_t first, const MlpLayer& layer) {
    return v.as_strided({v.size(0), layer.out}, {v.stride(0), 1}, v.storage_offset() + first);
  }
};

// The same matrix for every vector; cuBLAS takes a stride of 0.
at::Tensor for_all(const at::Tensor& m, int64_t k) { return m.unsqueeze(0).expand({k, m.size(0), m.size(1)}); }

}  // namespace

// Ra = h V^T + Rh W^T is two matrix products of which the second adds to the first, with no copy of h, V or W: the
// terms of V are one product per vector on shared data, those of W one product for the rows of all vectors.
const char* mlp_hvp_by_layers(const MlpData& data, at::TensorList weights, at::TensorList hidden, at::TensorList deltas,
                              const at::Tensor& v, at::Tensor& out, cuda::Stream stream) {
  const int64_t k = v.size(0), n = data.n, last = static_cast<int64_t>(data.layers.size()) - 1;
  if (k == 0) return nullptr;
  const c10::impl::ExcludeDispatchKeyGuard below_autograd(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  const char *v_data = static_cast<const char*>(v.const_data_ptr()), *error = nullptr;
  const auto shape = [&](int64_t width) { return cuda::MlpTangents{data.dtype, k, n, width}; };

  Workspace space(k * n);
  std::vector<Part> parts;
  std::vector<int64_t> tangents, products;
  int64_t widest = 0, taken = 0;
  for (const MlpLayer& layer : data.layers) {
    parts.push_back({taken, taken + layer.in * layer.out});
    taken += layer.out * (layer.in + data.biases);
    widest = std::max(widest, layer.out);
  }
  int64_t delta_at = space.plan(widest), next_at = space.plan(widest);
  for (int64_t l = 0; l < last; ++l) {
    const MlpLayer& layer = data.layers[l];
    tangents.push_back(space.plan(layer.out));
    // Where activations bend, the way back needs what mlp_forward makes of the product.
    products.push_back(layer.bend.data ? space.plan(layer.out) : next_at);
  }
  products.push_back(delta_at);
  space.reserve(v);

  const auto bias_of = [&](int64_t l) -> const void* {
    return data.biases ? v_data + parts[l].bias * size_of(data.dtype) : nullptr;
  };
  for (int64_t l = 0; l <= last && !error; ++l) {
    const MlpLayer& layer = data.layers[l];
    at::Tensor product = space.rows(products[l], layer.out), by_vector = product.view({k, n, layer.out});
    at::bmm_out(by_vector, for_all(hidden[l], k), Part::matrices(v, parts[l].weight, layer).transpose(1, 2));
    if (l > 0) at::addmm_out(product, product, space.rows(tangents[l - 1], layer.in), weights[l].t());
    if (l < last)
      error =
          cuda::mlp_forward(shape(layer.out), bias_of(l), v.stride(0), layer.slope, layer.bend,
                            product.mutable_data_ptr(), space.rows(tangents[l], layer.out).mutable_data_ptr(), stream);
    else
      error = cuda::mlp_loss(shape(layer.out), bias_of(l), v.stride(0), data.probabilities, data.scale,
                             product.mutable_data_ptr(), stream);
  }

  for (int64_t l = last; l >= 0 && !error; --l, std::swap(delta_at, next_at)) {
    const MlpLayer& layer = data.layers[l];
    const at::Tensor delta = space.rows(delta_at, layer.out), by_vector = delta.view({k, n, layer.out});
    const at::Tensor v_weight = Part::matrices(v, parts[l].weight, layer), transposed = by_vector.transpose(1, 2);
    at::Tensor gradient = Part::matrices(out, parts[l].weight, layer);
    if (data.l2 != 0)
      at::baddbmm_out(gradient, v_weight, transposed, for_all(hidden[l], k), 2 * data.l2);
    else
      at::bmm_out(gradient, transposed, for_all(hidden[l], k));
    if (data.biases) {
      at::Tensor sums = Part::biases(out, parts[l].bias, layer);
      at::sum_out(sums, by_vector, {1});
    }
    if (l == 0) break;
    const MlpLayer& before = data.layers[l - 1];
    const at::Tensor deltas_for_all = for_all(deltas[l - 1], k), tangent = space.rows(tangents[l - 1], layer.in);
    at::baddbmm_out(gradient, gradient, deltas_for_all.transpose(1, 2), tangent.view({k, n, layer.in}));
    at::Tensor next = space.rows(next_at, layer.in), next_by_vector = next.view({k, n, layer.in});
    at::mm_out(next, delta, weights[l]);
    at::baddbmm_out(next_by_vector, next_by_vector, deltas_for_all, v_weight);
    const void* curved = before.bend.data ? space.rows(products[l - 1], layer.in).const_data_ptr() : nullptr;
    error = cuda::mlp_backward(shape(layer.in), before.slope, curved, next.mutable_data_ptr(), stream);
  }
  return error;
}

}  // namespace hg
#endif
