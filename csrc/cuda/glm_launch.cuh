// Launch parameters of the GLM kernels, plain functions of the problem and the chip.
#pragma once

#include <algorithm>

#include "glm_tile.cuh"
#include "launch.h"

namespace hg::cuda {

// Columns up to which one pass wins. Its products run from shared memory at about half the rate of a matrix product,
// and read X once instead of twice: with 4.3 TB/s, 25 and 45 TFLOP/s, the two are equal at 26 columns in float32.
// By arithmetic, not yet by measurement.
constexpr int kOnePassColumns = 24;
// Bytes of a tile that is streamed: with two of three tiles under way in every multiprocessor, more than the 25 KB
// each that hide the latency of 4.8 TB/s.
constexpr int64_t kTileBytes = 24 << 10;
// Rows that one block sums, at most, so that rounding errors stay small; two-level sums within.
constexpr int64_t kBlockRows = 4096;
// The runtime keeps so much shared memory of every block for itself.
constexpr int kReserved = 1024;

// Whether a problem counts in 32 bits, and has few enough columns for one pass; before that there is no GlmProblem.
inline bool narrow_enough(const GlmData& data, int64_t k) {
  constexpr int64_t kMostFeatures = 1 << 20;  // far more than fit in shared memory
  return data.d < kMostFeatures && data.classes <= kOnePassColumns && k <= kOnePassColumns &&
         k * data.classes <= kOnePassColumns;
}

// Blocks, tiles and stages of a launch in which every block streams its part of the rows; bytes of shared memory
// besides the problem's own are `extra`. Returns 0 blocks if not even a small tile fits.
template <class X, class Real>
struct GlmLaunch {
  int blocks = 0;
  int64_t shared = 0;

  // Why tiles cannot come by bulk copies, or null if they can. Bulk copies begin, end and count in units of 16 bytes.
  static const char* no_bulk(const GlmProblem<X, Real>& problem, const Chip& chip) {
    const auto whole = [](uintptr_t bytes) { return bytes % 16 == 0; };
    if (without("bulk")) return "HYPERGRAD_EXT_CUDA_WITHOUT names bulk";
    if (chip.capability < 90) return "the device, or the code for it, is older than compute capability 9.0";
    if (problem.d == 0 || !whole(problem.d * sizeof(X))) return "the bytes of a row of x are not a multiple of 16";
    if (!whole(problem.stride * sizeof(X))) return "rows of x do not lie a multiple of 16 bytes apart";
    if (!whole(reinterpret_cast<uintptr_t>(problem.x))) return "x does not start at a multiple of 16 bytes";
    if (!whole(reinterpret_cast<uintptr_t>(problem.weights))) return "weights do not start at a multiple of 16 bytes";
    return nullptr;
  }

  // Splits n rows in tiles so that all multiprocessors work, two blocks each; more blocks if they may queue.
  static GlmLaunch streaming(GlmProblem<X, Real>& problem, const Chip& chip, int64_t extra, bool may_queue) {
    GlmLaunch launch;
    const int64_t resident = 2 * chip.multiprocessors;
    const int64_t row_bytes = std::max<int64_t>(1, problem.pitch * sizeof(X));
    int64_t rows = std::min(kTileBytes / row_bytes, (problem.n + resident - 1) / resident);
    rows = round_up(std::clamp<int64_t>(rows, 1, 256), kTileRows);
    const int64_t half = chip.shared_per_multiprocessor / 2 - kReserved;
    for (const int64_t limit : {std::min<int64_t>(half, chip.shared_per_block), int64_t{chip.shared_per_block}})
      for (problem.tile = static_cast<int>(rows); problem.tile > 0; problem.tile -= kTileRows) {
        const int64_t tiles = (problem.n + problem.tile - 1) / problem.tile;
        int64_t blocks = std::min(tiles, resident);
        if (may_queue) blocks = std::max(blocks, (problem.n + kBlockRows - 1) / kBlockRows);
        problem.stages = tiles <= blocks ? 1 : GlmTiles<X, Real>::kStages;
        launch.shared = shared_bytes(problem) + extra;
        if (launch.shared > limit) continue;
        launch.blocks = static_cast<int>(std::max<int64_t>(blocks, 1));
        return launch;
      }
    return launch;
  }

  static int64_t shared_bytes(const GlmProblem<X, Real>& problem) {
    Arena arena(nullptr);
    GlmBlock<X, Real>(problem, arena);
    return arena.size();
  }
};

// The block's share of the rows, in whole tiles.
template <class X, class Real>
__device__ __forceinline__ void begin_share(GlmBlock<X, Real>& block, const GlmProblem<X, Real>& problem) {
  const int64_t tiles = (problem.n + problem.tile - 1) / problem.tile;
  const int64_t first = tiles * blockIdx.x / gridDim.x * problem.tile;
  const int64_t last = tiles * (blockIdx.x + 1) / gridDim.x * problem.tile;
  block.tiles.begin(first, last < problem.n ? last : problem.n);
}

// Calls f with a value of the type of X and one of the vectors'; the host function has checked the pair.
template <class F>
auto for_glm_dtypes(DType x, const F& f) {
  if (x == DType::f64) return f(double{}, double{});
  if (x == DType::bf16) return f(__nv_bfloat16{}, float{});
  return f(float{}, float{});
}

}  // namespace hg::cuda
