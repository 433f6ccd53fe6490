// Both products of a layer of a dozen outputs with its input, in one pass over that: a block of rows is read from
// memory once, and again from the second cache.
#include <algorithm>

#include "../plan.h"
#include "buffer.h"
#include "share.h"

namespace hg::cpu {
namespace {

// Multiply-adds that a thread should have at least, and ranges per thread, each with a result of its own.
constexpr int64_t kGrain = 1 << 20, kRanges = 2;
// Bytes of a block's rows, of which there are multiples of as many as few_rows reads at once.
constexpr int64_t kBlockBytes = 256 << 10, kRows = 32;

}  // namespace

template <class Real>
void PlanKernels<Real>::sweep(const plan::Sweep& s, Real* const* slots, const double* numbers) {
  const int64_t rows = s.first.a.sizes[1], depth = s.first.a.sizes[2], outputs = s.last.out.sizes[1];
  const int64_t fit = kBlockBytes / (depth * static_cast<int64_t>(sizeof(Real))) / kRows * kRows;
  const int64_t block = std::max(kRows, fit), blocks = (rows + block - 1) / block;
  const Team team = team_for(rows * depth * (s.first.out.sizes[2] + outputs), kGrain);
  const int64_t ranges = team.ranges(blocks, kRanges), size = outputs * depth;
  Real* const out = slots[s.last.out.slot] + s.last.out.offset;
  const int64_t out_row = s.last.out.strides[1];
  // Results of ranges; the first range's is the product itself.
  const Buffer<Real> others((ranges - 1) * size);
  Real* const parts = others.get();
  share(ranges, team, [&](int64_t range) {
    const int64_t first = range * blocks / ranges, last = (range + 1) * blocks / ranges;
    for (int64_t i = first; i < last; ++i) {
      const plan::Range at{i * block, std::min(rows, (i + 1) * block)};
      dots(s.first, slots, at);
      for (const auto& work : s.between) {
        if (const auto* p = std::get_if<plan::Pointwise>(&work)) {
          const int64_t each = p->sizes[0] / rows;
          pointwise(*p, slots, numbers, {at.begin * each, at.end * each});
        } else {
          softmax(std::get<plan::Softmax>(work), slots, at);
        }
      }
      if (range == 0)
        few_rows(s.last, slots, at, out, out_row, i > 0 || s.last.accumulate);
      else
        few_rows(s.last, slots, at, parts + (range - 1) * size, depth, i > first);
    }
  });
  for (int64_t range = 1; range < ranges; ++range) {
    const Real* const part = parts + (range - 1) * size;
    for (int64_t i = 0; i < outputs; ++i)
#pragma GCC ivdep
      for (int64_t j = 0; j < depth; ++j) out[i * out_row + j] += part[i * depth + j];
  }
}

template void PlanKernels<float>::sweep(const plan::Sweep&, float* const*, const double*);
template void PlanKernels<double>::sweep(const plan::Sweep&, double* const*, const double*);

}  // namespace hg::cpu
