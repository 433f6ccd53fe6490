// Gram matrices by matrix units: blocks of 32 x 32 on and left of the diagonal, as tiles that are added to for every
// range of rows, and become the matrix at the end.
#include <algorithm>

#include "buffer.h"
#include "glm_gram.h"
#include "share.h"
#include "split_gemm.h"

namespace hg::cpu {
namespace {

// Columns and rows from which on packing is little of the work.
constexpr int64_t kLeastColumns = 128, kLeastRows = 1024;
// Bytes of both packed factors of some rows, which with the sums are in the second cache for all blocks, and rows at
// the most.
constexpr int64_t kPackedBytes = 640 << 10, kMaxRows = 2048;
// Blocks of columns that are packed together, row by row: 1 KB of a row at a time, where rows are far apart.
constexpr int64_t kGroup = 8;
// Each thread has sums of its own, of rows of its own, where there are so many rows for all, and sums take at most so
// many bytes: what another thread has packed is far away.
constexpr int64_t kRowsApart = 256, kSumBytes = 64 << 20;
// Steps along the rows, 32 of them, whose products are added up before they go to the sums: keeps the rounding error
// down.
constexpr int64_t kLongest = 4;
// Multiply-adds that a thread should have at least, and tasks per thread.
constexpr int64_t kGrain = 1 << 20, kTasks = 4;
constexpr int64_t kSide = SplitFactor::kSide, kHalf = kSide / 2, kTile = kHalf * kHalf, kSums = kSide * kSide;

// A block's place among those left of the diagonal, column by column: down from the diagonal.
struct Place {
  int64_t i, j;
  Place(int64_t block, int64_t side) : i(block), j(0) {
    for (; i >= side; ++j) i -= side - j - 1;
  }
  void next(int64_t side) {
    if (++i == side) i = ++j;
  }
};

// sums (+)= the products of blocks [begin, end).
struct Blocks {
  const float *left, *right;
  int64_t side, steps;
  float* sums;
  int64_t begin, end;
  bool first;

  HG_TARGET_AVX512 static void run(const Blocks& m) {
    const TileRegisters tiles;
    constexpr int64_t kBlock = SplitFactor::kBlockBytes / static_cast<int64_t>(sizeof(float));
    Made made;
    Place at(m.begin, m.side);
    float* sum = m.sums + m.begin * kSums;
    for (int64_t block = m.begin; block < m.end; ++block, at.next(m.side), sum += kSums)
      for (int64_t t = 0; t < m.steps; t += kLongest) {
        const float *left = m.left + (at.i * m.steps + t) * kBlock, *right = m.right + (at.j * m.steps + t) * kBlock;
        const int64_t steps = std::min(m.steps - t, kLongest), part = kSums / steps / kHalf * kHalf + kHalf;
        int64_t done = 0;
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        SplitTiles<2, 2>::add(left, right, steps, [&]() HG_LAMBDA_INLINE {
          made.add(done, done + part);
          done += part;
        });
        made.at = !made.at, made.sums = sum, made.first = m.first && t == 0;
        float* products = made.products[made.at];
        tile_store<0>(products, kTileRowBytes), tile_store<1>(products + kTile, kTileRowBytes);
        tile_store<2>(products + 2 * kTile, kTileRowBytes), tile_store<3>(products + 3 * kTile, kTileRowBytes);
      }
    made.add(0, kSums);
  }

  // The last products, which are added to their sums while the next are made.
  struct Made {
    float* sums = nullptr;
    bool at = false, first = false;
    alignas(64) float products[2][kSums];

