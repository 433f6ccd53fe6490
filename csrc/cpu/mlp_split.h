// The matrix products of a multilayer perceptron by matrix units: right factors are packed in advance, left ones for
// every product.
#pragma once

#include <cstdint>

#include "mlp_gemm.h"
#include "split_gemm.h"

namespace hg::cpu {

struct SplitRight {
  using Real = float;
  static constexpr bool kInPlace = false;
  static constexpr int64_t kRows = SplitFactor::kSide, kLeastRows = 128, kMostRows = 256, kTangentBytes = 1536 << 10;
  const float* packed;  // or null: packed when it is used
  SplitFactor::Source late;

  static SplitRight apart(const float* data, int64_t) { return {data, {}}; }
  static SplitRight rows(const float* data, int64_t stride, int64_t count, int64_t columns) {
    return {nullptr, {data, 1, stride, columns, count}};
  }
  static SplitRight late_rows(const float* data, int64_t stride, int64_t count, int64_t columns, float*) {
    return rows(data, stride, count, columns);
  }
  static SplitRight late_columns(const float* data, int64_t stride, int64_t count, int64_t rows, float*) {
    return {nullptr, {data, stride, 1, count, rows}};
  }
  static int64_t late_size(int64_t, int64_t) { return 0; }
  static int64_t size(int64_t rows, int64_t columns) { return SplitFactor::size(columns, rows); }
  static int64_t memory_size(int64_t rows, int64_t depth) {
    return SplitFactor::size(rows, depth) + SplitTerm::memory_size(depth);
  }

  static void pack_rows(const float* in, int64_t stride, int64_t begin, int64_t count, int64_t columns, float* out,
                        int64_t all) {
    SplitFactor::pack_right({in, 1, stride, columns, count}, out + SplitFactor::size(1, begin),
                            SplitFactor::blocks(all));
  }
  static void pack_columns(const float* in, int64_t stride, int64_t begin, int64_t count, int64_t rows, float* out) {
    SplitFactor::pack_right({in, stride, 1, count, rows}, out + SplitFactor::size(begin, rows),
                            SplitFactor::blocks(rows));
  }
};

template <template <class> class Finish>
struct Gemm<SplitRight, Finish> {
  Factors<SplitRight> factors[2];
  int terms;
  int64_t rows, columns;
  Finish<float> finish;
  float* memory;

  static void run(const Gemm& g) {
    SplitTerm terms[2];
    float* memory = g.memory;
    for (int i = 0; i < g.terms; ++i) {
      const Factors<SplitRight>& f = g.factors[i];
      const int64_t blocks = SplitFactor::blocks(f.depth);
      constexpr bool kTransposed = Finish<float>::kTransposed;
      const int64_t across = kTransposed ? 1 : f.a_stride, along = kTransposed ? f.a_stride : 1;
      SplitFactor::pack_left({f.a, across, along, g.rows, f.depth}, memory, blocks);
      float* late = memory + SplitFactor::size(g.rows, f.depth);
      terms[i] = {memory, f.b.packed, blocks, f.b.late, late};
      memory += SplitRight::memory_size(g.rows, f.depth);
    }
    SplitGemm<Finish<float>>::run({terms, g.terms, g.rows, g.columns, g.finish});
  }
};

}  // namespace hg::cpu
