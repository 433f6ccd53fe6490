#include "plan_lane.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>

#include "cpu/share.h"
#include "tensors.h"

namespace hg::plan {
namespace {

// Ranges of a compiled kernel per thread.
constexpr int64_t kRanges = 2;

// By the kernel for its shape.
template <class Real>
void multiply(const Gemm& g, Real* const* slots) {
  using Kernels = cpu::PlanKernels<Real>;
  const int64_t rows = g.out.sizes[1], columns = g.out.sizes[2];
  const bool deep = g.a.sizes[2] >= kNarrowDepth;
  if (deep && std::min(rows, columns) <= kNarrow && g.a.strides[2] == 1 && g.b.strides[1] == 1)
    return Kernels::dots(g, slots);
  if (deep && rows <= kNarrow && columns > kNarrow && g.b.strides[2] == 1) return Kernels::few_rows(g, slots);
  Kernels::multiply(g, slots);
}

template <class Real>
struct Run {
  using Kernels = cpu::PlanKernels<Real>;

  Real* const* slots;
  const std::vector<double>& numbers;

  void operator()(const Gemm& g) const { multiply(g, slots); }
  void operator()(const Pointwise& p) const { Kernels::pointwise(p, slots, numbers.data()); }
  void operator()(const Sum& s) const { Kernels::sum(s, slots); }
  void operator()(const Softmax& s) const { Kernels::softmax(s, slots); }
  void operator()(const Convolution& c) const { Kernels::convolve(c, slots); }
  void operator()(const Sweep& s) const { Kernels::sweep(s, slots, numbers.data()); }

  void operator()(const Compiled& kernel) const {
    std::array<void*, kMaxPlaces> places;
    std::array<double, kMaxPlaces> values;
    for (size_t i = 0; i < kernel.views.size(); ++i) places[i] = slots[kernel.views[i].slot] + kernel.views[i].offset;
    for (size_t i = 0; i < kernel.numbers.size(); ++i) values[i] = numbers[kernel.numbers[i]];
    const auto [begin, end] = kernel.range;
    const cpu::Team team = cpu::team_for(kernel.apart ? operations(kernel) : 0, kGrain);
    const int64_t count = end - begin, ranges = team.ranges(count, kRanges);
    cpu::share(ranges, team, [&, begin = begin](int64_t i) {
      kernel.run(places.data(), values.data(), begin + i * count / ranges, begin + (i + 1) * count / ranges);
    });
  }

  void operator()(const Bands& b) const {
    const cpu::Team team = cpu::team_for(b.operations(), kGrain);
    const int64_t bands = cpu::has_help(team) ? std::min(team.threads, b.rows()) : 1;
    if (bands == 1) return all(b.kernels());
    const auto& narrowed = b.in(bands);
    cpu::share(bands, team, [&](int64_t i) { all(narrowed[i]); });
  }

  void operator()(const Tasks& t) const {
    cpu::share(static_cast<int64_t>(t.kernels.size()), cpu::team_for(t.operations, kGrain),
               [&](int64_t i) { std::visit(*this, t.kernels[i]); });
  }

