// Parallel loop over aligned vector lists with sums that do not depend on the number of threads:
// every block of elements writes its own partial sums, which are added in order.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "../vector_list.h"
#include "share.h"

namespace hg::cpu {

// Elements per block. A float32 step touches five streams: 320 KB, well inside a 1 MB L2 cache.
constexpr int64_t kBlock = 16384;
// Blocks per thread below which another thread costs more than it saves.
constexpr int64_t kGrain = 24;
// Blocks from which on a job is long, some 8 ms of one thread: working alone costs more than waiting for a slice of
// time.
constexpr int64_t kLong = 640;

// Runs f(pointers, size, sums) over all rows that are `live`; returns rows x S sums.
template <int S, int N, class Live, class F>
std::vector<std::array<double, S>> for_each_block(const AlignedPieces<N>& pieces, int64_t rows, const Live& live,
                                                  const F& f) {
  const int64_t blocks = (pieces.numel() + kBlock - 1) / kBlock;
  std::vector<std::array<double, S>> partial(rows * blocks, std::array<double, S>{});
  const int64_t tasks = rows * blocks;
  Team team = team_for(tasks, kGrain);
  team.patient = tasks >= kLong;
  // Long ranges, because the hardware fetches ahead only along each of them; several, for threads that are late.
  const int64_t ranges = team.ranges(tasks, 4);
  share(ranges, team, [&](int64_t range) {
    for (int64_t task = range * tasks / ranges; task < (range + 1) * tasks / ranges; ++task) {
      const int64_t row = task / blocks, begin = task % blocks * kBlock;
      if (live(row))
        pieces.visit(row, begin, std::min(begin + kBlock, pieces.numel()),
                     [&](const auto& at, int64_t size) { f(row, at, size, partial[task].data()); });
    }
  });
  std::vector<std::array<double, S>> sums(rows, std::array<double, S>{});
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t b = 0; b < blocks; ++b)
      for (int s = 0; s < S; ++s) sums[row][s] += partial[row * blocks + b][s];
  return sums;
}

}  // namespace hg::cpu
