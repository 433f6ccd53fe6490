#include "shared_gemm.h"

#include <algorithm>
#include <type_traits>

#include "../plan.h"
#include "share.h"
#include "split_multiply.h"

namespace hg::cpu {
namespace {

// Multiply-adds that a thread should have at least.
constexpr int64_t kGrain = 1 << 19;

// A part has a multiple of so many rows and columns, but for the last one, and at least so many: it packs columns of
// its right factor anew, and, for matrix units, rows of its left one.
struct Unit {
  int64_t rows, columns, least_rows, least_columns, tasks;  // tasks: parts for each thread
};
template <class Real>
constexpr int64_t kGroupOf = kGroupBytes / static_cast<int64_t>(sizeof(Real));
template <class Real>
constexpr Unit kPanels{1, kGroupOf<Real>, 24, kGroupOf<Real>, 2};
constexpr Unit kSplit{32, 32, 64, 64, 1};

int64_t units(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }

}  // namespace

template <class Real>
void multiply(const Part<Real>& first, const GemmBatch& batch) {
  bool split = false;
  if constexpr (std::is_same_v<Real, float>) split = split_suits(first);
  const Unit unit = split ? kSplit : kPanels<Real>;
  const int64_t rows = first.rows, columns = first.columns;
  const Team team = team_for(batch.count * rows * columns * first.depth, kGrain);
  // What is shared are products of the batch, and where there are few of them parts of their columns and then rows, or
  // of the longer side: the factor of the shorter one is packed for each of them.
  const int64_t wanted = team.threads > 1 ? unit.tasks * team.threads : 1;
  const auto parts_of = [&](int64_t there, int64_t most) {
    return std::clamp<int64_t>((wanted + there - 1) / there, 1, std::max<int64_t>(1, most));
  };
  const int64_t groups = units(columns, unit.columns), strips = units(rows, unit.rows);
  const int64_t most_across = units(columns, unit.least_columns), most_down = rows / unit.least_rows;
  int64_t across = 1, down = 1;
  if (split && rows > columns) {
    down = parts_of(batch.count, most_down);
    across = parts_of(batch.count * down, most_across);
  } else {
    across = parts_of(batch.count, most_across);
    down = parts_of(batch.count * across, most_down);
  }
  const int64_t tasks = batch.count * across * down, ranges = team.ranges(tasks, unit.tasks);
  share(ranges, team, [&](int64_t range) {
    for (int64_t task = range * tasks / ranges; task < (range + 1) * tasks / ranges; ++task) {
      const int64_t i = task / (across * down), group = task / down % across, strip = task % down;
      const int64_t left = group * groups / across * unit.columns;
      const int64_t right = std::min((group + 1) * groups / across * unit.columns, columns);
      const int64_t top = strip * strips / down * unit.rows;
      const int64_t bottom = std::min((strip + 1) * strips / down * unit.rows, rows);
      Part<Real> part = first;
      part.a += i * batch.a + top * first.a_row, part.b += i * batch.b + left * first.b_column;
      part.out += i * batch.out + top * first.out_row + left;
      part.rows = bottom - top, part.columns = right - left;
      if constexpr (std::is_same_v<Real, float>)
        if (split) {
          multiply_split(part);
          continue;
        }
      multiply_part(part);
    }
  });
}

template <class Real>
void PlanKernels<Real>::multiply(const plan::Gemm& g, Real* const* slots) {
  const auto at = [&](const auto& view) { return slots[view.slot] + view.offset; };
  cpu::multiply<Real>({at(g.a), g.a.strides[1], g.a.strides[2], at(g.b), g.b.strides[1], g.b.strides[2], at(g.out),
                       g.out.strides[1], g.out.sizes[1], g.out.sizes[2], g.a.sizes[2], g.accumulate},
                      {g.out.sizes[0], g.a.strides[0], g.b.strides[0], g.out.strides[0]});
}

template void multiply(const Part<float>&, const GemmBatch&);
template void multiply(const Part<double>&, const GemmBatch&);
template void PlanKernels<float>::multiply(const plan::Gemm&, float* const*);
template void PlanKernels<double>::multiply(const plan::Gemm&, double* const*);

}  // namespace hg::cpu
