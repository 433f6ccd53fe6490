// The pointwise part of an LSTM step on a CUDA device, forward, backward and backward of the backward: one
// thread per few units, everything read and written once.
#include <cstring>
#include <limits>

#include "../lstm.h"
#include "launch.h"
#include "pack.cuh"

namespace hg::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float tanh_(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_(double x) { return tanh(x); }
__device__ __forceinline__ float sigmoid_(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid_(double x) { return 1.0 / (1.0 + exp(-x)); }

// The gates of W units.
template <class T, int W>
struct GatePacks {
  Pack<T, W> i, f, g, o;

  template <class Real>
  __device__ __forceinline__ LstmGates<Real> get(int w) const {
    return {widen(i.at[w]), widen(f.at[w]), widen(g.at[w]), widen(o.at[w])};
  }
  template <class Real>
  __device__ __forceinline__ void set(int w, const LstmGates<Real>& x) {
    i.at[w] = narrow<T>(x.i), f.at[w] = narrow<T>(x.f), g.at[w] = narrow<T>(x.g), o.at[w] = narrow<T>(x.o);
  }
};

template <class T, int W>
__device__ __forceinline__ Pack<T, W> load(const void* data, int64_t at) {
  return *reinterpret_cast<const Pack<T, W>*>(static_cast<const T*>(data) + at);
}
template <class T, int W>
__device__ __forceinline__ void store(void* data, int64_t at, const Pack<T, W>& pack) {
  *reinterpret_cast<Pack<T, W>*>(static_cast<T*>(data) + at) = pack;
}
template <class T, int W>
__device__ __forceinline__ GatePacks<T, W> load_gates(const void* data, int64_t at, int64_t units) {
  return {load<T, W>(data, at), load<T, W>(data, at + units), load<T, W>(data, at + 2 * units),
          load<T, W>(data, at + 3 * units)};
}
template <class T, int W>
__device__ __forceinline__ void store_gates(void* data, int64_t at, int64_t units, const GatePacks<T, W>& packs) {
  store(data, at, packs.i);
  store(data, at + units, packs.f);
  store(data, at + 2 * units, packs.g);
  store(data, at + 3 * units, packs.o);
}

// kBytes: what a thread moves together of every array; as much as the registers hold.
template <class T, class Real>
struct ForwardStep {
  static constexpr int kBytes = 16;
  LstmForward data;

  template <int W>
  __device__ __forceinline__ void run(int64_t at, int64_t gates_at, int64_t units) const {
    auto gates = load_gates<T, W>(data.gates, gates_at, units);
    auto c = load<T, W>(data.c, at);
    Pack<T, W> h;
#pragma unroll
    for (int w = 0; w < W; ++w) {
      auto a = gates.template get<Real>(w);
      a = {sigmoid_(a.i), sigmoid_(a.f), tanh_(a.g), sigmoid_(a.o)};
      const Real c_next = lstm_memory(a, widen(c.at[w]));
      gates.set(w, a);
      c.at[w] = narrow<T>(c_next);
      h.at[w] = narrow<T>(a.o * tanh_(c_next));
    }
    store_gates(data.activations, gates_at, units, gates);
    store(data.c_next, at, c);
    store(data.h, at, h);
  }
};

template <class T, class Real>
struct BackwardStep {
  static constexpr int kBytes = sizeof(T) == 2 ? 8 : 16;
  LstmBackward data;

  template <int W>
  __device__ __forceinline__ void run(int64_t at, int64_t gates_at, int64_t units) const {
    auto gates = load_gates<T, W>(data.activations, gates_at, units);
    GatePacks<T, W> more{};
    if (data.grad_activations) more = load_gates<T, W>(data.grad_activations, gates_at, units);
    auto c = load<T, W>(data.c, at);
    const auto c_next = load<T, W>(data.c_next, at), grad_hs = load<T, W>(data.grad_h, at);
    const auto grad_c = load<T, W>(data.grad_c, at);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const LstmUnit<Real> u{gates.template get<Real>(w), widen(c.at[w]), tanh_(widen(c_next.at[w]))};
      const Real grad_h = widen(grad_hs.at[w]);
      const Real d = lstm_grad_memory<Real, Real>(u, grad_h, widen(grad_c.at[w]));
      const auto grad = lstm_grad_activations(u, grad_h, d), slope = lstm_slopes<Real>(u.a);
      const auto add = more.template get<Real>(w);
      gates.set(w, LstmGates<Real>{(grad.i + add.i) * slope.i, (grad.f + add.f) * slope.f, (grad.g + add.g) * slope.g,
                                   (grad.o + add.o) * slope.o});
      c.at[w] = narrow<T>(d * u.a.f);
    }
    store_gates(data.grad_gates, gates_at, units, gates);
    store(data.grad_c_prev, at, c);
  }
};

template <class T, class Real>
struct DoubleBackwardStep {
  static constexpr int kBytes = 8;
  LstmDoubleBackward data;

  template <int W>
  __device__ __forceinline__ void run(int64_t at, int64_t gates_at, int64_t units) const {
    auto gates = load_gates<T, W>(data.activations, gates_at, units);
    const auto v_gates = load_gates<T, W>(data.v_gates, gates_at, units);
    auto c = load<T, W>(data.c, at), c_next = load<T, W>(data.c_next, at);
    auto grad_h = load<T, W>(data.grad_h, at), grad_c = load<T, W>(data.grad_c, at);
    const auto v_c = load<T, W>(data.v_c, at);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const LstmUnit<Real> u{gates.template get<Real>(w), widen(c.at[w]), tanh_(widen(c_next.at[w]))};
      const auto out = lstm_double_backward<Real, Real>(u, widen(grad_h.at[w]), widen(grad_c.at[w]),
                                                        v_gates.template get<Real>(w), widen(v_c.at[w]));
      gates.set(w, out.a);
      c.at[w] = narrow<T>(out.c), c_next.at[w] = narrow<T>(out.c_next);
      grad_h.at[w] = narrow<T>(out.grad_h), grad_c.at[w] = narrow<T>(out.grad_c);
    }
    store_gates(data.by_activations, gates_at, units, gates);
    store(data.by_c, at, c);
    store(data.by_c_next, at, c_next);
    store(data.by_grad_h, at, grad_h);
    store(data.by_grad_c, at, grad_c);
  }
};

