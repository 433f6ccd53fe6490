// Products of float32 matrices by matrix units that multiply bfloat16 and add up in float32.
//
// A float32 is the sum of three bfloat16, x = x0 + x1 + x2, each the rest of those before it cut or rounded to 8 bits:
// the last one is exact. Of the nine products of parts six are added up. The others are below 2^-24 of the whole, and
// of random sign where one factor is rounded; cutting is faster. A tile adds up 32 products before it rounds to the sum
// so far, so that the error is less than half of that of a loop of float32. Parts below 1e-38, of numbers below 1e-33,
// are lost (see lift.h); what is not finite makes a NaN, as do numbers within 0.2 % of the largest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "simd.h"
#include "turn.h"

namespace hg::cpu {

// One factor of a product: `count` rows of the left or columns of the right one, `depth` numbers each. It is packed by
// blocks of 32 x 32, those of the same rows or columns one after another: three parts of two tiles each. In a tile of
// the left factor a row is a row, in one of the right factor it is a step along the depth; pairs are 16 steps apart.
struct SplitFactor {
  static constexpr int64_t kSide = 32, kParts = 3, kPartBytes = 2 * kTileBytes, kBlockBytes = kParts * kPartBytes;
  static constexpr int64_t kBlockSize = kBlockBytes / static_cast<int64_t>(sizeof(float));  // in floats

  static int64_t blocks(int64_t size) { return (size + kSide - 1) / kSide; }
  // In floats.
  static int64_t size(int64_t count, int64_t depth) { return blocks(count) * blocks(depth) * kBlockSize; }

  // Element (i, t) at data[i * across + t * along].
  struct Source {
    const float* data;
    int64_t across, along, count, depth;
    // A factor for every step along the depth, of a right factor.
    const float* scale = nullptr;
    int64_t scale_step = 0;
  };

  // Blocks of the source, to those of a factor that begin at `to`, `all` of them along the depth.
  template <bool kRound = false>
  HG_TARGET_AVX512 static void pack_left(const Source& source, float* to, int64_t all) {
    pack_blocks<true, kRound>(source, reinterpret_cast<char*>(to), all);
  }
  template <bool kRound = true>
  HG_TARGET_AVX512 static void pack_right(const Source& source, float* to, int64_t all) {
    pack_blocks<false, kRound>(source, reinterpret_cast<char*>(to), all);
  }

 private:
  using S = Simd<float, 64>;
  using V = S::V;
  using Words = S::Words;
  static constexpr int64_t kHalf = kSide / 2;

  // The parts of pairs (x, y). The last part is cut: it is exact, and a NaN stays one.
  template <bool kRound>
  static HG_INLINE void split(V x, V y, char* to) {
    constexpr uint32_t kHigh = 0xffff0000, kHalfUnit = 0x8000;
#pragma GCC unroll 3
    for (int64_t part = 0; part < kParts; ++part, to += kPartBytes) {
      const uint32_t up = kRound && part + 1 < kParts ? kHalfUnit : 0;
      const Words low = bits(x) + up, high = (bits(y) + up) & kHigh;
      const Words pairs = low >> 16 | high;
      std::memcpy(to, &pairs, sizeof pairs);
      x -= number(low & kHigh), y -= number(high);
    }
  }

  template <bool kLeft, bool kRound>
  static HG_INLINE void pack_blocks(const Source& s, char* to, int64_t all) {
    for (int64_t i = 0; i < s.count; i += kSide, to += all * kBlockBytes)
      for (int64_t t = 0; t < s.depth; t += kSide)
        for (int64_t half = 0; half < 2; ++half)
          pack_tile<kLeft, kRound>(s, i + half * kHalf, t, to + t / kSide * kBlockBytes + half * kTileBytes);
  }

  template <bool kLeft, bool kRound>
  static HG_INLINE void pack_tile(const Source& s, int64_t i, int64_t t, char* to) {
    alignas(64) float memory[2][kHalf * kHalf];
    const float* square[2];
    int64_t row[2];
    for (int p = 0; p < 2; ++p) {
      const int64_t first = t + p * kHalf, depth = std::clamp<int64_t>(s.depth - first, 0, kHalf);
      const int64_t count = std::clamp<int64_t>(s.count - i, 0, kHalf);
      const float* at = s.data + i * s.across + first * s.along;
      square[p] = kLeft ? rows_of(at, s.across, s.along, count, depth, memory[p], row[p])
                        : rows_of(at, s.along, s.across, depth, count, memory[p], row[p]);
    }
    for (int64_t r = 0; r < kHalf; ++r) {
      V x = S::load(square[0] + r * row[0]), y = S::load(square[1] + r * row[1]);
      if (!kLeft && s.scale) {
        x *= t + r < s.depth ? s.scale[(t + r) * s.scale_step] : 0;
        y *= t + kHalf + r < s.depth ? s.scale[(t + kHalf + r) * s.scale_step] : 0;
      }
      split<kRound>(x, y, to + r * kTileRowBytes);
    }
  }

