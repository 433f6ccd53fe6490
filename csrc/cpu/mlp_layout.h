// Where a network's layers are in a vector, in what is packed for a product with its Hessian and in what the product
// adds up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "mlp_gemm.h"

namespace hg::cpu {

// In elements. -1: nowhere, as said.
struct MlpLayerLayout {
  int64_t in, out;          // padded
  int64_t in_row, out_row;  // from row to row of matrices of these widths
  int64_t v_weight, v_bias;
  bool along_inputs;             // a last layer so narrow that it is multiplied along its inputs
  int64_t transposed, rows;      // in the packed copy of v; -1 where v itself will do
  int64_t w_transposed, w_rows;  // in the packed copy of W; -1 where it is not needed, or W itself will do
  int64_t hidden;                // in a block's packed rows of the network; -1 where its own will do
  int64_t bias;                  // in the padded copy of v's
  bool direct;                   // whether its part of H v may be added up where it belongs
  int64_t sum, sum_bias;         // in the padded sum of H v
  int64_t tangent;               // row elements before this layer's, in a block's tangents
};

// Outputs of a layer, as many at most as panels take at once.
struct MlpPiece {
  size_t layer;
  int64_t begin, end;
};

// Right: how right factors of matrix products lie.
template <class Right>
struct MlpLayout {
  using Real = typename Right::Real;
  std::vector<MlpLayerLayout> layers;
  std::vector<MlpPiece> pieces;
  // Elements of a vector, of the padded copy of its biases, of its packed copy, of that of the weights, and of the
  // padded sum of H v.
  int64_t v_size = 0, bias_size = 0, packed_size = 0, weights_size = 0, sum_size = 0;
  // For a row of a block: its tangents, the widest of them, what is packed of the network.
  int64_t tangent_size = 0, widest = 0, hidden_size = 0;
  int64_t max_rows;  // of a block
  int64_t ops = 0;   // multiply-adds for a row of the batch

  explicit MlpLayout(const MlpData& data) {
    for (const MlpLayer& layer : data.layers) {
      MlpLayerLayout at;
      at.in = padded(layer.in), at.out = padded(layer.out);
      at.in_row = spread(at.in), at.out_row = spread(at.out);
      at.v_weight = take(v_size, layer.in * layer.out);
      at.v_bias = take(v_size, data.biases ? layer.out : 0);
      const int64_t transposed = Right::size(layer.in, layer.out), rows = Right::size(layer.out, layer.in);
      const bool back = !layers.empty();  // the input has no tangent
      at.along_inputs = Right::kInPlace && &layer == &data.layers.back() && kNarrow * layer.out <= at.out;
      at.transposed = at.along_inputs ? -1 : take(packed_size, transposed);
      at.rows = back && (packed(at.in) || at.in != layer.in) ? take(packed_size, rows) : -1;
      at.w_transposed = back && !at.along_inputs ? take(weights_size, transposed) : -1;
      at.w_rows = back && packed(at.in) ? take(weights_size, rows) : -1;
      at.hidden = packed(at.in) ? take(hidden_size, (at.in + kPiece - 1) / kPiece * kPiece) : -1;
      at.bias = take(bias_size, at.out);
      at.direct = at.in == layer.in && layer.out * layer.in < kDirectBytes / kItemSize;
      at.sum = take(sum_size, layer.out * at.in_row);
      at.sum_bias = take(sum_size, at.out);
      at.tangent = take(tangent_size, at.out_row);
      widest = std::max(widest, at.out_row);
      ops += 6 * layer.in * layer.out;
      for (int64_t o = 0; o < layer.out; o += kPiece)
        pieces.push_back({layers.size(), o, std::min(o + kPiece, layer.out)});
      layers.push_back(at);
    }
    const int64_t fitting = Right::kTangentBytes / (2 * tangent_size * kItemSize) / Right::kRows * Right::kRows;
    max_rows = std::clamp<int64_t>(fitting, Right::kLeastRows, Right::kMostRows);
  }

  // Whether rows of so many elements are far apart.
  static bool wide(int64_t columns) { return columns * kItemSize > kWideBytes; }

 private:
  static constexpr int64_t kItemSize = sizeof(Real), kUnit = kMlpPadding / kItemSize, kPiece = 2 * kUnit;
  // Last layers that fill at most one of so many parts of a padded row are multiplied along their inputs.
  static constexpr int64_t kNarrow = 4;
  // Matrices with longer rows are put into panels apart; the rows of others are fetched ahead by hand.
  static constexpr int64_t kWideBytes = 576;
  // Matrices whose part of H v is added up where it belongs, if their rows fill cache lines. Larger ones leave the
  // nearer caches, and take 1.1 times as long there where H v is new memory.
  static constexpr int64_t kDirectBytes = 1 << 20;

  static int64_t padded(int64_t size) { return (size + kUnit - 1) / kUnit * kUnit; }
  // Rows a multiple of 512 bytes apart would share a few sets of the cache, and drive each other out of it.
  static int64_t spread(int64_t width) { return width % (8 * kUnit) ? width : width + kUnit; }
  static bool packed(int64_t columns) { return !Right::kInPlace || wide(columns); }
  static int64_t take(int64_t& total, int64_t size) { return (total += size) - size; }
};

}  // namespace hg::cpu
