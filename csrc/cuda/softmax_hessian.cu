// Products with the Hessian of cross-entropy on a CUDA device. A group of threads takes a row: it reads the logits from
// memory once, keeps them in shared memory if they fit, and serves all vectors with them. Of u, the first reading comes
// from memory, and the second, soon after, from the L2 cache. The probabilities are never stored.
#include <cmath>
#include <limits>

#include "../softmax.h"
#include "device.cuh"
#include "launch.h"
#include "pack.cuh"

namespace hg::cuda {
namespace {

// Threads that share a row, for rows of up to so many classes; longer ones are for a block. With two blocks of two
// packs per thread, a multiprocessor has 32 KB under way, and 25 hide the latency of 4.8 TB/s.
constexpr int kFew = 8, kFewClasses = 64, kWarp = 32, kWarpClasses = 2048, kBlock = 512;
constexpr int64_t kMostClasses = int64_t{1} << 30;

template <int G>
constexpr int kThreadsFor = G == kBlock ? kBlock : 256;

template <class Real>
constexpr Real kMinusInfinity = -std::numeric_limits<Real>::infinity();

// Bits are dear to float64 and float32; beside the rounding of a half the fast form's error of 2^-22 is nothing, and
// with the accurate one the instructions would take longer than the memory.
template <class T>
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}
template <class T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(T) == 2)
    return __expf(x);
  else
    return expf(x);
}

struct Sum {
  template <class Real>
  __device__ Real operator()(Real a, Real b) const {
    return a + b;
  }
};
struct Largest {
  template <class Real>
  __device__ Real operator()(Real a, Real b) const {
    return a > b ? a : b;
  }
};

template <int G>
__device__ __forceinline__ void sync_group() {
  if constexpr (G > 32)
    __syncthreads();
  else
    __syncwarp();
}

// Joins x over the threads of each group, in a fixed order; all of them get the result.
template <int G, class Real, class Join>
__device__ __forceinline__ Real join_group(Real x, const Join& join) {
#pragma unroll
  for (int offset = (G < 32 ? G : 32) / 2; offset > 0; offset /= 2)
    x = join(x, __shfl_xor_sync(0xffffffffu, x, offset));
  if constexpr (G > 32) {
    HG_SHARED(Real, warps, [G / 32]);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = warps[0];
    for (int w = 1; w < G / 32; ++w) x = join(x, warps[w]);
    __syncthreads();
  }
  return x;
}

template <int W>
struct Width {
  static constexpr int value = W;
};

// W elements by one access, or one by one where they do not start a pack.
template <int W, class T>
__device__ __forceinline__ Pack<T, W> load(const T* at, bool aligned = true) {
  Pack<T, W> pack;
  if (aligned) {
    pack = *reinterpret_cast<const Pack<T, W>*>(at);
  } else {
#pragma unroll
    for (int w = 0; w < W; ++w) pack.at[w] = at[w];
  }
  return pack;
}
template <int W, class T>
__device__ __forceinline__ void store(T* at, const Pack<T, W>& pack, bool aligned = true) {
  if (aligned) {
    *reinterpret_cast<Pack<T, W>*>(at) = pack;
  } else {
#pragma unroll
    for (int w = 0; w < W; ++w) at[w] = pack.at[w];
  }
}

template <class T>
constexpr int kPack = 16 / sizeof(T);

// Elements before the first that starts a pack.
template <class T>
__device__ __forceinline__ int head_of(const T* row) {
  const int misplaced = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kPack<T>);
  return misplaced ? kPack<T> - misplaced : 0;
}

// Calls use(load(width, i), width, i) for i = first, first + step, ... < last; U loads come before their uses, to keep
// enough bytes under way.
template <int W, int U, class Load, class Use>
__device__ __forceinline__ void stride(int first, int last, int step, const Load& load, const Use& use) {
  int i = first;
#pragma unroll 1
  for (; i + (U - 1) * step < last; i += U * step) {
    decltype(load(Width<W>(), i)) items[U];
#pragma unroll
    for (int n = 0; n < U; ++n) items[n] = load(Width<W>(), i + n * step);
#pragma unroll
    for (int n = 0; n < U; ++n) use(items[n], Width<W>(), i + n * step);
  }
#pragma unroll 1
  for (; i < last; i += step) use(load(Width<W>(), i), Width<W>(), i);
}