  // 16 rows of 16 numbers that lie side by side, zeros where there are none.
  static HG_INLINE const float* rows_of(const float* at, int64_t down, int64_t right, int64_t rows, int64_t columns,
                                        float* memory, int64_t& row) {
    const bool whole = rows == kHalf && columns == kHalf;
    row = kHalf;
    if (whole && right == 1) {
      row = down;
      return at;
    }
    if (whole && down == 1) {
      turn<S>(at, right, memory, kHalf);
      return memory;
    }
    std::memset(memory, 0, kHalf * kHalf * sizeof(float));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) memory[r * kHalf + c] = at[r * down + c * right];
    return memory;
  }

  static HG_INLINE Words bits(V x) {
    Words words;
    std::memcpy(&words, &x, sizeof x);
    return words;
  }
  static HG_INLINE V number(Words words) {
    V x;
    std::memcpy(&x, &words, sizeof x);
    return x;
  }
};

// Adds products of factors, `blocks` of them along the depth, to R x C tiles: sums in tiles 0 to 3, which belong to
// rows of the left factor first. Calls after() between blocks.
template <int R, int C>
struct SplitTiles {
  template <class After>
  static HG_INLINE void add(const float* left, const float* right, int64_t blocks, const After& after) {
    constexpr int64_t kPart = SplitFactor::kPartBytes, kBlock = SplitFactor::kBlockBytes;
    const char *a = reinterpret_cast<const char*>(left), *b = reinterpret_cast<const char*>(right);
    for (; blocks > 0; --blocks, a += kBlock, b += kBlock) {
      // Small products first; each step but the first loads one factor only.
      multiply<true, true>(a, b + 2 * kPart);
      multiply<false, true>(a, b + kPart);
      multiply<true, false>(a + kPart, b);
      multiply<false, true>(a, b);
      multiply<true, false>(a + 2 * kPart, b);
      multiply<true, false>(a, b);
      after();
    }
  }

 private:
  // The left factor in tiles 4 and 5, the right one in 6 and 7.
  template <bool kLoadLeft, bool kLoadRight>
  static HG_INLINE void multiply(const char* a, const char* b) {
    if constexpr (kLoadLeft) tile_load<4>(a);
    if constexpr (kLoadRight) tile_load<6>(b);
    tile_multiply<0, 4, 6>();
    if constexpr (C > 1) {
      if constexpr (kLoadRight) tile_load<7>(b + kTileBytes);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (R > 1) {
      if constexpr (kLoadLeft) tile_load<5>(a + kTileBytes);
      tile_multiply<2, 5, 6>();
      if constexpr (C > 1) tile_multiply<3, 5, 7>();
    }
  }
};

// A term of a product: packed factors, with so many blocks along the depth. A right factor that is used once is better
// packed right before its use, some columns at a time: it stays in the nearest caches.
struct SplitTerm {
  const float *left, *right;  // no right: `late` is packed, to `memory`
  int64_t blocks;
  SplitFactor::Source late;
  float* memory;

  // Enough for any smaller depth as well.
  static int64_t memory_size(int64_t depth) { return std::max(kAtATime, SplitFactor::size(1, depth)); }

  // The right factor's columns from j on.
  HG_INLINE const float* right_at(int64_t j) const {
    const int64_t at = j / SplitFactor::kSide, size = SplitFactor::kBlockSize * blocks;
    if (right) return right + at * size;
    const int64_t several = group(size), in_group = at % several;
    if (in_group == 0)
      SplitFactor::pack_right({late.data + j * late.across, late.across, late.along,
                               std::min(several * SplitFactor::kSide, late.count - j), late.depth},
                              memory, blocks);
    return memory + in_group * size;
  }

