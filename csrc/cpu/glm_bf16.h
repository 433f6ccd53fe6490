// What the product of a generalised linear model does with some rows of X by matrix units, which multiply bfloat16 and
// add up in float32: Z = X V^T, G += Z^T X. X is in bfloat16 and read where it lies; a number of V or Z is the sum of
// three bfloat16, as in split_gemm.h.
//
// A tile of X is 16 rows of 16 pairs of columns. As the left factor its pairs meet pairs of V. As the right factor its
// rows are the steps of the sum, and of the two numbers of a pair one meets Z, the other a zero: Z comes twice, once
// for each. So X is never turned, nor copied.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "amx.h"
#include "simd.h"
#include "turn.h"

namespace hg::cpu {

// Products with a group of at most kColumns columns of V.
template <int kColumns>
struct GlmBf16 {
  using S = Simd<float, 64>;
  using V = S::V;
  using Words = S::Words;
  static constexpr int64_t kParts = 3, kRows = kTileRows, kWidth = S::width;
  // Columns of X in a tile, and floats.
  static constexpr int64_t kDepth = kTileRowBytes / sizeof(BFloat16), kTile = kTileBytes / sizeof(float);

  static constexpr int tiles(int64_t rows) { return static_cast<int>((rows + kTileRows - 1) / kTileRows); }
  // Tiles of V's parts side by side, and of Z's, each for both numbers of a pair.
  static constexpr int kAcross = tiles(kParts * kColumns), kDown = tiles(2 * kParts * kColumns);
  // Tiles along the rows of X, and along its columns, whose sums are made at the same time.
  static constexpr int kPanels = 4 / kAcross, kSteps = kDown > 2 ? 1 : 4 / kDown;
  static constexpr int64_t kPanelRows = kPanels * kRows;
  // Sums of a step: of each number of the pairs, of each column of Z.
  static constexpr int64_t kSums = 2 * kColumns * kWidth;
  // Steps whose products are added up before they go to others: keeps the rounding error of long sums down.
  static constexpr int64_t kLongest = 32;

  // Steps along d columns of X. The last one may begin among the columns of the one before, which it skips.
  static int64_t steps(int64_t d) { return (d + kDepth - 1) / kDepth; }
  static int64_t first(int64_t s, int64_t d) { return std::min(s * kDepth, d - kDepth); }
  static int64_t skipped(int64_t s, int64_t d) { return s * kDepth - first(s, d); }

  // In floats.
  static int64_t packed_size(int64_t d) { return steps(d) * kAcross * kTile; }
  static int64_t weighted_size(int64_t rows) { return rows / kRows * kDown * kTile; }
  static int64_t sums_size(int64_t d) { return steps(d) * kSums; }

  // Step s of `count` columns of V.
  HG_TARGET_AVX512 static void pack(const float* const* v, int64_t count, int64_t d, int64_t s, float* packed) {
    pack_step(v, count, d, s, packed + s * kAcross * kTile);
  }

  // 16 rows of each column of Z: of column c at z[c * 16], of the next 16 rows `panel` floats further on. There has to
  // be memory for 16 columns. Calls fetch() for every tile of X.
  template <class Fetch>
  static HG_INLINE void multiply(const BFloat16* x, int64_t stride, int64_t d, const float* packed, float* z,
                                 int64_t panel, const Fetch& fetch) {
    constexpr std::make_integer_sequence<int, kPanels> kEach;
    constexpr std::make_integer_sequence<int, kPanels * kAcross> kTiles;
    // The last row's parts are read with what follows them.
    alignas(64) float sums[kPanelRows * kWidth] = {}, made[kPanelRows * kAcross * kWidth + kWidth] = {};
    const int64_t all = steps(d);
    for (int64_t begin = 0; begin < all; begin += kLongest) {
      zero(kTiles);
      for (int64_t s = begin; s < std::min(all, begin + kLongest); ++s)
        multiply_step(x + first(s, d), stride, packed + s * kAcross * kTile, fetch, kEach);
      keep<kAcross>(made, kTiles);
      for (int64_t r = 0; r < kPanelRows; ++r) {
        const float* part = made + r * kAcross * kWidth;
        const V sum = S::load(part + 2 * kColumns) + S::load(part + kColumns) + S::load(part);
        S::store(sums + r * kWidth, S::load(sums + r * kWidth) + sum);
      }
    }
    for (int64_t p = 0; p < kPanels; ++p) turn<S>(sums + p * kRows * kWidth, kWidth, z + p * panel, kRows);
  }

