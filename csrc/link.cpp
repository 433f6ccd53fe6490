#include "link.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstring>

namespace hg::plan {
namespace {

const at::StorageImpl* memory(const at::Tensor& t) { return t.storage().unsafeGetStorageImpl(); }

std::string layout(const at::Tensor& t) {
  std::string key;
  put_layout(key, t);
  return key;
}

// An argument with tensors in the places of those that were taken out.
c10::IValue with_tensors(const c10::IValue& a, std::vector<at::Tensor>::const_iterator& next) {
  if (a.isTensor()) return *next++;
  if (!a.isTensorList() && !a.isOptionalTensorList()) return a;
  const c10::List<c10::IValue> list = a.toList();
  c10::impl::GenericList filled(list.elementType());
  for (const c10::IValue& item : list) filled.push_back(with_tensors(item, next));
  return filled;
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  // Tensors without elements have no memory.
  if (place_of(a) == place_of(b) || a.numel() == 0) return true;
  const at::Tensor left = a.contiguous(), right = b.contiguous();
  return std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()) == 0;
}

}  // namespace

at::Tensor Link::find(const Source& s, const Graph& graph, const std::vector<at::Tensor>& results) const {
  switch (s.kind) {
    case 'g':
      return graph.tensors.at(s.index);
    case 'r':
      return results.at(s.index);
    case 'f':
      return fixed_.at(s.index);
    default:
      return {};
  }
}

std::vector<at::Tensor> Link::constants(const Graph& graph) const {
  // As in a backward pass: views share the counters by which changes in place are noticed.
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> results(results_), tensors;
  for (const Step& step : steps_) {
    tensors.clear();
    for (const Source& s : step.tensors) tensors.push_back(find(s, graph, results));
    torch::jit::Stack stack;
    auto next = tensors.cbegin();
    for (const c10::IValue& a : step.arguments) stack.push_back(with_tensors(a, next));
    step.op.callBoxed(stack);
    int64_t at = step.first;
    for (const c10::IValue& value : stack) {
      if (value.isTensor()) {
        results.at(at++) = value.toTensor();
      } else {
        for (const at::Tensor& t : value.toTensorVector()) results.at(at++) = t;
      }
    }
    TORCH_CHECK(at == step.first + step.results, step.op.schema(), " gave another number of results");
    for (const int64_t dead : step.frees) results[dead].reset();
  }
  std::vector<at::Tensor> found;
  found.reserve(sources_.size());
  for (size_t i = 0; i < sources_.size(); ++i) {
    found.push_back(find(sources_[i], graph, results));
    TORCH_CHECK(layout(found.back()) == layouts_[i], "a constant has another layout");
  }
  return found;
}

bool Link::agrees(const Graph& graph, const std::vector<at::Tensor>& shown) const {
  const auto found = constants(graph);
  return found.size() == shown.size() && std::equal(found.begin(), found.end(), shown.begin(), same_bits);
}

Origins::Origins(const Graph& graph) : refusal_(graph.refusal) {
  for (size_t i = 0; i < graph.tensors.size(); ++i) {
    saved_.emplace(place_of(graph.tensors[i]), i);
    saved_memory_.insert(memory(graph.tensors[i]));
  }
}

void Origins::look_at(const c10::OperatorHandle& op) {
  for (const at::Tag tag :
       {at::Tag::nondeterministic_seeded, at::Tag::data_dependent_output, at::Tag::dynamic_output_shape})
    if (op.hasTag(tag)) refuse(op.schema().name() + " gives what its arguments' layouts do not tell");
}

void Origins::call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  look_at(op);
  if (!refusal_.empty()) return op.callBoxed(stack);
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  Step step{op, without_tensors(arguments), {}, results_, 0, {}};
  for (const c10::IValue& a : arguments) of(a, &step.tensors);
  if (kind_of(op) != Kind::pure) {
    // Steps are made again in their order, so they may write to what steps before them have made.
    const bool own = kind_of(op) == Kind::in_place && step.tensors.at(0).kind == 'r';
    if (!own || saved_memory_.count(memory(arguments[0].toTensor())) > 0)
      refuse(op.schema().name() + " writes to its arguments");
    writes_.push_back(steps_.size());
  }
  op.callBoxed(stack);
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().returns().size()))
    if (!result(value)) return refuse(op.schema().name() + " reads numbers, which decide what happens next");
  step.results = results_ - step.first;
  steps_.push_back(std::move(step));
}

