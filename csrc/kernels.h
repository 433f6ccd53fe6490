// The kernels as the host functions see them: torch-free, raw pointers. One declaration per op and device.
#pragma once

#include <cstdint>
#include <functional>

#include "minres.h"
#include "update.h"
#include "vector_list.h"

namespace hg::cpu {

// result[row] <- ||x||; x: float64 or float32.
void norms(const VectorList& x, int64_t rows, double* result);

// v <- v - alpha (Hv + damping v); p <- p + v; stats <- (||v||^2, any v not finite)
// v, p: float64 or float32; hv: the same, or bf16/fp16 with float32 state; stats: rows x kNeumannStats.
void neumann_step(const VectorList& v, const VectorList& p, const VectorList& hv, int64_t rows, double* stats,
                  double alpha, double damping);

// One iteration of conjugate gradients on (H + damping I) x = b, given hp = H p.
// x, r, p: float64 or float32; hp as hv above; state: rows x kCgState.
void cg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp, int64_t rows,
             double* state, double damping);

// The same with p from M r, M the diagonal matrix m; state: rows x kPcgState.
void pcg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp, const VectorList& m,
              int64_t rows, double* state, double damping);

// x <- x + alpha M r, r = b - (H + damping I) x, given hx = H x; stats: rows x kResidualStats. Without m (a null
// pointer) M = I. b and m are only read, in the dtype of x; hx as hv above.
void richardson_step(const VectorList& x, const VectorList& hx, const VectorList& b, const VectorList* m, int64_t rows,
                     double* stats, double alpha, double damping);

// x_old <- x + momentum (x - x_old) + alpha M r, with r, m and stats likewise.
void chebyshev_step(const VectorList& x_old, const VectorList& x, const VectorList& hx, const VectorList& b,
                    const VectorList* m, int64_t rows, double* stats, double alpha, double momentum, double damping);

// One iteration of MINRES, given hv = H v: the next Lanczos vector over v_old, the next direction over w_old, and x
// one direction behind; a row that stops catches up. state: rows x kMinresState.
void minres_step(const VectorList& x, const VectorList& v, const VectorList& v_old, const VectorList& w,
                 const VectorList& w_old, const VectorList& hv, int64_t rows, double* state, double damping);

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

const char* pcg_step(const VectorList& x, const VectorList& r, const VectorList& p, const VectorList& hp,
                     const VectorList& m, int64_t rows, double* state, double damping, const Scratch& scratch,
                     Stream stream);

const char* richardson_step(const VectorList& x, const VectorList& hx, const VectorList& b, const VectorList* m,
                            int64_t rows, double* stats, double alpha, double damping, const Scratch& scratch,
                            Stream stream);

const char* chebyshev_step(const VectorList& x_old, const VectorList& x, const VectorList& hx, const VectorList& b,
                           const VectorList* m, int64_t rows, double* stats, double alpha, double momentum,
                           double damping, const Scratch& scratch, Stream stream);

const char* minres_step(const VectorList& x, const VectorList& v, const VectorList& v_old, const VectorList& w,
                        const VectorList& w_old, const VectorList& hv, int64_t rows, double* state, double damping,
                        const Scratch& scratch, Stream stream);

}  // namespace hg::cuda