  // 16 rows of `count` columns of Z as left factors; there have to be zeros where it writes nothing.
  static HG_INLINE void pack_weighted(const float* z, int64_t count, float* weighted) {
    for (int64_t c = 0; c < count; ++c) {
      V x = S::load(z + c * kRows);
      for (int64_t part = 0; part < kParts; ++part) {
        const Words high = cut(x, part), low = high >> 16;
        std::memcpy(weighted + (2 * part * kColumns + c) * kWidth, &low, sizeof low);
        std::memcpy(weighted + ((2 * part + 1) * kColumns + c) * kWidth, &high, sizeof high);
      }
    }
  }

  // Adds Z^T X of so many rows to the sums of all steps.
  template <class Fetch>
  static HG_INLINE void add(const BFloat16* x, int64_t stride, int64_t rows, int64_t d, const float* weighted,
                            float* sums, const Fetch& fetch) {
    const int64_t all = steps(d);
    int64_t s = 0;
    for (; s + kSteps <= all; s += kSteps) add_steps<kSteps>(x, stride, rows, d, s, weighted, sums, fetch);
    for (; s < all; ++s) add_steps<1>(x, stride, rows, d, s, weighted, sums, fetch);
  }

  // Adds the sums to `count` rows of d numbers; they become zero.
  HG_TARGET_AVX512 static void unpack(float* sums, int64_t count, int64_t d, float* g) {
    for (int64_t s = 0; s < steps(d); ++s) unpack_step(sums + s * kSums, count, d, s, g);
    std::fill_n(sums, sums_size(d), 0.0f);
  }

 private:
  using Lanes = std::make_integer_sequence<int, kWidth>;

  // A part of x, in the high halves; x becomes what is left. The last part is cut: it is exact, and a NaN stays one.
  static HG_INLINE Words cut(V& x, int64_t part) {
    constexpr uint32_t kHigh = 0xffff0000, kHalfUnit = 0x8000;
    Words bits = reinterpret<Words>(x);
    if (part + 1 < kParts) bits += kHalfUnit;
    bits &= kHigh;
    x -= reinterpret<V>(bits);
    return bits;
  }

  static HG_INLINE void pack_step(const float* const* v, int64_t count, int64_t d, int64_t s, float* packed) {
    alignas(64) float rows[kAcross * kRows][kWidth] = {}, numbers[kDepth] = {};
    for (int64_t c = 0; c < count; ++c) {
      std::copy_n(v[c] + s * kDepth, kDepth - skipped(s, d), numbers + skipped(s, d));
      for (int64_t at = 0; at < kDepth; at += kWidth) {
        V x = S::load(numbers + at);
        for (int64_t part = 0; part < kParts; ++part) {
          const auto halves = __builtin_convertvector(cut(x, part) >> 16, typename S::Halves);
          std::memcpy(reinterpret_cast<BFloat16*>(rows[part * kColumns + c]) + at, &halves, sizeof halves);
        }
      }
    }
    for (int t = 0; t < kAcross; ++t) turn<S>(rows[t * kRows], kWidth, packed + t * kTile, kWidth);
  }

  static HG_INLINE void unpack_step(const float* sums, int64_t count, int64_t d, int64_t s, float* g) {
    for (int64_t c = 0; c < count; ++c, sums += kWidth) {
      alignas(64) float numbers[kDepth];
      interleave(S::load(sums), S::load(sums + kColumns * kWidth), numbers, Lanes());
      float* to = g + c * d + first(s, d);
      if (skipped(s, d) == 0)
        for (int64_t j = 0; j < kDepth; j += kWidth) S::store(to + j, S::load(to + j) + S::load(numbers + j));
      else
        for (int64_t j = skipped(s, d); j < kDepth; ++j) to[j] += numbers[j];
    }
  }

