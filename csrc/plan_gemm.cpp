// Matrix products of native plans, by torch's own BLAS on one thread: a product is shared by this library's own rules,
// since BLAS would wait for a thread that has lost its core to somebody else.
#include <algorithm>
#include <vector>

#include "cpu/share.h"
#include "plan_host.h"

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

// Multiply-adds that a thread should have at least, and rows or columns of the result that a part of a product has.
constexpr int64_t kGrainOps = 1 << 20, kPart = 32;
// Parts per thread: a thread that comes late leaves the others as little to wait for.
constexpr int64_t kParts = 2;

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
  OneThread() {
    if (MKL_Set_Num_Threads_Local) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_ = 0;
};

// A product with few columns, which MKL takes several times longer for than for the same numbers in columns: where
// the left factor is read along its columns (3 to 16 times, below 12), or the right one along its rows (1.2 to 1.5).
template <class Real>
bool narrow(const Leading& a, const Leading& b, int m, int n) {
  const int64_t size = static_cast<int64_t>(m) * n;
  if (n < 2 || n > 12 || m < 4 * n) return false;
  if (a.transposed) return n < 12 && size <= 1 << 22;
  return b.transposed && n >= 8 && sizeof(Real) == 4 && size <= 1 << 16;
}

// The same product with the result's columns one after another, then turned.
template <class Real>
void multiply_columns(const Leading& a, const Leading& b, int m, int n, int k, const Real* pa, const Real* pb, Real* pc,
                      int64_t row, bool accumulate) {
  static thread_local std::vector<Real> columns;
  columns.resize(std::max(columns.size(), static_cast<size_t>(m) * n));
  const Real one = 1, zero = 0;
  blas(a.transposed ? "N" : "T", b.transposed ? "N" : "T", &m, &n, &k, &one, pa, &a.stride, pb, &b.stride, &zero,
       columns.data(), &m);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      const Real value = columns[static_cast<size_t>(j) * m + i];
      pc[i * row + j] = accumulate ? pc[i * row + j] + value : value;
    }
}

// Multiply-adds of one product of the batch.
int64_t work(const Gemm& g) { return g.out.sizes[1] * g.out.sizes[2] * g.a.sizes[2]; }

template <class Real>
void by_blas(const Gemm& g, Real* const* slots) {
  const Leading a = leading(g.a), b = leading(g.b), out = leading(g.out);
  const int64_t batch = g.out.sizes[0], rows = g.out.sizes[1], columns = g.out.sizes[2];
  const int depth = g.a.sizes[2];
  const Real one = 1, beta = g.accumulate ? 1 : 0;
  const bool turn = narrow<Real>(a, b, rows, columns), by_rows = turn || rows >= columns;
  const cpu::Team team = cpu::team_for(batch * work(g), kGrainOps);
  // What is shared are products of the batch, and where there are few of them ranges of a product's longer side.
  const int64_t along = by_rows ? rows : columns, wanted = team.ranges(batch * along, kParts);
  const int64_t parts = std::clamp<int64_t>((wanted + batch - 1) / batch, 1, std::max<int64_t>(1, along / kPart));
  cpu::share(batch * parts, team, [&](int64_t task) {
    const int64_t i = task / parts, part = task % parts;
    const int64_t begin = along * part / parts, count = along * (part + 1) / parts - begin;
    const Real* pa = slots[g.a.slot] + g.a.offset + i * g.a.strides[0] + (by_rows ? begin * g.a.strides[1] : 0);
    const Real* pb = slots[g.b.slot] + g.b.offset + i * g.b.strides[0] + (by_rows ? 0 : begin * g.b.strides[2]);
    Real* pc = slots[g.out.slot] + g.out.offset + i * g.out.strides[0] + begin * g.out.strides[by_rows ? 1 : 2];
    const int m = by_rows ? count : rows, n = by_rows ? columns : count;
    const OneThread alone;
    if (turn)
      multiply_columns(a, b, m, n, depth, pa, pb, pc, out.stride, g.accumulate);
    else  // BLAS thinks in columns: the transposed product, of the factors in the other order, is this one in rows.
      blas(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &n, &m, &depth, &one, pb, &b.stride, pa, &a.stride,
           &beta, pc, &out.stride);
  });
}

}  // namespace

bool has_blas() { return sgemm_ != nullptr && dgemm_ != nullptr; }

template <class Real>
void multiply(const Gemm& g, Real* const* slots) {
  const int64_t rows = g.out.sizes[1], columns = g.out.sizes[2], depth = g.a.sizes[2];
  if (depth <= kSmallDepth && work(g) <= kSmallOps) return cpu::PlanKernels<Real>::multiply(g, slots);
  if (depth >= kNarrowDepth && std::min(rows, columns) <= kNarrow && g.a.strides[2] == 1 && g.b.strides[1] == 1)
    return cpu::PlanKernels<Real>::dots(g, slots);
  if (depth >= kNarrowDepth && rows <= kNarrow && columns > kNarrow && g.b.strides[2] == 1)
    return cpu::PlanKernels<Real>::few_rows(g, slots);
  by_blas(g, slots);
}

template void multiply<float>(const Gemm&, float* const*);
template void multiply<double>(const Gemm&, double* const*);

}  // namespace hg::plan
