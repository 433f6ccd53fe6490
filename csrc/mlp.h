// Multilayer perceptrons: products with the Hessian of the mean loss by Pearlmutter's R-operator. Torch-free.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"
#include "mlp_plan.h"

namespace hg {

// Rows of matrices are readable up to the next multiple of this many bytes; what is there does not matter.
constexpr int64_t kMlpPadding = 64;

struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;  // elements
};

// a = h W^T + b, next h = act(a); the last layer is linear.
struct MlpLayer {
  int64_t in, out;
  Rows weight;  // W, out x in
  Rows hidden;  // h, n x in
  Rows delta;   // dL/da, n x out; not in the first layer
  Rows slope;   // act'(a), n x out; not in the last layer
  Rows bend;    // act''(a) dL/d(next h), n x out; not in the last layer, nor for piecewise linear activations
};

struct MlpData {
  DType dtype;  // f64 or f32, of everything
  int64_t n;
  std::vector<MlpLayer> layers;
  Rows probabilities;  // n x classes: softmax and cross entropy; null for squared error
  double scale;        // second derivative of the loss by an output: 1/n, or 2/(n outputs)
  bool biases;
  double l2;  // penalty l2 ||W||^2
};

namespace cpu {

struct Team;

struct MlpProduct {
  // out = H v. v, out: k vectors, layer after layer, the weight before the bias.
  std::function<void(const void* v, int64_t k, void* out)> multiply;
  // The team that it shares its work with.
  std::function<Team(int64_t k)> team;
};
// What does not depend on v is done here, and where the product is called `often` more of it is kept. `data` must stay
// as long as the product.
MlpProduct mlp_product(const MlpData& data, bool often);

}  // namespace cpu

namespace cuda {

// Tangents of one layer: k x n x width, contiguous, for k vectors over the same n rows of the batch.
struct MlpTangents {
  DType dtype;
  int64_t k, n, width;
};

// out = H v on the current device, for products so small that launches are what takes time.
const char* mlp_hvp(const MlpData& data, const void* v, int64_t k, void* out, const Scratch& scratch, Stream stream);

// The same in one launch, as planned. `done` is false, and nothing was launched, where not all blocks can run at once.
const char* mlp_one_launch(const MlpData& data, const MlpLaunch& launch, const void* v, int64_t k, void* out,
                           bool& done, const Scratch& scratch, Stream stream);

// The current device.
const char* current_chip(Chip& chip);

// What is left of a product once the matrices are multiplied. Like all launchers these never wait, and return
// nullptr, or what CUDA says went wrong. `product` is what matrix products have made, and is overwritten.

// Ra = product + bias; tangent = act'(a) Ra; product = act''(a) dL/dh Ra, or anything where there is no bend.
// bias: one row per vector, `bias_stride` elements apart, or null.
const char* mlp_forward(const MlpTangents& shape, const void* bias, int64_t bias_stride, const Rows& slope,
                        const Rows& bend, void* product, void* tangent, Stream stream);

// R(dL/dz) from Rz = product + bias, in place: scale p (Rz - <p, Rz>), or scale Rz without probabilities.
const char* mlp_loss(const MlpTangents& shape, const void* bias, int64_t bias_stride, const Rows& probabilities,
                     double scale, void* product, Stream stream);

// R(dL/da) = act'(a) product + curved, in place; curved: what mlp_forward left of the layer's product, or null.
const char* mlp_backward(const MlpTangents& shape, const Rows& slope, const void* curved, void* product, Stream stream);

}  // namespace cuda
}  // namespace hg
