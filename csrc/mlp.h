// Multilayer perceptrons: products with the Hessian of the mean loss by Pearlmutter's R-operator. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

#include "vector_list.h"

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

// out = H v. v, out: k vectors, layer after layer, the weight before the bias.
void mlp_hvp(const MlpData& data, const void* v, int64_t k, void* out);

}  // namespace cpu
}  // namespace hg
