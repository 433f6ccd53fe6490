// What a block of the batch contributes to a product with a network's Hessian: its tangents go forward through all
// layers, and those of the loss's gradient back, while they are in L2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "mlp_gemm.h"
#include "mlp_layout.h"

namespace hg::cpu {

template <class Real>
const Real* row_of(const Rows& m, int64_t row = 0) {
  return m.data ? static_cast<const Real*>(m.data) + row * m.stride : nullptr;
}

template <class Right>
class MlpPass {
 public:
  using Real = typename Right::Real;

  // A vector, and its biases padded. What is packed of it and of the weights, or null: then matrices are packed as they
  // are used.
  struct Vector {
    const Real *v, *biases, *packed, *weights;
  };

  // Rows of the batch. What is packed of those of the network, or null likewise.
  struct Block {
    int64_t begin, rows;
    const Real* hidden;
    Real* scratch;
  };

  // Where H v is added up.
  struct Sum {
    Real *padded, *out;  // out: H v itself, or null
    bool first;          // whether the block is the first one, which writes
  };

  MlpPass(const MlpData& data, const MlpLayout<Right>& layout) : data_(data), layers_(data.layers), layout_(layout) {}

  // Elements of the scratch.
  int64_t scratch_size(int64_t rows) const {
    int64_t factors = 0;
    for (const MlpLayer& layer : layers_)
      factors = std::max({factors, Right::memory_size(rows, std::max(layer.in, layer.out)),
                          Right::memory_size(layer.out, rows), late_size(layer), Right::late_size(rows, layer.in)});
    return 2 * (rows * (layout_.tangent_size + layout_.widest) + factors);
  }

  void add(const Vector& vector, const Block& block, const Sum& sum) const {
    const int64_t rows = block.rows, widest = rows * layout_.widest;
    Tangents at;
    at.rows = block.scratch, at.curved = at.rows + rows * layout_.tangent_size;
    at.delta = at.curved + rows * layout_.tangent_size, at.next_delta = at.delta + widest;
    at.memory = at.next_delta + widest;
    const size_t all = layers_.size();
    for (size_t l = 0; l < all; ++l) {
      if (l + 1 < all) fetch(block, {&layers_[l + 1].hidden, &layers_[l + 1].slope, &layers_[l + 1].bend});
      forward(l, vector, block, at);
    }
    differentiate_loss(at.delta, block.begin, rows);
    for (size_t l = all; l-- > 0; std::swap(at.delta, at.next_delta)) {
      if (l > 0) fetch(block, {&layers_[l - 1].hidden, &layers_[l - 1].slope, &layers_[l - 1].delta});
      add_weights(l, block, at, sum);
      if (l > 0) back(l, vector, block, at);
    }
  }

 private:
  // Those of a block: Rh and act''(a) dL/dh Ra of all layers but the last, R(dL/da) of a layer and of that before it,
  // and memory for factors of a product.
  struct Tangents {
    Real *rows, *curved, *delta, *next_delta, *memory;
  };

  // Ra = h V^T + Rh W^T + Rb, and what the activation makes of it.
  void forward(size_t l, const Vector& vector, const Block& block, const Tangents& tangents) const {
    const MlpLayer& layer = layers_[l];
    const MlpLayerLayout& at = layout_.layers[l];
    const int64_t rows = block.rows, begin = block.begin;
    const Factors<Right> by_v{
        row_of<Real>(layer.hidden, begin), layer.hidden.stride,
        transposed(vector.packed, at.transposed, vector.v + at.v_weight, layer.in, layer, tangents.memory), layer.in};
    Factors<Right> by_w{};
    if (l > 0)
      by_w = {tangents.rows + rows * layout_.layers[l - 1].tangent, at.in_row,
              transposed(vector.weights, at.w_transposed, row_of<Real>(layer.weight), layer.weight.stride, layer,
                         tangents.memory + late_size(layer)),
              layer.in};
    const int terms = l > 0 ? 2 : 1;
    const Real* bias = vector.biases + at.bias;
    if (l + 1 == layers_.size()) {
      const PlusBias<Real> finish{bias, tangents.delta, at.out_row};
      if (!at.along_inputs)
        Gemm<Right, PlusBias>::run({{by_v, by_w}, terms, rows, filled<Real>(layer.out), finish, tangents.memory});
      else if constexpr (Right::kInPlace)
        NarrowGemm<Real>::run({{by_v, by_w}, terms, rows, layer.out, finish});
      return;
    }
    Gemm<Right, ThroughActivation>::run(
        {{by_v, by_w},
         terms,
         rows,
         filled<Real>(layer.out),
         {bias, row_of<Real>(layer.slope, begin), row_of<Real>(layer.bend, begin), layer.slope.stride,
          layer.bend.stride, tangents.rows + rows * at.tangent, tangents.curved + rows * at.tangent, at.out_row},
         tangents.memory});
  }