template <int W, class Step>
__global__ void __launch_bounds__(kThreads) step_kernel(Step step, int64_t packs, int64_t units) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= packs) return;
  const int64_t per_row = units / W;
  // A division of 64 bits takes longer than all the rest.
  const int64_t row = packs <= 0xffffffff ? static_cast<uint32_t>(i) / static_cast<uint32_t>(per_row) : i / per_row;
  const int64_t j = (i - row * per_row) * W;
  step.template run<W>(row * units + j, 4 * row * units + j, units);
}

template <class Data>
bool aligned(const Data& data, int bytes) {
  constexpr int kPointers = sizeof(Data) / sizeof(void*);
  uintptr_t at[kPointers];
  std::memcpy(at, &data, sizeof at);
  for (const uintptr_t address : at)
    if (address % bytes) return false;
  return true;
}

template <class T, class Step>
cudaError_t launch_step(const LstmSize& size, const Step& step, CUstream_st* stream) {
  constexpr int kWidth = Step::kBytes / sizeof(T);
  const bool wide = size.units % kWidth == 0 && aligned(step.data, Step::kBytes);
  const int64_t packs = size.rows * size.units / (wide ? kWidth : 1), blocks = (packs + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks);
  return wide ? launch(step_kernel<kWidth, Step>, grid, kThreads, 0, stream, step, packs, size.units)
              : launch(step_kernel<1, Step>, grid, kThreads, 0, stream, step, packs, size.units);
}

template <template <class, class> class Step, class Data>
const char* run(const LstmSize& size, const Data& data, CUstream_st* stream) {
  cudaError_t error = cudaErrorInvalidValue;
  switch (size.dtype) {
    case DType::f64:
      error = launch_step<double>(size, Step<double, double>{data}, stream);
      break;
    case DType::f32:
      error = launch_step<float>(size, Step<float, float>{data}, stream);
      break;
    case DType::bf16:
      error = launch_step<__nv_bfloat16>(size, Step<__nv_bfloat16, float>{data}, stream);
      break;
    case DType::f16:
      error = launch_step<__half>(size, Step<__half, float>{data}, stream);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* lstm_cell(const LstmSize& size, const LstmForward& data, CUstream_st* stream) {
  return run<ForwardStep>(size, data, stream);
}
const char* lstm_cell(const LstmSize& size, const LstmBackward& data, CUstream_st* stream) {
  return run<BackwardStep>(size, data, stream);
}
const char* lstm_cell(const LstmSize& size, const LstmDoubleBackward& data, CUstream_st* stream) {
  return run<DoubleBackwardStep>(size, data, stream);
}

}  // namespace hg::cuda
