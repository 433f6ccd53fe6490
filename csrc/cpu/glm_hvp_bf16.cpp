// Hessian-vector products of generalised linear models with several columns, X in bfloat16, by matrix units: every row
// of X is read once from memory, and again from the second cache.
#include "glm_hvp_bf16.h"

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "glm_bf16.h"
#include "glm_weigh.h"
#include "share.h"

namespace hg::cpu {
namespace {

// Columns and rows of X from which on matrix units are not slower.
constexpr int64_t kLeastColumns = 64, kLeastRows = 256;
// Bytes of a block of rows, which lives in L2 between its two uses, and of its weighted columns, which live in L1.
constexpr int64_t kBytes = 200 << 10, kWeightedBytes = 24 << 10;
// Rows of a block come in multiples of this, which is one of the rows of all groups' panels.
constexpr int64_t kUnit = 64;
// Blocks whose sums are added up before they go to the total: keeps the rounding error of long sums down.
constexpr int64_t kFlush = 64;
// Ranges per thread.
constexpr int64_t kRanges = 4;

// The next block, sent for in the order of memory: so the processor's own prefetching goes ahead. Sent for row by row,
// as they are used, they take a product 1.05 to 1.25 times as long.
struct Ahead {
  static constexpr int64_t kLine = 64, kLines = 8;
  const char *next, *end;

  HG_INLINE void operator()() {
    if (next >= end) return;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLines; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
  }
};

template <int kColumns>
struct Product {
  using Group = GlmBf16<kColumns>;
  static constexpr int64_t kRows = Group::kRows;

  const GlmColumns<float>& of;
  const GlmData& data;
  const int64_t K, groups, in_group;
  const Buffer<float> packed;

  explicit Product(const GlmColumns<float>& of)
      : of(of),
        data(of.data),
        K(of.K),
        groups((K + kColumns - 1) / kColumns),
        in_group((K + groups - 1) / groups),
        packed(groups * Group::packed_size(data.d)) {}

  // Columns of group i.
  int64_t first(int64_t i) const { return i * in_group; }
  int64_t count(int64_t i) const { return std::min(in_group, K - first(i)); }

  // What a range of rows adds up, and its scratch: for every 16 rows columns of z, and of the probabilities.
  struct Sums {
    const Product& p;
    const int64_t size, panel;
    const Buffer<float> g, g_intercept, z, weighted, probabilities;

    Sums(const Product& p, int64_t block)
        : p(p),
          size(Group::sums_size(p.data.d)),
          panel((p.K + Group::kWidth) * kRows),
          g(p.groups * size),
          g_intercept(p.K * kRows),
          z(block / kRows * panel),
          weighted(Group::weighted_size(block)),
          probabilities(GlmWeigh::scratch_size(p.of)) {
      std::fill_n(g.get(), p.groups * size, 0.0f);
      std::fill_n(g_intercept.get(), p.K * kRows, 0.0f);
      std::fill_n(weighted.get(), Group::weighted_size(block), 0.0f);
    }

    // To K x d, and the intercepts'.
    void flush(float* total) {
      const int64_t d = p.data.d;
      for (int64_t i = 0; i < p.groups; ++i) Group::unpack(g.get() + i * size, p.count(i), d, total + p.first(i) * d);
      for (int64_t i = 0; i < p.K * kRows; ++i) total[p.K * d + i / kRows] += g_intercept.get()[i];
      std::fill_n(g_intercept.get(), p.K * kRows, 0.0f);
    }
  };

  struct Block {
    const BFloat16* x;
    int64_t stride, rows;
    const float* weights;
    int64_t ahead;  // from a row to that of the next block, or 0
  };

  HG_TARGET_AVX512 void add(const Block& b, const Sums& sums) const {
    const TileRegisters tiles;
    const int64_t d = data.d;
    Ahead next{reinterpret_cast<const char*>(b.x + b.ahead), reinterpret_cast<const char*>(b.x + 2 * b.ahead)};
    const auto fetch = [&]() HG_LAMBDA_INLINE { next(); };
    const auto nothing = []() HG_LAMBDA_INLINE {};
    for (int64_t i = 0; i < groups; ++i)
      for (int64_t r = 0; r < b.rows; r += Group::kPanelRows) {
        const BFloat16* x = b.x + r * b.stride;
        const float* v = packed.get() + i * Group::packed_size(d);
        float* z = sums.z.get() + r / kRows * sums.panel + first(i) * kRows;
        i == 0 ? Group::multiply(x, b.stride, d, v, z, sums.panel, fetch)
               : Group::multiply(x, b.stride, d, v, z, sums.panel, nothing);
      }
    const GlmWeigh weigh{of, sums.probabilities.get(), sums.g_intercept.get()};
    for (int64_t r = 0; r < b.rows; r += kRows)
      weigh.run(b.weights + r * data.classes, sums.z.get() + r / kRows * sums.panel);
    for (int64_t i = 0; i < groups; ++i) {
      float *weighted = sums.weighted.get(), *g = sums.g.get() + i * sums.size;
      for (int64_t r = 0; r < b.rows; r += kRows)
        Group::pack_weighted(sums.z.get() + r / kRows * sums.panel + first(i) * kRows, count(i),
                             weighted + Group::weighted_size(r));
      i == 0 ? Group::add(b.x, b.stride, b.rows, d, weighted, g, fetch)
             : Group::add(b.x, b.stride, b.rows, d, weighted, g, nothing);
    }
  }

