#include "graph.h"

#include <ATen/Context.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/version.h>

// The visitor is no part of torch's public interface: it is used with the versions whose headers it was written for,
// and with others every product is recorded.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 10 && TORCH_VERSION_MINOR <= 13
#define HG_HAVE_VISITOR
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#endif

#include <algorithm>
#include <map>
#include <string_view>
#include <typeinfo>
#include <unordered_set>

namespace hg::plan {

#if defined(HG_HAVE_VISITOR)
namespace {

using torch::autograd::Node;
using namespace torch::dynamo::autograd;
using NodePtr = decltype(NodeCall::node);

// A node's key has 16 bits for its length; what one edge and one saved tensor add to it stays far below 64 bytes.
constexpr size_t kMostEdges = 256, kMostTensors = 512;

// Nodes of torch's table of derivatives: ops and nothing else, on state that they show to compiled_args. What others
// do (Python's functions, for one) their state does not tell.
bool generated(const Node& node) {
  const std::string_view type = typeid(node).name();
  return type.rfind("N5torch8autograd9generated", 0) == 0 || type == "N5torch8autograd10CopySlicesE" ||
         type == "N5torch8autograd13CopyBackwardsE";
}

bool has_hooks(const NodePtr& pointer) {
  Node& node = *pointer;
  return !node.tensor_pre_hooks().empty() || !node.retains_grad_hooks().empty() || !node.pre_hooks().empty() ||
         !node.post_hooks().empty();
}

}  // namespace
#endif

Place place_of(const at::Tensor& t) {
  // Every unpacking of a saved tensor makes a new object for the same memory.
  const void* place = t.numel() > 0 ? t.const_data_ptr() : static_cast<const void*>(t.unsafeGetTensorImpl());
  return {place, t.scalar_type(), t.sizes().vec(), t.strides().vec()};
}

int64_t version_of(const at::Tensor& t) { return t.is_inference() ? 0 : t._version(); }

bool plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet special({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
                                         c10::DispatchKey::ZeroTensor, c10::DispatchKey::NestedTensor});
  return t.layout() == at::kStrided && t.is_cpu() && !t.is_quantized() && t.has_storage() &&
         !t.key_set().has_any(special);
}

void put(std::string& key, int64_t value) { key.append(reinterpret_cast<const char*>(&value), sizeof value); }

void put_layout(std::string& key, const at::Tensor& t) {
  put(key, static_cast<int64_t>(t.scalar_type())), put(key, t.dim());
  for (const int64_t size : t.sizes()) put(key, size);
  for (const int64_t stride : t.strides()) put(key, stride);
}

Graph::Graph(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& leaves,
             const std::vector<at::Tensor>& seeds) {
  try {
    look(outputs, leaves, seeds);
  } catch (const std::exception& error) {
    // A backward pass will say it in its own words, or cope.
    refusal = error.what();
  }
  if (!refusal.empty()) key.clear(), tensors.clear();
}

bool Graph::current() const {
  const bool written = !std::equal(tensors.begin(), tensors.end(), versions_.begin(), versions_.end(),
                                   [](const at::Tensor& t, int64_t version) { return version_of(t) == version; });
  return refusal.empty() && !written && without_hooks_();
}

#if defined(HG_HAVE_VISITOR)
void Graph::look(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& leaves,
                 const std::vector<at::Tensor>& seeds) {
  AutogradCompilerCall call(SizeInput::DYNAMIC);
  std::vector<NodePtr> todo, nodes;
  std::unordered_set<const Node*> seen;
  const auto edge_to = [&](const at::Tensor& t) {
    const auto edge = torch::autograd::impl::gradient_edge(t);
    TORCH_CHECK(edge.is_valid(), "a tensor has no graph");
    put(key, call.node_calls.lookup(edge.function).id), put(key, edge.input_nr);
    return edge.function;
  };
  const auto go_on = [&](const NodePtr& node) {
    if (node && seen.insert(node.get()).second) todo.push_back(node);
  };
  for (const at::Tensor& t : outputs) go_on(edge_to(t)), put_layout(key, t);
  while (!todo.empty()) {
    const NodePtr node = std::move(todo.back());
    todo.pop_back();
    nodes.push_back(node);
    NodeCall& visited = call.node_calls.lookup(node);
    put(key, visited.id), put(key, reinterpret_cast<intptr_t>(typeid(*node).name()));
    if (has_hooks(node)) return void(refusal = node->name() + " has hooks");
    if (dynamic_cast<const torch::autograd::AccumulateGrad*>(node.get())) continue;  // its state does not matter
    if (!generated(*node)) return void(refusal = node->name() + " may do anything");
    const size_t before = call.tensor_args.inputs.size();
    CompiledNodeArgs arguments(call, visited);
    node->compiled_args(arguments);
    arguments.collect(node->next_edges());
    if (node->next_edges().size() > kMostEdges || call.tensor_args.inputs.size() - before > kMostTensors)
      return void(refusal = node->name() + " has many edges");
    const CacheKey own = arguments.key();
    put(key, own.key_size), key.append(reinterpret_cast<const char*>(own.key), own.key_size);
    for (const auto& edge : node->next_edges()) go_on(edge.function);
  }
  for (const at::Tensor& t : leaves) edge_to(t), put_layout(key, t);
  if (!call.hooks.empty() || !call.cpp_tensor_pre_hooks.empty() || !call.packed_inputs.empty() ||
      !call.lifted_ivalue_args.args.empty())
    return void(refusal = "a saved tensor has hooks");
  put(key, call.all_size_inputs.size());
  for (const SizeInput& size : call.all_size_inputs) put(key, size.value);

  std::map<Place, size_t> places;
  tensors = std::move(call.tensor_args.inputs);
  tensors.insert(tensors.end(), seeds.begin(), seeds.end());
  put(key, tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = tensors[i];
    if (!plain(t)) return void(refusal = "a saved tensor is not a plain one on the CPU");
    put(key, places.emplace(place_of(t), i).first->second);
    put_layout(key, t), put(key, t.storage_offset()), put(key, t.unsafeGetTensorImpl()->is_wrapped_number());
  }
  for (const at::Tensor& t : tensors) versions_.push_back(version_of(t));
  without_hooks_ = [nodes = std::move(nodes)] { return std::none_of(nodes.begin(), nodes.end(), has_hooks); };
  // What ops may depend on besides their arguments.
  const auto local = c10::impl::tls_local_dispatch_key_set();
  put(key, local.included_.raw_repr()), put(key, local.excluded_.raw_repr());
  put(key, at::globalContext().deterministicAlgorithms()), put(key, at::globalContext().userEnabledMkldnn());
  put(key, static_cast<int64_t>(c10::get_default_dtype_as_scalartype()));
}

#else
void Graph::look(const std::vector<at::Tensor>&, const std::vector<at::Tensor>&, const std::vector<at::Tensor>&) {
  refusal = "graphs are not looked at with torch " TORCH_VERSION;
}
#endif

}  // namespace hg::plan
