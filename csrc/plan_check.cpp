// What a native plan must not do: reach outside its memory, or name what is not there.
#include <algorithm>

#include "plan_host.h"

namespace hg::plan {
namespace {

// Elements from the first of a slot to the last of a view.
int64_t extent(const View& view) {
  TORCH_CHECK_VALUE(view.sizes.size() == view.strides.size() && view.sizes.size() <= kMaxDims && view.offset >= 0,
                    "a view has ", view.sizes.size(), " sizes and ", view.strides.size(), " strides");
  int64_t last = view.offset;
  for (size_t d = 0; d < view.sizes.size(); ++d) {
    TORCH_CHECK_VALUE(view.sizes[d] > 0 && view.strides[d] >= 0, "a view has a size or stride that is not positive");
    last += (view.sizes[d] - 1) * view.strides[d];
  }
  return last + 1;
}

class Check {
 public:
  explicit Check(Plan& plan) : plan_(plan), results_(plan.dynamic, 0) { plan.extents.assign(plan.constants, 0); }

  void operator()(const Kernel& kernel) {
    std::visit([&](const auto& k) { (*this)(k); }, kernel);
  }

  void operator()(const Gemm& g) {
    for (const View* view : {&g.a, &g.b, &g.out}) {
      TORCH_CHECK_VALUE(view->sizes.size() == 3, "a matrix product has ", view->sizes.size(), " dimensions");
      inside(*view);
    }
    TORCH_CHECK_VALUE(g.a.sizes[1] == g.out.sizes[1] && g.b.sizes[2] == g.out.sizes[2] &&
                          g.a.sizes[2] == g.b.sizes[1] && g.a.sizes[0] == g.out.sizes[0] &&
                          g.b.sizes[0] == g.out.sizes[0],
                      "matrices do not fit: ", g.a.sizes, " times ", g.b.sizes, " is not ", g.out.sizes);
  }

  void operator()(const Pointwise& p) {
    const int64_t count = static_cast<int64_t>(p.operands.size());
    TORCH_CHECK_VALUE(count <= kMaxOperands, "a group has ", count, " operands");
    for (const View& view : p.operands) {
      TORCH_CHECK_VALUE(view.sizes == p.sizes, "operands of a group differ in their sizes");
      inside(view);
    }
    for (const Op& op : p.ops)
      TORCH_CHECK_VALUE(op.out >= 0 && std::max({op.out, op.a, op.b, op.c}) < count && op.scalar < numbers(),
                        "an op names an operand that is not there");
  }

  void operator()(const Sum& s) {
    TORCH_CHECK_VALUE(s.out.sizes == s.sizes && s.in.sizes == s.sizes, "a sum's views differ in their sizes");
    inside(s.out), inside(s.in);
  }

  void operator()(const Softmax& m) {
    for (const View* view : {&m.grad, &m.probabilities, &m.out})
      inside({view->slot, view->offset, {m.rows, m.columns}, {m.columns, 1}});
  }

  void operator()(const Convolution& c) {
    for (const View* view : {&c.x, &c.w, &c.y}) {
      TORCH_CHECK_VALUE(view->sizes.size() == 4, "a convolution has ", view->sizes.size(), " dimensions");
      inside(*view);
    }
    for (int d = 0; d < 2; ++d) {
      TORCH_CHECK_VALUE(c.stride[d] > 0 && c.dilation[d] > 0 && c.padding[d] >= 0,
                        "a convolution has a stride or dilation that is not positive, or a negative padding");
      const int64_t room = c.x.sizes[2 + d] + 2 * c.padding[d] - c.dilation[d] * (c.w.sizes[2 + d] - 1) - 1;
      TORCH_CHECK_VALUE(room >= 0 && room / c.stride[d] + 1 == c.y.sizes[2 + d], "a convolution of ", c.x.sizes,
                        " with ", c.w.sizes, " is not ", c.y.sizes);
    }
    TORCH_CHECK_VALUE(c.x.sizes[0] == c.y.sizes[0] && c.x.sizes[1] == c.w.sizes[1] && c.y.sizes[1] == c.w.sizes[0] &&
                          (c.by_weight || c.y.strides[3] == 1) && !(c.by_weight && c.flipped),
                      "a convolution of ", c.x.sizes, " with ", c.w.sizes, " is not ", c.y.sizes);
  }