  // Rows from `row` on.
  void add_rows(int64_t row, int64_t count, int64_t ahead, const Sums& sums) const {
    const int64_t d = data.d, classes = data.classes, whole = count / Group::kPanelRows * Group::kPanelRows;
    const BFloat16* x = static_cast<const BFloat16*>(data.x) + row * data.stride;
    const float* weights = static_cast<const float*>(data.weights) + row * classes;
    if (whole > 0) add({x, data.stride, whole, weights, ahead}, sums);
    if (whole == count) return;
    // The last ones, with zeros below them.
    std::vector<BFloat16> last_x(Group::kPanelRows * d, BFloat16{0});
    std::vector<float> last_weights(Group::kPanelRows * classes, 0.0f);
    for (int64_t r = whole; r < count; ++r) std::copy_n(x + r * data.stride, d, last_x.data() + (r - whole) * d);
    std::copy_n(weights + whole * classes, (count - whole) * classes, last_weights.data());
    add({last_x.data(), d, Group::kPanelRows, last_weights.data(), 0}, sums);
  }

  static void run(const GlmColumns<float>& of, float* out) {
    const Product p(of);
    const int64_t n = p.data.n, d = p.data.d, steps = Group::steps(d);
    const int64_t fitting = std::min<int64_t>(kBytes / (d * static_cast<int64_t>(sizeof(BFloat16))),
                                              kWeightedBytes / (Group::kDown * kTileBytes) * kRows);
    const int64_t block = std::max<int64_t>(fitting / kUnit, 1) * kUnit, blocks = (n + block - 1) / block;
    const Team team = glm_team(p.data, of.k);
    const int64_t ranges = team.ranges(blocks, kRanges);
    const Buffer<float> totals(ranges * of.pitch());
    lead(team, [&] {
      share(p.groups * steps, team, [&](int64_t task) {
        const int64_t i = task / steps;
        Group::pack(of.columns.data() + p.first(i), p.count(i), d, task % steps,
                    p.packed.get() + i * Group::packed_size(d));
      });
      // Every range has sums of its own, added in order: the result depends on the number of threads alone.
      share(ranges, team, [&](int64_t range) {
        const int64_t first = range * blocks / ranges, last = (range + 1) * blocks / ranges;
        float* total = totals.get() + range * of.pitch();
        std::fill_n(total, of.size(), 0.0f);
        Sums sums(p, block);
        for (int64_t i = first; i < last; ++i) {
          const bool more = i + 1 < last && (i + 2) * block <= n;
          p.add_rows(i * block, std::min(block, n - i * block), more ? block * p.data.stride : 0, sums);
          if ((i - first) % kFlush == kFlush - 1 || i + 1 == last) sums.flush(total);
        }
      });
    });
    of.finish(totals.get(), ranges, out);
  }
};

}  // namespace

bool bf16_suits(const GlmData& data, int64_t k) {
  return has_amx() && data.x_dtype == DType::bf16 && k * data.classes > 1 && data.d >= kLeastColumns &&
         data.n >= kLeastRows;
}

void glm_hvp_bf16(const GlmData& data, const float* v, int64_t k, float* out) {
  const GlmColumns<float> of(data, v, k);
  // Groups of equal width, which pad as little as these allow: five columns are 15 parts, one tile; eight fill two
  // in one step and three in the other.
  constexpr int64_t kMost = 10;
  const int64_t groups = (of.K + kMost - 1) / kMost, width = (of.K + groups - 1) / groups;
  const auto run = width <= 2   ? &Product<2>::run
                   : width <= 5 ? &Product<5>::run
                   : width <= 8 ? &Product<8>::run
                                : &Product<kMost>::run;
  run(of, out);
}

}  // namespace hg::cpu
