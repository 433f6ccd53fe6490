// The instructions of native plans that are not matrix products.
#include "../plan.h"

#include <algorithm>
#include <array>

#include "isa.h"
#include "lanes.h"
#include "share.h"

namespace hg::cpu {
namespace {

using plan::Code;
using plan::Op;
using plan::Range;
using plan::View;

// Elements that all ops of a group do before the next block: a few dozen operands of it stay in the caches.
constexpr int64_t kBlock = 512;

// Elements, times the ops on each, that a thread should have at least; ranges per thread.
constexpr int64_t kGrain = 1 << 17, kRanges = 2;

// Calls f(offsets) for every index of all dimensions but the last, of the first those in the range unless it is the
// last; offsets of the views in elements.
template <class F>
HG_INLINE void for_each_row(const std::vector<int64_t>& sizes, const View* const* views, int count, Range range,
                            const F& f) {
  std::array<int64_t, plan::kMaxDims> index{};
  std::array<int64_t, plan::kMaxOperands> at;
  const int outer = static_cast<int>(sizes.size()) - 1;
  for (int v = 0; v < count; ++v) at[v] = views[v]->offset + (outer > 0 ? range.begin * views[v]->strides[0] : 0);
  index[0] = range.begin;
  for (;;) {
    f(at.data());
    int d = outer - 1;
    for (; d >= 0; --d) {
      const bool wraps = ++index[d] == (d == 0 ? range.end : sizes[d]);
      for (int v = 0; v < count; ++v) at[v] += wraps ? (1 - sizes[d]) * views[v]->strides[d] : views[v]->strides[d];
      if (!wraps) break;
      index[d] = 0;
    }
    if (d < 0) return;
  }
}

// Calls f(range) for ranges that make up the first dimension, on several threads where there is work for them.
template <class F>
void share_first(const std::vector<int64_t>& sizes, int64_t ops, bool apart, const F& f) {
  const int64_t first = sizes.empty() ? 1 : sizes[0];
  int64_t work = ops;
  for (const int64_t size : sizes) work *= size;
  const Team team = team_for(apart ? work : 0, kGrain);
  const int64_t ranges = team.ranges(first, kRanges);
  share(ranges, team, [&](int64_t range) { f(Range{range * first / ranges, (range + 1) * first / ranges}); });
}

inline int64_t last_stride(const View& view) { return view.strides.empty() ? 1 : view.strides.back(); }

template <class Real>
struct PointwiseBody {
  struct Input {
    const Real* data;
    int64_t stride;
  };

  template <class F>
  static HG_INLINE void binary(Real* out, int64_t stride, Input a, Input b, int64_t n, const F& f) {
    if (stride == 1 && a.stride == 1 && b.stride == 1) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = f(a.data[i], b.data[i]);
    } else if (stride == 1 && a.stride == 1 && b.stride == 0) {
      const Real y = b.data[0];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = f(a.data[i], y);
    } else if (stride == 1 && a.stride == 0 && b.stride == 1) {
      const Real x = a.data[0];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = f(x, b.data[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i * stride] = f(a.data[i * a.stride], b.data[i * b.stride]);
    }
  }

  template <class F>
  static HG_INLINE void unary(Real* out, int64_t stride, Input a, int64_t n, const F& f) {
    binary(out, stride, a, a, n, [&](Real x, Real) HG_LAMBDA_INLINE { return f(x); });
  }

  static HG_INLINE void muladd(Real* out, int64_t stride, Input a, Input b, Input c, int64_t n) {
    if (stride == 1 && a.stride == 1 && b.stride == 1 && c.stride == 1) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = a.data[i] * b.data[i] + c.data[i];
    } else {
      for (int64_t i = 0; i < n; ++i)
        out[i * stride] = a.data[i * a.stride] * b.data[i * b.stride] + c.data[i * c.stride];
    }
  }

  static HG_INLINE void apply(const Op& op, Real number, Real* out, int64_t stride, Input a, Input b, Input c,
                              int64_t n) {
    switch (op.code) {
      case Code::copy:
        return unary(out, stride, a, n, [](Real x) HG_LAMBDA_INLINE { return x; });
      case Code::fill:
        for (int64_t i = 0; i < n; ++i) out[i * stride] = number;
        return;
      case Code::add:
        return binary(out, stride, a, b, n, [](Real x, Real y) HG_LAMBDA_INLINE { return x + y; });
      case Code::sub:
        return binary(out, stride, a, b, n, [](Real x, Real y) HG_LAMBDA_INLINE { return x - y; });
      case Code::mul:
        return binary(out, stride, a, b, n, [](Real x, Real y) HG_LAMBDA_INLINE { return x * y; });
      case Code::div:
        return binary(out, stride, a, b, n, [](Real x, Real y) HG_LAMBDA_INLINE { return x / y; });
      case Code::axpy:
        return binary(out, stride, a, b, n, [=](Real x, Real y) HG_LAMBDA_INLINE { return x + number * y; });
      case Code::scale:
        return unary(out, stride, a, n, [=](Real x) HG_LAMBDA_INLINE { return x * number; });
      case Code::muladd:
        return muladd(out, stride, a, b, c, n);
      case Code::select:
        return binary(out, stride, a, b, n, [](Real x, Real y) HG_LAMBDA_INLINE { return y != 0 ? x : Real(0); });
    }
  }

