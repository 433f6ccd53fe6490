// Products with the Hessian of cross-entropy on the CPU: logits and u are read from memory once, and of
// the probabilities never more than a few rows exist.
#include <vector>

#include "../softmax.h"
#include "dispatch.h"
#include "exp.h"
#include "share.h"
#include "simd.h"

namespace hg::cpu {
namespace {

// Up to so many classes, SIMD lanes hold rows instead of classes: short rows would leave most lanes idle.
constexpr int64_t kTileClasses = 24;
constexpr int kTileRows = 16;
// Elements of a row that are added up in its own precision, before float64.
constexpr int64_t kChunk = 4096;
// Exponentials that are kept at a time, of several rows where they are short: by the time they are read, they are
// written, which with a single short row they would not be.
constexpr int64_t kBlockBytes = 4 << 10, kMaxRows = 64;
// Elements per thread below which forking threads costs more than it saves.
constexpr int64_t kGrainElements = 1 << 15;

int64_t long_rows(int64_t classes, int64_t item_size) {
  return std::clamp<int64_t>(kBlockBytes / (classes * item_size), 1, kMaxRows);
}

template <class T, class Real>
struct Pointers {
  const SoftmaxRows& data;

  HG_INLINE const T* logits(int64_t row) const { return static_cast<const T*>(data.logits) + row * data.logits_stride; }
  HG_INLINE const T* u(int64_t j, int64_t row) const {
    return static_cast<const T*>(data.u) + j * data.u_stride + row * data.u_row_stride;
  }
  HG_INLINE T* out(int64_t j, int64_t row) const {
    return static_cast<T*>(data.out) + j * data.out_stride + row * data.out_row_stride;
  }
  HG_INLINE Real weight(int64_t row) const {
    return data.weights ? static_cast<const Real*>(data.weights)[row] : Real(1);
  }
};

// Lanes are classes. exps: exp(logit - max) of a block of rows, all that is kept of it. What a row has beyond whole
// registers is done by a register that ends with the row, and overlaps the one before.
template <class T, class Real, class Tiles>
struct LongRows {
  using S = Simd<Real, Tiles::bytes>;
  using V = typename S::V;
  using Bits = typename Vector<typename ExpConstants<Real>::Bits, Tiles::bytes>::type;
  static constexpr int kWidth = S::width;

  // The last `count` lanes of x, zeros before.
  static HG_INLINE V last_lanes(V x, int64_t count) {
    V lane = {};
    for (int l = 0; l < kWidth; ++l) lane[l] = static_cast<Real>(l);
    return lane >= static_cast<Real>(kWidth - count) ? x : V{};
  }

  // Sum of the lanes of terms(i) over all registers i of a row, in float64 from chunk to chunk.
  template <class F>
  static HG_INLINE double sum(int64_t n, const F& terms) {
    double total = 0;
    for (int64_t i = 0; i < n;) {
      const int64_t end = std::min(n, i + kChunk);
      V sums[4] = {};
      for (; i + 4 * kWidth <= end; i += 4 * kWidth)
        for (int s = 0; s < 4; ++s) sums[s] += terms(i + s * kWidth);
      for (; i + kWidth <= end; i += kWidth) sums[0] += terms(i);
      if (i < end) sums[1] += last_lanes(terms(n - kWidth), n - i), i = n;
      total += S::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return total;
  }

  static HG_INLINE Real largest(const T* x, int64_t n) {
    V max[4];
    for (V& m : max) m = S::load(x);
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth)
      for (int s = 0; s < 4; ++s) {
        const V value = S::load(x + i + s * kWidth);
        max[s] = value > max[s] ? value : max[s];
      }
    for (; i < n; i += kWidth) {
      const V value = S::load(x + std::min(i, n - kWidth));
      max[0] = value > max[0] ? value : max[0];
    }
    for (int s = 1; s < 4; ++s) max[0] = max[s] > max[0] ? max[s] : max[0];
    Real result = max[0][0];
    for (int l = 1; l < kWidth; ++l) result = max[0][l] > result ? max[0][l] : result;
    return result;
  }

  static HG_INLINE void run(const SoftmaxRows& data, int64_t first, int64_t last, void* scratch) {
    const int64_t rows = long_rows(data.classes, sizeof(Real));
    for (; first < last; first += rows) block(data, first, std::min(rows, last - first), static_cast<Real*>(scratch));
  }

  // The exponentials of some rows, then all vectors.
  static HG_INLINE void block(const SoftmaxRows& data, int64_t first, int64_t rows, Real* exps) {
    const Pointers<T, Real> at{data};
    const int64_t n = data.classes;
    double inverses[kMaxRows];  // of the sums of exponentials; 0 for a row of weight 0
    for (int64_t r = 0; r < rows; ++r) {
      inverses[r] = 0;
      if (at.weight(first + r) == 0) continue;
      const T* logits = at.logits(first + r);
      Real* row = exps + r * n;
      const Real max = largest(logits, n);
      inverses[r] = 1 / sum(n, [&](int64_t i) HG_LAMBDA_INLINE {
                      const V e = exp_nonpositive<Real, Bits>(S::load(logits + i) - max);
                      S::store(row + i, e);
                      return e;
                    });
    }
    for (int64_t j = 0; j < data.k; ++j)
      for (int64_t r = 0; r < rows; ++r) {
        const T* u = at.u(j, first + r);
        T* out = at.out(j, first + r);
        if (inverses[r] == 0)
          std::memset(out, 0, n * sizeof(T));
        else
          multiply(exps + r * n, u, out, n, inverses[r], data.scale * at.weight(first + r));
      }
  }

