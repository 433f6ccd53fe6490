// Tiles of rows of X, and of their weights, on their way from global to shared memory: all at once, or a ring of three
// tiles of which two are under way while one is used. They come by bulk copies, for which one warp asks and which
// arrive at a barrier in shared memory, or else by copies of at most 16 bytes, each asked for by a thread.
#pragma once

#include "glm_problem.cuh"

namespace hg::cuda {

template <class X, class Real>
class GlmTiles {
 public:
  using Problem = GlmProblem<X, Real>;
  static constexpr int kStages = 3;

  __host__ __device__ GlmTiles(const Problem& problem, Arena& arena) : problem_(problem) {
    weights_ = arena.take<Real>(static_cast<int64_t>(problem.stages) * problem.tile * problem.classes);
    x_ = arena.take<X>(static_cast<int64_t>(problem.stages) * problem.tile * problem.pitch);
    arrived_ = arena.take<uint64_t>(kStages);
  }

  // The block's rows, and the padding of its tiles, which copies leave as it is. A barrier of the block if any.
  __device__ void begin(int64_t first, int64_t last) {
    first_ = first, last_ = last;
    const int padding = problem_.pitch - problem_.d;
    for (int i = threadIdx.x; i < problem_.stages * problem_.tile * padding; i += kThreads) {
      const int row = i / padding, j = i % padding;
      x_[row * problem_.pitch + problem_.d + j] = narrow<X>(problem_.intercept && j == 0 ? 1.f : 0.f);
    }
    if (!bulk()) return;
    if (threadIdx.x == 0)
      for (int s = 0; s < kStages; ++s) bulk_barrier_init(arrived_ + s);
    __syncthreads();
  }

  // Whether all of the block's rows are in shared memory at once.
  __device__ bool resident() const { return problem_.stages == 1; }
  __device__ int count() const { return static_cast<int>((last_ - first_ + problem_.tile - 1) / problem_.tile); }
  __device__ int rows(int tile) const {
    const int64_t left = last_ - first_ - static_cast<int64_t>(tile) * problem_.tile;
    return static_cast<int>(left < problem_.tile ? left : problem_.tile);
  }
  __device__ const X* x(int stage) const { return x_ + stage * problem_.tile * problem_.pitch; }
  __device__ const Real* weights(int stage) const { return weights_ + stage * problem_.tile * problem_.classes; }

  // Sends for the first tiles.
  __device__ void prefetch() {
#pragma unroll 1
    for (int s = 0; s < (resident() ? 1 : kStages - 1); ++s) fetch(s);
  }

  // Sends for the tile after those that are under way when tile i is used; all threads must be done with tile i - 1.
  __device__ void fetch_after(int i) {
    if (!resident()) fetch(i + kStages - 1);
  }

  // Waits for this thread's part of the next tile, after which and a barrier all have it; returns its stage.
  __device__ int take() {
    if (resident()) {
      wait_copies<0>();
      return 0;
    }
    const int stage = next_.stage;
    if (bulk()) {
      while (!bulk_try_wait(arrived_ + stage, next_.phase)) {
      }
    } else {
      wait_copies<kStages - 2>();
    }
    next_.advance();
    return stage;
  }

  // Waits for what was sent for and not taken: the block's memory must not end before.
  __device__ void end() {
    wait_copies<0>();
    while (bulk() && next_.stage != sent_.stage) take();
  }

 private:
  // A place in the ring, and how often, modulo 2, it has come round to it.
  struct Place {
    int stage = 0;
    unsigned phase = 0;

    __device__ void advance() {
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  };

  __device__ bool bulk() const { return kBulkCopies && problem_.bulk; }

  // Sends for tile i, or for nothing if there is none: batches are counted.
  __device__ __forceinline__ void fetch(int i) {
    const int64_t row = first_ + static_cast<int64_t>(i) * problem_.tile;
    if (row < last_) {
      const int count = rows(i), stage = resident() ? 0 : sent_.stage;
      if (!resident()) sent_.advance();
      const X* from = problem_.x + row * problem_.stride;
      X* to = x_ + stage * problem_.tile * problem_.pitch;
      const Real* weights = problem_.weights + row * problem_.classes;
      Real* place = weights_ + stage * problem_.tile * problem_.classes;
      if (bulk()) {
        if (threadIdx.x < 32) fetch_bulk(from, to, count, weights, place, arrived_ + stage);
        return;
      }
      const uintptr_t misplaced = reinterpret_cast<uintptr_t>(problem_.x) | (problem_.stride * sizeof(X));
      // Pairs of bf16: a copy has at least 4 bytes.
      constexpr int kSmall = sizeof(X) < 4 ? 4 : sizeof(X);
      if (misplaced % 16 == 0)
        fetch_rows<16>(from, to, count);
      else if (misplaced % kSmall == 0)
        fetch_rows<kSmall>(from, to, count);
      else
        fetch_rows<0>(from, to, count);
      for (int e = threadIdx.x; e < count * problem_.classes; e += kThreads)
        copy_async<sizeof(Real)>(place + e, weights + e);
    }
    end_copies();
  }

  // By one warp: a copy per row, or one for all where rows follow each other there as here, and one for the weights.
  __device__ __forceinline__ void fetch_bulk(const X* from, X* to, int rows, const Real* weights, Real* place,
                                             uint64_t* arrived) {
    constexpr int kUnit = 16 / sizeof(Real);
    const unsigned row_bytes = problem_.d * sizeof(X);
    const int values = rows * problem_.classes, whole = values / kUnit * kUnit;
    const bool together = problem_.stride == problem_.pitch && problem_.d == problem_.pitch;
    if (threadIdx.x == 0) {
      // Only the last tile of X ends within a unit. What is written here may be copied over next time.
      for (int e = whole; e < values; ++e) place[e] = weights[e];
      order_bulk_copies();
      bulk_expect(arrived, rows * row_bytes + whole * sizeof(Real));
      if (whole > 0) copy_bulk(place, weights, whole * sizeof(Real), arrived);
      if (together) copy_bulk(to, from, rows * row_bytes, arrived);
    }
    __syncwarp();
    if (together) return;
    for (int r = threadIdx.x; r < rows; r += 32)
      copy_bulk(to + r * problem_.pitch, from + r * problem_.stride, row_bytes, arrived);
  }

  // Copies in units of so many bytes, which the rows' addresses allow, if any, then what is left of each row.
  template <int Bytes>
  __device__ __forceinline__ void fetch_rows(const X* from, X* to, int rows) {
    int copied = 0;
    if constexpr (Bytes > 0) {
      constexpr int kUnit = Bytes / sizeof(X);
      if (const int units = problem_.d / kUnit; units > 0) {
        copied = units * kUnit;
        int row = threadIdx.x / units, unit = threadIdx.x % units;
#pragma unroll 1
        while (row < rows) {
          copy_async<Bytes>(to + row * problem_.pitch + unit * kUnit, from + row * problem_.stride + unit * kUnit);
          row += kThreads / units, unit += kThreads % units;
          if (unit >= units) ++row, unit -= units;
        }
      }
    }
    const int rest = problem_.d - copied;
    for (int i = threadIdx.x; i < rows * rest; i += kThreads) {
      const int row = i / rest, j = copied + i % rest;
      to[row * problem_.pitch + j] = from[row * problem_.stride + j];
    }
  }

  const Problem& problem_;
  Real* weights_;      // stages x tile x classes
  X* x_;               // stages x tile x pitch
  uint64_t* arrived_;  // per stage
  int64_t first_ = 0, last_ = 0;
  Place sent_, next_;
};

}  // namespace hg::cuda
