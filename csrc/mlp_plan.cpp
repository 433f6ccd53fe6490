#include "mlp_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace hg {
namespace {

// Estimates for an H200, by arithmetic and not yet by measurement. A launch that waits for the one before it; a layer,
// forward or back, within one launch: a barrier of the block and a few hundred cycles of latency; multiply-adds of a
// multiprocessor, limited by shared memory and by tiles that are small; a barrier of the grid, and bytes that go
// through the cache to be added up.
constexpr double kLaunchUs = 2.5, kLayerUs = 0.6, kBlockRate = 9e4, kTileRate = 7.5e4, kBarrierUs = 3, kSumRate = 3e6;
// Products of fewer multiply-adds than this take a GPU less time than the launches around them: 3 us at 45 TFLOP/s.
constexpr int64_t kSmallProduct = int64_t{1} << 26;
// What the runtime keeps of every block's shared memory, blocks for which registers suffice, and rows to choose from.
constexpr int kReserved = 1024, kMostResident = 2, kRows[] = {4, 8, 16, 32};

double multiply_adds(const MlpShape& shape, int64_t rows) {
  double sum = 0;
  for (size_t l = 0; l + 1 < shape.sizes.size(); ++l)
    sum += 6.0 * static_cast<double>(rows) * static_cast<double>(shape.sizes[l] * shape.sizes[l + 1]);
  return shape.itemsize == 8 ? 2 * sum : sum;
}

// Without `slots`, which depend on how many blocks there can be.
MlpLaunch launch_of(const MlpShape& shape, int rows) {
  MlpLaunch launch;
  launch.rows = rows;
  launch.row_blocks = static_cast<int>(std::max<int64_t>(1, (shape.n + rows - 1) / rows));
  for (size_t l = 0; l + 1 < shape.sizes.size(); ++l) {
    const int in = mlp_pitch(static_cast<int>(shape.sizes[l]), shape.itemsize);
    const int width = static_cast<int>(shape.sizes[l + 1]), out = mlp_pitch(width, shape.itemsize);
    launch.matrix = std::max(launch.matrix, width * in);
    launch.padded += width * in;
    launch.in_rows = std::max(launch.in_rows, rows * in);
    launch.out_rows = std::max(launch.out_rows, rows * out);
    if (l + 2 < shape.sizes.size()) launch.tangents += rows * out;
  }
  const int64_t stage = 2 * int64_t{launch.matrix} + launch.in_rows + 2 * int64_t{launch.out_rows};
  const int64_t elements = launch.tangents * int64_t{1 + shape.curved} + 2 * stage + 2 * int64_t{launch.out_rows};
  launch.shared = elements * shape.itemsize;
  return launch;
}

std::string text(const char* format, double a, double b) {
  char buffer[160];
  std::snprintf(buffer, sizeof buffer, format, a, b);
  return buffer;
}

}  // namespace

MlpPlan plan_mlp(const MlpShape& shape, const Chip& chip) {
  const int64_t layers = static_cast<int64_t>(shape.sizes.size()) - 1;
  int64_t largest = 0, widest = 0;
  for (int64_t l = 0; l < layers; ++l) largest = std::max(largest, shape.sizes[l] * shape.sizes[l + 1]);
  for (const int64_t size : shape.sizes) widest = std::max(widest, size);
  if (static_cast<double>(shape.k) * static_cast<double>(shape.n) * static_cast<double>(largest) > kSmallProduct)
    return {{"products", "arithmetic, not launches, is what a product takes its time for"}, {}};
  const auto launches = [](const std::string& reason) { return MlpPlan{{"launches", reason}, {}}; };
  if (without("one_launch")) return launches("HYPERGRAD_EXT_CUDA_WITHOUT names one_launch");
  if (layers > kMlpLaunchLayers) return launches("one launch takes at most 61 layers");
  if (!chip.cooperative) return launches("the device has no cooperative launches");
  // Beyond this width not even one matrix fits, and sizes might not count in 32 bits.
  if (widest > 4096) return launches("a layer is too wide for shared memory");

  MlpPlan best = launches("matrices and tangents do not fit in shared memory, or not all rows at the same time");
  double least = INFINITY;
  for (const int rows : kRows) {
    MlpLaunch launch = launch_of(shape, rows);
    if (launch.shared > chip.shared_per_block) continue;
    const int64_t resident =
        std::min<int64_t>(kMostResident, chip.shared_per_multiprocessor / (launch.shared + kReserved));
    launch.slots =
        static_cast<int>(std::min(std::max<int64_t>(1, shape.k), resident * chip.multiprocessors / launch.row_blocks));
    if (launch.slots == 0) continue;
    const int64_t blocks = int64_t{launch.slots} * launch.row_blocks;
    const double rounds = std::ceil(static_cast<double>(shape.k) / launch.slots);
    const double share = std::ceil(static_cast<double>(blocks) / chip.multiprocessors);
    double us = 2 * kLayerUs * static_cast<double>(layers) + share * multiply_adds(shape, rows) / kBlockRate;
    if (launch.row_blocks > 1)
      us += kBarrierUs + 2.0 * static_cast<double>(blocks * launch.padded * shape.itemsize) / kSumRate;
    us = kLaunchUs + rounds * us;
    if (us < least) least = us, best.launch = launch;
  }
  if (best.launch.rows == 0) return best;
  const double all = multiply_adds(shape, shape.n * shape.k) / (kTileRate * chip.multiprocessors);
  const double others = 3 * kLaunchUs * static_cast<double>(layers) + all;
  if (least > others) return launches(text("estimated %.0f us in one launch, %.0f us layer by layer", least, others));
  best.plan = {"one_launch", text("estimated %.0f us, %.0f us layer by layer", least, others)};
  return best;
}

}  // namespace hg
