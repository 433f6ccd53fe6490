// Element loops with several sums, in the shape that compilers vectorise without reordering anything:
// independent lanes per sum, added up as a tree.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

namespace hg::cpu {

// Four AVX-512 registers of float, eight of double: enough to hide the latency of an addition.
constexpr int kLanes = 64;

template <class A, int Width>
HG_INLINE double add_lanes(A* lanes) {
  for (int width = Width / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

// element(i, sums) for i in [begin, n) in strips of Width; returns where it stopped.
template <class A, int S, int Width, class F>
HG_INLINE int64_t sum_strips(int64_t begin, int64_t n, double* sums, const F& element) {
  if (n - begin < Width) return begin;
  A lanes[S][Width] = {};
  int64_t i = begin;
  for (; i + Width <= n; i += Width) {
#pragma GCC ivdep
    for (int l = 0; l < Width; ++l) {
      A terms[S];
      element(i + l, terms);
      for (int s = 0; s < S; ++s) lanes[s][l] += terms[s];
    }
  }
  for (int s = 0; s < S; ++s) sums[s] += add_lanes<A, Width>(lanes[s]);
  return i;
}

// Elements between two additions in double precision: lanes that add up all of a long vector would lose digits.
constexpr int64_t kChunk = 1 << 12;

// element(i, terms) writes S terms for element i; sums[s] += the sum of terms[s] over i < n.
template <class A, int S, class F>
HG_INLINE void sum_elements(int64_t n, double* sums, const F& element) {
  int64_t i = 0;
  while (n - i >= kLanes) i = sum_strips<A, S, kLanes>(i, std::min(n, i + kChunk), sums, element);
  i = sum_strips<A, S, 16>(i, n, sums, element);
  for (; i < n; ++i) {
    A terms[S];
    element(i, terms);
    for (int s = 0; s < S; ++s) sums[s] += static_cast<double>(terms[s]);
  }
}

}  // namespace hg::cpu
