// Checks that guard memory: whatever Python passes, a kernel sees only valid pointers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <deque>
#include <vector>

#include "vector_list.h"

namespace hg {

// The tensor of per-row scalars: float64, contiguous, shape (columns,) or (rows, columns).
inline int64_t check_rows(const char* name, const at::Tensor& t, int64_t columns) {
  // Any other device (meta, mps) holds no memory that a kernel here could touch.
  TORCH_CHECK_VALUE(t.is_cpu() || t.is_cuda(), name, " must be on a CPU or CUDA device, got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kDouble, name, " must be float64, got ", t.scalar_type());
  TORCH_CHECK_VALUE((t.dim() == 1 || t.dim() == 2) && t.size(-1) == columns && t.is_contiguous(), name,
                    " must be contiguous with shape (", columns, ",) or (k, ", columns, "), got ", t.sizes());
  return t.dim() == 2 ? t.size(0) : 1;
}

// The tensor lists of one call. The first list fixes dtype and length; every other one is held to it.
class Lists {
 public:
  Lists(at::Device device, int64_t rows, bool batched) : device_(device), rows_(rows), batched_(batched) {}

  // A list that holds solver state: float64 or float32, contiguous because it may be written to.
  const VectorList& state(const char* name, at::TensorList tensors) {
    VectorList& list = start(name, tensors);
    if (!tensors.empty()) {
      const auto dtype = tensors[0].scalar_type();
      TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat, name,
                       " must be float64 or float32 (a lower precision loses the series), got ", dtype);
      list.dtype = dtype == at::kDouble ? DType::f64 : DType::f32;
    }
    TORCH_CHECK_TYPE(lists_.size() == 1 || list.dtype == lists_[0].dtype, name, " must have the dtype of ", first_);
    for (const at::Tensor& t : tensors) {
      TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous, got sizes ", t.sizes(), " and strides ",
                        t.strides());
      // Autograd would not see the write.
      TORCH_CHECK_VALUE(!t.requires_grad() || !c10::GradMode::is_enabled(), name, " must not require grad");
      add(list, name, t, tensors[0]);
    }
    return finish(list, name);
  }

  // A list that is only read: the state's dtype, or bf16/fp16 beside float32 state; any strides.
  const VectorList& product(const char* name, at::TensorList tensors) {
    VectorList& list = start(name, tensors);
    list.dtype = lists_[0].dtype;
    if (!tensors.empty()) {
      const auto dtype = tensors[0].scalar_type();
      const bool half = dtype == at::kBFloat16 || dtype == at::kHalf;
      const bool fits = lists_[0].dtype == DType::f64 ? dtype == at::kDouble : dtype == at::kFloat || half;
      TORCH_CHECK_TYPE(fits, name, " must have the dtype of ", first_, ", or bfloat16/float16 beside float32, got ",
                       dtype);
      if (half) list.dtype = dtype == at::kHalf ? DType::f16 : DType::bf16;
    }
    for (const at::Tensor& t : tensors) add(list, name, contiguous(t), tensors[0]);
    return finish(list, name);
  }

  // A list that is only read, in the state's dtype; any strides. One `for_all_rows` has no rows of its own.
  const VectorList& constant(const char* name, at::TensorList tensors, bool for_all_rows = false) {
    VectorList& list = start(name, tensors);
    list.dtype = lists_[0].dtype;
    const auto dtype = list.dtype == DType::f64 ? at::kDouble : at::kFloat;
    for (const at::Tensor& t : tensors) {
      TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must have the dtype of ", first_, ", got ", t.scalar_type());
      if (for_all_rows) {
        check_device(name, t);
        list.spans.push_back({static_cast<char*>(contiguous(t).data_ptr()), t.numel(), 0});
      } else {
        add(list, name, contiguous(t), tensors[0]);
      }
    }
    return finish(list, name);
  }

 private:
  VectorList& start(const char* name, at::TensorList tensors) {
    if (lists_.empty()) first_ = name;
    lists_.emplace_back();
    lists_.back().spans.reserve(tensors.size());
    return lists_.back();
  }

  const at::Tensor& contiguous(const at::Tensor& t) {
    if (t.is_contiguous()) return t;
    copies_.push_back(t.contiguous());
    return copies_.back();
  }

  void check_device(const char* name, const at::Tensor& t) const {
    TORCH_CHECK_VALUE(t.device() == device_, name, " must be on ", device_, ", got ", t.device());
  }

  void add(VectorList& list, const char* name, const at::Tensor& t, const at::Tensor& head) {
    check_device(name, t);
    TORCH_CHECK_TYPE(t.scalar_type() == head.scalar_type(), name, " must have one dtype, got ", head.scalar_type(),
                     " and ", t.scalar_type());
    TORCH_CHECK_VALUE(!batched_ || (t.dim() >= 1 && t.size(0) == rows_), name, " must have ", rows_,
                      " rows in every tensor, got shape ", t.sizes());
    const int64_t numel = rows_ ? t.numel() / rows_ : 0;
    list.spans.push_back({static_cast<char*>(t.data_ptr()), numel, numel});
  }

  const VectorList& finish(const VectorList& list, const char* name) {
    int64_t total = 0;
    for (const Span& span : list.spans) total += span.numel;
    if (lists_.size() == 1) total_ = total;
    TORCH_CHECK_VALUE(total == total_, name, " must have as many elements as ", first_, ": expected ", total_, ", got ",
                      total);
    return list;
  }

  at::Device device_;
  int64_t rows_;
  bool batched_;
  const char* first_ = "";
  int64_t total_ = 0;
  std::deque<VectorList> lists_;  // a deque, so that references stay valid
  std::deque<at::Tensor> copies_;
};

}  // namespace hg
