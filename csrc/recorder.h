// Which ops lead from a vector to a Hessian-vector product, and on what data: engines/record.py for torch's dispatcher.
#pragma once

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "graph.h"
#include "link.h"

namespace hg::plan {

// 'v': part of the vector, 'c': constant, 's': number, 'n': result of a call, '-': no tensor.
struct Name {
  char kind;
  int64_t index;
  std::string text() const { return kind + std::to_string(index); }
};

struct Recorded {
  c10::OperatorHandle op;
  std::vector<c10::IValue> arguments;  // undefined tensors stand for tensors
  std::vector<Name> names;             // of the tensors and floats in the arguments, in order
  std::vector<Name> outputs;
  bool single, in_place;
};

// Every op of a recorded pass goes through `see`: what depends on the vector is noted, the rest only runs. What
// becomes a constant stays alive as long as the recorder. Of all other tensors only the shells do (weak pointers keep
// a TensorImpl or StorageImpl from being deallocated, not its data): results die as early as in a pass that is not
// recorded, and yet no later tensor is taken for one of them.
class Recorder {
 public:
  // With a graph of the pass, `link` says how its constants come about.
  explicit Recorder(std::vector<at::Tensor> v, const Graph* graph = nullptr);

  // Records the ops of the calling thread until `stop`. False if another recording is under way in this process.
  bool start();
  void stop();
  // Takes the product's parts. False if it cannot be replayed.
  bool finish(const std::vector<at::Tensor>& product);

  void see(const c10::OperatorHandle& op, torch::jit::Stack* stack);

  // Equal for two recordings if and only if one program computes both, within this process.
  const std::string& key() const { return key_; }
  const std::string& refusal() const { return refusal_; }
  const std::vector<at::Tensor>& constants() const { return constants_; }
  const std::vector<double>& scalars() const { return scalars_; }
  const std::vector<Recorded>& calls() const { return calls_; }
  const std::vector<Name>& outputs() const { return outputs_; }
  // Constants that are zeros in every pass with this key.
  const std::vector<Name>& zeros() const { return zero_constants_; }
  // None without a graph, or if another pass through such a graph might make other ops.
  std::optional<Link> link() const;
  std::string unlinked() const { return origins_ ? origins_->refusal() : ""; }
  // Every named tensor; for the results of calls, which may be dead, tensors without data of the same layout.
  std::vector<std::pair<Name, at::Tensor>> tensors() const;

 private:
  struct Known {
    Name name;
    Shell shell;
  };
  struct Memory {
    c10::weak_intrusive_ptr<at::StorageImpl> shell;
    std::vector<const at::TensorImpl*> views;
  };
  struct Layout {
    at::ScalarType type;
    at::DimVector sizes, strides;
    int64_t offset;
  };

  bool depends(const c10::IValue& a) const;
  bool depends(const at::Tensor& t) const { return names_.count(t.unsafeGetTensorImpl()) > 0; }
  bool has_other_views(const at::Tensor& t) const;
  void encode(const c10::IValue& a, std::vector<Name>* names);
  Name encode(const at::Tensor& t);
  Name constant(const at::Tensor& t);
  void name(const at::Tensor& t, Name name);
  Name name_result(const at::Tensor& t);
  void result(const c10::IValue& value, Recorded* call);
  void result(const at::Tensor& t, Recorded* call);
  void see_constant(const c10::OperatorHandle& op, torch::jit::Stack* stack);
  void write_in_place(const c10::OperatorHandle& op, torch::jit::Stack* stack);
  void refuse(const std::string& reason) {
    if (refusal_.empty()) refusal_ = reason;
  }
  void put(char tag) { key_.push_back(tag); }
  void put(int64_t value) { plan::put(key_, value); }
  void put(const Name& n) { put(n.kind), put(n.index); }

  std::string key_, refusal_;
  std::vector<at::Tensor> constants_;
  std::vector<int64_t> versions_;
  std::vector<double> scalars_;
  std::vector<Recorded> calls_;
  std::vector<Name> outputs_, zero_constants_;
  std::vector<at::Tensor> vector_;
  std::vector<Layout> results_;
  std::unordered_map<const at::TensorImpl*, Known> names_, fixed_;
  std::map<Place, Name> places_;
  // Storages that depend on the vector, and what looks into each.
  std::unordered_map<const at::StorageImpl*, Memory> dependent_;
  std::unordered_map<const at::TensorImpl*, Shell> zeros_;
  std::unique_ptr<Origins> origins_;
};

}  // namespace hg::plan