  void all(const std::vector<Kernel>& kernels) const {
    for (const Kernel& kernel : kernels) std::visit(*this, kernel);
  }
};

}  // namespace

Lane::Lane(const Plan& plan, const std::vector<at::Tensor>& constants, const std::vector<double>& numbers)
    : plan_(plan),
      constants_(constants),
      numbers_(numbers),
      arena_(empty({std::max<int64_t>(plan.arena, 1)}, at::TensorOptions().dtype(plan.dtype()))),
      dynamic_(plan.dynamic),
      views_(plan.views),
      slots_(plan.slots(), nullptr) {
  slots_[0] = arena_.data_ptr();
  for (int64_t i = 0; i < plan.constants; ++i) slots_[plan.first_constant() + i] = constants[i].data_ptr();
}

void Lane::run(const std::vector<char*>& v, char* out) {
  std::copy(v.begin(), v.end(), slots_.begin() + 1);
  auto slot = slots_.begin() + plan_.first_output();
  for (const int64_t output : plan_.outputs) *slot++ = out, out += output * plan_.item();
  plan_.is_double ? run_as<double>() : run_as<float>();
}

template <class Real>
void Lane::run_as() {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Run<Real> run{reinterpret_cast<Real* const*>(slots_.data()), numbers_};
  const int64_t first = plan_.first_dynamic();
  const auto step = [&](const Instruction& instruction) {
    if (const auto* kernel = std::get_if<Kernel>(&instruction.work))
      std::visit(run, *kernel);
    else if (const auto* bands = std::get_if<Bands>(&instruction.work))
      run(*bands);
    else if (const auto* tasks = std::get_if<Tasks>(&instruction.work))
      run(*tasks);
    else
      call(std::get<Aten>(instruction.work));
    for (const int64_t slot : instruction.frees) dynamic_[slot - first].reset();
  };
  for (const Stretch& stretch : plan_.stretches)
    cpu::lead(cpu::team_for(stretch.shared, kGrain), [&] {
      for (size_t i = stretch.begin; i < stretch.end; ++i) step(plan_.instructions[i]);
    });
}

at::Tensor Lane::tensor(const Argument& a) {
  if (a.kind == Argument::Kind::constant) return constants_[a.index];
  if (a.kind != Argument::Kind::view) return {};
  char* data = static_cast<char*>(slots_[a.view.slot]) + a.view.offset * plan_.item();
  at::Tensor& kept = views_[a.index];
  if (!kept.defined() || kept.data_ptr() != data)
    kept = at::from_blob(data, a.view.sizes, a.view.strides, at::TensorOptions().dtype(plan_.dtype()));
  return kept;
}

c10::IValue Lane::value(const Argument& a) {
  switch (a.kind) {
    case Argument::Kind::literal:
      return a.literal;
    case Argument::Kind::number:
      return numbers_[a.index];
    case Argument::Kind::list: {
      if (a.optional_items) {
        c10::List<std::optional<at::Tensor>> list;
        for (const Argument& item : a.items) {
          const at::Tensor t = tensor(item);
          list.push_back(t.defined() ? std::optional<at::Tensor>(t) : std::nullopt);
        }
        return list;
      }
      c10::List<at::Tensor> list;
      for (const Argument& item : a.items) list.push_back(tensor(item));
      return list;
    }
    default:
      return tensor(a);
  }
}

void Lane::call(const Aten& aten) {
  torch::jit::Stack stack;
  stack.reserve(aten.arguments.size());
  for (const Argument& a : aten.arguments) stack.push_back(value(a));
  aten.op.callBoxed(stack);
  // A single result that is a list (split and the like) stands for its elements.
  if (stack.size() == 1 && stack[0].isTensorList()) {
    const auto list = stack[0].toTensorVector();
    stack.assign(list.begin(), list.end());
  }
  TORCH_CHECK(stack.size() == aten.results.size(), aten.op.schema(), " gave ", stack.size(), " results");
  const int64_t first = plan_.first_dynamic();
  for (size_t i = 0; i < stack.size(); ++i) {
    if (!aten.results[i]) continue;
    const View& expected = *aten.results[i];
    at::Tensor t = stack[i].toTensor();
    TORCH_CHECK(
        t.defined() && t.sizes() == at::IntArrayRef(expected.sizes) && t.is_cpu() && t.scalar_type() == plan_.dtype(),
        aten.op.schema(), " gave another shape, dtype or device than when it was recorded");
    if (t.strides() != at::IntArrayRef(expected.strides))
      t = at::empty_strided(expected.sizes, expected.strides, t.options()).copy_(t);
    slots_[expected.slot] = t.data_ptr();
    dynamic_[expected.slot - first] = std::move(t);
  }
}

}  // namespace hg::plan
