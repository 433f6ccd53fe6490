// Intel's matrix units (AMX): whether they may be used, and their instructions. A tile register has 16 rows of 64
// bytes: 16 x 16 sums in float32, or 16 x 16 pairs of bfloat16.
#pragma once

#include <cstdint>

#include "isa.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define HG_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hg::cpu {

// The processor has them, the system lets this process use them, and torch was not told to do without AVX-512.
inline bool has_amx() {
#if defined(HG_HAVE_AMX)
  static const bool has = [] {
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kBoth = kBFloat16 | kTiles;
    // Linux keeps the tiles of a thread only for processes that have asked (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
    constexpr long kAsk = 0x1023, kTileData = 18;
    unsigned eax, ebx, ecx, edx;
    return isa() == Isa::avx512 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBoth) == kBoth &&
           syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}

constexpr int64_t kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

#if defined(HG_HAVE_AMX)

// A thread's tile registers, all of full size, for as long as this lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) shape.row_bytes[t] = kTileRowBytes, shape.rows[t] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int kTile>
HG_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
HG_INLINE void tile_load(const void* at) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(kTileRowBytes), "i"(kTile) : "memory");
}

// `row` bytes from row to row.
template <int kTile>
HG_INLINE void tile_store(float* at, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(row), "i"(kTile) : "memory");
}

// sum[i][j] += the sum over p of left[i][p] right[p][j], for both halves of the pairs.
template <int kSum, int kLeft, int kRight>
HG_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

#else

// Never used, since has_amx() is false.
struct Tiles {};
template <int kTile>
void tile_zero() {}
template <int kTile>
void tile_load(const void*) {}
template <int kTile>
void tile_store(float*, int64_t) {}
template <int kSum, int kLeft, int kRight>
void tile_multiply() {}

#endif

}  // namespace hg::cpu