// The same for this thread's share of n elements: packs from element `head` on, what is around them one by one.
template <int G, int W, int U, class Load, class Use>
__device__ __forceinline__ void sweep(int n, int head, const Load& load, const Use& use) {
  const int lane = threadIdx.x % G;
  const int first = head < n ? head : n, last = n - (n - first) % W;
  stride<1, U>(lane, first, G, load, use);
  stride<W, U>(first + lane * W, last, G * W, load, use);
  stride<1, U>(last + lane, n, G, load, use);
}

template <class T, int W>
struct Pair {
  Pack<T, W> z, x;
};

// 64 registers per thread, or 128 in float64. `pitch`: elements of shared memory for each group.
template <class T, class Real, int G, bool Cached>
__global__ void __launch_bounds__(kThreadsFor<G>, 4096 / sizeof(Real) / kThreadsFor<G>)
    softmax_rows(const __grid_constant__ SoftmaxRows data, int pitch) {
  constexpr int W = kPack<T>, U = Cached && G == kBlock && sizeof(T) > 2 ? 4 : 2, kGroups = kThreadsFor<G> / G;
  const int group = threadIdx.x / G, classes = static_cast<int>(data.classes);
  T* cache = reinterpret_cast<T*>(dynamic_shared()) + group * pitch;
  for (int64_t begin = int64_t{blockIdx.x} * kGroups; begin < data.rows; begin += int64_t{gridDim.x} * kGroups) {
    const int64_t row = begin + group;
    const bool inside = row < data.rows;
    const Real weight = !inside ? 0 : data.weights ? static_cast<const Real*>(data.weights)[row] : Real(1);
    // Groups without work go along: the others of the warp wait for them in shuffles.
    const int n = weight == 0 ? 0 : classes;
    const T* logits = static_cast<const T*>(data.logits) + (inside ? row : 0) * data.logits_stride;
    const int head = head_of(logits);
    T* const place = cache + (W - head) % W;  // of the first logit, so that packs are packs there too

    Real largest = kMinusInfinity<Real>, total = 0;
    sweep<G, W, U>(
        n, head, [&](auto width, int i) { return load<width.value>(logits + i); },
        [&](const auto& x, auto width, int i) {
          if constexpr (Cached) store(place + i, x);
          Real next = largest;
#pragma unroll
          for (int w = 0; w < width.value; ++w) next = Largest()(widen(x.at[w]), next);
          // Before the first finite logit there is nothing to shift by: -inf minus -inf would be NaN.
          const Real shift = next == kMinusInfinity<Real> ? 0 : next;
          total *= exponential<T>(largest - shift);
#pragma unroll
          for (int w = 0; w < width.value; ++w) total += exponential<T>(widen(x.at[w]) - shift);
          largest = next;
        });
    const Real shift = join_group<G>(largest, Largest());
    // A thread that saw no finite logit has a sum of 0, or NaN if it saw one.
    if (largest != kMinusInfinity<Real>) total *= exponential<T>(largest - shift);
    total = join_group<G>(total, Sum());
    if constexpr (Cached) sync_group<G>();

    const Real factor = static_cast<Real>(data.scale) * weight / total;
    for (int64_t j = blockIdx.y; j < data.k; j += gridDim.y) {
      const T* u = static_cast<const T*>(data.u) + j * data.u_stride + (inside ? row : 0) * data.u_row_stride;
      T* out = static_cast<T*>(data.out) + j * data.out_stride + (inside ? row : 0) * data.out_row_stride;
      // Packs are where those of the logits are, for the same sums wherever u is.
      const bool u_aligned = head_of(u) == head, out_aligned = head_of(out) == head;
      // Logits that are not in shared memory come with u.
      const auto load_pair = [&](auto width, int i) {
        Pair<T, width.value> pair;
        pair.z = load<width.value>(u + i, u_aligned);
        if constexpr (!Cached) pair.x = load<width.value>(logits + i);
        return pair;
      };
      const auto logit = [&](const auto& pair, auto width, int i) {
        if constexpr (Cached)
          return load<width.value>(place + i);
        else
          return pair.x;
      };
      Real dot = 0;
      sweep<G, W, U>(n, head, load_pair, [&](const auto& pair, auto width, int i) {
        const auto x = logit(pair, width, i);
#pragma unroll
        for (int w = 0; w < width.value; ++w) dot += exponential<T>(widen(x.at[w]) - shift) * widen(pair.z.at[w]);
      });
      const Real mean = join_group<G>(dot, Sum()) / total;
      sweep<G, W, U>(n, head, load_pair, [&](const auto& pair, auto width, int i) {
        const auto x = logit(pair, width, i);
        Pack<T, width.value> result;
#pragma unroll
        for (int w = 0; w < width.value; ++w)
          result.at[w] = narrow<T>(factor * exponential<T>(widen(x.at[w]) - shift) * (widen(pair.z.at[w]) - mean));
        store(out + i, result, out_aligned);
      });
      if (inside && n == 0)
        sweep<G, W, U>(
            classes, head_of(out), [&](auto width, int) { return Pack<T, width.value>{}; },
            [&](const auto& zeros, auto, int i) { store(out + i, zeros); });
    }
    // The next row overwrites the cache.
    if constexpr (Cached) sync_group<G>();
  }
}

