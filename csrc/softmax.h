// The Hessian of cross-entropy in the logits, diag(p) - p p^T for every row. Torch-free.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hg {

struct SoftmaxRows {
  const void* logits;   // rows x classes
  const void* u;        // k x rows x classes
  void* out;            // like u, or u itself
  const void* weights;  // one number per row, float64 beside float64, else float32, or null; rows of 0 are not read
  DType dtype;          // of logits, u and out
  int64_t k, rows, classes;
  // In elements; the classes of a row are contiguous.
  int64_t logits_stride, u_stride, u_row_stride, out_stride, out_row_stride;
  double scale;
};

namespace cpu {

// out = scale weight p (u - <p, u>), p = softmax(logits).
void softmax_hessian(const SoftmaxRows& data);

}  // namespace cpu

namespace cuda {

// The same on the current device; returns nullptr, or what CUDA says went wrong.
const char* softmax_hessian(const SoftmaxRows& data, Stream stream);

}  // namespace cuda
}  // namespace hg
