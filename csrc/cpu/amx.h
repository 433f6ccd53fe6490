// Intel's matrix units (AMX): whether they may be used, and their instructions. A tile register has 16 rows of 64
// bytes: 16 x 16 sums in float32, or 16 x 16 pairs of bfloat16.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "isa.h"

// Under the sanitizers, which do not see what these instructions read and write, and on every machine with AVX-512.
#if defined(__SANITIZE_ADDRESS__)
#define HG_EMULATE_AMX
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define HG_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hg::cpu {

// The processor has them, the system lets this process use them, and neither was torch told to do without AVX-512 nor
// are we told to do without them (HYPERGRAD_EXT_AMX=0).
inline bool has_amx() {
  static const char* const wish = std::getenv("HYPERGRAD_EXT_AMX");
  if (wish && std::strcmp(wish, "0") == 0) return false;
#if defined(HG_EMULATE_AMX)
  return isa() == Isa::avx512;
#elif defined(HG_HAVE_AMX)
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
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) shape.row_bytes[t] = kTileRowBytes, shape.rows[t] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int kTile>
HG_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// `row` bytes from row to row.
template <int kTile>
HG_INLINE void tile_load(const void* at, int64_t row = kTileRowBytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(row), "i"(kTile) : "memory");
}
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

// The same by other instructions, row by row; never used without AVX-512, nor on machines for which it is not emulated.
typedef float TileRow __attribute__((vector_size(kTileRowBytes)));
typedef uint32_t TilePairs __attribute__((vector_size(kTileRowBytes)));

struct Tile {
  TileRow rows[kTileRows];

  // What is in the low or the high halves of a row's pairs.
  TileRow half(int64_t i, bool high) const {
    TilePairs pairs;
    std::memcpy(&pairs, &rows[i], sizeof pairs);
    pairs = high ? pairs & 0xffff0000u : pairs << 16;
    TileRow row;
    std::memcpy(&row, &pairs, sizeof row);
    return row;
  }
};

inline Tile& emulated(int which) {
  static thread_local Tile tiles[8];
  return tiles[which];
}

struct TileRegisters {
  TileRegisters() {}
};

template <int kTile>
void tile_zero() {
  emulated(kTile) = {};
}

template <int kTile>
void tile_load(const void* at, int64_t row = kTileRowBytes) {
  for (int64_t i = 0; i < kTileRows; ++i)
    std::memcpy(&emulated(kTile).rows[i], static_cast<const char*>(at) + i * row, kTileRowBytes);
}

template <int kTile>
void tile_store(float* at, int64_t row) {
  for (int64_t i = 0; i < kTileRows; ++i)
    std::memcpy(reinterpret_cast<char*>(at) + i * row, &emulated(kTile).rows[i], kTileRowBytes);
}

template <int kSum, int kLeft, int kRight>
void tile_multiply() {
  Tile &sum = emulated(kSum), &left = emulated(kLeft), &right = emulated(kRight);
  TileRow factors[2][kTileRows];
  for (int64_t p = 0; p < kTileRows; ++p)
    for (int high = 0; high < 2; ++high) factors[high][p] = right.half(p, high);
  for (int64_t i = 0; i < kTileRows; ++i) {
    const TileRow low = left.half(i, false), high = left.half(i, true);
    TileRow sums[2] = {};
    for (int64_t p = 0; p < kTileRows; ++p) sums[0] += low[p] * factors[0][p], sums[1] += high[p] * factors[1][p];
    sum.rows[i] += sums[0] + sums[1];
  }
}

#endif

}  // namespace hg::cpu