void Origins::constant(const at::Tensor& t) { sources_.push_back(of(t)); }

bool Origins::result(const c10::IValue& value) {
  if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorVector()) result(t);
    return true;
  }
  if (!value.isTensor()) return false;
  const at::Tensor& t = value.toTensor();
  if (t.defined() && !plain(t)) refuse("a constant is not a plain tensor on the CPU");
  if (t.defined()) known_.insert_or_assign(t.unsafeGetTensorImpl(), Known{{'r', results_}, Shell(t.getIntrusivePtr())});
  if (t.defined() && plain(t)) {
    results_at_.insert_or_assign(place_of(t), results_);
    alive_.push_back(t.storage());
  }
  memory_.push_back(t.defined() && plain(t) ? memory(t) : nullptr);
  ++results_;
  return true;
}

void Origins::of(const c10::IValue& a, std::vector<Source>* sources) {
  if (a.isTensor()) {
    sources->push_back(of(a.toTensor()));
  } else if (a.isTensorList() || a.isOptionalTensorList()) {
    const c10::List<c10::IValue> list = a.toList();
    for (const c10::IValue& item : list)
      if (item.isTensor()) sources->push_back(of(item.toTensor()));
  }
}

Source Origins::of(const at::Tensor& t) {
  if (!t.defined()) return {'-', 0};
  const auto known = known_.find(t.unsafeGetTensorImpl());
  if (known != known_.end()) return known->second.source;
  if (!plain(t)) refuse("a constant is not a plain tensor on the CPU");
  const auto saved = saved_.find(place_of(t));
  if (saved != saved_.end()) return {'g', saved->second};
  const auto result = results_at_.find(place_of(t));
  if (result != results_at_.end()) return {'r', result->second};
  // A number that was made a tensor comes from the state of a node, as its literals do.
  if (t.numel() > 0 && !t.unsafeGetTensorImpl()->is_wrapped_number())
    refuse("no op and no node of the graph has shown a tensor");
  fixed_.push_back(t);
  return {'f', static_cast<int64_t>(fixed_.size()) - 1};
}

Link Origins::link(const std::vector<at::Tensor>& constants) const {
  Link link;
  link.sources_ = sources_, link.fixed_ = fixed_, link.results_ = results_;
  for (const at::Tensor& t : constants) link.layouts_.push_back(layout(t));
  std::vector<bool> needed(results_), alive(results_);
  for (const Source& s : sources_)
    if (s.kind == 'r') needed[s.index] = alive[s.index] = true;
  // Memory of needed results: who writes there is needed too. An address that was used again keeps a step too many.
  std::unordered_set<const at::StorageImpl*> read;
  for (const Source& s : sources_)
    if (s.kind == 'r') read.insert(memory_[s.index]);
  for (size_t at = steps_.size(); at-- > 0;) {
    const Step& step = steps_[at];
    const auto from = needed.begin() + step.first, to = from + step.results;
    const bool writes = std::find(writes_.begin(), writes_.end(), at) != writes_.end();
    if (std::find(from, to, true) == to && !(writes && read.count(memory_[step.first]) > 0)) continue;
    Step kept = step;
    for (int64_t r = kept.first; r < kept.first + kept.results; ++r)
      if (!alive[r]) kept.frees.push_back(r);
    for (const Source& s : kept.tensors) {
      if (s.kind != 'r') continue;
      if (!alive[s.index]) kept.frees.push_back(s.index);
      needed[s.index] = alive[s.index] = true;
      read.insert(memory_[s.index]);
    }
    link.steps_.push_back(std::move(kept));
  }
  std::reverse(link.steps_.begin(), link.steps_.end());
  return link;
}

}  // namespace hg::plan
