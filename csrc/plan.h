// Native plans: a recorded Hessian-vector product as flat instructions over preallocated memory. Torch-free.
//
// Memory is addressed by slot: 0 is the arena, then come the vector's parts, the constants of the solve, the
// results that ATen allocates, and the product's parts. Offsets and strides are in elements.
#pragma once

#include <array>
#include <cstdint>
#include <variant>
#include <vector>

namespace hg::plan {

// Indices of a first dimension.
struct Range {
  int64_t begin, end;
};

struct View {
  int64_t slot = 0, offset = 0;
  std::vector<int64_t> sizes, strides;
};

// out = a op b, with number `scalar` where the op takes one; muladd is a b + c, select is a where b is not 0, else 0.
enum class Code : int { copy, fill, add, sub, mul, div, axpy, scale, muladd, select };

struct Op {
  Code code;
  int64_t out, a, b, c;  // places among the operands; -1 where the op takes fewer
  int64_t scalar;
};

// Ops over the same indices, one after another on every block of them.
struct Pointwise {
  std::vector<int64_t> sizes;
  std::vector<View> operands;
  std::vector<Op> ops;
};
constexpr int kMaxOperands = 64, kMaxDims = 16;

// out += in, where strides of 0 in `out` sum over a dimension.
struct Sum {
  std::vector<int64_t> sizes;
  View out, in;
};

// Derivative over rows, by the probabilities p: of softmax p (g - <g, p>), of its logarithm g - p sum(g).
struct Softmax {
  bool log;
  int64_t rows, columns;
  View grad, probabilities, out;
};

// (batch, rows, columns) each; unit stride along rows or columns, in `out` along rows.
struct Gemm {
  View a, b, out;
  bool accumulate;
};
// Most rows or columns of a narrow product, and the least that it adds up.
constexpr int64_t kNarrow = 16, kNarrowDepth = 64;

// y (batch, outputs, rows, columns) is the cross-correlation of x (batch, inputs, rows, columns) with w (outputs,
// inputs, rows, columns); or w is the gradient by w, of which y is given.
struct Convolution {
  View x, w, y;
  std::array<int64_t, 2> stride, padding, dilation;
  bool by_weight;   // whether w is the result
  bool flipped;     // w is read from its last row and column to its first
  bool accumulate;  // add to what is there
};

// out = last.a f(first.a first.b) with f by rows, in one pass over first.a, which last.b is too: a block of its rows
// stays in the cache from one product to the other. Both are narrow; what lies between writes the rows that it reads.
struct Sweep {
  Gemm first;
  std::vector<std::variant<Pointwise, Softmax>> between;
  Gemm last;
};

// A kernel that was compiled for this plan; it takes the places of views, numbers, and a range of its first dimension.
struct Compiled {
  void (*run)(void* const* places, const double* numbers, int64_t begin, int64_t end);
  std::vector<View> views;
  std::vector<int64_t> numbers;
  Range range;
  bool apart;  // what is written lies apart for indices that differ
};
constexpr int kMaxPlaces = 128;

using Kernel = std::variant<Gemm, Pointwise, Sum, Softmax, Convolution, Sweep, Compiled>;

}  // namespace hg::plan

namespace hg::cpu {

struct Team;

template <class Real>
struct PlanKernels {
  // A product of any shape.
  static void multiply(const plan::Gemm& g, Real* const* slots);
  // Narrow ones: of factors that are both dense along what is added up; with few rows, where b and out have dense ones.
  static void dots(const plan::Gemm& g, Real* const* slots);
  // The team that it shares its work with.
  static Team dots_team(const plan::Gemm& g);
  static void few_rows(const plan::Gemm& g, Real* const* slots);
  static void pointwise(const plan::Pointwise& p, Real* const* slots, const double* numbers);
  static void sum(const plan::Sum& s, Real* const* slots);
  static void softmax(const plan::Softmax& s, Real* const* slots);
  static void convolve(const plan::Convolution& c, Real* const* slots);
  static void sweep(const plan::Sweep& s, Real* const* slots, const double* numbers);

  // Some rows, on this thread; of few_rows those of b, added up in `out` as if that were the product's.
  static void dots(const plan::Gemm& g, Real* const* slots, plan::Range rows);
  static void few_rows(const plan::Gemm& g, Real* const* slots, plan::Range depth, Real* out, int64_t out_row,
                       bool accumulate);
  static void pointwise(const plan::Pointwise& p, Real* const* slots, const double* numbers, plan::Range range);
  static void softmax(const plan::Softmax& s, Real* const* slots, plan::Range range);
};

}  // namespace hg::cpu