  static HG_INLINE void multiply(const Real* exps, const T* u, T* out, int64_t n, double inverse, double scale) {
    const Real factor = static_cast<Real>(scale * inverse);
    const Real mean = static_cast<Real>(
        inverse * sum(n, [&](int64_t i) HG_LAMBDA_INLINE { return S::load(exps + i) * S::load(u + i); }));
    const auto product = [&](int64_t i)
                             HG_LAMBDA_INLINE { return factor * S::load(exps + i) * (S::load(u + i) - mean); };
    // Read before out, which may be u, is written there.
    const V end = product(n - kWidth);
    for (int64_t i = 0; i + kWidth <= n; i += kWidth) S::store(out + i, product(i));
    S::store(out + n - kWidth, end);
  }
};

// Lanes are rows: a tile holds kTileRows of them, transposed.
template <class T, class Real>
struct ShortRows {
  using Lanes = Real[kTileRows];

  // Rows of weight 0, and those past the end, are read as zeros.
  template <class Row>
  static HG_INLINE void load(Lanes* tile, int64_t n, const bool* live, const Row& row) {
    for (int r = 0; r < kTileRows; ++r) {
      if (!live[r]) {
        for (int64_t c = 0; c < n; ++c) tile[c][r] = 0;
        continue;
      }
      const T* x = row(r);
      for (int64_t c = 0; c < n; ++c) tile[c][r] = widen(x[c]);
    }
  }

  static HG_INLINE void run(const SoftmaxRows& data, int64_t first, int64_t last, void* scratch) {
    const Pointers<T, Real> at{data};
    const int64_t n = data.classes;
    Lanes* exps = static_cast<Lanes*>(scratch);
    Lanes* tile = exps + n;
    for (; first < last; first += kTileRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, last - first));
      bool live[kTileRows];
      Lanes max, sum = {}, factor;
      for (int r = 0; r < kTileRows; ++r) {
        factor[r] = r < rows ? static_cast<Real>(data.scale) * at.weight(first + r) : Real(0);
        live[r] = r < rows && at.weight(first + r) != 0;
      }
      load(exps, n, live, [&](int r) HG_LAMBDA_INLINE { return at.logits(first + r); });
      for (int r = 0; r < kTileRows; ++r) max[r] = exps[0][r];
      for (int64_t c = 1; c < n; ++c)
        for (int r = 0; r < kTileRows; ++r) max[r] = exps[c][r] > max[r] ? exps[c][r] : max[r];
      for (int64_t c = 0; c < n; ++c)
        for (int r = 0; r < kTileRows; ++r) {
          exps[c][r] = exp_nonpositive<Real, typename ExpConstants<Real>::Bits>(exps[c][r] - max[r]);
          sum[r] += exps[c][r];
        }
      for (int r = 0; r < kTileRows; ++r) factor[r] /= sum[r];
      for (int64_t j = 0; j < data.k; ++j) {
        Lanes mean = {};
        load(tile, n, live, [&](int r) HG_LAMBDA_INLINE { return at.u(j, first + r); });
        for (int64_t c = 0; c < n; ++c)
          for (int r = 0; r < kTileRows; ++r) mean[r] += exps[c][r] * tile[c][r];
        for (int r = 0; r < kTileRows; ++r) mean[r] /= sum[r];
        for (int64_t c = 0; c < n; ++c)
          for (int r = 0; r < kTileRows; ++r) tile[c][r] = factor[r] * exps[c][r] * (tile[c][r] - mean[r]);
        for (int r = 0; r < rows; ++r) {
          T* out = at.out(j, first + r);
          for (int64_t c = 0; c < n; ++c) store(out + c, tile[c][r]);
        }
      }
    }
  }
};

template <class T, class Real>
struct Long {
  template <class Tiles>
  using Body = LongRows<T, Real, Tiles>;
};

template <class T, class Real>
void run(const SoftmaxRows& data) {
  using Kernel = void (*)(const SoftmaxRows&, int64_t, int64_t, void*);
  const bool tiles = data.classes <= kTileClasses;
  const Kernel kernel =
      tiles ? ForIsa<ShortRows<T, Real>, const SoftmaxRows&, int64_t, int64_t, void*>::get()
            : ForTiles<Long<T, Real>::template Body, const SoftmaxRows&, int64_t, int64_t, void*>::get();
  const int64_t scratch = tiles ? 2 * kTileRows * data.classes : data.classes * long_rows(data.classes, sizeof(Real));
  const int64_t step = tiles ? kTileRows : long_rows(data.classes, sizeof(Real));
  const int64_t row = std::max<int64_t>(1, data.classes * (data.k + 1) * step);
  const int64_t blocks = (data.rows + step - 1) / step;
  const Team team = team_for(blocks * row, kGrainElements);
  const int64_t ranges = team.ranges(blocks, 4);
  share(ranges, team, [&](int64_t range) {
    const int64_t first = range * blocks / ranges, last = (range + 1) * blocks / ranges;
    std::vector<Real> memory(scratch);
    kernel(data, first * step, std::min(last * step, data.rows), memory.data());
  });
}

}  // namespace

void softmax_hessian(const SoftmaxRows& data) {
  if (data.classes == 0) return;
  switch (data.dtype) {
    case DType::f64:
      return run<double, double>(data);
    case DType::f32:
      return run<float, float>(data);
    case DType::bf16:
      return run<BFloat16, float>(data);
    case DType::f16:
      return run<Float16, float>(data);
  }
}

}  // namespace hg::cpu
