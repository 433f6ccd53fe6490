// Hessian-vector products of generalised linear models on the CPU: every row of X is read once.
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "glm_block.h"
#include "glm_column.h"
#include "glm_columns.h"
#include "glm_hvp_bf16.h"
#include "glm_hvp_split.h"
#include "glm_widen.h"
#include "lift.h"
#include "share.h"

namespace hg::cpu {
namespace {

// Of a block of rows for several columns: it lives in L2 between its two uses.
constexpr int64_t kBytes = 160 << 10;
// Rows of a block come in multiples of this, which is one of the rows of all register tiles.
constexpr int64_t kTileRows = 24;
// Rows of a block at the most: its sums over rows are plain, and longer ones would round worse than torch's.
constexpr int64_t kMaxRows = 240;
// Multiply-adds of Z = X V^T per thread below which waking another thread costs more than it saves.
constexpr int64_t kGrainOps = 1 << 20;
// Blocks whose sums are added up before they go to the total: keeps the rounding error of long sums down.
constexpr int64_t kFlush = 64;
// Rows of one vector's product that are added up before they go to the total, likewise.
constexpr int64_t kPartRows = 768;
// Columns, and bytes of them and their sums, from which on matrix products of torch are faster.
constexpr int64_t kMany = 32, kManyBytes = 2 << 20;
// Bytes of X that a thread takes at a time, and how often at the most: what it took last is in L2 when the next product
// begins there.
constexpr int64_t kTaken = 768 << 10, kMostTaken = 8;

// Whatever X is stored as: once for every type of the arithmetic, since these functions take the compiler longest.
template <class Real>
struct Blocks {
  template <class Tiles>
  struct Body {
    static HG_INLINE void run(const GlmBlock<Real>& block) { GlmBlockBody<Tiles, Real>::run(block); }
  };
  static void multiply(const GlmBlock<Real>& block) {
    static const auto columns = ForTiles<Body, const GlmBlock<Real>&>::get();
    columns(block);
  }
};

template <class X, class Real>
struct Product {
  static constexpr bool kNarrow = !std::is_same_v<X, Real>;
  using Column = GlmColumn<Real, X>;
  using Block = GlmBlock<Real>;

  template <class Tiles>
  struct OneColumn {
    static HG_INLINE void run(const Column& column) { GlmColumnBody<Tiles, Real, X>::run(column); }
  };
  // Adds the rows from `first` to `last` to `total`: d sums, and the intercept's.
  static void one_column(const GlmData& data, const Real* v, int64_t first, int64_t last, Real* total) {
    static const auto multiply = ForTiles<OneColumn, const Column&>::get();
    const int64_t d = data.d, part = kPartRows;
    const Buffer<Real> sums(d + 1);
    for (int64_t row = first; row < last; row += part) {
      Real* g = last - first > part ? sums.get() : total;
      if (g != total) std::fill_n(g, d + 1, Real(0));
      const int64_t rows = std::min(part, last - row);
      multiply({static_cast<const X*>(data.x) + row * data.stride, static_cast<const Real*>(data.weights) + row, v,
                data.intercept ? v[d] : Real(0), g, g + d, rows, d, data.stride, data.n - row - rows});
      if (g != total)
        for (int64_t j = 0; j <= d; ++j) total[j] += g[j];
    }
  }

  // `wide` is where a narrower X is widened to, once for both of its uses.
  static void multiply(Block block, const X* x, int64_t stride, Real* wide) {
    if constexpr (kNarrow) {
      Widen<X, Real>::run({x, block.rows, block.d, stride, wide});
      block.x = wide, block.stride = block.d;
    } else {
      block.x = x, block.stride = stride;
    }
    Blocks<Real>::multiply(block);
  }