  template <int... L>
  static HG_INLINE void interleave(V a, V b, float* to, std::integer_sequence<int, L...>) {
    S::store(to, __builtin_shufflevector(a, b, (L / 2 + L % 2 * kWidth)...));
    S::store(to + kWidth, __builtin_shufflevector(a, b, (kWidth / 2 + L / 2 + L % 2 * kWidth)...));
  }

  template <int... T>
  static HG_INLINE void zero(std::integer_sequence<int, T...>) {
    (tile_zero<T>(), ...);
  }

  // Tiles to memory, so many side by side.
  template <int kBeside, int... T>
  static HG_INLINE void keep(float* to, std::integer_sequence<int, T...>) {
    (tile_store<T>(to + T / kBeside * kBeside * kTile + T % kBeside * kWidth, kBeside * kTileRowBytes), ...);
  }

  // V in tiles 4 and 5, X in 6 and 7.
  template <class Fetch, int... P>
  static HG_INLINE void multiply_step(const BFloat16* x, int64_t stride, const float* packed, const Fetch& fetch,
                                      std::integer_sequence<int, P...>) {
    tile_load<4>(packed);
    if constexpr (kAcross > 1) tile_load<5>(packed + kTile);
    (multiply_panel<P>(x + P * kRows * stride, stride, fetch), ...);
  }
  template <int P, class Fetch>
  static HG_INLINE void multiply_panel(const BFloat16* x, int64_t stride, const Fetch& fetch) {
    constexpr int kX = 6 + P % 2;
    tile_load<kX>(x, stride * sizeof(BFloat16));
    tile_multiply<P * kAcross, kX, 4>();
    if constexpr (kAcross > 1) tile_multiply<P * kAcross + 1, kX, 5>();
    fetch();
  }

  template <int kCount, class Fetch>
  static HG_INLINE void add_steps(const BFloat16* x, int64_t stride, int64_t rows, int64_t d, int64_t s,
                                  const float* weighted, float* sums, const Fetch& fetch) {
    constexpr std::make_integer_sequence<int, kCount> kEach;
    constexpr std::make_integer_sequence<int, kCount * kDown> kTiles;
    alignas(64) float made[kCount * kDown * kTile];
    zero(kTiles);
    for (int64_t r = 0; r < rows; r += kRows, weighted += kDown * kTile)
      add_panel(x + r * stride, stride, d, s, weighted, fetch, kEach);
    keep<1>(made, kTiles);
    for (int e = 0; e < kCount; ++e)
      for (int64_t i = 0; i < kSums; i += kWidth) {
        const float* part = made + e * kDown * kTile + i;
        float* sum = sums + (s + e) * kSums + i;
        S::store(sum, S::load(sum) + (S::load(part + 2 * kSums) + S::load(part + kSums) + S::load(part)));
      }
  }

  // X in tile 4, Z in 5 to 7.
  template <class Fetch, int... E>
  static HG_INLINE void add_panel(const BFloat16* x, int64_t stride, int64_t d, int64_t s, const float* weighted,
                                  const Fetch& fetch, std::integer_sequence<int, E...>) {
    (add_step<E>(x + first(s + E, d), stride, weighted, fetch, std::make_integer_sequence<int, kDown>()), ...);
  }
  template <int E, class Fetch, int... M>
  static HG_INLINE void add_step(const BFloat16* x, int64_t stride, const float* weighted, const Fetch& fetch,
                                 std::integer_sequence<int, M...>) {
    tile_load<4>(x, stride * sizeof(BFloat16));
    ((tile_load<5 + M % 3>(weighted + M * kTile), tile_multiply<E * kDown + M, 5 + M % 3, 4>()), ...);
    fetch();
  }
};

}  // namespace hg::cpu
