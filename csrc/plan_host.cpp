#include "plan_host.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels.h"
#include "tensors.h"

// Torch's own BLAS, called without the dispatcher. Weak: a torch that exports none is told by has_blas.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*,
                                  const int*);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int);
}

namespace hg::plan {
namespace {

// Multiply-adds of one matrix product below which a second thread is not worth waiting for.
constexpr double kGrainOps = 1 << 23;

void blas(const char* ta, const char* tb, const int* m, const int* n, const int* k, const float* alpha, const float* a,
          const int* lda, const float* b, const int* ldb, const float* beta, float* c, const int* ldc) {
  sgemm_(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void blas(const char* ta, const char* tb, const int* m, const int* n, const int* k, const double* alpha,
          const double* a, const int* lda, const double* b, const int* ldb, const double* beta, double* c,
          const int* ldc) {
  dgemm_(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// How BLAS sees rows of a matrix: distance between them, or that the matrix is transposed.
struct Leading {
  bool transposed;
  int stride;
};
Leading leading(const View& x) {
  const int64_t rows = x.sizes[1], columns = x.sizes[2], down = x.strides[1], along = x.strides[2];
  if ((along == 1 || columns == 1) && (down >= columns || rows == 1))
    return {false, static_cast<int>(rows == 1 ? std::max<int64_t>(columns, 1) : down)};
  return {true, static_cast<int>(columns == 1 ? std::max<int64_t>(rows, 1) : along)};
}

class OneThread {
 public:
  explicit OneThread(bool active) : active_(active && MKL_Set_Num_Threads_Local != nullptr) {
    if (active_) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneThread() {
    if (active_) MKL_Set_Num_Threads_Local(before_);
  }

 private:
  bool active_;
  int before_ = 0;
};

double work(const Gemm& g) { return static_cast<double>(g.a.sizes[0]) * g.a.sizes[1] * g.a.sizes[2] * g.b.sizes[2]; }

VectorList as_list(const at::Tensor& t) {
  const DType dtype = t.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
  return {{{static_cast<char*>(t.data_ptr()), t.size(1), t.size(1)}}, dtype};
}

}  // namespace

int64_t Plan::numel() const { return std::accumulate(leaves.begin(), leaves.end(), int64_t{0}); }

bool has_blas() { return sgemm_ != nullptr && dgemm_ != nullptr; }

void check(Plan& plan) {
  const int64_t leaves = static_cast<int64_t>(plan.leaves.size());
  const int64_t first_constant = 1 + leaves, first_dynamic = first_constant + plan.constants;
  const int64_t first_out = first_dynamic + plan.dynamic;
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
                                                  : plan.leaves[slot - first_out];
    TORCH_CHECK_VALUE(end <= there, "a view reaches element ", end, " of ", there, " in slot ", slot);
  };
  for (const Instruction& instruction : plan.instructions) {
    if (const auto* g = std::get_if<Gemm>(&instruction.work)) {
      for (const View* view : {&g->a, &g->b, &g->out}) {
        TORCH_CHECK_VALUE(view->sizes.size() == 3, "a matrix product has ", view->sizes.size(), " dimensions");
        inside(*view);
      }
      TORCH_CHECK_VALUE(g->a.sizes[1] == g->out.sizes[1] && g->b.sizes[2] == g->out.sizes[2] &&
                            g->a.sizes[2] == g->b.sizes[1] && g->a.sizes[0] == g->out.sizes[0] &&
                            g->b.sizes[0] == g->out.sizes[0],
                        "matrices do not fit: ", g->a.sizes, " times ", g->b.sizes, " is not ", g->out.sizes);
    } else if (const auto* p = std::get_if<Pointwise>(&instruction.work)) {
      const int64_t count = static_cast<int64_t>(p->operands.size());
      TORCH_CHECK_VALUE(count <= kMaxOperands, "a group has ", count, " operands");
      for (const View& view : p->operands) {
        TORCH_CHECK_VALUE(view.sizes == p->sizes, "operands of a group differ in their sizes");
        inside(view);
      }
      for (const Op& op : p->ops)
        TORCH_CHECK_VALUE(op.out >= 0 && std::max({op.out, op.a, op.b, op.c}) < count &&
                              op.scalar < plan.scalars + static_cast<int64_t>(plan.immediates.size()),
                          "an op names an operand that is not there");
    } else if (const auto* s = std::get_if<Sum>(&instruction.work)) {
      TORCH_CHECK_VALUE(s->out.sizes == s->sizes && s->in.sizes == s->sizes, "a sum's views differ in their sizes");
      inside(s->out), inside(s->in);
    } else if (const auto* m = std::get_if<Softmax>(&instruction.work)) {
      for (const View* view : {&m->grad, &m->probabilities, &m->out})
        inside({view->slot, view->offset, {m->rows, m->columns}, {m->columns, 1}});
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
  const int64_t k = b.size(0);
  TORCH_CHECK_VALUE(stop.dim() == 1 && stop.size(0) == k && stop.scalar_type() == at::kDouble && stop.is_contiguous(),
                    "stop must be float64 with shape (", k, ",), got ", stop.scalar_type(), " ", stop.sizes());
  TORCH_CHECK_VALUE(steps >= 0, "steps must be at least 0, got ", steps);
  at::Tensor v = b.clone(), p = b.clone(), hv = empty_like(b);
  at::Tensor history = full({steps, k, kNeumannStats}, -1.0, stop.options());
  const VectorList v_list = as_list(v), p_list = as_list(p), hv_list = as_list(hv);
  const double* limit = stop.const_data_ptr<double>();
  double* stats = history.mutable_data_ptr<double>();
  for (int64_t step = 0; step < steps; ++step, stats += k * kNeumannStats) {
    rows(v, hv);
    cpu::neumann_step(v_list, p_list, hv_list, k, stats, alpha, damping);
    bool running = false;
    for (int64_t row = 0; row < k; ++row) {
      const double square = stats[row * kNeumannStats + kNormSquared];
      running |= square > limit[row] && finite(square);
    }
    if (!running) break;
  }
  return {p.mul_(alpha), history};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> Bound::conjugate_gradients(const at::Tensor& b, double damping,
                                                                          int64_t steps, const at::Tensor& state) {
  check_vectors("b", b);
  const int64_t k = b.size(0);
  TORCH_CHECK_VALUE(state.dim() == 2 && state.size(0) == k && state.size(1) == kCgState &&
                        state.scalar_type() == at::kDouble && state.is_contiguous(),
                    "state must be float64 with shape (", k, ", ", static_cast<int>(kCgState), "), got ",
                    state.scalar_type(), " ", state.sizes());
  at::Tensor x = zeros(b.sizes(), b.options()), r = b.clone(), p = b.clone(), hp = empty_like(b),
             scalars = state.clone();
  const VectorList x_list = as_list(x), r_list = as_list(r), p_list = as_list(p), hp_list = as_list(hp);
  double* values = scalars.mutable_data_ptr<double>();
  int64_t step = 0;
  for (; step < steps; ++step) {
    bool running = false;
    for (int64_t row = 0; row < k; ++row) running |= values[row * kCgState + kFlag] == kRunning;
    if (!running) break;
    rows(p, hp);
    cpu::cg_step(x_list, r_list, p_list, hp_list, k, values, damping);
  }
  return {x, scalars, full({}, static_cast<double>(step), at::kLong)};
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
        gemm<Real>(std::get<Gemm>(instruction.work));
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
      default:
        call(std::get<Aten>(instruction.work));
    }
    for (const int64_t slot : instruction.frees) dynamic_[slot - first].reset();
  }
}

template <class Real>
void Bound::gemm(const Gemm& g) {
  const Leading a = leading(g.a), b = leading(g.b), out = leading(g.out);
  const int m = g.out.sizes[1], n = g.out.sizes[2], k = g.a.sizes[2];
  const Real one = 1, beta = g.accumulate ? 1 : 0;
  const Real* pa = static_cast<const Real*>(slots_[g.a.slot]) + g.a.offset;
  const Real* pb = static_cast<const Real*>(slots_[g.b.slot]) + g.b.offset;
  Real* pc = static_cast<Real*>(slots_[g.out.slot]) + g.out.offset;
  const OneThread alone(work(g) / g.out.sizes[0] < kGrainOps);
  // BLAS thinks in columns: the transposed product, of the factors in the other order, is this one in rows.
  for (int64_t i = 0; i < g.out.sizes[0]; ++i)
    blas(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &n, &m, &k, &one, pb + i * g.b.strides[0], &b.stride,
         pa + i * g.a.strides[0], &a.stride, &beta, pc + i * g.out.strides[0], &out.stride);
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
