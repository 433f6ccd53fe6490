#include "plan_host.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

#include "cpu/share.h"
#include "plan_lane.h"
#include "tensors.h"

namespace hg::plan {
namespace {

// Bytes that the memory of all threads may take together where whole products are shared.
constexpr int64_t kLaneBytes = int64_t{1} << 28;

// The elements of one vector, if there are several along the first dimension, one after another.
bool dense(const at::Tensor& t, bool several) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= (several ? 1 : 0); --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

}  // namespace

int64_t Plan::numel() const { return std::accumulate(leaves.begin(), leaves.end(), int64_t{0}); }

int64_t Plan::output_numel() const { return std::accumulate(outputs.begin(), outputs.end(), int64_t{0}); }

int64_t Instruction::operations() const {
  if (const auto* kernel = std::get_if<Kernel>(&work)) return plan::operations(*kernel);
  if (const auto* bands = std::get_if<Bands>(&work)) return bands->operations();
  if (const auto* tasks = std::get_if<Tasks>(&work)) return tasks->operations;
  int64_t sum = 0;
  for (const auto& result : std::get<Aten>(work).results) sum += result ? elements(result->sizes) : 0;
  return sum;
}

int64_t Plan::operations() const {
  int64_t sum = 0;
  for (const Instruction& instruction : instructions) sum += instruction.operations();
  return sum;
}

void Plan::find_stretches() {
  const auto is_aten = [](const Instruction& i) { return std::holds_alternative<Aten>(i.work); };
  for (size_t begin = 0; begin < instructions.size(); begin = stretches.back().end) {
    Stretch stretch{begin, begin + 1, 0};
    const auto count = [&](size_t i) {
      const int64_t operations = instructions[i].operations();
      if (operations < 2 * kGrain) return 0;
      stretch.shared += operations;
      return 1;
    };
    if (!is_aten(instructions[begin])) {
      int several = count(begin);
      for (; stretch.end < instructions.size() && !is_aten(instructions[stretch.end]); ++stretch.end)
        several += count(stretch.end);
      // A single one is shared as well alone.
      if (several < 2) stretch.shared = 0;
    }
    stretches.push_back(stretch);
  }
}

Bound::Bound(std::shared_ptr<const Plan> plan, std::vector<at::Tensor> constants, std::vector<double> scalars)
    : plan_(std::move(plan)), constants_(std::move(constants)), numbers_(std::move(scalars)) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(constants_.size()) == plan_->constants, "constants must hold ",
                    plan_->constants, " tensors, got ", constants_.size());
  TORCH_CHECK_VALUE(static_cast<int64_t>(numbers_.size()) == plan_->scalars, "scalars must hold ", plan_->scalars,
                    " numbers, got ", numbers_.size());
  numbers_.insert(numbers_.end(), plan_->immediates.begin(), plan_->immediates.end());
  for (int64_t i = 0; i < plan_->constants; ++i) {
    TORCH_CHECK_VALUE(constants_[i].is_cpu(), "constants must be on the CPU, got ", constants_[i].device());
    if (plan_->extents[i] == 0) continue;
    TORCH_CHECK_TYPE(constants_[i].scalar_type() == plan_->dtype(), "constants must be ", plan_->dtype(), ", got ",
                     constants_[i].scalar_type());
    const int64_t end = (constants_[i].storage_offset() + plan_->extents[i]) * plan_->item();
    TORCH_CHECK_VALUE(end <= static_cast<int64_t>(constants_[i].storage().nbytes()),
                      "constants must reach as far as those of the recording");
  }
  lane(0);
}

Bound::~Bound() = default;

Lane& Bound::lane(int64_t thread) {
  while (static_cast<int64_t>(lanes_.size()) <= thread)
    lanes_.push_back(std::make_unique<Lane>(*plan_, constants_, numbers_));
  return *lanes_[thread];
}

int64_t Bound::most_lanes() const {
  return std::clamp<int64_t>(kLaneBytes / (plan_->arena * plan_->item() + 1), 1, at::get_num_threads());
}

void Bound::check_vectors(const char* name, const at::Tensor& t) const {
  TORCH_CHECK_TYPE(t.scalar_type() == plan_->dtype(), name, " must be ", plan_->dtype(), ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_cpu() && t.dim() == 2 && t.size(1) == plan_->numel() && t.is_contiguous(), name,
                    " must be contiguous on the CPU with shape (k, ", plan_->numel(), "), got ", t.sizes(), " on ",
                    t.device());
  TORCH_CHECK_VALUE(plan_->outputs == plan_->leaves, "a solve needs products of the shapes of its vectors");
}

