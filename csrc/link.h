// From the saved tensors of a graph to the constants of a recorded product, without a backward pass.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "graph.h"

namespace hg::plan {

enum class Kind { composite, pure, in_place, mutable_otherwise };
Kind kind_of(const c10::OperatorHandle& op);

// Arguments as they are kept: what they say, without the tensors' data; undefined tensors stand for tensors.
std::vector<c10::IValue> without_tensors(at::ArrayRef<c10::IValue> arguments);

// A pointer to a tensor that keeps its address from being used again, not its data.
using Shell = c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>;

// Where a tensor comes from. 'g': the graph has saved it, 'r': a result of the steps, 'f': the same in every pass,
// '-': no tensor.
struct Source {
  char kind;
  int64_t index;
};

struct Step {
  c10::OperatorHandle op;
  std::vector<c10::IValue> arguments;
  std::vector<Source> tensors;  // in the arguments, in order
  int64_t first = 0, results = 0;
  std::vector<int64_t> frees;  // results that no later step reads
};

// What a pass computes on its own, whatever the vector: ops on saved tensors, whose results are constants.
class Link {
 public:
  // The constants for another graph of the same key. Throws where they have not the layouts that were recorded.
  std::vector<at::Tensor> constants(const Graph& graph) const;
  // Whether they are, bit by bit, those that a pass has shown.
  bool agrees(const Graph& graph, const std::vector<at::Tensor>& shown) const;

 private:
  friend class Origins;
  at::Tensor find(const Source& s, const Graph& graph, const std::vector<at::Tensor>& results) const;

  std::vector<Step> steps_;
  std::vector<Source> sources_;
  std::vector<at::Tensor> fixed_;
  std::vector<std::string> layouts_;
  int64_t results_ = 0;
};

// Watches the ops of a pass that do not depend on the vector.
class Origins {
 public:
  explicit Origins(const Graph& graph);

  // Runs an op on what does not depend on the vector.
  void call(const c10::OperatorHandle& op, torch::jit::Stack* stack);
  // Looks at an op on what does.
  void look_at(const c10::OperatorHandle& op);
  // The next constant of the recording.
  void constant(const at::Tensor& t);

  void refuse(const std::string& reason) {
    if (refusal_.empty()) refusal_ = reason;
  }
  // Why there is no link: another pass through such a graph might be another.
  const std::string& refusal() const { return refusal_; }
  Link link(const std::vector<at::Tensor>& constants) const;

 private:
  struct Known {
    Source source;
    Shell shell;
  };
  Source of(const at::Tensor& t);
  void of(const c10::IValue& a, std::vector<Source>* sources);
  bool result(const c10::IValue& value);

  std::string refusal_;
  std::map<Place, int64_t> saved_;
  std::unordered_map<const at::TensorImpl*, Known> known_;
  // Results by place: a node that has saved one makes a new object of it. They stay alive, so that no memory is used
  // again by another.
  std::map<Place, int64_t> results_at_;
  std::vector<c10::Storage> alive_;
  std::vector<Step> steps_;
  std::vector<size_t> writes_;  // steps that write to their first argument
  std::vector<Source> sources_;
  std::vector<at::Tensor> fixed_;
  int64_t results_ = 0;
  std::vector<const at::StorageImpl*> memory_;  // of the results
  std::unordered_set<const at::StorageImpl*> saved_memory_;
};

}  // namespace hg::plan
