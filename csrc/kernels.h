// The kernels as the host functions see them: torch-free, raw pointers. One declaration per op and device.
#pragma once

#include <cstdint>

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
