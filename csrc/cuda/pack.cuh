// Elements that one thread moves together: 16 bytes of solver state, and as many elements of the other lists.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace hg::cuda {

template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T at[W];
};

// The lists of one piece, from the first element of a tile on.
template <int N>
struct Cursor {
  char* data[N];

  template <class T, int W>
  __device__ __forceinline__ Pack<T, W> load(int list, int64_t i) const {
    return *reinterpret_cast<const Pack<T, W>*>(data[list] + i * sizeof(T));
  }
  template <class T, int W>
  __device__ __forceinline__ void store(int list, int64_t i, const Pack<T, W>& pack) const {
    *reinterpret_cast<Pack<T, W>*>(data[list] + i * sizeof(T)) = pack;
  }
};

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Conversions by name: torch's build switches off the implicit ones.
template <class T, class Real>
__device__ __forceinline__ T narrow(Real x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return static_cast<T>(x);
}

}  // namespace hg::cuda
