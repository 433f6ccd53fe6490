// Host functions of softmax_hessian: tensors in, memory-safety checks, kernel calls.
#include <ATen/MemoryOverlap.h>
#include <c10/core/GradMode.h>

#include "cuda/call.h"
#include "host.h"
#include "softmax.h"
#include "tensors.h"

namespace hg {
namespace {

DType dtype_of(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kDouble:
      return DType::f64;
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, "logits must be float64, float32, bfloat16 or float16, got ", logits.scalar_type());
  }
}

void check_rows(const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.stride(-1) == 1 || t.size(-1) <= 1, name, " must have a contiguous last dimension, got sizes ",
                    t.sizes(), " and strides ", t.strides());
  // Autograd does not see the kernel.
  TORCH_CHECK_VALUE(!t.requires_grad() || !c10::GradMode::is_enabled(), name, kRequiresGrad);
}

// logits: (rows, classes); u, out: (rows, classes) or (k, rows, classes); weights, if any: (rows,).
void run(const at::Tensor& logits, const at::Tensor& u, const at::Tensor& out, double scale,
         const std::optional<at::Tensor>& weights) {
  SoftmaxRows data;
  data.dtype = dtype_of(logits);
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape (rows, classes), got ", logits.sizes());
  data.rows = logits.size(0), data.classes = logits.size(1), data.scale = scale;
  TORCH_CHECK_VALUE((u.dim() == 2 || u.dim() == 3) && u.size(-2) == data.rows && u.size(-1) == data.classes,
                    "u must have shape (", data.rows, ", ", data.classes, ") or (k, ", data.rows, ", ", data.classes,
                    "), got ", u.sizes());
  TORCH_CHECK_TYPE(u.scalar_type() == logits.scalar_type(), "u must be ", logits.scalar_type(), " like logits, got ",
                   u.scalar_type());
  TORCH_CHECK_VALUE(logits.device() == u.device(), "logits and u must be on one device, got ", logits.device(), " and ",
                    u.device());
  // Any other device (meta, mps) holds no memory that a kernel here could touch.
  TORCH_CHECK_VALUE(u.is_cpu() || u.is_cuda(), "u must be on a CPU or CUDA device, got ", u.device());
  check_rows("logits", logits);
  check_rows("u", u);
  data.k = u.dim() == 3 ? u.size(0) : 1;
  data.logits_stride = logits.stride(0);
  data.u_stride = u.dim() == 3 ? u.stride(0) : 0, data.u_row_stride = u.stride(-2);
  data.out_stride = u.dim() == 3 ? out.stride(0) : 0, data.out_row_stride = out.stride(-2);
  at::Tensor real;
  if (weights) {
    TORCH_CHECK_VALUE(weights->dim() == 1 && weights->size(0) == data.rows, "weights must have shape (", data.rows,
                      ",), got ", weights->sizes());
    TORCH_CHECK_TYPE(weights->is_floating_point(), "weights must be floating point, got ", weights->scalar_type());
    TORCH_CHECK_VALUE(weights->device() == u.device(), "weights must be on ", u.device(), ", got ", weights->device());
    TORCH_CHECK_VALUE(!weights->requires_grad() || !c10::GradMode::is_enabled(), "weights", kRequiresGrad);
    real = weights->to(data.dtype == DType::f64 ? at::kDouble : at::kFloat).contiguous();
  }
  data.weights = weights ? real.const_data_ptr() : nullptr;
  data.logits = logits.const_data_ptr();
  data.u = u.const_data_ptr();
  data.out = out.mutable_data_ptr();
  if (cuda::for_cpu(u)) return cpu::softmax_hessian(data);
  // Instantiated, and so linked, only in a build with CUDA.
  cuda::call("softmax_hessian", u.device(),
             [&](const auto&, auto stream) { return cuda::softmax_hessian(data, stream); });
}

}  // namespace

at::Tensor softmax_hessian(const at::Tensor& logits, const at::Tensor& u, double scale,
                           const std::optional<at::Tensor>& weights) {
  at::Tensor out = empty(u.sizes(), u.options());
  run(logits, u, out, scale, weights);
  return out;
}

void softmax_hessian_(const at::Tensor& logits, const at::Tensor& u, double scale,
                      const std::optional<at::Tensor>& weights) {
  at::assert_no_internal_overlap(u);
  at::assert_no_overlap(u, logits);
  run(logits, u, u, scale, weights);
}

}  // namespace hg
