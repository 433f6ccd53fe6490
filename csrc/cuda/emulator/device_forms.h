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

inline unsigned load_acquire(const unsigned* address) {
  hg::emulator::spin();
  return *address;
}

}  // namespace hg::cuda