  // R(dL/dW) = R(dL/da)^T h + (dL/da)^T Rh, and the biases'.
  void add_weights(size_t l, const Block& block, const Tangents& tangents, const Sum& sum) const {
    const MlpLayer& layer = layers_[l];
    const MlpLayerLayout& at = layout_.layers[l];
    const int64_t rows = block.rows, begin = block.begin;
    const int64_t packed = at.hidden < 0 ? -1 : Right::size(rows, at.hidden);  // the layers' rows one after another
    Factors<Right> factors[2]{{tangents.delta, at.out_row,
                               as_it_is(block.hidden, packed, row_of<Real>(layer.hidden, begin), layer.hidden.stride,
                                        rows, layer.in, tangents.memory),
                               rows}};
    if (l > 0) {
      const Real* tangent = tangents.rows + rows * layout_.layers[l - 1].tangent;
      factors[1] = {row_of<Real>(layer.delta, begin), layer.delta.stride,
                    Right::rows(tangent, at.in_row, rows, layer.in), rows};
    }
    const bool direct = sum.out && at.direct;
    const Accumulate<Real> finish{direct ? sum.out + at.v_weight : sum.padded + at.sum, direct ? layer.in : at.in_row,
                                  sum.first};
    if (data_.biases)
      ColumnSums<Real>::run({tangents.delta, at.out_row, rows, layer.out, sum.padded + at.sum_bias, sum.first});
    Gemm<Right, Accumulate>::run(
        {{factors[0], factors[1]}, l > 0 ? 2 : 1, layer.out, filled<Real>(layer.in), finish, tangents.memory});
  }

  // R(dL/dh) = R(dL/da) W + dL/da V, and R(dL/da) of the layer before.
  void back(size_t l, const Vector& vector, const Block& block, const Tangents& tangents) const {
    const MlpLayer &layer = layers_[l], &before = layers_[l - 1];
    const MlpLayerLayout& at = layout_.layers[l];
    const int64_t rows = block.rows, begin = block.begin;
    const Factors<Right> by_w{tangents.delta, at.out_row,
                              as_it_is(vector.weights, at.w_rows, row_of<Real>(layer.weight), layer.weight.stride,
                                       layer.out, layer.in, tangents.memory),
                              layer.out};
    const Factors<Right> by_v{row_of<Real>(layer.delta, begin), layer.delta.stride,
                              as_it_is(vector.packed, at.rows, vector.v + at.v_weight, layer.in, layer.out, layer.in,
                                       tangents.memory + late_size(layer)),
                              layer.out};
    const Real* curved = before.bend.data ? tangents.curved + rows * layout_.layers[l - 1].tangent : nullptr;
    Gemm<Right, BackThroughActivation>::run(
        {{by_w, by_v},
         2,
         rows,
         filled<Real>(layer.in),
         {row_of<Real>(before.slope, begin), curved, before.slope.stride, at.in_row, tangents.next_delta, at.in_row},
         tangents.memory});
  }

  // R(dL/dz) from Rz, in place: p (Rz - <p, Rz>) scale, or Rz scale.
  void differentiate_loss(Real* z, int64_t begin, int64_t rows) const {
    const int64_t classes = layers_.back().out, stride = layout_.layers.back().out_row;
    const Real scale = static_cast<Real>(data_.scale);
    for (int64_t r = 0; r < rows; ++r, z += stride) {
      const Real* p = row_of<Real>(data_.probabilities, begin + r);
      Real mean = 0;
      if (p)
        for (int64_t c = 0; c < classes; ++c) mean += p[c] * z[c];
      for (int64_t c = 0; c < classes; ++c) z[c] = scale * (p ? p[c] * (z[c] - mean) : z[c]);
    }
  }

  // A right factor, a matrix or its transpose: at `at` of what is packed, packed to `memory`, or where it lies.
  static Right as_it_is(const Real* packed, int64_t at, const Real* matrix, int64_t stride, int64_t rows,
                        int64_t columns, Real* memory) {
    if (at < 0) return Right::rows(matrix, stride, rows, columns);
    return packed ? Right::apart(packed + at, rows) : Right::late_rows(matrix, stride, rows, columns, memory);
  }
  static Right transposed(const Real* packed, int64_t at, const Real* matrix, int64_t stride, const MlpLayer& layer,
                          Real* memory) {
    if (at < 0) return Right::rows(matrix, stride, layer.out, layer.in);
    return packed ? Right::apart(packed + at, layer.in)
                  : Right::late_columns(matrix, stride, layer.out, layer.in, memory);
  }
  static int64_t late_size(const MlpLayer& layer) {
    return std::max(Right::late_size(layer.in, layer.out), Right::late_size(layer.out, layer.in));
  }

  // Sends for the rows of a block ahead of their use: layers are too short for the hardware to see where it goes.
  static void fetch(const Block& block, std::initializer_list<const Rows*> matrices) {
    for (const Rows* m : matrices) {
      if (!m->data || MlpLayout<Right>::wide(m->stride)) continue;
      const char* at = reinterpret_cast<const char*>(row_of<Real>(*m, block.begin));
      for (const char* end = at + block.rows * m->stride * sizeof(Real); at < end; at += kMlpPadding)
        __builtin_prefetch(at, 0, 2);
    }
  }

  const MlpData& data_;
  const std::vector<MlpLayer>& layers_;
  const MlpLayout<Right>& layout_;
};

}  // namespace hg::cpu