// Of join_group, for the largest logit and for sums.
template <int G, class Real>
constexpr int64_t kStaticShared = G > 32 ? 2 * G / 32 * sizeof(Real) : 0;

template <class T, class Real, int G, bool Cached>
cudaError_t run(const SoftmaxRows& data, int pitch, int multiprocessors, cudaStream_t stream) {
  const auto kernel = softmax_rows<T, Real, G, Cached>;
  constexpr int kGroups = kThreadsFor<G> / G;
  const size_t shared = Cached ? size_t{sizeof(T)} * kGroups * pitch : 0;
  const cudaError_t error = Cached ? allow_shared(kernel, kStaticShared<G, Real>) : cudaSuccess;
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min<int64_t>((data.rows + kGroups - 1) / kGroups, 1 << 30);
  // Where rows are few, their vectors go to several blocks, each of which computes the sums again.
  const int64_t wanted = std::max<int64_t>(1, 2 * multiprocessors / blocks);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(data.k, wanted)));
  return launch(kernel, grid, kThreadsFor<G>, shared, stream, data, pitch);
}

template <class T, class Real>
cudaError_t run(const SoftmaxRows& data, cudaStream_t stream) {
  int device, multiprocessors, most_shared;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  // Room for a row that starts inside a pack, and whole packs.
  const int pitch = static_cast<int>((data.classes + 2 * kPack<T> - 2) / kPack<T> * kPack<T>);
  if (data.classes <= kFewClasses) return run<T, Real, kFew, true>(data, pitch, multiprocessors, stream);
  if (data.classes <= kWarpClasses && 8 * pitch * int64_t{sizeof(T)} <= most_shared)
    return run<T, Real, kWarp, true>(data, pitch, multiprocessors, stream);
  if (pitch * int64_t{sizeof(T)} + kStaticShared<kBlock, Real> <= most_shared)
    return run<T, Real, kBlock, true>(data, pitch, multiprocessors, stream);
  return run<T, Real, kBlock, false>(data, pitch, multiprocessors, stream);
}

cudaError_t run(const SoftmaxRows& data, cudaStream_t stream) {
  if (data.classes > kMostClasses) return cudaErrorInvalidValue;
  switch (data.dtype) {
    case DType::f64:
      return run<double, double>(data, stream);
    case DType::f32:
      return run<float, float>(data, stream);
    case DType::bf16:
      return run<__nv_bfloat16, float>(data, stream);
    case DType::f16:
      return run<__half, float>(data, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

const char* softmax_hessian(const SoftmaxRows& data, Stream stream) {
  if (data.rows == 0 || data.classes == 0 || data.k == 0) return nullptr;
  const cudaError_t error = run(data, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hg::cuda