 private:
  // Floats that are packed at a time, and how many blocks of columns those are.
  static constexpr int64_t kAtATime = 32 << 10;
  static int64_t group(int64_t size) { return std::max<int64_t>(1, kAtATime / size); }
};

// Calls finish<S>(i, j, sums) for the products' registers of 16 columns: of all rows below `rows`, and of columns up to
// the register that holds the last one.
template <class Finish>
struct SplitGemm {
  static constexpr int64_t kSide = SplitFactor::kSide, kHalf = kSide / 2;
  const SplitTerm* terms;
  int count;
  int64_t rows, columns;
  const Finish& finish;

  HG_TARGET_AVX512 static void run(const SplitGemm& g) {
    const TileRegisters tiles;
    Made last(g.finish);
    for (int64_t j = 0; j < g.columns; j += kSide) {
      const float* right[2];
      for (int term = 0; term < g.count; ++term) right[term] = g.terms[term].right_at(j);
      for (int64_t i = 0; i < g.rows; i += kSide) {
        const int64_t down = g.rows - i, across = g.columns - j;
        if (down > kHalf)
          across > kHalf ? g.block<2, 2>(i, j, right, last) : g.block<2, 1>(i, j, right, last);
        else
          across > kHalf ? g.block<1, 2>(i, j, right, last) : g.block<1, 1>(i, j, right, last);
      }
    }
    last.finish_rows(0, kSide);
  }

 private:
  using S = Simd<float, 64>;
  // Blocks along the depth whose products are added up before they go to others: keeps the rounding error of long sums
  // down.
  static constexpr int64_t kLongest = 32;

  // The sums of the last block, which are finished while those of the next one are made.
  struct Made {
    const Finish finish;  // a copy, which nothing that is stored can change
    int64_t i = 0, j = 0, rows = 0, columns = 0;
    bool at = false;
    alignas(64) float sums[2][kSide * kSide];

    HG_INLINE explicit Made(const Finish& finish) : finish(finish) {}

    HG_INLINE void finish_rows(int64_t begin, int64_t end) const {
      end = std::min(end, rows);
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < columns; c += S::width)
          finish.template operator()<S>(i + r, j + c, S::load(sums[at] + r * kSide + c));
    }
  };

  template <int R, int C>
  HG_INLINE void block(int64_t i, int64_t j, const float* const* rights, Made& last) const {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    float* sums = last.sums[!last.at];
    int64_t steps = 0, row = 0, added = 0;
    bool some = false;
    for (int term = 0; term < count; ++term) steps += terms[term].blocks;
    const int64_t part = (kSide + steps - 1) / steps;
    for (int term = 0; term < count; ++term) {
      const int64_t all = terms[term].blocks, size = all * SplitFactor::kBlockSize;
      const float *left = terms[term].left + i / kSide * size, *right = rights[term];
      for (int64_t t = 0; t < all;) {
        if (added == kLongest) {
          keep<R, C>(sums, some);
          tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
          some = true, added = 0;
        }
        const int64_t blocks = std::min(all - t, kLongest - added), from = t * (size / all);
        SplitTiles<R, C>::add(left + from, right + from, blocks, [&]() HG_LAMBDA_INLINE {
          last.finish_rows(row, row + part);
          row += part;
        });
        t += blocks, added += blocks;
      }
    }
    keep<R, C>(sums, some);
    last.at = !last.at;
    last.i = i, last.j = j;
    last.rows = std::min(rows - i, R * kHalf), last.columns = std::min(columns - j, C * kHalf);
  }

  // The tiles, or with what was kept before them.
  template <int R, int C>
  static HG_INLINE void keep(float* sums, bool add) {
    alignas(64) float memory[kSide * kSide];
    float* to = add ? memory : sums;
    constexpr int64_t kRow = kSide * sizeof(float);
    tile_store<0>(to, kRow);
    if constexpr (C > 1) tile_store<1>(to + kHalf, kRow);
    if constexpr (R > 1) tile_store<2>(to + kHalf * kSide, kRow);
    if constexpr (R > 1 && C > 1) tile_store<3>(to + kHalf * kSide + kHalf, kRow);
    if (!add) return;
    for (int64_t r = 0; r < R * kHalf; ++r)
      for (int64_t c = 0; c < C * kHalf; c += S::width)
        S::store(sums + r * kSide + c, S::load(sums + r * kSide + c) + S::load(memory + r * kSide + c));
  }
};

}  // namespace hg::cpu