    HG_INLINE void add(int64_t begin, int64_t end) const {
      if (!sums) return;
      using S = Simd<float, 64>;
      const float* from = products[at];
      for (int64_t k = begin; k < std::min(end, kSums); k += S::width)
        S::store(sums + k, first ? S::load(from + k) : S::load(sums + k) + S::load(from + k));
    }
  };
};

}  // namespace

bool split_suits(int64_t n, int64_t d) { return has_amx() && d >= kLeastColumns && n >= kLeastRows; }

void form_gram_split(const float* x, int64_t n, int64_t d, int64_t stride, const float* weights, int64_t step,
                     float* out) {
  const int64_t side = SplitFactor::blocks(d), blocks = side * (side + 1) / 2;
  const int64_t fitting = kPackedBytes / (2 * SplitFactor::size(d, kSide) * static_cast<int64_t>(sizeof(float)));
  const int64_t most = std::clamp<int64_t>(fitting, 2, kMaxRows / kSide) * kSide;
  const Team team = team_for(n * d * (d + kSide) / 2, kGrain);
  const int64_t threads = has_help(team) ? team.threads : 1;
  const int64_t bytes = blocks * kSums * static_cast<int64_t>(sizeof(float));
  const int64_t ranges = std::clamp<int64_t>(std::min(n / kRowsApart, kSumBytes / bytes), 1, threads);
  const int64_t parts = ranges < threads ? std::min(blocks, kTasks * threads / ranges) : 1;
  const int64_t groups = (side + kGroup - 1) / kGroup, packed = SplitFactor::size(d, most);
  const Buffer<float> factors(ranges * 2 * packed), sums(ranges * blocks * kSums);
  const auto left_of = [&](int64_t range) { return factors.get() + range * 2 * packed; };
  const auto right_of = [&](int64_t range) { return left_of(range) + packed; };
  const auto sums_of = [&](int64_t range) { return sums.get() + range * blocks * kSums; };
  lead(team, [&] {
    for (int64_t begin = 0; begin < n; begin += ranges * most) {
      // The last ranges may have none.
      const auto rows_of = [&](int64_t range) { return std::clamp<int64_t>(n - begin - range * most, 0, most); };
      share(ranges * groups, team, [&](int64_t task) {
        const int64_t range = task / groups, first = task % groups * kGroup * kSide, rows = rows_of(range);
        const int64_t last = std::min(d, first + kGroup * kSide), all = SplitFactor::blocks(rows);
        for (int64_t t = 0; t < rows; t += kSide)
          for (int64_t j = first; j < last; j += kSide) {
            const int64_t row = begin + range * most + t, to = SplitFactor::size(j, rows) + SplitFactor::size(1, t);
            const SplitFactor::Source source{
                x + row * stride + j, 1,   stride, std::min(kSide, d - j), std::min(kSide, rows - t),
                weights + row * step, step};
            SplitFactor::pack_left(source, left_of(range) + to, all);
            SplitFactor::pack_right(source, right_of(range) + to, all);
          }
      });
      share(ranges * parts, team, [&](int64_t task) {
        const int64_t range = task / parts, part = task % parts, steps = SplitFactor::blocks(rows_of(range));
        if (steps == 0) return;
        Blocks::run({left_of(range), right_of(range), side, steps, sums_of(range), part * blocks / parts,
                     (part + 1) * blocks / parts, begin == 0});
      });
    }
    // Into the matrix, and its mirror image.
    share(side, team, [&](int64_t task) {
      for (int64_t j = task, i = task, block = task * side - task * (task - 1) / 2; i < side; ++i, ++block)
        for (int64_t r = 0; r < std::min(kSide, d - i * kSide); ++r)
          for (int64_t c = 0; c < std::min(i == j ? r + 1 : kSide, d - j * kSide); ++c) {
            const int64_t at = block * kSums + (r / kHalf * 2 + c / kHalf) * kTile + r % kHalf * kHalf + c % kHalf;
            float sum = sums.get()[at];
            for (int64_t range = 1; range < ranges; ++range) sum += sums_of(range)[at];
            const int64_t row = i * kSide + r, column = j * kSide + c;
            out[row * d + column] = out[column * d + row] = sum;
          }
    });
  });
}

}  // namespace hg::cpu