  void operator()(const Sweep& s) {
    (*this)(s.first), (*this)(s.last);
    const View &x = s.first.a, &again = s.last.b;
    TORCH_CHECK_VALUE(x.slot == again.slot && x.offset == again.offset && x.sizes == again.sizes &&
                          x.strides[1] == again.strides[1] && x.sizes[0] == 1,
                      "a sweep multiplies by two matrices");
    TORCH_CHECK_VALUE(x.strides[2] == 1 && again.strides[2] == 1 && s.first.b.strides[1] == 1 &&
                          s.last.out.strides[2] == 1 && s.first.out.sizes[2] <= kNarrow &&
                          s.last.out.sizes[1] <= kNarrow && !s.first.accumulate,
                      "a sweep's products must be narrow and have dense rows");
    for (const auto& work : s.between) {
      std::visit([&](const auto& w) { (*this)(w); }, work);
      const auto* m = std::get_if<Softmax>(&work);
      const auto* p = std::get_if<Pointwise>(&work);
      TORCH_CHECK_VALUE(m ? m->rows == x.sizes[1] : !p->sizes.empty() && p->sizes[0] % x.sizes[1] == 0,
                        "what lies between a sweep's products has other rows");
    }
  }

  void operator()(const Compiled& k) {
    TORCH_CHECK_VALUE(k.run && k.views.size() <= kMaxPlaces && k.numbers.size() <= kMaxPlaces, "a kernel takes ",
                      k.views.size(), " views and ", k.numbers.size(), " numbers");
    for (const View& view : k.views) inside(view);
    for (const int64_t number : k.numbers)
      TORCH_CHECK_VALUE(number >= 0 && number < numbers(), "no such number: ", number);
  }

  void operator()(const Bands& b) {
    TORCH_CHECK_VALUE(b.rows() > 0, "bands of ", b.rows(), " rows");
    for (const Kernel& kernel : b.kernels()) {
      (*this)(kernel);
      const int64_t size = rows_of(kernel);
      TORCH_CHECK_VALUE(size > 0 && size % b.rows() == 0, "a kernel of bands has ", size, " rows, not a multiple of ",
                        b.rows());
    }
  }

  void operator()(const Tasks& t) {
    for (const Kernel& kernel : t.kernels) (*this)(kernel);
  }

  void operator()(const Aten& call) {
    for (const Argument& a : call.arguments) {
      TORCH_CHECK_VALUE(a.kind != Argument::Kind::number || a.index < plan_.scalars, "no such number: ", a.index);
      if (a.kind == Argument::Kind::view) inside(a.view);
      for (const Argument& item : a.items)
        if (item.kind == Argument::Kind::view) inside(item.view);
    }
    for (const auto& result : call.results) {
      if (!result) continue;
      TORCH_CHECK_VALUE(is_dynamic(result->slot), "a result is in slot ", result->slot);
      results_[result->slot - plan_.first_dynamic()] = extent(*result);
    }
  }

  void frees(int64_t slot) const { TORCH_CHECK_VALUE(is_dynamic(slot), "slot ", slot, " cannot be freed"); }

 private:
  int64_t numbers() const { return plan_.scalars + static_cast<int64_t>(plan_.immediates.size()); }

  bool is_dynamic(int64_t slot) const { return slot >= plan_.first_dynamic() && slot < plan_.first_output(); }

  // Where bands are cut; 0 if that cannot be.
  static int64_t rows_of(const Kernel& kernel) {
    if (const auto* g = std::get_if<Gemm>(&kernel)) return g->out.sizes[g->out.sizes[0] > 1 ? 0 : 1];
    if (const auto* p = std::get_if<Pointwise>(&kernel)) return p->sizes.empty() ? 0 : p->sizes[0];
    if (const auto* s = std::get_if<Sum>(&kernel)) return s->sizes.empty() ? 0 : s->sizes[0];
    if (const auto* m = std::get_if<Softmax>(&kernel)) return m->rows;
    if (const auto* c = std::get_if<Convolution>(&kernel)) return c->by_weight ? 0 : c->y.sizes[0];
    if (const auto* k = std::get_if<Compiled>(&kernel)) return k->range.end;
    return 0;
  }

  void inside(const View& view) {
    const int64_t end = extent(view), slot = view.slot, first = plan_.first_constant();
    TORCH_CHECK_VALUE(slot >= 0 && slot < plan_.slots(), "a view is in slot ", slot, " of ", plan_.slots());
    if (slot >= first && slot < plan_.first_dynamic()) {
      plan_.extents[slot - first] = std::max(plan_.extents[slot - first], end);
      return;
    }
    const int64_t there = slot == 0          ? plan_.arena
                          : slot < first     ? plan_.leaves[slot - 1]
                          : is_dynamic(slot) ? results_[slot - plan_.first_dynamic()]
                                             : plan_.outputs[slot - plan_.first_output()];
    TORCH_CHECK_VALUE(end <= there, "a view reaches element ", end, " of ", there, " in slot ", slot);
  }

  Plan& plan_;
  std::vector<int64_t> results_;  // elements of what ATen allocates
};

}  // namespace

void check(Plan& plan) {
  Check check(plan);
  for (const Instruction& instruction : plan.instructions) {
    std::visit([&](const auto& work) { check(work); }, instruction.work);
    for (const int64_t slot : instruction.frees) check.frees(slot);
  }
  plan.find_stretches();
}

}  // namespace hg::plan