  static HG_INLINE void run(const plan::Pointwise& p, Real* const* slots, const double* numbers, Range range) {
    const int count = static_cast<int>(p.operands.size());
    std::array<const View*, plan::kMaxOperands> views;
    std::array<Real*, plan::kMaxOperands> base;
    std::array<int64_t, plan::kMaxOperands> stride;
    for (int v = 0; v < count; ++v) {
      views[v] = &p.operands[v];
      base[v] = slots[views[v]->slot];
      stride[v] = last_stride(*views[v]);
    }
    const Range inner = p.sizes.size() > 1 ? Range{0, p.sizes.back()} : range;
    for_each_row(p.sizes, views.data(), count, range, [&](const int64_t* at) HG_LAMBDA_INLINE {
      for (int64_t begin = inner.begin; begin < inner.end; begin += kBlock) {
        const int64_t n = std::min(kBlock, inner.end - begin);
        const auto place = [&](int64_t v) { return base[v] + at[v] + begin * stride[v]; };
        for (const Op& op : p.ops) {
          const Real number = op.scalar < 0 ? Real(0) : static_cast<Real>(numbers[op.scalar]);
          const Input a = op.a < 0 ? Input{nullptr, 1} : Input{place(op.a), stride[op.a]};
          const Input b = op.b < 0 ? a : Input{place(op.b), stride[op.b]};
          const Input c = op.c < 0 ? a : Input{place(op.c), stride[op.c]};
          apply(op, number, place(op.out), stride[op.out], a, b, c, n);
        }
      }
    });
  }
};

// Rows that are added up as they are before their sum goes on in double precision: a chain of additions as long as a
// batch would lose digits.
constexpr int64_t kChain = 64;

// Calls f(offset) for every index of the dimensions of a view from `first` to before `end`.
template <class F>
HG_INLINE void for_each_offset(const std::vector<int64_t>& sizes, const View& view, int first, int end, const F& f) {
  std::array<int64_t, plan::kMaxDims> index{};
  int64_t at = 0;
  for (;;) {
    f(at);
    int d = end - 1;
    for (; d >= first; --d) {
      at += view.strides[d];
      if (++index[d] < sizes[d]) break;
      at -= sizes[d] * view.strides[d];
      index[d] = 0;
    }
    if (d < first) return;
  }
}

template <class Real>
struct SumBody {
  static HG_INLINE void run(const plan::Sum& s, Real* const* slots, Range range) {
    const View* const views[] = {&s.out, &s.in};
    const int last = std::max(0, static_cast<int>(s.sizes.size()) - 1);
    int first = last;  // of the dimensions before the last that are added up to one row of `out`
    while (first > 0 && s.out.strides[first - 1] == 0) --first;
    std::vector<int64_t> kept(s.sizes.begin(), s.sizes.begin() + first);
    kept.push_back(s.sizes.empty() ? 1 : s.sizes.back());
    for_each_row(kept, views, 2, range, [&](const int64_t* at) HG_LAMBDA_INLINE {
      Real* out = slots[s.out.slot] + at[0];
      const Real* in = slots[s.in.slot] + at[1];
      if (last_stride(s.out) == 0)
        out[0] += static_cast<Real>(total(s, in, first, last));
      else if (first == last)
        add(kept.back(), out, last_stride(s.out), in, last_stride(s.in));
      else
        columns(s, out, in, first, last);
    });
  }

