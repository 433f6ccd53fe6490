// A native plan, and the plan bound to the data of one solve.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <variant>
#include <vector>

#include "plan.h"
#include "plan_bands.h"
#include "solve_loop.h"

namespace hg::plan {

// An argument of an ATen op: a literal, number `index` of the solve, a view, constant `index` as it is, or
// a list of such tensors (an empty one stands for None).
struct Argument {
  enum class Kind { literal, number, view, constant, list } kind = Kind::literal;
  c10::IValue literal;
  int64_t index = -1;  // number or constant; of a view: where its tensor is kept
  View view;
  std::vector<Argument> items;
  bool optional_items = false;
};

// An op of the dispatcher; its results get slots of their own.
struct Aten {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<std::optional<View>> results;
};

struct Instruction {
  std::variant<Kernel, Bands, Tasks, Aten> work;
  std::vector<int64_t> frees;  // slots of ATen results that nothing reads after it

  int64_t operations() const;  // roughly
};

// Instructions that follow each other, of which none is an op of the dispatcher, or a single one that is.
struct Stretch {
  size_t begin, end;
  int64_t shared;  // operations, if several instructions are shared among threads; else 0
};

struct Plan {
  bool is_double = false;
  int64_t arena = 0;             // elements
  std::vector<int64_t> leaves;   // elements of the vector's parts
  std::vector<int64_t> outputs;  // and of the results'
  int64_t constants = 0, dynamic = 0, scalars = 0, views = 0;
  std::vector<double> immediates;  // numbers that follow the solve's scalars
  std::vector<Instruction> instructions;
  std::vector<Stretch> stretches;  // of all instructions
  std::vector<int64_t> extents;    // of every constant, the elements that views of it reach; 0 without views

  at::ScalarType dtype() const { return is_double ? at::kDouble : at::kFloat; }
  int64_t item() const { return is_double ? 8 : 4; }  // bytes of an element
  int64_t numel() const;                              // elements of a vector
  int64_t output_numel() const;                       // and of a result
  int64_t operations() const;                         // of a product, roughly
  void find_stretches();
  int64_t first_constant() const { return 1 + static_cast<int64_t>(leaves.size()); }
  int64_t first_dynamic() const { return first_constant() + constants; }
  int64_t first_output() const { return first_dynamic() + dynamic; }
  int64_t slots() const { return first_output() + static_cast<int64_t>(outputs.size()); }
};

// Refuses a plan with a view outside its memory, and notes how far views of constants reach, and the stretches.
void check(Plan& plan);

class Lane;

class Bound {
 public:
  Bound(std::shared_ptr<const Plan> plan, std::vector<at::Tensor> constants, std::vector<double> scalars);
  ~Bound();
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;

  // v: the parts of a vector; with rows, of so many vectors, along a first dimension of every part. Returns the
  // product as one flat tensor, or one for each vector, (rows, elements).
  at::Tensor product(at::TensorList v, std::optional<int64_t> rows);

  // As glm_neumann_solve and glm_cg_solve, of a plan whose results are of the vectors' shapes.
  std::tuple<at::Tensor, at::Tensor> neumann_series(const at::Tensor& b, double alpha, double damping, int64_t steps,
                                                    const at::Tensor& stop);
  std::tuple<at::Tensor, at::Tensor, at::Tensor> conjugate_gradients(const at::Tensor& b, double damping, int64_t steps,
                                                                     const at::Tensor& state);

 private:
  // Where a part of the first vector is, and the bytes from there to the next vector's.
  struct Part {
    char* data;
    int64_t stride;
  };

  void run(const std::vector<Part>& v, int64_t rows, char* out);
  void run(const at::Tensor& v, const at::Tensor& out);
  // As a solve wants it.
  Multiply product_with(int64_t rows);
  Lane& lane(int64_t thread);
  int64_t most_lanes() const;
  void check_vectors(const char* name, const at::Tensor& t) const;

  std::shared_ptr<const Plan> plan_;
  std::vector<at::Tensor> constants_;
  std::vector<double> numbers_;
  std::mutex mutex_;                          // of the lanes, whose memory several callers would share
  std::vector<std::unique_ptr<Lane>> lanes_;  // of every thread that makes whole products; the first is there at once
};

}  // namespace hg::plan
