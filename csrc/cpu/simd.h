// Vectors of one register, for kernels whose register tiles depend on the instruction set: compiler
// vector types, so that one source serves AVX-512, AVX2 and plain x86-64 or Arm.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "half.h"
#include "isa.h"

// Registers of 32 bytes and more are used by functions compiled for AVX2 at least, and some of its instructions by
// name: g++ makes several of a conversion, and an intrinsic cannot be in a function that is inlined into those of all
// sets. Under the sanitizers nothing is inlined, and they would be in a function for all sets.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define HG_HAVE_AVX2
#endif

namespace hg::cpu {

// Register bytes, and the register tiles of matrix products: at most so many columns, and so many accumulators
// beside the operands in the register file.
struct TilesAvx512 {
  static constexpr int bytes = 64, columns = 4, accumulators = 25;
};
struct TilesAvx2 {
  static constexpr int bytes = 32, columns = 4, accumulators = 12;
};
struct TilesBase {
  static constexpr int bytes = 16, columns = 4, accumulators = 12;
};

template <class T, int Bytes>
struct Vector {
  typedef T type __attribute__((vector_size(Bytes)));
};

template <class Real, int Bytes>
struct Simd {
  using V = typename Vector<Real, Bytes>::type;
  typedef Real Unaligned __attribute__((vector_size(Bytes), aligned(sizeof(Real)), may_alias));
  typedef Real Quad __attribute__((vector_size(16), aligned(sizeof(Real)), may_alias));
  using Halves = typename Vector<uint16_t, Bytes / 2>::type;
  using Words = typename Vector<uint32_t, Bytes>::type;
  static constexpr int width = Bytes / sizeof(Real);

  static HG_INLINE V load(const Real* at) { return *reinterpret_cast<const Unaligned*>(at); }

  static HG_INLINE V load(const BFloat16* at) { return from_bfloat16<V>(words(at)); }
  static HG_INLINE V load(const Float16* at) {
#if defined(HG_HAVE_AVX2)
    if constexpr (Bytes >= 32) {
      const Halves halves = load_halves(at);
      V x;
      asm("vcvtph2ps %1, %0" : "=v"(x) : "v"(halves));
      return x;
    }
#endif
    return from_float16<V>(words(at));
  }

  // A factor of several sums, which stays in its register: g++ would load it anew for each of them, and a core makes no
  // more loads than multiply-adds in a cycle.
  template <class T>
  static HG_INLINE V factor(const T* at) {
    V x = load(at);
#if defined(HG_HAVE_AVX2)
    asm("" : "+v"(x));
#endif
    return x;
  }

  // One element in every place.
  static HG_INLINE V every(const Real* at) {
    V x;
#if defined(HG_HAVE_AVX2)
    if constexpr (Bytes >= 32 && sizeof(Real) == 4) {
      asm("vbroadcastss %1, %0" : "=v"(x) : "m"(*at));
      return x;
    } else if constexpr (Bytes >= 32) {
      asm("vbroadcastsd %1, %0" : "=v"(x) : "m"(*at));
      return x;
    }
#endif
    for (int i = 0; i < width; ++i) x[i] = *at;
    return x;
  }

  // 16 bytes as often as they fit.
  static HG_INLINE V repeat(const Real* at) {
    V x;
#if defined(HG_HAVE_AVX2)
    const Quad& quad = *reinterpret_cast<const Quad*>(at);
    if constexpr (Bytes == 64) {
      asm("vbroadcastf32x4 %1, %0" : "=v"(x) : "m"(quad));
      return x;
    } else if constexpr (Bytes == 32) {
      asm("vbroadcastf128 %1, %0" : "=x"(x) : "m"(quad));
      return x;
    }
#endif
    for (int i = 0; i < Bytes; i += 16) std::memcpy(reinterpret_cast<char*>(&x) + i, at, 16);
    return x;
  }

  // sum + a * b, in the register of the sum: in long loops over a tile of sums g++ puts it into that of a factor now
  // and then, and moves it back.
  static HG_INLINE V multiply_add(V a, V b, V sum) {
#if defined(HG_HAVE_AVX2)
    if constexpr (Bytes >= 32 && sizeof(Real) == 4) {
      asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      return sum;
    } else if constexpr (Bytes >= 32) {
      asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      return sum;
    }
#endif
    return sum + a * b;
  }

