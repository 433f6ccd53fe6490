// How a product with a network's Hessian runs on a CUDA device: a plain function of shapes and chip. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

#include "chip.h"
#include "update.h"

namespace hg {

// Layers that one launch takes: so many are described by the 4 KB that a kernel's arguments may have.
constexpr int kMlpLaunchLayers = 61;
// Rows of a batch that one thread works on at once.
constexpr int kMlpRowTile = 2;

struct MlpShape {
  std::vector<int64_t> sizes;  // inputs, then the outputs of every layer
  int64_t n, k;
  int itemsize;
  bool curved;  // activations with a second derivative
};

// One launch: every block takes `rows` rows of the batch, and one vector at a time, through all layers and back.
// Elements of shared memory: the tangents of all layers, of each kind; a matrix, the rows that go into a layer, and
// those that come out, at most.
struct MlpLaunch {
  int rows = 0, row_blocks = 0, slots = 0;  // slots: vectors at a time
  int tangents = 0, matrix = 0, in_rows = 0, out_rows = 0;
  int padded = 0;  // elements of a block's sums, rows of matrices as in shared memory
  int64_t shared = 0;
};

struct MlpPlan {
  // "one_launch"; "launches", three per layer; or "products": cuBLAS, and launches between.
  Plan plan;
  MlpLaunch launch;
};

MlpPlan plan_mlp(const MlpShape& shape, const Chip& chip);

// Elements from row to row in shared memory, for a column of ones, or of biases, after the others: packs of 16 bytes,
// an odd number of them, so that eight rows lie in different banks.
HG_HD int mlp_pitch(int width, int itemsize) {
  const int pack = 16 / itemsize;
  return ((width + pack) / pack | 1) * pack;
}

}  // namespace hg