at::Tensor Bound::product(at::TensorList v, std::optional<int64_t> rows) {
  TORCH_CHECK_VALUE(v.size() == plan_->leaves.size(), "v must hold ", plan_->leaves.size(), " tensors, got ", v.size());
  const int64_t k = rows.value_or(1);
  std::vector<at::Tensor> kept;
  std::vector<Part> parts;
  parts.reserve(v.size());
  for (size_t i = 0; i < v.size(); ++i) {
    TORCH_CHECK_VALUE(
        v[i].is_cpu() && v[i].numel() == k * plan_->leaves[i] && (!rows || (v[i].dim() > 0 && v[i].size(0) == k)),
        "v must hold ", k, " times ", plan_->leaves[i], " elements on the CPU, got ", v[i].sizes(), " on ",
        v[i].device());
    TORCH_CHECK_TYPE(v[i].scalar_type() == plan_->dtype(), "v must be ", plan_->dtype(), ", got ", v[i].scalar_type());
    const bool in_place = dense(v[i], rows.has_value());
    if (!in_place) kept.push_back(v[i].contiguous());
    const at::Tensor& t = in_place ? v[i] : kept.back();
    parts.push_back({static_cast<char*>(t.data_ptr()), rows ? t.stride(0) * plan_->item() : 0});
  }
  const at::TensorOptions options = at::TensorOptions().dtype(plan_->dtype());
  const int64_t n = plan_->output_numel();
  at::Tensor out = rows ? empty({k, n}, options) : empty({n}, options);
  const std::lock_guard<std::mutex> lock(mutex_);
  run(parts, k, static_cast<char*>(out.data_ptr()));
  return out;
}

void Bound::run(const at::Tensor& v, const at::Tensor& out) {
  std::vector<Part> parts;
  char* at = static_cast<char*>(v.data_ptr());
  for (const int64_t leaf : plan_->leaves) {
    parts.push_back({at, v.size(1) * plan_->item()});
    at += leaf * plan_->item();
  }
  run(parts, v.size(0), static_cast<char*>(out.data_ptr()));
}

void Bound::run(const std::vector<Part>& v, int64_t rows, char* out) {
  const int64_t row_bytes = plan_->output_numel() * plan_->item();
  const auto one = [&](int64_t row, Lane& lane) {
    std::vector<char*> parts(v.size());
    for (size_t i = 0; i < v.size(); ++i) parts[i] = v[i].data + row * v[i].stride;
    lane.run(parts, out + row * row_bytes);
  };
  int64_t row = 0;
  if (rows > 1 && most_lanes() > 1) {
    // Whole products on every thread; the last ones, fewer than threads, are shared within.
    cpu::Team team = cpu::team_for(rows * plan_->operations(), kGrain);
    team.threads = std::min({team.threads, most_lanes(), rows});
    if (team.threads > 1) {
      lane(team.threads - 1);
      row = rows - rows % team.threads;
      cpu::share(row, team, [&](int64_t task, int64_t thread) { one(task, *lanes_[thread]); });
    }
  }
  for (; row < rows; ++row) one(row, *lanes_[0]);
}

Multiply Bound::product_with(int64_t rows) {
  const auto product = [this](const at::Tensor& v, at::Tensor& out) { run(v, out); };
  const auto& stretches = plan_->stretches;
  const bool ours = stretches.size() == 1 && !std::holds_alternative<Aten>(plan_->instructions[0].work);
  return {product, ours ? cpu::team_for(rows * plan_->operations(), 2 * kGrain) : cpu::Team{1, false}};
}

std::tuple<at::Tensor, at::Tensor> Bound::neumann_series(const at::Tensor& b, double alpha, double damping,
                                                         int64_t steps, const at::Tensor& stop) {
  check_vectors("b", b);
  check_stop(b, steps, stop);
  const std::lock_guard<std::mutex> lock(mutex_);
  return hg::neumann_series(b, alpha, damping, steps, stop, product_with(b.size(0)));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> Bound::conjugate_gradients(const at::Tensor& b, double damping,
                                                                          int64_t steps, const at::Tensor& state) {
  check_vectors("b", b);
  check_state(b, state);
  const std::lock_guard<std::mutex> lock(mutex_);
  return hg::conjugate_gradients(b, damping, steps, state, product_with(b.size(0)));
}

}  // namespace hg::plan