  static HG_INLINE void add(int64_t n, Real* out, int64_t out_stride, const Real* in, int64_t in_stride) {
    if (out_stride == 1 && in_stride == 1) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] += in[i];
    } else {
      for (int64_t i = 0; i < n; ++i) out[i * out_stride] += in[i * in_stride];
    }
  }

  static HG_INLINE double total(const plan::Sum& s, const Real* in, int first, int last) {
    const int64_t n = s.sizes.back(), stride = last_stride(s.in);
    double sum = 0;
    for_each_offset(s.sizes, s.in, first, last, [&](int64_t at) HG_LAMBDA_INLINE {
      const Real* row = in + at;
      if (stride == 1) {
        sum_elements<Real, 1>(n, &sum, [&](int64_t i, Real* term) HG_LAMBDA_INLINE { term[0] = row[i]; });
      } else {
        for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(row[i * stride]);
      }
    });
    return sum;
  }

  static HG_INLINE void columns(const plan::Sum& s, Real* out, const Real* in, int first, int last) {
    const int64_t out_stride = last_stride(s.out), in_stride = last_stride(s.in);
    std::array<Real, kBlock> chain;
    std::array<double, kBlock> sums;
    for (int64_t begin = 0; begin < s.sizes.back(); begin += kBlock) {
      const int64_t n = std::min(kBlock, s.sizes.back() - begin);
      int64_t rows = 0;
      const auto end_chain = [&]() HG_LAMBDA_INLINE {
        for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(chain[i]);
        std::fill_n(chain.begin(), n, Real(0));
        rows = 0;
      };
      std::fill_n(chain.begin(), n, Real(0));
      std::fill_n(sums.begin(), n, 0.0);
      for_each_offset(s.sizes, s.in, first, last, [&](int64_t at) HG_LAMBDA_INLINE {
        add(n, chain.data(), 1, in + at + begin * in_stride, in_stride);
        if (++rows == kChain) end_chain();
      });
      end_chain();
      for (int64_t i = 0; i < n; ++i) out[(begin + i) * out_stride] += static_cast<Real>(sums[i]);
    }
  }
};

template <class Real>
struct SoftmaxBody {
  static HG_INLINE void run(const plan::Softmax& s, Real* const* slots, Range range) {
    const int64_t begin = range.begin * s.columns;
    const Real *g = slots[s.grad.slot] + s.grad.offset + begin,
               *p = slots[s.probabilities.slot] + s.probabilities.offset + begin;
    Real* out = slots[s.out.slot] + s.out.offset + begin;
    for (int64_t row = range.begin; row < range.end; ++row, g += s.columns, p += s.columns, out += s.columns) {
      double dot = 0;
      if (s.log) {
        sum_elements<Real, 1>(s.columns, &dot, [&](int64_t i, Real* term) HG_LAMBDA_INLINE { term[0] = g[i]; });
        const Real total = static_cast<Real>(dot);
#pragma GCC ivdep
        for (int64_t i = 0; i < s.columns; ++i) out[i] = g[i] - p[i] * total;
      } else {
        sum_elements<Real, 1>(s.columns, &dot, [&](int64_t i, Real* term) HG_LAMBDA_INLINE { term[0] = g[i] * p[i]; });
        const Real mean = static_cast<Real>(dot);
#pragma GCC ivdep
        for (int64_t i = 0; i < s.columns; ++i) out[i] = p[i] * (g[i] - mean);
      }
    }
  }
};

}  // namespace

template <class Real>
void PlanKernels<Real>::pointwise(const plan::Pointwise& p, Real* const* slots, const double* numbers, Range range) {
  static const auto function =
      ForIsa<PointwiseBody<Real>, const plan::Pointwise&, Real* const*, const double*, Range>::get();
  function(p, slots, numbers, range);
}

template <class Real>
void PlanKernels<Real>::pointwise(const plan::Pointwise& p, Real* const* slots, const double* numbers) {
  // What is written lies apart for indices that differ.
  const auto apart = [&](const Op& op) { return p.sizes.empty() || p.operands[op.out].strides[0] != 0; };
  share_first(p.sizes, static_cast<int64_t>(p.ops.size()), std::all_of(p.ops.begin(), p.ops.end(), apart),
              [&](Range range) { pointwise(p, slots, numbers, range); });
}

template <class Real>
void PlanKernels<Real>::sum(const plan::Sum& s, Real* const* slots) {
  static const auto function = ForIsa<SumBody<Real>, const plan::Sum&, Real* const*, Range>::get();
  const bool apart = s.sizes.size() > 1 && s.out.strides[0] != 0;
  share_first(s.sizes, 1, apart, [&](Range range) { function(s, slots, range); });
}

template <class Real>
void PlanKernels<Real>::softmax(const plan::Softmax& s, Real* const* slots, Range range) {
  static const auto function = ForIsa<SoftmaxBody<Real>, const plan::Softmax&, Real* const*, Range>::get();
  function(s, slots, range);
}

template <class Real>
void PlanKernels<Real>::softmax(const plan::Softmax& s, Real* const* slots) {
  share_first({s.rows, s.columns}, 2, true, [&](Range range) { softmax(s, slots, range); });
}

template struct PlanKernels<float>;
template struct PlanKernels<double>;

}  // namespace hg::cpu
