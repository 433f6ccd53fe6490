#include "plan_bands.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace hg::plan {
namespace {

struct Operations {
  int64_t operator()(const Gemm& g) const { return elements(g.out.sizes) * g.a.sizes[2]; }
  int64_t operator()(const Pointwise& p) const { return elements(p.sizes) * static_cast<int64_t>(p.ops.size()); }
  int64_t operator()(const Sum& s) const { return elements(s.sizes); }
  int64_t operator()(const Softmax& s) const { return s.rows * s.columns; }
  int64_t operator()(const Convolution& c) const {
    return elements(c.y.sizes) * elements(c.w.sizes) / std::max<int64_t>(1, c.w.sizes[0]);
  }
  int64_t operator()(const Sweep& s) const {
    int64_t sum = (*this)(s.first) + (*this)(s.last);
    for (const auto& work : s.between) sum += std::visit(*this, work);
    return sum;
  }
  int64_t operator()(const Compiled& c) const {
    int64_t sum = 0;
    for (const View& view : c.views) sum += elements(view.sizes);
    return sum;
  }
};

// A kernel on some of its rows.
struct Narrowed {
  int64_t rows;
  Range band;

  Range of(int64_t size) const { return {size / rows * band.begin, size / rows * band.end}; }

  void narrow(View& view, size_t d) const {
    const Range range = of(view.sizes[d]);
    view.offset += range.begin * view.strides[d];
    view.sizes[d] = range.end - range.begin;
  }

  Kernel operator()(Gemm g) const {
    const bool batch = g.out.sizes[0] > 1;
    narrow(g.a, batch ? 0 : 1);
    if (batch) narrow(g.b, 0);
    narrow(g.out, batch ? 0 : 1);
    return g;
  }
  Kernel operator()(Pointwise p) const {
    for (View& view : p.operands) narrow(view, 0);
    const Range range = of(p.sizes[0]);
    p.sizes[0] = range.end - range.begin;
    return p;
  }
  Kernel operator()(Sum s) const {
    narrow(s.out, 0), narrow(s.in, 0);
    s.sizes[0] = s.out.sizes[0];
    return s;
  }
  Kernel operator()(Softmax s) const {
    const Range range = of(s.rows);
    for (View* view : {&s.grad, &s.probabilities, &s.out}) view->offset += range.begin * s.columns;
    s.rows = range.end - range.begin;
    return s;
  }
  Kernel operator()(Convolution c) const {
    narrow(c.x, 0), narrow(c.y, 0);
    return c;
  }
  Kernel operator()(Compiled c) const {
    c.range = of(c.range.end);
    return c;
  }
  Kernel operator()(Sweep s) const { return s; }  // check() has refused it
};

}  // namespace

int64_t elements(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

int64_t operations(const Kernel& kernel) { return std::visit(Operations{}, kernel); }

Bands::Bands(int64_t rows, std::vector<Kernel> kernels) : rows_(rows), kernels_(std::move(kernels)) {
  for (const Kernel& kernel : kernels_) operations_ += plan::operations(kernel);
}

const std::vector<std::vector<Kernel>>& Bands::in(int64_t bands) const {
  const std::lock_guard lock(known_->mutex);
  auto& made = known_->bands[bands];
  for (int64_t i = static_cast<int64_t>(made.size()); i < bands; ++i) {
    std::vector<Kernel> band;
    const Narrowed narrowed{rows_, {i * rows_ / bands, (i + 1) * rows_ / bands}};
    for (const Kernel& kernel : kernels_) band.push_back(std::visit(narrowed, kernel));
    made.push_back(std::move(band));
  }
  return made;
}

Tasks::Tasks(std::vector<Kernel> all) : kernels(std::move(all)) {
  for (const Kernel& kernel : kernels) operations += plan::operations(kernel);
}

}  // namespace hg::plan
