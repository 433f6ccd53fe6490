// Rows of X in a half precision as numbers that are multiplied, one after another.
#pragma once

#include <cstdint>

#include "half.h"
#include "simd.h"

namespace hg::cpu {

template <class X, class Real>
struct Widen {
  const X* from;
  int64_t rows, d, stride;
  Real* to;

  template <class Tiles>
  struct Body {
    static HG_INLINE void run(const Widen& m) {
      using S = Simd<Real, Tiles::bytes>;
      for (int64_t r = 0; r < m.rows; ++r) {
        const X* from = m.from + r * m.stride;
        Real* to = m.to + r * m.d;
        int64_t j = 0;
        for (; j + S::width <= m.d; j += S::width) S::store(to + j, S::load(from + j));
        for (; j < m.d; ++j) to[j] = static_cast<Real>(widen(from[j]));
      }
    }
  };

  static void run(const Widen& m) {
    static const auto function = ForTiles<Body, const Widen&>::get();
    function(m);
  }
};

}  // namespace hg::cpu
