#include "plan_host.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include "kernels.h"
#include "solve_loop.h"
#include "tensors.h"

namespace hg::plan {
namespace {

template <class Real>
void call(const Compiled& kernel, Real* const* slots, const std::vector<double>& numbers) {
  std::array<void*, kMaxPlaces> places;
  std::array<double, kMaxPlaces> values;
  for (size_t i = 0; i < kernel.views.size(); ++i) places[i] = slots[kernel.views[i].slot] + kernel.views[i].offset;
  for (size_t i = 0; i < kernel.numbers.size(); ++i) values[i] = numbers[kernel.numbers[i]];
  kernel.run(places.data(), values.data());
}

}  // namespace

int64_t Plan::numel() const { return std::accumulate(leaves.begin(), leaves.end(), int64_t{0}); }

Bound::Bound(std::shared_ptr<const Plan> plan, std::vector<at::Tensor> constants, std::vector<double> scalars)
    : plan_(std::move(plan)), constants_(std::move(constants)), numbers_(std::move(scalars)) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(constants_.size()) == plan_->constants, "constants must hold ",
                    plan_->constants, " tensors, got ", constants_.size());
  TORCH_CHECK_VALUE(static_cast<int64_t>(numbers_.size()) == plan_->scalars, "scalars must hold ", plan_->scalars,
                    " numbers, got ", numbers_.size());
  numbers_.insert(numbers_.end(), plan_->immediates.begin(), plan_->immediates.end());
  dynamic_.resize(plan_->dynamic);
  views_.resize(plan_->views);
  slots_.assign(plan_->slots(), nullptr);
  const auto dtype = plan_->is_double ? at::kDouble : at::kFloat;
  arena_ = empty({std::max<int64_t>(plan_->arena, 1)}, at::TensorOptions().dtype(dtype));
  slots_[0] = arena_.data_ptr();
  const int64_t first = 1 + static_cast<int64_t>(plan_->leaves.size());
  for (int64_t i = 0; i < plan_->constants; ++i) {
    TORCH_CHECK_VALUE(constants_[i].is_cpu(), "constants must be on the CPU, got ", constants_[i].device());
    if (plan_->extents[i] > 0) {
      TORCH_CHECK_TYPE(constants_[i].scalar_type() == dtype, "constants must be ", dtype, ", got ",
                       constants_[i].scalar_type());
      const int64_t end = (constants_[i].storage_offset() + plan_->extents[i]) * constants_[i].element_size();
      TORCH_CHECK_VALUE(end <= static_cast<int64_t>(constants_[i].storage().nbytes()),
                        "constants must reach as far as those of the recording");
    }
    slots_[first + i] = constants_[i].data_ptr();
  }
}

void Bound::check_vectors(const char* name, const at::Tensor& t) const {
  const auto dtype = plan_->is_double ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_cpu() && t.dim() == 2 && t.size(1) == plan_->numel() && t.is_contiguous(), name,
                    " must be contiguous on the CPU with shape (k, ", plan_->numel(), "), got ", t.sizes(), " on ",
                    t.device());
}

at::Tensor Bound::product(at::TensorList v) {
  const auto dtype = plan_->is_double ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(v.size() == plan_->leaves.size(), "v must hold ", plan_->leaves.size(), " tensors, got ", v.size());
  std::vector<at::Tensor> kept;
  std::vector<char*> parts;
  parts.reserve(v.size());
  for (size_t i = 0; i < v.size(); ++i) {
    TORCH_CHECK_VALUE(v[i].is_cpu() && v[i].numel() == plan_->leaves[i], "v must hold ", plan_->leaves[i],
                      " elements on the CPU, got ", v[i].sizes(), " on ", v[i].device());
    TORCH_CHECK_TYPE(v[i].scalar_type() == dtype, "v must be ", dtype, ", got ", v[i].scalar_type());
    const bool dense = v[i].is_contiguous();
    if (!dense) kept.push_back(v[i].contiguous());
    parts.push_back(static_cast<char*>((dense ? v[i] : kept.back()).data_ptr()));
  }
  at::Tensor out = empty({plan_->numel()}, at::TensorOptions().dtype(dtype));
  run(parts, static_cast<char*>(out.data_ptr()));
  return out;
}

