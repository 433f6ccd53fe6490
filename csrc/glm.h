// Generalised linear models: H = scale X^T D X + diag(l2). Torch-free.
#pragma once

#include <cstdint>

#include "chip.h"
#include "kernels.h"
#include "vector_list.h"

namespace hg {

struct GlmData {
  const void* x;  // n x d, rows `stride` elements apart; f64, f32, or bf16 or (on the CPU) f16 beside f32 vectors
  DType x_dtype;
  int64_t n, d, stride;
  const void* weights;  // n x classes: the diagonal of D if classes is 1, else probabilities p, D = diag(p) - p p^T
  int64_t classes;
  bool intercept;  // one more feature that is 1 everywhere
  double scale;    // usually 1/n
  const void* l2;  // diagonal of the penalty's Hessian, one number per weight, or null
};

namespace cpu {

// out = H v. v, out: k vectors of classes x d weights, then, if there is an intercept, classes more.
void glm_hvp(const GlmData& data, const void* v, int64_t k, void* out);

// Whether two matrix products are faster, since so many columns and their sums leave no room in the second cache.
bool glm_many(const GlmData& data, int64_t k);

// The team that it shares its work with.
struct Team;
Team glm_team(const GlmData& data, int64_t k);

// out[c] = X^T diag(weights[:, c]) X, d x d, for every column of the weights, of which there are `classes`. There is at
// least one row and one feature; f64 or f32.
void glm_gram(const GlmData& data, void* out);

}  // namespace cpu

namespace cuda {

// Whether the product with k vectors runs as one pass over X on the current device; else two matrix products are
// faster, or the vectors do not fit beside X in shared memory.
bool glm_one_pass(const GlmData& data, int64_t k);

// out = H v in one pass. Does nothing if `running` is given and 0 on the device.
const char* glm_hvp(const GlmData& data, const void* v, int64_t k, void* out, const int* running,
                    const Scratch& scratch, Stream stream);

// Whole solves in one launch of blocks that wait for each other; arguments as those of the ops, all but the flags on
// the device. `done` is false, and nothing was launched, where that is not possible: the caller goes step by step.
// If not `deterministic`, blocks add their sums in the order in which they come.
struct GlmSolve {
  const void* b;
  void* out;
  int64_t k, steps;
  double damping;
  bool deterministic;
};
const char* glm_neumann_solve(const GlmData& data, const GlmSolve& solve, double alpha, const double* stop,
                              double* history, bool& done, const Scratch& scratch, Stream stream);
const char* glm_cg_solve(const GlmData& data, const GlmSolve& solve, double* state, int64_t* taken, bool& done,
                         const Scratch& scratch, Stream stream);

// How glm_neumann_solve runs with k vectors on the current device: "resident", "bulk" or "stream" (one launch, x in
// shared memory, or on its way through it in every step by bulk copies or by small ones), or "steps".
const char* glm_neumann_plan(const GlmData& data, int64_t k, Plan& plan);

// For solves step by step, without the host: whether any row goes on, from the stats or the state of all rows.
const char* glm_neumann_running(const double* stats, const double* stop, int64_t k, int* running, Stream stream);
const char* glm_cg_running(const double* state, int64_t k, int* running, int64_t* taken, Stream stream);

}  // namespace cuda
}  // namespace hg
