#include "recorder.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <mutex>

namespace hg::plan {
namespace {

// Above autograd, without a meaning of its own in torch; ops come here only while a recording is under way.
constexpr auto kKey = c10::DispatchKey::TESTING_ONLY_GenericMode;

// The recording of this process. Not one per thread: autograd may go on in another thread, and brings the key along.
std::atomic<Recorder*> active{nullptr};

Kind classify(const c10::OperatorHandle& op) {
  // What is made of other ops is recorded as those.
  if (op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
      !op.hasKernelForDispatchKey(c10::DispatchKey::CPU))
    return Kind::composite;
  const auto& schema = op.schema();
  int writes = 0;
  for (const auto& a : schema.arguments()) writes += a.alias_info() != nullptr && a.alias_info()->isWrite();
  if (writes == 0) return Kind::pure;
  const std::string& name = schema.name();
  const bool alone = writes == 1 && schema.arguments()[0].alias_info() != nullptr &&
                     schema.arguments()[0].alias_info()->isWrite() && schema.returns().size() == 1;
  return alone && name.back() == '_' && name[name.size() - 2] != '_' ? Kind::in_place : Kind::mutable_otherwise;
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (kind_of(op) == Kind::composite)
    return op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kKey), stack);
  const c10::impl::ExcludeDispatchKeyGuard alone(kKey);
  if (Recorder* recorder = active.load()) return recorder->see(op, stack);
  op.callBoxed(stack);
}

const at::StorageImpl* memory(const at::Tensor& t) { return t.storage().unsafeGetStorageImpl(); }

// An argument as it is kept: what it says, without the tensors' data.
c10::IValue without_tensors(const c10::IValue& a) {
  if (a.isTensor()) return at::Tensor();
  if (!a.isTensorList() && !a.isOptionalTensorList()) return a;
  const c10::List<c10::IValue> list = a.toList();
  c10::impl::GenericList kept(list.elementType());
  for (const c10::IValue& item : list) kept.push_back(without_tensors(item));
  return kept;
}

}  // namespace

Kind kind_of(const c10::OperatorHandle& op) {
  static std::mutex mutex;
  static std::unordered_map<c10::OperatorName, Kind> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(op.operator_name());
  return found != known.end() ? found->second : known.emplace(op.operator_name(), classify(op)).first->second;
}

std::vector<c10::IValue> without_tensors(at::ArrayRef<c10::IValue> arguments) {
  std::vector<c10::IValue> kept;
  kept.reserve(arguments.size());
  for (const c10::IValue& a : arguments) kept.push_back(without_tensors(a));
  return kept;
}

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

Recorder::Recorder(std::vector<at::Tensor> v, const Graph* graph) : vector_(std::move(v)) {
  if (graph) origins_ = std::make_unique<Origins>(*graph);
  for (size_t i = 0; i < vector_.size(); ++i) {
    if (!plain(vector_[i]))
      refuse("the vector is not made of plain tensors on the CPU");
    else
      name(vector_[i], {'v', static_cast<int64_t>(i)});
  }
}

bool Recorder::start() {
  Recorder* none = nullptr;
  if (!active.compare_exchange_strong(none, this)) return false;
  c10::impl::tls_set_dispatch_key_included(kKey, true);
  return true;
}

void Recorder::stop() {
  c10::impl::tls_set_dispatch_key_included(kKey, false);
  active.store(nullptr);
}

bool Recorder::depends(const c10::IValue& a) const {
  if (a.isTensor()) return depends(a.toTensor());
  if (a.isTensorList()) {
    for (const at::Tensor& t : a.toTensorList()) {
      if (depends(t)) return true;
    }
  } else if (a.isList() && !a.isIntList() && !a.isDoubleList() && !a.isBoolList()) {
    for (const c10::IValue& item : a.toListRef()) {
      if (depends(item)) return true;
    }
  }
  return false;
}

void Recorder::see(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  bool any = false;
  for (const c10::IValue& a : arguments) any = any || depends(a);
  if (!any) return see_constant(op, stack);
  if (!refusal_.empty()) return op.callBoxed(stack);
  if (origins_) origins_->look_at(op);
  switch (kind_of(op)) {
    case Kind::in_place:
      return write_in_place(op, stack);
    case Kind::pure:
      break;
    default:
      refuse(op.schema().name() + " writes to its arguments");
      return op.callBoxed(stack);
  }
  Recorded call{op, without_tensors(arguments), {}, {}, true, false};
  put(static_cast<int64_t>(reinterpret_cast<intptr_t>(&op.schema())));
  for (const c10::IValue& a : arguments) encode(a, &call.names);
  op.callBoxed(stack);
  const auto results = torch::jit::last(*stack, op.schema().returns().size());
  call.single = results.size() == 1 && results[0].isTensor() && results[0].toTensor().defined();
  for (const c10::IValue& value : results) result(value, &call);
  for (const Name& n : call.outputs) put(n.kind);
  calls_.push_back(std::move(call));
}