  static void run(const GlmData& data, const Real* v, int64_t k, Real* out) {
    const GlmColumns<Real> of(data, v, k);
    const int64_t d = data.d, classes = data.classes, K = of.K, size = of.size(), pitch = of.pitch();
    const bool one = K == 1 && d * static_cast<int64_t>(sizeof(Real)) >= TilesBase::bytes;
    const int64_t fitting = kBytes / std::max<int64_t>(1, d * sizeof(Real)) / kTileRows * kTileRows;
    const int64_t block = one ? kTileRows : std::clamp(fitting, kTileRows, kMaxRows);
    const int64_t blocks = (data.n + block - 1) / block;
    // Every range of blocks has sums of its own, added in order: the result depends on the number of threads alone.
    Team team = glm_team(data, k);
    team.alternating = one;
    const int64_t taken = one ? data.n * d * static_cast<int64_t>(sizeof(X)) / kTaken / team.threads : 0;
    const int64_t per_thread = std::clamp<int64_t>(taken, team.threads > 1 ? 4 : 1, kMostTaken);
    const int64_t ranges = std::clamp<int64_t>(blocks, 1, team.threads * per_thread);

    // Registers of 16 bytes hold one column.
    const int64_t panel_size = DotPanel<Real>::size(d),
                  in_panels = isa() == Isa::base ? 0 : K / DotPanel<Real>::kColumns;
    const Buffer<Real> panels(in_panels * panel_size);
    for (int64_t i = 0; i < in_panels; ++i)
      DotPanel<Real>::pack(of.columns.data() + i * DotPanel<Real>::kColumns, d, panels.get() + i * panel_size);

    // One column's are taken from both ends.
    const auto begin_of = [&](int64_t range) {
      return one ? range * blocks / ranges : falling_begin(range, ranges, team.threads, blocks);
    };
    const Buffer<Real> memory(ranges * pitch);
    Real* const totals = memory.get();
    share(ranges, team, [&](int64_t range) {
      const int64_t first = begin_of(range), last = begin_of(range + 1);
      Real* total = totals + range * pitch;
      std::fill_n(total, size, Real(0));
      if (one) return one_column(data, v, first * block, std::min(last * block, data.n), total);
      std::vector<Real> z(block * K), partial(last - first > kFlush ? size : 0, Real(0));
      const Buffer<Real> wide(kNarrow ? block * d : 0);
      Real* g = partial.empty() ? total : partial.data();
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = i * block;
        const X* x = static_cast<const X*>(data.x) + row * data.stride;
        const bool more = i + 1 < last && row + 2 * block <= data.n;
        Block job{};
        job.weights = static_cast<const Real*>(data.weights) + row * classes;
        job.v = of.columns.data(), job.panels = in_panels ? panels.get() : nullptr,
        job.intercept = data.intercept ? of.intercepts.data() : nullptr;
        job.z = z.data(), job.g = g, job.g_intercept = g + K * d;
        job.rows = std::min(block, data.n - row), job.d = d, job.K = K, job.classes = classes;
        job.next = more ? reinterpret_cast<const char*>(x + block * data.stride) : nullptr;
        job.next_stride = data.stride * sizeof(X), job.size = sizeof(X);
        multiply(job, x, data.stride, wide.get());
        if (g != total && ((i - first) % kFlush == kFlush - 1 || i + 1 == last))
          for (int64_t j = 0; j < size; ++j) total[j] += g[j], g[j] = 0;
      }
    });

    of.finish(totals, ranges, out);
  }
};

}  // namespace

bool glm_many(const GlmData& data, int64_t k) {
  const int64_t K = k * data.classes, size = data.x_dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return !split_suits(data, k) && K >= kMany &&
         2 * K * data.d * size >= (bf16_suits(data, k) ? kMostOfBf16 : kManyBytes);
}

Team glm_team(const GlmData& data, int64_t k) { return team_for(data.n * data.d * data.classes * k, kGrainOps); }

void glm_hvp(const GlmData& data, const void* v, int64_t k, void* out) {
  const bool split = split_suits(data, k);
  if (data.x_dtype == DType::f64)
    Product<double, double>::run(data, static_cast<const double*>(v), k, static_cast<double*>(out));
  else if (split || bf16_suits(data, k))
    lifted(static_cast<const float*>(v), k, data.classes * (data.d + data.intercept), static_cast<float*>(out),
           [&](const float* v, float* out) { (split ? glm_hvp_split : glm_hvp_bf16)(data, v, k, out); });
  else if (data.x_dtype == DType::bf16)
    Product<BFloat16, float>::run(data, static_cast<const float*>(v), k, static_cast<float*>(out));
  else if (data.x_dtype == DType::f16)
    Product<Float16, float>::run(data, static_cast<const float*>(v), k, static_cast<float*>(out));
  else
    Product<float, float>::run(data, static_cast<const float*>(v), k, static_cast<float*>(out));
}

}  // namespace hg::cpu
