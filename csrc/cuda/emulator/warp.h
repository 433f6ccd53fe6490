// Barriers, warp operations and atomics of the emulated device. Default arguments name the caller for messages.
#pragma once

#include <type_traits>

#include "emulator.h"

#define HG_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(HG_CALLER) { hg::emulator::block_barrier({"__syncthreads", file, line}, false); }
inline int __syncthreads_count(int predicate, HG_CALLER) {
  return hg::emulator::block_barrier({"__syncthreads_count", file, line}, predicate != 0);
}
inline int __syncthreads_or(int predicate, HG_CALLER) {
  return hg::emulator::block_barrier({"__syncthreads_or", file, line}, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, HG_CALLER) {
  return hg::emulator::block_barrier({"__syncthreads_and", file, line}, predicate == 0) == 0;
}

namespace hg::emulator {

inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp);
}

template <class T>
Value pack(T x) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Value));
  Value value{};
  std::memcpy(value.bytes, &x, sizeof x);
  return value;
}

template <class T>
T unpack(const Value& value) {
  T x;
  std::memcpy(&x, value.bytes, sizeof x);
  return x;
}

// What lane `from` gave.
template <class T>
T read(Site site, unsigned mask, T x, int from) {
  return unpack<T>(exchange(site, mask, pack(x), from));
}

// Joins what the lanes of the mask gave, in the order of the lanes.
template <class T, class F>
T reduce(Site site, unsigned mask, T x, const F& join) {
  const Value* values = exchange_all(site, mask, pack(x));
  bool first = true;
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1) x = first ? unpack<T>(values[l]) : join(x, unpack<T>(values[l])), first = false;
  return x;
}

}  // namespace hg::emulator

template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, HG_CALLER) {
  const int base = hg::emulator::lane() & ~(width - 1);
  return hg::emulator::read({"__shfl_sync", file, line}, mask, x, base + (from & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, HG_CALLER) {
  const int lane = hg::emulator::lane(), base = lane & ~(width - 1), from = lane - static_cast<int>(delta);
  return hg::emulator::read({"__shfl_up_sync", file, line}, mask, x, from < base ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, HG_CALLER) {
  const int lane = hg::emulator::lane(), base = lane & ~(width - 1), from = lane + static_cast<int>(delta);
  return hg::emulator::read({"__shfl_down_sync", file, line}, mask, x, from >= base + width ? lane : from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, HG_CALLER) {
  const int lane = hg::emulator::lane(), base = lane & ~(width - 1), from = lane ^ bits;
  return hg::emulator::read({"__shfl_xor_sync", file, line}, mask, x, from >= base + width ? lane : from);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, HG_CALLER) {
  hg::emulator::exchange({"__syncwarp", file, line}, mask, {}, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, HG_CALLER) {
  const unsigned bit = predicate ? 1u << hg::emulator::lane() : 0;
  // A lane that has returned has no vote, whatever its value reads as.
  const auto* values = hg::emulator::exchange_all({"__ballot_sync", file, line}, mask, hg::emulator::pack(bit));
  unsigned votes = 0;
  for (int l = 0; l < hg::emulator::kWarp; ++l)
    if (mask >> l & 1) votes |= hg::emulator::unpack<unsigned>(values[l]) == 1u << l ? 1u << l : 0;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, HG_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, HG_CALLER) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
template <class T>
T __reduce_add_sync(unsigned mask, T x, HG_CALLER) {
  static_assert(std::is_integral_v<T>, "the hardware reduces integers");
  return hg::emulator::reduce({"__reduce_add_sync", file, line}, mask, x, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T x, HG_CALLER) {
  static_assert(std::is_integral_v<T>, "the hardware reduces integers");
  return hg::emulator::reduce({"__reduce_max_sync", file, line}, mask, x, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T x, HG_CALLER) {
  static_assert(std::is_integral_v<T>, "the hardware reduces integers");
  return hg::emulator::reduce({"__reduce_min_sync", file, line}, mask, x, [](T a, T b) { return a < b ? a : b; });
}

#undef HG_CALLER

// One thread runs at a time, so memory is always in order.
inline void __threadfence() {}
inline void __threadfence_block() {}

// To wait a little is to let others run.
inline void __nanosleep(unsigned) { hg::emulator::spin(); }

namespace hg::emulator {
template <class T, class F>
T update(T* at, const F& f) {
  const T old = *at;
  *at = static_cast<T>(f(old));
  return old;
}
}  // namespace hg::emulator

template <class T, class U>
T atomicAdd(T* at, U x) {
  return hg::emulator::update(at, [&](T old) { return old + static_cast<T>(x); });
}
template <class T, class U>
T atomicMax(T* at, U x) {
  return hg::emulator::update(at, [&](T old) { return old < static_cast<T>(x) ? static_cast<T>(x) : old; });
}
template <class T, class U>
T atomicMin(T* at, U x) {
  return hg::emulator::update(at, [&](T old) { return static_cast<T>(x) < old ? static_cast<T>(x) : old; });
}
template <class T, class U>
T atomicOr(T* at, U x) {
  return hg::emulator::update(at, [&](T old) { return old | static_cast<T>(x); });
}
template <class T, class U>
T atomicAnd(T* at, U x) {
  return hg::emulator::update(at, [&](T old) { return old & static_cast<T>(x); });
}
template <class T, class U>
T atomicExch(T* at, U x) {
  return hg::emulator::update(at, [&](T) { return static_cast<T>(x); });
}
template <class T, class U, class V>
T atomicCAS(T* at, U expected, V x) {
  return hg::emulator::update(at, [&](T old) { return old == static_cast<T>(expected) ? static_cast<T>(x) : old; });
}