// What does not depend on the vector only runs, but zeros are known as such as long as nobody writes anywhere.
void Recorder::see_constant(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (kind_of(op) != Kind::pure) {
    zeros_.clear();
    const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
    const bool writes = !arguments.empty() && arguments[0].isTensor() && plain(arguments[0].toTensor());
    if (origins_ && writes && dependent_.count(memory(arguments[0].toTensor())) > 0)
      origins_->refuse(op.schema().name() + " writes where the vector has been");
  }
  origins_ ? origins_->call(op, stack) : op.callBoxed(stack);
  const std::string& name = op.schema().name();
  if (name == "aten::zeros_like" || name == "aten::new_zeros" || name == "aten::zeros") {
    const at::Tensor& t = stack->back().toTensor();
    zeros_.insert_or_assign(t.unsafeGetTensorImpl(), Shell(t.getIntrusivePtr()));
  }
}

// `x.op_(...)` is noted as `op(x, ...)` whose result is called x from then on.
void Recorder::write_in_place(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const at::Tensor target = arguments[0].toTensor();
  const bool named = depends(target);
  if (!plain(target) || (named ? has_other_views(target) : dependent_.count(memory(target)) > 0)) {
    refuse(op.schema().name() + " writes to memory that has several views");
    return op.callBoxed(stack);
  }
  Recorded call{op, without_tensors(arguments), {}, {}, true, true};
  put(static_cast<int64_t>(reinterpret_cast<intptr_t>(&op.schema())));
  // What a constant held before is a constant of its own.
  const Name before = named ? encode(target) : constant(target.clone());
  put('t'), put(before), call.names.push_back(before);
  for (size_t i = 1; i < arguments.size(); ++i) encode(arguments[i], &call.names);
  const auto sizes = target.sizes().vec(), strides = target.strides().vec();
  op.callBoxed(stack);
  if (target.sizes() != at::IntArrayRef(sizes) || target.strides() != at::IntArrayRef(strides))
    refuse(op.schema().name() + " changes the layout of its argument");
  call.outputs.push_back(name_result(target));
  calls_.push_back(std::move(call));
}

void Recorder::encode(const c10::IValue& a, std::vector<Name>* names) {
  if (a.isTensor()) {
    names->push_back(encode(a.toTensor()));
    put('t'), put(names->back());
  } else if (a.isNone()) {
    put('0');
  } else if (a.isDouble()) {
    names->push_back({'s', static_cast<int64_t>(scalars_.size())});
    scalars_.push_back(a.toDouble());
    put('s');
  } else if (a.isInt()) {
    put('i'), put(a.toInt());
  } else if (a.isBool()) {
    put(a.toBool() ? 'y' : 'z');
  } else if (a.isString()) {
    const std::string& text = a.toStringRef();
    put('"'), put(static_cast<int64_t>(text.size())), key_.append(text);
  } else if (a.isDevice()) {
    put('d'), put(static_cast<int64_t>(a.toDevice().type())), put(static_cast<int64_t>(a.toDevice().index()));
  } else if (a.isList()) {
    const c10::List<c10::IValue> list = a.toList();
    put('['), put(static_cast<int64_t>(list.size()));
    for (const c10::IValue& item : list) encode(item, names);
  } else {
    refuse("an argument is a " + a.tagKind());
  }
}

Name Recorder::encode(const at::Tensor& t) {
  if (!t.defined()) return {'-', 0};
  const auto named = names_.find(t.unsafeGetTensorImpl());
  if (named != names_.end()) return named->second.name;
  const auto known = fixed_.find(t.unsafeGetTensorImpl());
  if (known != fixed_.end()) return known->second.name;
  if (plain(t) && t.numel() > 0 && dependent_.count(memory(t)) > 0)
    refuse("a tensor shares memory with one that depends on the vector");
  return constant(t);
}

