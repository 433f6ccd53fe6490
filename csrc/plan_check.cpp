// What a native plan must not do: reach outside its memory, or name what is not there.
#include <algorithm>

#include "plan_host.h"

namespace hg::plan {

void check(Plan& plan) {
  const int64_t first_constant = plan.first_constant(), first_dynamic = plan.first_dynamic();
  const int64_t first_out = plan.first_output();
  plan.extents.assign(plan.constants, 0);
  std::vector<int64_t> results(plan.dynamic, 0);
  const auto extent = [](const View& view) {
    TORCH_CHECK_VALUE(view.sizes.size() == view.strides.size() && view.sizes.size() <= kMaxDims && view.offset >= 0,
                      "a view has ", view.sizes.size(), " sizes and ", view.strides.size(), " strides");
    int64_t last = view.offset;
    for (size_t d = 0; d < view.sizes.size(); ++d) {
      TORCH_CHECK_VALUE(view.sizes[d] > 0 && view.strides[d] >= 0, "a view has a size or stride that is not positive");
      last += (view.sizes[d] - 1) * view.strides[d];
    }
    return last + 1;
  };
  const auto inside = [&](const View& view) {
    const int64_t end = extent(view), slot = view.slot;
    TORCH_CHECK_VALUE(slot >= 0 && slot < plan.slots(), "a view is in slot ", slot, " of ", plan.slots());
    if (slot >= first_constant && slot < first_dynamic) {
      plan.extents[slot - first_constant] = std::max(plan.extents[slot - first_constant], end);
      return;
    }
    const int64_t there = slot == 0               ? plan.arena
                          : slot < first_constant ? plan.leaves[slot - 1]
                          : slot < first_out      ? results[slot - first_dynamic]
                                                  : plan.outputs[slot - first_out];
    TORCH_CHECK_VALUE(end <= there, "a view reaches element ", end, " of ", there, " in slot ", slot);
  };
  const auto check_product = [&](const Gemm& g) {
    for (const View* view : {&g.a, &g.b, &g.out}) {
      TORCH_CHECK_VALUE(view->sizes.size() == 3, "a matrix product has ", view->sizes.size(), " dimensions");
      inside(*view);
    }
    TORCH_CHECK_VALUE(g.a.sizes[1] == g.out.sizes[1] && g.b.sizes[2] == g.out.sizes[2] &&
                          g.a.sizes[2] == g.b.sizes[1] && g.a.sizes[0] == g.out.sizes[0] &&
                          g.b.sizes[0] == g.out.sizes[0],
                      "matrices do not fit: ", g.a.sizes, " times ", g.b.sizes, " is not ", g.out.sizes);
  };
  const auto check_pointwise = [&](const Pointwise& p) {
    const int64_t count = static_cast<int64_t>(p.operands.size());
    TORCH_CHECK_VALUE(count <= kMaxOperands, "a group has ", count, " operands");
    for (const View& view : p.operands) {
      TORCH_CHECK_VALUE(view.sizes == p.sizes, "operands of a group differ in their sizes");
      inside(view);
    }
    for (const Op& op : p.ops)
      TORCH_CHECK_VALUE(op.out >= 0 && std::max({op.out, op.a, op.b, op.c}) < count &&
                            op.scalar < plan.scalars + static_cast<int64_t>(plan.immediates.size()),
                        "an op names an operand that is not there");
  };
  const auto check_softmax = [&](const Softmax& m) {
    for (const View* view : {&m.grad, &m.probabilities, &m.out})
      inside({view->slot, view->offset, {m.rows, m.columns}, {m.columns, 1}});
  };
  const auto check_sweep = [&](const Sweep& s) {
    check_product(s.first), check_product(s.last);
    const View &x = s.first.a, &again = s.last.b;
    TORCH_CHECK_VALUE(x.slot == again.slot && x.offset == again.offset && x.sizes == again.sizes &&
                          x.strides[1] == again.strides[1] && x.sizes[0] == 1,
                      "a sweep multiplies by two matrices");
    TORCH_CHECK_VALUE(x.strides[2] == 1 && again.strides[2] == 1 && s.first.b.strides[1] == 1 &&
                          s.last.out.strides[2] == 1 && s.first.out.sizes[2] <= kNarrow &&
                          s.last.out.sizes[1] <= kNarrow && !s.first.accumulate,
                      "a sweep's products must be narrow and have dense rows");
    for (const auto& work : s.between) {
      const auto* m = std::get_if<Softmax>(&work);
      const auto* p = std::get_if<Pointwise>(&work);
      m ? check_softmax(*m) : check_pointwise(*p);
      TORCH_CHECK_VALUE(m ? m->rows == x.sizes[1] : !p->sizes.empty() && p->sizes[0] % x.sizes[1] == 0,
                        "what lies between a sweep's products has other rows");
    }
  };
  for (const Instruction& instruction : plan.instructions) {
    if (const auto* g = std::get_if<Gemm>(&instruction.work)) {
      check_product(*g);
    } else if (const auto* p = std::get_if<Pointwise>(&instruction.work)) {
      check_pointwise(*p);
    } else if (const auto* w = std::get_if<Sweep>(&instruction.work)) {
      check_sweep(*w);
    } else if (const auto* s = std::get_if<Sum>(&instruction.work)) {
      TORCH_CHECK_VALUE(s->out.sizes == s->sizes && s->in.sizes == s->sizes, "a sum's views differ in their sizes");
      inside(s->out), inside(s->in);
    } else if (const auto* m = std::get_if<Softmax>(&instruction.work)) {
      check_softmax(*m);
    } else if (const auto* c = std::get_if<Convolution>(&instruction.work)) {
      for (const View* view : {&c->x, &c->w, &c->y}) {
        TORCH_CHECK_VALUE(view->sizes.size() == 4, "a convolution has ", view->sizes.size(), " dimensions");
        inside(*view);
      }
      for (int d = 0; d < 2; ++d) {
        TORCH_CHECK_VALUE(c->stride[d] > 0 && c->dilation[d] > 0 && c->padding[d] >= 0,
                          "a convolution has a stride or dilation that is not positive, or a negative padding");
        const int64_t room = c->x.sizes[2 + d] + 2 * c->padding[d] - c->dilation[d] * (c->w.sizes[2 + d] - 1) - 1;
        TORCH_CHECK_VALUE(room >= 0 && room / c->stride[d] + 1 == c->y.sizes[2 + d], "a convolution of ", c->x.sizes,
                          " with ", c->w.sizes, " is not ", c->y.sizes);
      }
      TORCH_CHECK_VALUE(c->x.sizes[0] == c->y.sizes[0] && c->x.sizes[1] == c->w.sizes[1] &&
                            c->y.sizes[1] == c->w.sizes[0] && (c->by_weight || c->y.strides[3] == 1) &&
                            !(c->by_weight && c->flipped),
                        "a convolution of ", c->x.sizes, " with ", c->w.sizes, " is not ", c->y.sizes);
    } else if (const auto* k = std::get_if<Compiled>(&instruction.work)) {
      TORCH_CHECK_VALUE(k->run && k->views.size() <= kMaxPlaces && k->numbers.size() <= kMaxPlaces, "a kernel takes ",
                        k->views.size(), " views and ", k->numbers.size(), " numbers");
      for (const View& view : k->views) inside(view);
      for (const int64_t number : k->numbers)
        TORCH_CHECK_VALUE(number >= 0 && number < plan.scalars + static_cast<int64_t>(plan.immediates.size()),
                          "no such number: ", number);
    } else {
      const Aten& call = std::get<Aten>(instruction.work);
      for (const Argument& a : call.arguments) {
        TORCH_CHECK_VALUE(a.kind != Argument::Kind::number || a.index < plan.scalars, "no such number: ", a.index);
        if (a.kind == Argument::Kind::view) inside(a.view);
        for (const Argument& item : a.items)
          if (item.kind == Argument::Kind::view) inside(item.view);
      }
      for (const auto& result : call.results) {
        if (!result) continue;
        TORCH_CHECK_VALUE(result->slot >= first_dynamic && result->slot < first_out, "a result is in slot ",
                          result->slot);
        results[result->slot - first_dynamic] = extent(*result);
      }
    }
    for (const int64_t slot : instruction.frees)
      TORCH_CHECK_VALUE(slot >= first_dynamic && slot < first_out, "slot ", slot, " cannot be freed");
  }
}

}  // namespace hg::plan
