// Host function of the MLP family: tensors in, memory-safety checks, then one kernel on the CPU, or the layers' matrix
// products and what is between them on a GPU.
#include <c10/core/GradMode.h>

#include <algorithm>
#include <deque>
#include <limits>

#include "cuda/call.h"
#include "host.h"
#include "mlp.h"
#include "mlp_layers.h"
#include "solve_loop.h"
#include "tensors.h"

namespace hg {
namespace {

// The matrices of one call: of one dtype, on one device, with rows that may be read up to the padding.
class Matrices {
 public:
  Matrices(const at::Tensor& like, int64_t padding)
      : dtype_(like.scalar_type()), device_(like.device()), padding_(padding) {}

  Rows operator()(const char* name, const at::Tensor& t, int64_t rows, int64_t columns) {
    TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape (", rows, ", ",
                      columns, "), got ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == dtype_, name, " must be ", dtype_, " like v, got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == device_, name, " must be on ", device_, " like v, got ", t.device());
    const int64_t width = (columns + padding_ - 1) / padding_ * padding_;
    if (!readable(t, rows, width)) {
      copies_.push_back(zeros({rows, width}, t.options().requires_grad(false)));
      copies_.back().narrow(1, 0, columns).copy_(t.detach());
      return {copies_.back().const_data_ptr(), width};
    }
    return {t.const_data_ptr(), t.stride(0)};
  }

 private:
  static bool readable(const at::Tensor& t, int64_t rows, int64_t width) {
    if (t.stride(1) != 1 || (rows > 1 && t.stride(0) < width)) return false;
    const int64_t end = t.storage_offset() + (rows - 1) * t.stride(0) + width;
    return rows == 0 || end * static_cast<int64_t>(t.element_size()) <= static_cast<int64_t>(t.storage().nbytes());
  }

  at::ScalarType dtype_;
  at::Device device_;
  int64_t padding_;
  std::deque<at::Tensor> copies_;
};

// Whether kernels of ours may do it all: they count elements of one matrix in 32 bits.
[[maybe_unused]] bool near(const MlpData& data) {
  constexpr int64_t kFarthest = std::numeric_limits<int>::max();
  for (const MlpLayer& layer : data.layers) {
    const int64_t farthest =
        data.n * std::max({layer.hidden.stride, layer.delta.stride, layer.slope.stride, layer.bend.stride});
    if (std::max(farthest, layer.out * layer.weight.stride) > kFarthest) return false;
  }
  return true;
}

void check_count(const char* name, at::TensorList tensors, size_t expected) {
  TORCH_CHECK_VALUE(tensors.size() == expected, name, " must hold ", expected, " tensors, got ", tensors.size());
}

// The tensors of one call: checked, and as kernels take them. v: the vectors, or the right-hand sides.
struct Model {
  Matrices rows_of;
  MlpData data;

  Model(at::TensorList weights, at::TensorList hidden, at::TensorList slopes, at::TensorList bends,
        at::TensorList deltas, const std::optional<at::Tensor>& probabilities, const char* name, const at::Tensor& v,
        double scale, bool biases, double l2)
      // A GPU needs no padding.
      : rows_of(v, cuda::for_cpu(v) ? kMlpPadding / static_cast<int64_t>(v.element_size()) : 1) {
    const auto dtype = v.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat, name, " must be float64 or float32, got ", dtype);
    TORCH_CHECK_VALUE(v.is_cpu() || v.is_cuda(), name, " must be on a CPU or CUDA device, got ", v.device());
    TORCH_CHECK_VALUE(!weights.empty(), "weights must hold at least one tensor");
    const size_t count = weights.size();
    check_count("hidden", hidden, count);
    check_count("slopes", slopes, count - 1);
    if (!bends.empty()) check_count("bends", bends, count - 1);
    check_count("deltas", deltas, count - 1);
    data.dtype = dtype == at::kDouble ? DType::f64 : DType::f32;
    TORCH_CHECK_VALUE(hidden[0].dim() == 2, "hidden must have shape (n, inputs), got ", hidden[0].sizes());
    data.n = hidden[0].size(0);
    data.scale = scale, data.biases = biases, data.l2 = l2;
    data.layers.reserve(count);
    int64_t numel = 0, in = hidden[0].size(1);
    for (size_t l = 0; l < count; ++l) {
      TORCH_CHECK_VALUE(weights[l].dim() == 2, "weights must have shape (outputs, inputs), got ", weights[l].sizes());
      const int64_t out = weights[l].size(0);
      TORCH_CHECK_VALUE(in > 0 && out > 0, "weights must have at least one element, got ", weights[l].sizes());
      MlpLayer layer;
      layer.in = in, layer.out = out;
      layer.weight = rows_of("weights", weights[l], out, in);
      layer.hidden = rows_of("hidden", hidden[l], data.n, in);
      if (l > 0) layer.delta = rows_of("deltas", deltas[l - 1], data.n, out);
      if (l + 1 < count) layer.slope = rows_of("slopes", slopes[l], data.n, out);
      if (l + 1 < count && !bends.empty()) layer.bend = rows_of("bends", bends[l], data.n, out);
      data.layers.push_back(layer);
      numel += out * (in + biases);
      in = out;
    }
    if (probabilities) data.probabilities = rows_of("probabilities", *probabilities, data.n, in);
    TORCH_CHECK_VALUE(v.dim() == 2 && v.size(1) == numel && v.is_contiguous(), name,
                      " must be contiguous with shape (k, ", numel, "), got ", v.sizes());
    // Autograd does not see the kernel.
    TORCH_CHECK_VALUE(!v.requires_grad() || !c10::GradMode::is_enabled(), name, kRequiresGrad);
  }