Name Recorder::constant(const at::Tensor& t) {
  if (!plain(t)) {
    refuse("a constant is not a plain tensor on the CPU");
    return {'-', 0};
  }
  const Name next{'c', static_cast<int64_t>(constants_.size())};
  const auto [at, fresh] = places_.emplace(place_of(t), next);
  if (fresh) {
    if (origins_) origins_->constant(t);
    if (zeros_.count(t.unsafeGetTensorImpl()) > 0) zero_constants_.push_back(next);
    constants_.push_back(t);
    versions_.push_back(version_of(t));
  }
  fixed_.insert_or_assign(t.unsafeGetTensorImpl(), Known{at->second, Shell(t.getIntrusivePtr())});
  return at->second;
}

void Recorder::name(const at::Tensor& t, Name name) {
  if (!names_.insert_or_assign(t.unsafeGetTensorImpl(), Known{name, Shell(t.getIntrusivePtr())}).second) return;
  const auto [at, fresh] = dependent_.try_emplace(memory(t), Memory{t.storage().getWeakStorageImpl(), {}});
  at->second.views.push_back(t.unsafeGetTensorImpl());
}

Name Recorder::name_result(const at::Tensor& t) {
  const Name next{'n', static_cast<int64_t>(results_.size())};
  results_.push_back({t.scalar_type(), at::DimVector(t.sizes()), at::DimVector(t.strides()), t.storage_offset()});
  name(t, next);
  return next;
}

bool Recorder::has_other_views(const at::Tensor& t) const {
  const auto seen = dependent_.find(memory(t));
  if (seen == dependent_.end()) return true;  // it got other memory
  const auto& views = seen->second.views;
  return std::any_of(views.begin(), views.end(), [&](const at::TensorImpl* view) {
    return view != t.unsafeGetTensorImpl() && !names_.at(view).shell.expired();
  });
}

void Recorder::result(const c10::IValue& value, Recorded* call) {
  if (value.isTensor()) {
    result(value.toTensor(), call);
  } else if (value.isTensorList()) {
    call->single = false;
    for (const at::Tensor& t : value.toTensorVector()) result(t, call);
  } else {
    refuse(call->op.schema().name() + " turns the vector into a " + value.tagKind() +
           ", which decides what happens next");
  }
}

void Recorder::result(const at::Tensor& t, Recorded* call) {
  if (!t.defined()) {
    call->outputs.push_back({'-', 0});
  } else if (!plain(t) || !t.is_floating_point()) {
    refuse(call->op.schema().name() + " turns the vector into something else than plain floating point numbers");
  } else {
    call->outputs.push_back(name_result(t));
  }
}

bool Recorder::finish(const std::vector<at::Tensor>& product) {
  for (const at::Tensor& t : product) outputs_.push_back(encode(t));
  for (const Name& n : outputs_) put(n);
  put(static_cast<int64_t>(zero_constants_.size()));
  for (const Name& n : zero_constants_) put(n);
  for (const at::Tensor& t : vector_) put('v'), put_layout(key_, t);
  for (const at::Tensor& t : constants_) put('c'), put_layout(key_, t);
  put(static_cast<int64_t>(scalars_.size()));
  for (size_t i = 0; i < constants_.size(); ++i) {
    if (version_of(constants_[i]) != versions_[i]) refuse("a constant was overwritten during the product");
  }
  return refusal_.empty();
}

std::optional<Link> Recorder::link() const {
  const bool dense = std::all_of(vector_.begin(), vector_.end(), [](const at::Tensor& t) { return t.is_contiguous(); });
  if (!origins_ || !dense || !refusal_.empty() || !origins_->refusal().empty()) return std::nullopt;
  return origins_->link(constants_);
}

std::vector<std::pair<Name, at::Tensor>> Recorder::tensors() const {
  std::vector<std::pair<Name, at::Tensor>> all;
  const auto add = [&all](char kind, at::Tensor t) {
    const bool first = all.empty() || all.back().first.kind != kind;
    all.emplace_back(Name{kind, first ? 0 : all.back().first.index + 1}, std::move(t));
  };
  for (const at::Tensor& t : vector_) add('v', t);
  for (const at::Tensor& t : constants_) add('c', t);
  for (const Layout& r : results_) {
    at::Tensor t = at::empty({0}, at::TensorOptions(at::kMeta).dtype(r.type));
    t.unsafeGetTensorImpl()->set_sizes_and_strides(r.sizes, r.strides, r.offset);
    add('n', std::move(t));
  }
  return all;
}

}  // namespace hg::plan
