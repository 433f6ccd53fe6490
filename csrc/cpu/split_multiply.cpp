// A part of the left factor is packed and stays in the second cache while columns of the right one, which are packed as
// they are used, pass it.
#include "split_multiply.h"

#include <algorithm>

#include "buffer.h"
#include "split_gemm.h"

namespace hg::cpu {
namespace {

// Rows and depth of a part of the left factor: 768 KB, packed.
constexpr int64_t kRows = 256, kDepth = 512;
// Sides and multiply-adds from which on packing is little of the work.
constexpr int64_t kLeastSide = 64, kLeastOps = 1 << 23;

// out (+)= sums, of which those beyond the last column are left out.
struct Store {
  float* out;
  int64_t row, columns;
  bool accumulate;

  template <class S>
  HG_INLINE void operator()(int64_t i, int64_t j, typename S::V sum) const {
    float* at = out + i * row + j;
    if (j + S::width <= columns) {
      if (accumulate) sum += S::load(at);
      S::store(at, sum);
      return;
    }
    float values[S::width];
    S::store(values, sum);
    for (int64_t c = 0; c < columns - j; ++c) at[c] = values[c] + (accumulate ? at[c] : 0);
  }
};

}  // namespace

bool split_suits(int64_t rows, int64_t columns, int64_t depth) {
  return has_amx() && std::min({rows, columns, depth}) >= kLeastSide && rows * columns * depth >= kLeastOps;
}

bool split_suits(const Part<float>& part) {
  return split_suits(part.rows, part.columns, part.depth) && std::min(part.a_row, part.a_depth) == 1 &&
         std::min(part.b_depth, part.b_column) == 1;
}

void multiply_split(const Part<float>& part) {
  static thread_local const Buffer<float> memory(SplitFactor::size(kRows, kDepth) + SplitTerm::memory_size(kDepth));
  for (int64_t t = 0; t < part.depth; t += kDepth) {
    const int64_t depth = std::min(kDepth, part.depth - t), blocks = SplitFactor::blocks(depth);
    for (int64_t i = 0; i < part.rows; i += kRows) {
      const int64_t rows = std::min(kRows, part.rows - i);
      const float* left = part.a + i * part.a_row + t * part.a_depth;
      SplitFactor::pack_left({left, part.a_row, part.a_depth, rows, depth}, memory.get(), blocks);
      const float* right = part.b + t * part.b_depth;
      const SplitTerm term{memory.get(),
                           nullptr,
                           blocks,
                           {right, part.b_column, part.b_depth, part.columns, depth},
                           memory.get() + SplitFactor::size(kRows, kDepth)};
      SplitGemm<Store>::run({&term,
                             1,
                             rows,
                             part.columns,
                             {part.out + i * part.out_row, part.out_row, part.columns, part.accumulate || t > 0}});
    }
  }
}

}  // namespace hg::cpu