  static HG_INLINE void store(Real* at, V x) { *reinterpret_cast<Unaligned*>(at) = x; }
  static HG_INLINE void store(BFloat16* at, V x) { store_halves(at, to_bfloat16<Words>(x)); }
  static HG_INLINE void store(Float16* at, V x) { store_halves(at, to_float16<Words>(x)); }

  static HG_INLINE Real sum(V x) { return sum(x, Lanes()); }

  // The sums of four vectors at once, in a third of the instructions of four sums.
  static HG_INLINE void sum4(V a, V b, V c, V d, Real* out) { sum4(a, b, c, d, out, Lanes()); }

 private:
  using Lanes = std::make_integer_sequence<int, width>;

  static HG_INLINE Words words(const void* at) {
    const Halves halves = load_halves(at);
#if defined(HG_HAVE_AVX2)
    if constexpr (Bytes >= 32) {
      Words words;
      asm("vpmovzxwd %1, %0" : "=v"(words) : "v"(halves));
      return words;
    }
#endif
    return __builtin_convertvector(halves, Words);
  }

  static HG_INLINE Halves load_halves(const void* at) {
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    return halves;
  }

  static HG_INLINE void store_halves(void* at, Words words) {
    const Halves halves = __builtin_convertvector(words, Halves);
    std::memcpy(at, &halves, sizeof halves);
  }

  template <int... L>
  static HG_INLINE Real sum(V x, std::integer_sequence<int, L...>) {
    if constexpr (width > 8) x += __builtin_shufflevector(x, x, (L + 8) % width...);
    if constexpr (width > 4) x += __builtin_shufflevector(x, x, (L + 4) % width...);
    if constexpr (width > 2) x += __builtin_shufflevector(x, x, (L + 2) % width...);
    x += __builtin_shufflevector(x, x, (L + 1) % width...);
    return x[0];
  }

  template <int... L>
  static HG_INLINE void sum4(V a, V b, V c, V d, Real* out, std::integer_sequence<int, L...> lanes) {
    if constexpr (width < 4) {
      out[0] = sum(a, lanes), out[1] = sum(b, lanes), out[2] = sum(c, lanes), out[3] = sum(d, lanes);
    } else {
      // Neighbours within a and b, alternating: a01 b01 a23 b23 ...
      const V ab = __builtin_shufflevector(a, b, (L % 2 * width + L / 2 * 2)...) +
                   __builtin_shufflevector(a, b, (L % 2 * width + L / 2 * 2 + 1)...);
      const V cd = __builtin_shufflevector(c, d, (L % 2 * width + L / 2 * 2)...) +
                   __builtin_shufflevector(c, d, (L % 2 * width + L / 2 * 2 + 1)...);
      // Quadruples: a0123 b0123 c0123 d0123 a4567 ...
      V abcd = __builtin_shufflevector(ab, cd, (L % 4 / 2 * width + L / 4 * 4 + L % 2)...) +
               __builtin_shufflevector(ab, cd, (L % 4 / 2 * width + L / 4 * 4 + L % 2 + 2)...);
      if constexpr (width > 8) abcd += __builtin_shufflevector(abcd, abcd, (L + 8) % width...);
      if constexpr (width > 4) abcd += __builtin_shufflevector(abcd, abcd, (L + 4) % width...);
      std::memcpy(out, &abcd, 4 * sizeof(Real));
    }
  }
};

// Body<Tiles>::run compiled for every instruction set with the tiles that suit it.
template <template <class> class Body, class... Args>
struct ForTiles {
  using Function = void (*)(Args...);
  static void base(Args... args) { Body<TilesBase>::run(args...); }
  HG_TARGET_AVX2 static void avx2(Args... args) { Body<TilesAvx2>::run(args...); }
  HG_TARGET_AVX512 static void avx512(Args... args) { Body<TilesAvx512>::run(args...); }
  static Function get() { return HG_CHOSEN_ISA; }
};

}  // namespace hg::cpu