void Bound::rows(const at::Tensor& v, const at::Tensor& out) {
  const int64_t item = static_cast<int64_t>(v.element_size());
  std::vector<char*> parts(plan_->leaves.size());
  for (int64_t row = 0; row < v.size(0); ++row) {
    char* at = static_cast<char*>(v.data_ptr()) + row * v.size(1) * item;
    for (size_t i = 0; i < parts.size(); ++i) parts[i] = at, at += plan_->leaves[i] * item;
    run(parts, static_cast<char*>(out.data_ptr()) + row * v.size(1) * item);
  }
}

std::tuple<at::Tensor, at::Tensor> Bound::neumann_series(const at::Tensor& b, double alpha, double damping,
                                                         int64_t steps, const at::Tensor& stop) {
  check_vectors("b", b);
  check_stop(b, steps, stop);
  return hg::neumann_series(b, alpha, damping, steps, stop,
                            [this](const at::Tensor& v, at::Tensor& hv) { rows(v, hv); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> Bound::conjugate_gradients(const at::Tensor& b, double damping,
                                                                          int64_t steps, const at::Tensor& state) {
  check_vectors("b", b);
  check_state(b, state);
  return hg::conjugate_gradients(b, damping, steps, state,
                                 [this](const at::Tensor& p, at::Tensor& hp) { rows(p, hp); });
}

void Bound::run(const std::vector<char*>& v, char* out) {
  std::copy(v.begin(), v.end(), slots_.begin() + 1);
  const int64_t item = plan_->is_double ? 8 : 4;
  auto slot = slots_.begin() + 1 + v.size() + plan_->constants + plan_->dynamic;
  for (const int64_t leaf : plan_->leaves) *slot++ = out, out += leaf * item;
  plan_->is_double ? run_as<double>() : run_as<float>();
}

template <class Real>
void Bound::run_as() {
  using Kernels = cpu::PlanKernels<Real>;
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  Real* const* slots = reinterpret_cast<Real* const*>(slots_.data());
  const int64_t first = 1 + static_cast<int64_t>(plan_->leaves.size()) + plan_->constants;
  for (const Instruction& instruction : plan_->instructions) {
    switch (instruction.work.index()) {
      case 0:
        multiply<Real>(std::get<Gemm>(instruction.work), slots);
        break;
      case 1:
        Kernels::pointwise(std::get<Pointwise>(instruction.work), slots, numbers_.data());
        break;
      case 2:
        Kernels::sum(std::get<Sum>(instruction.work), slots);
        break;
      case 3:
        Kernels::softmax(std::get<Softmax>(instruction.work), slots);
        break;
      case 4:
        Kernels::convolve(std::get<Convolution>(instruction.work), slots);
        break;
      case 5:
        plan::call<Real>(std::get<Compiled>(instruction.work), slots, numbers_);
        break;
      default:
        call(std::get<Aten>(instruction.work));
    }
    for (const int64_t slot : instruction.frees) dynamic_[slot - first].reset();
  }
}

at::Tensor Bound::tensor(const Argument& a) {
  if (a.kind == Argument::Kind::constant) return constants_[a.index];
  if (a.kind != Argument::Kind::view) return {};
  const int64_t item = plan_->is_double ? 8 : 4;
  char* data = static_cast<char*>(slots_[a.view.slot]) + a.view.offset * item;
  at::Tensor& kept = views_[a.index];
  if (!kept.defined() || kept.data_ptr() != data)
    kept = at::from_blob(data, a.view.sizes, a.view.strides,
                         at::TensorOptions().dtype(plan_->is_double ? at::kDouble : at::kFloat));
  return kept;
}

c10::IValue Bound::value(const Argument& a) {
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

void Bound::call(const Aten& aten) {
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
  const int64_t first = 1 + static_cast<int64_t>(plan_->leaves.size()) + plan_->constants;
  for (size_t i = 0; i < stack.size(); ++i) {
    if (!aten.results[i]) continue;
    const View& expected = *aten.results[i];
    at::Tensor t = stack[i].toTensor();
    TORCH_CHECK(t.defined() && t.sizes() == at::IntArrayRef(expected.sizes) && t.is_cpu() &&
                    t.scalar_type() == (plan_->is_double ? at::kDouble : at::kFloat),
                aten.op.schema(), " gave another shape, dtype or device than when it was recorded");
    if (t.strides() != at::IntArrayRef(expected.strides))
      t = at::empty_strided(expected.sizes, expected.strides, t.options()).copy_(t);
    slots_[expected.slot] = t.data_ptr();
    dynamic_[expected.slot - first] = std::move(t);
  }
}

}  // namespace hg::plan
