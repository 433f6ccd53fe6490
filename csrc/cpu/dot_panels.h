// Dot products of rows with eight columns at a time. A register holds 16 bytes of several columns, another the same 16
// bytes of a row repeated. Of 100 multiply-adds that a core can make these tiles make 99; with 64 bytes of one row and
// of one column in a register there are more loads, and more to add up at the end, and they make 90.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"

namespace hg::cpu {

template <class Real>
struct DotPanel {
  static constexpr int kColumns = 8;
  // Elements of 16 bytes, and of a cache line.
  static constexpr int kQuad = 16 / sizeof(Real), kLine = 64 / sizeof(Real);

  // What is left over when a row is cut into quads is no part of a panel.
  static int64_t size(int64_t depth) { return depth / kQuad * kQuad * kColumns; }

  static void pack(const Real* const* columns, int64_t depth, Real* panel) {
    for (int64_t t = 0; t + kQuad <= depth; t += kQuad)
      for (int c = 0; c < kColumns; ++c, panel += kQuad) std::memcpy(panel, columns[c] + t, kQuad * sizeof(Real));
  }
};

template <class Real, class Tiles>
struct DotTile {
  using S = Simd<Real, Tiles::bytes>;
  using V = typename S::V;
  using Panel = DotPanel<Real>;
  static constexpr int kColumns = Panel::kColumns, kQuad = Panel::kQuad, kLine = Panel::kLine;
  static constexpr int W = S::width, C = kColumns * kQuad / W;
  // Rows of a tile, so that sums hide each other's latency: 32 vectors with AVX-512, else 16.
  static constexpr int kRows = Tiles::bytes == 64 ? 8 : 12 / C;

  // out[r * out_row + c]: row r of `a` by column c of the panel. Calls fetch(t) before it reads the line at t.
  template <int R, class Fetch>
  static HG_INLINE void run(const Real* a, int64_t a_row, const Real* panel, int64_t depth, Real* out, int64_t out_row,
                            const Fetch& fetch) {
    V sums[R][C];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = V{};
    Rows rows(a, a_row);
    int64_t t = 0;
    for (; t + kLine <= depth; t += kLine, panel += kLine * kColumns) {
      fetch(t);
      rows.keep();
#pragma GCC unroll 4
      for (int q = 0; q < kLine; q += kQuad) add<R>(rows, q, panel + q * kColumns, sums);
      rows.next(kLine);
    }
    for (; t + kQuad <= depth; t += kQuad, panel += kQuad * kColumns) {
      add<R>(rows, 0, panel, sums);
      rows.next(kQuad);
    }
    store(sums, out, out_row);
  }

 private:
  using Lanes = std::make_integer_sequence<int, W>;

  // Where up to eight rows are: the processor adds a few multiples of their distance to one address as it loads, where
  // a pointer to each of them would take a register each, and as many additions as there are loads.
  class Rows {
   public:
    HG_INLINE Rows(const Real* first, int64_t row)
        : at_(reinterpret_cast<const char*>(first)),
          one_(row * static_cast<int64_t>(sizeof(Real))),
          three_(3 * one_),
          five_(5 * one_),
          seven_(7 * one_) {}

    // Hides from the compiler how these hang together.
    HG_INLINE void keep() { asm("" : "+r"(at_), "+r"(one_), "+r"(three_), "+r"(five_), "+r"(seven_)); }
    HG_INLINE void next(int64_t elements) { at_ += elements * static_cast<int64_t>(sizeof(Real)); }

    HG_INLINE const Real* at(int row, int64_t element) const {
      const int64_t distance[8] = {0, one_, 2 * one_, three_, 4 * one_, five_, 2 * three_, seven_};
      return reinterpret_cast<const Real*>(at_ + distance[row]) + element;
    }

   private:
    const char* at_;
    int64_t one_, three_, five_, seven_;
  };

  template <int R>
  static HG_INLINE void add(const Rows& rows, int64_t t, const Real* panel, V (&sums)[R][C]) {
    V columns[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) columns[c] = S::factor(panel + c * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V row = S::repeat(rows.at(r, t));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = S::multiply_add(row, columns[c], sums[r][c]);
    }
  }

  // Neighbours within 16 bytes of a, then of b.
  template <int... L>
  static HG_INLINE V fold(V a, V b, std::integer_sequence<int, L...>) {
    constexpr int kHalf = kQuad / 2;
    return __builtin_shufflevector(a, b, (L % kQuad / kHalf * W + L / kQuad * kQuad + L % kHalf * 2)...) +
           __builtin_shufflevector(a, b, (L % kQuad / kHalf * W + L / kQuad * kQuad + L % kHalf * 2 + 1)...);
  }

  // From the rows of every column to the columns of every row.
  template <int... L>
  static HG_INLINE V by_rows(V x, std::integer_sequence<int, L...>) {
    constexpr int kAcross = W / kQuad;
    return __builtin_shufflevector(x, x, (L % kAcross * kQuad + L / kAcross)...);
  }

  // The sums of as many rows as a quad has elements.
  template <int R>
  static HG_INLINE void store(const V (&sums)[R][C], Real* out, int64_t out_row) {
#pragma GCC unroll 12
    for (int r = 0; r < R; r += kQuad)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const auto row = [&](int i) HG_LAMBDA_INLINE { return sums[r + i < R ? r + i : r][c]; };
        V folded = fold(row(0), row(1), Lanes());
        if constexpr (kQuad == 4) folded = fold(folded, fold(row(2), row(3), Lanes()), Lanes());
        // Columns of a row side by side.
        constexpr int kAcross = W / kQuad;
        folded = by_rows(folded, Lanes());
        Real values[W];
        S::store(values, folded);
#pragma GCC unroll 4
        for (int i = 0; i < kQuad; ++i)
          if (r + i < R)
            std::memcpy(out + (r + i) * out_row + c * kAcross, values + i * kAcross, kAcross * sizeof(Real));
      }
  }
};

}  // namespace hg::cpu
