// The kernels as the host functions see them: torch-free, raw pointers. One declaration per op and device.
#pragma once

#include <cstdint>
#include <functional>

#include "update.h"
#include "vector_list.h"

namespace hg::cpu {

// v <- v - alpha (Hv + damping v); p <- p + v; stats <- (||v||^2, any v not finite)
// v, p: float64 or float32; hv: the same, or bf16/fp16 with float32 state; stats: rows x kNeumannStats.
void neumann_step(const VectorList& v, const VectorList& p, const VectorList& hv, int64_t rows, double* stats,
                  double alpha, double damping);

// One iteration of conjugate gradients on (H + damping I) x = b, given hp = H p.
// x, r, p: float64 or float32; hp as hv above; state: rows x kCgState.
void cg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp, int64_t rows,
             double* state, double damping);

}  // namespace hg::cpu

// cudaStream_t, without its header.
struct CUstream_st;

namespace hg::cuda {

using Stream = CUstream_st*;
// Device memory for so many doubles, good for all that is launched before the call returns.
using Scratch = std::function<double*(int64_t)>;

// The same ops on the current device; all pointers are device memory. They launch and never wait, so
// that a CUDA graph can capture them. They return nullptr, or what CUDA says went wrong.
// neumann_step does nothing if `running` is given and 0 on the device.
const char* neumann_step(const VectorList& v, const VectorList& p, const VectorList& hv, int64_t rows, double* stats,
                         double alpha, double damping, const Scratch& scratch, Stream stream,
                         const int* running = nullptr);

const char* cg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp, int64_t rows,
                    double* state, double damping, const Scratch& scratch, Stream stream);

}  // namespace hg::cuda
