// The plain C++ forms of csrc/cuda/device.cuh.
#pragma once

#include "emulator.h"

// Every block has its own, from the heap, so that the address sanitizer knows its ends.
#define HG_SHARED(type, name, ...)          \
  static char hg_tag_of_##name;             \
  using HgTypeOf_##name = type __VA_ARGS__; \
  HgTypeOf_##name& name =                   \
      *static_cast<HgTypeOf_##name*>(hg::emulator::static_shared(&hg_tag_of_##name, sizeof(HgTypeOf_##name)))

namespace hg::cuda {

inline char* dynamic_shared() { return hg::emulator::dynamic_shared(); }

// As late as the rules allow: who reads before wait_copies reads what was there before.
template <int Bytes>
void copy_async(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  hg::emulator::copy_later(shared, global, Bytes);
}
inline void end_copies() { hg::emulator::end_copies(); }
template <int Pending>
void wait_copies() {
  hg::emulator::finish_copies(Pending);
}

constexpr bool kBulkCopies = true;
inline void bulk_barrier_init(uint64_t* barrier) { hg::emulator::bulk_barrier_init(barrier); }
inline void bulk_expect(uint64_t* barrier, unsigned bytes) { hg::emulator::bulk_expect(barrier, bytes); }
inline void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  hg::emulator::copy_bulk(shared, global, bytes, barrier);
}
inline bool bulk_try_wait(uint64_t* barrier, unsigned parity, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  return hg::emulator::bulk_try_wait({"bulk_try_wait", file, line}, barrier, parity);
}
// One thread runs at a time, so memory is always in order.
inline void order_bulk_copies() {}

inline unsigned load_acquire(const unsigned* address) {
  hg::emulator::spin();
  return *address;
}

}  // namespace hg::cuda