  MlpShape shape(int64_t k) const {
    MlpShape shape{{data.layers[0].in}, data.n, k, static_cast<int>(size_of(data.dtype)), false};
    for (const MlpLayer& layer : data.layers)
      shape.sizes.push_back(layer.out), shape.curved |= layer.bend.data != nullptr;
    return shape;
  }

  Multiply product(int64_t k, bool often) const {
    const cpu::MlpProduct product = cpu::mlp_product(data, often);
    const auto multiply = [product](const at::Tensor& v, at::Tensor& out) {
      product.multiply(v.const_data_ptr(), v.size(0), out.mutable_data_ptr());
    };
    return {multiply, product.team(k)};
  }
};

void check_on_cpu(const at::Tensor& b) {
  TORCH_CHECK_VALUE(cuda::for_cpu(b), "b must be on the CPU, got ", b.device());
}

}  // namespace

at::Tensor mlp_hvp(at::TensorList weights, at::TensorList hidden, at::TensorList slopes, at::TensorList bends,
                   at::TensorList deltas, const std::optional<at::Tensor>& probabilities, const at::Tensor& v,
                   double scale, bool biases, double l2) {
  const Model model(weights, hidden, slopes, bends, deltas, probabilities, "v", v, scale, biases, l2);
  at::Tensor out = empty_like(v);
  if (cuda::for_cpu(v)) {
    model.product(v.size(0), false).product(v, out);
    return out;
  }
  cuda::call("mlp_hvp", v.device(), [&](const auto& scratch, auto stream) {
    const int64_t k = v.size(0);
    Chip chip;
    if (const char* error = cuda::current_chip(chip)) return error;
    const MlpPlan plan = plan_mlp(model.shape(k), chip);
    if (near(model.data) && plan.plan.path == "one_launch") {
      bool done = false;
      const char* error = cuda::mlp_one_launch(model.data, plan.launch, v.const_data_ptr(), k, out.mutable_data_ptr(),
                                               done, scratch, stream);
      if (error || done) return error;
    }
    if (near(model.data) && plan.plan.path != "products")
      return cuda::mlp_hvp(model.data, v.const_data_ptr(), k, out.mutable_data_ptr(), scratch, stream);
    return mlp_hvp_by_layers(model.data, weights, hidden, deltas, v, out, stream);
  });
  return out;
}

Plan mlp_hvp_plan(const std::vector<int64_t>& sizes, int64_t n, int64_t k, int64_t itemsize, bool curved,
                  std::optional<Chip> chip) {
  TORCH_CHECK_VALUE(sizes.size() > 1 && *std::min_element(sizes.begin(), sizes.end()) > 0 && n >= 0 && k >= 0,
                    "sizes must hold the inputs and the outputs of at least one layer, n and k must not be negative");
  TORCH_CHECK_VALUE(itemsize == 4 || itemsize == 8, "itemsize must be 4 or 8, got ", itemsize);
  if (!chip) {
    chip.emplace();
    cuda::call("mlp_hvp_plan", c10::DeviceType::CUDA, [&](const auto&, auto) { return cuda::current_chip(*chip); });
  }
  return plan_mlp({sizes, n, k, static_cast<int>(itemsize), curved}, *chip).plan;
}

std::tuple<at::Tensor, at::Tensor> mlp_neumann_solve(at::TensorList weights, at::TensorList hidden,
                                                     at::TensorList slopes, at::TensorList bends, at::TensorList deltas,
                                                     const std::optional<at::Tensor>& probabilities,
                                                     const at::Tensor& b, double scale, bool biases, double l2,
                                                     double alpha, double damping, int64_t steps,
                                                     const at::Tensor& stop) {
  const Model model(weights, hidden, slopes, bends, deltas, probabilities, "b", b, scale, biases, l2);
  check_on_cpu(b);
  check_stop(b, steps, stop);
  return neumann_series(b, alpha, damping, steps, stop, model.product(b.size(0), true));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mlp_cg_solve(at::TensorList weights, at::TensorList hidden,
                                                            at::TensorList slopes, at::TensorList bends,
                                                            at::TensorList deltas,
                                                            const std::optional<at::Tensor>& probabilities,
                                                            const at::Tensor& b, double scale, bool biases, double l2,
                                                            double damping, int64_t steps, const at::Tensor& state) {
  const Model model(weights, hidden, slopes, bends, deltas, probabilities, "b", b, scale, biases, l2);
  check_on_cpu(b);
  check_state(b, state);
  return conjugate_gradients(b, damping, steps, state, model.product(b.size(0), true));
}

}  // namespace hg
