// hypergrad_ext._C.Plan: native plans, read from the tuples that engines/native.py writes.
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/tensor_memoryformats.h>

#include "graph.h"
#include "link.h"
#include "plan_host.h"
#include "recorder.h"
#include "tensors.h"

namespace py = pybind11;

namespace torch::jit {
// From torch/csrc/jit/python/pybind_utils.h, which takes a minute to compile.
c10::IValue toIValue(py::handle object, const c10::TypePtr& type, std::optional<int32_t> n);
py::object toPyObject(c10::IValue value);
}  // namespace torch::jit

namespace hg::plan {
namespace {

View view(const py::handle& object) {
  const auto t = py::cast<py::tuple>(object);
  return {py::cast<int64_t>(t[0]), py::cast<int64_t>(t[1]), py::cast<std::vector<int64_t>>(t[2]),
          py::cast<std::vector<int64_t>>(t[3])};
}

std::vector<int64_t> integers(const py::handle& object) { return py::cast<std::vector<int64_t>>(object); }

Pointwise pointwise(const py::list& fields) {
  Pointwise p;
  p.sizes = integers(fields[0]);
  for (const py::handle operand : fields[1]) p.operands.push_back(view(operand));
  for (const py::handle op : fields[2]) {
    const auto f = integers(op);
    p.ops.push_back({static_cast<Code>(f.at(0)), f.at(1), f.at(2), f.at(3), f.at(4), f.at(5)});
  }
  return p;
}

Gemm gemm(const py::list& fields) {
  return {view(fields[0]), view(fields[1]), view(fields[2]), py::cast<bool>(fields[3])};
}

Softmax softmax(const py::list& fields) {
  return {py::cast<bool>(fields[0]),
          py::cast<int64_t>(fields[1]),
          py::cast<int64_t>(fields[2]),
          view(fields[3]),
          view(fields[4]),
          view(fields[5])};
}

Convolution convolution(const py::list& fields) {
  const auto pair = [&](int at) { return py::cast<std::array<int64_t, 2>>(fields[at]); };
  return {view(fields[0]),           view(fields[1]),           view(fields[2]),          pair(3), pair(4), pair(5),
          py::cast<bool>(fields[6]), py::cast<bool>(fields[7]), py::cast<bool>(fields[8])};
}

Compiled compiled(const py::list& fields) {
  Compiled kernel{reinterpret_cast<decltype(Compiled::run)>(py::cast<intptr_t>(fields[0])),
                  {},
                  integers(fields[2]),
                  {0, py::cast<int64_t>(fields[3])},
                  py::cast<bool>(fields[4])};
  for (const py::handle v : fields[1]) kernel.views.push_back(view(v));
  return kernel;
}

// The kind and the fields of an instruction that is part of another one.
std::pair<std::string, py::list> part(const py::handle& object) {
  return py::cast<std::pair<std::string, py::list>>(object);
}

Sweep sweep(const py::list& fields) {
  Sweep s{gemm(fields[0]), {}, gemm(fields[2])};
  for (const py::handle work : fields[1]) {
    const auto [kind, parts] = part(work);
    if (kind == "softmax")
      s.between.emplace_back(softmax(parts));
    else
      s.between.emplace_back(pointwise(parts));
  }
  return s;
}

Kernel kernel(const std::string& kind, const py::list& fields) {
  if (kind == "gemm") return gemm(fields);
  if (kind == "pointwise") return pointwise(fields);
  if (kind == "sum") return Sum{integers(fields[0]), view(fields[1]), view(fields[2])};
  if (kind == "softmax") return softmax(fields);
  if (kind == "convolution") return convolution(fields);
  if (kind == "sweep") return sweep(fields);
  TORCH_CHECK_VALUE(kind == "compiled", "no such instruction: ", kind);
  return compiled(fields);
}

std::vector<Kernel> kernels(const py::handle& objects) {
  std::vector<Kernel> list;
  for (const py::handle object : py::cast<py::list>(objects)) {
    const auto [kind, fields] = part(object);
    list.push_back(kernel(kind, fields));
  }
  return list;
}

class Reader {
 public:
  explicit Reader(Plan& plan) : plan_(plan) {}

  Instruction instruction(const py::tuple& object) {
    const auto kind = py::cast<std::string>(object[0]);
    const auto fields = py::cast<py::list>(object[1]);
    Instruction i{Kernel{}, integers(object[2])};
    if (kind == "bands")
      i.work = Bands(py::cast<int64_t>(fields[0]), kernels(fields[1]));
    else if (kind == "tasks")
      i.work = Tasks(kernels(fields[0]));
    else if (kind == "aten")
      i.work = aten(fields);
    else
      i.work = kernel(kind, fields);
    return i;
  }

 private:
  Aten aten(const py::list& fields) {
    const auto name = py::cast<std::string>(fields[0]), overload = py::cast<std::string>(fields[1]);
    Aten a{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload == "default" ? "" : overload.c_str()),
           {},
           {}};
    const auto& arguments = a.op.schema().arguments();
    size_t at = 0;
    for (const py::handle object : fields[2]) {
      TORCH_CHECK_VALUE(at < arguments.size(), name, " takes ", arguments.size(), " arguments");
      a.arguments.push_back(argument(py::cast<py::tuple>(object), arguments[at++].type()));
    }
    for (const py::handle result : fields[3])
      a.results.push_back(result.is_none() ? std::nullopt : std::optional<View>(view(result)));
    return a;
  }

  Argument tensor(const py::handle& object) {
    Argument a;
    const auto t = py::cast<py::tuple>(object);
    if (py::isinstance<py::str>(t[0])) {
      a.kind = Argument::Kind::constant;
      a.index = py::cast<int64_t>(t[1]);
    } else {
      a.kind = Argument::Kind::view;
      a.view = view(t);
      a.index = plan_.views++;
    }
    return a;
  }

  Argument argument(const py::tuple& object, const c10::TypePtr& type) {
    const auto kind = py::cast<std::string>(object[0]);
    if (kind == "tensor") return tensor(object[1]);
    Argument a;
    if (kind == "number") {
      a.kind = Argument::Kind::number;
      a.index = py::cast<int64_t>(object[1]);
    } else if (kind == "list") {
      a.kind = Argument::Kind::list;
      const auto list = type->cast<c10::ListType>();
      a.optional_items = list && list->getElementType()->kind() == c10::TypeKind::OptionalType;
      for (const py::handle item : object[1]) a.items.push_back(item.is_none() ? Argument{} : tensor(item));
    } else {
      a.literal = torch::jit::toIValue(object[1], type, std::nullopt);
    }
    return a;
  }

  Plan& plan_;
};

std::shared_ptr<Plan> make(bool is_double, int64_t arena, std::vector<int64_t> leaves, std::vector<int64_t> outputs,
                           int64_t constants, int64_t dynamic, int64_t scalars, std::vector<double> immediates,
                           const py::list& instructions) {
  auto plan = std::make_shared<Plan>();
  plan->is_double = is_double, plan->arena = arena, plan->leaves = std::move(leaves);
  plan->outputs = std::move(outputs);
  plan->constants = constants, plan->dynamic = dynamic, plan->scalars = scalars;
  plan->immediates = std::move(immediates);
  Reader reader(*plan);
  for (const py::handle i : instructions) plan->instructions.push_back(reader.instruction(py::cast<py::tuple>(i)));
  check(*plan);
  return plan;
}

const at::Tensor& tensor(py::handle object) {
  const at::Tensor* t = from_python(object.ptr());
  if (!t) throw py::type_error("expected a tensor");
  return *t;
}

std::vector<at::Tensor> tensors(const py::sequence& objects) {
  std::vector<at::Tensor> list;
  list.reserve(py::len(objects));
  for (const py::handle object : objects) list.push_back(tensor(object));
  return list;
}

py::object wrap(const at::Tensor& t) { return py::reinterpret_steal<py::object>(to_python(t)); }

// Runs f without Python's lock.
template <class F>
auto released(const F& f) {
  const py::gil_scoped_release release;
  return f();
}

py::object name(const Name& n) { return n.kind == '-' ? py::none() : py::object(py::str(n.text())); }

// An argument as engines/record.py writes it: the next of the names, a literal, or a tuple.
py::object literal(const c10::IValue& a, c10::TypeKind kind, const py::object& text, const Name*& next) {
  if (a.isTensor() || a.isDouble()) return name(*next++);
  if (a.isString()) return text(a.toStringRef());
  if (a.isList()) {
    py::list items;
    const c10::List<c10::IValue> list = a.toList();
    for (const c10::IValue& item : list) items.append(literal(item, c10::TypeKind::AnyType, text, next));
    return py::tuple(items);
  }
  if (a.isInt() && kind == c10::TypeKind::ScalarTypeType)
    return py::reinterpret_borrow<py::object>(
        reinterpret_cast<PyObject*>(torch::getTHPDtype(static_cast<at::ScalarType>(a.toInt()))));
  if (a.isInt() && kind == c10::TypeKind::LayoutType)
    return py::reinterpret_borrow<py::object>(
        reinterpret_cast<PyObject*>(torch::getTHPLayout(static_cast<at::Layout>(a.toInt()))));
  if (a.isInt() && kind == c10::TypeKind::MemoryFormatType)
    return py::reinterpret_borrow<py::object>(
        torch::utils::getTHPMemoryFormat(static_cast<at::MemoryFormat>(a.toInt())));
  return torch::jit::toPyObject(a);
}

// The kind of an argument that the schema calls an int, if it is optional the kind of what it holds.
c10::TypeKind kind_of(const c10::Argument& a) {
  const auto optional = a.real_type()->cast<c10::OptionalType>();
  return optional ? optional->getElementType()->kind() : a.real_type()->kind();
}

py::tuple call(const Recorded& c, const py::object& text) {
  py::list positional, named, outputs;
  const Name* next = c.names.data();
  const auto& arguments = c.op.schema().arguments();
  size_t last = 0;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& preset = arguments[i].default_value();
    const py::object value = literal(c.arguments[i], kind_of(arguments[i]), text, next);
    const bool given = !preset || c.arguments[i].isTensor() || *preset != c.arguments[i];
    if (!arguments[i].kwarg_only()) {
      positional.append(value);
      if (given) last = i + 1;
    } else if (given) {
      named.append(py::make_tuple(arguments[i].name(), value));
    }
  }
  for (const Name& n : c.outputs) outputs.append(name(n));
  const auto& schema = c.op.schema();
  return py::make_tuple(schema.name(), schema.overload_name(), py::tuple(positional[py::slice(0, last, 1)]),
                        py::tuple(named), py::tuple(outputs), c.single, c.in_place);
}

py::list list_of(const std::vector<at::Tensor>& tensors) {
  py::list list;
  for (const at::Tensor& t : tensors) list.append(wrap(t));
  return list;
}

py::list list_of(const std::vector<Name>& names) {
  py::list list;
  for (const Name& n : names) list.append(name(n));
  return list;
}

void bind_links(py::module_& m) {
  py::class_<Graph>(m, "Graph")
      .def(py::init([](const py::sequence& outputs, const py::sequence& leaves, const py::sequence& seeds) {
        return std::make_unique<Graph>(tensors(outputs), tensors(leaves), tensors(seeds));
      }))
      .def_property_readonly("key", [](const Graph& self) { return py::bytes(self.key); })
      .def("current", &Graph::current)
      .def_readonly("refusal", &Graph::refusal);
  py::class_<Link>(m, "Link")
      .def("constants", [](const Link& self, const Graph& graph) { return list_of(self.constants(graph)); })
      .def("agrees", [](const Link& self, const Graph& graph, const py::sequence& shown) {
        return self.agrees(graph, tensors(shown));
      });
}

void bind_recorder(py::module_& m) {
  py::class_<Recorder>(m, "Recorder")
      .def(py::init(
          [](const py::sequence& v, const Graph* graph) { return std::make_unique<Recorder>(tensors(v), graph); }))
      .def("start", &Recorder::start)
      .def("stop", &Recorder::stop)
      .def("finish", [](Recorder& self, const py::sequence& product) { return self.finish(tensors(product)); })
      .def_property_readonly("key", [](const Recorder& self) { return py::bytes(self.key()); })
      .def_property_readonly("refusal", &Recorder::refusal)
      .def_property_readonly("scalars", &Recorder::scalars)
      .def_property_readonly("constants", [](const Recorder& self) { return list_of(self.constants()); })
      .def("link", &Recorder::link)
      .def_property_readonly("unlinked", &Recorder::unlinked)
      .def_property_readonly("outputs", [](const Recorder& self) { return list_of(self.outputs()); })
      .def_property_readonly("zeros", [](const Recorder& self) { return list_of(self.zeros()); })
      .def_property_readonly("tensors",
                             [](const Recorder& self) {
                               py::dict dict;
                               for (const auto& [n, t] : self.tensors()) dict[name(n)] = wrap(t);
                               return dict;
                             })
      .def("calls", [](const Recorder& self, const py::object& text) {
        py::list list;
        for (const Recorded& c : self.calls()) list.append(call(c, text));
        return list;
      });
}

}  // namespace

void bind(py::module_& m) {
  bind_links(m);
  bind_recorder(m);
  py::class_<Bound, std::shared_ptr<Bound>>(m, "BoundPlan")
      .def(
          "product",
          [](Bound& self, const py::sequence& v, std::optional<int64_t> rows) {
            const auto parts = tensors(v);
            return wrap(released([&] { return self.product(parts, rows); }));
          },
          py::arg("v"), py::arg("rows") = py::none())
      .def("neumann_series",
           [](Bound& self, py::handle b, double alpha, double damping, int64_t steps, py::handle stop) {
             const auto r = released([&, &bt = tensor(b), &st = tensor(stop)] {
               return self.neumann_series(bt, alpha, damping, steps, st);
             });
             return py::make_tuple(wrap(std::get<0>(r)), wrap(std::get<1>(r)));
           })
      .def("conjugate_gradients", [](Bound& self, py::handle b, double damping, int64_t steps, py::handle state) {
        const auto r = released(
            [&, &bt = tensor(b), &st = tensor(state)] { return self.conjugate_gradients(bt, damping, steps, st); });
        return py::make_tuple(wrap(std::get<0>(r)), wrap(std::get<1>(r)), wrap(std::get<2>(r)));
      });
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init(&make))
      .def("bind", [](const std::shared_ptr<Plan>& self, const py::sequence& constants, std::vector<double> scalars) {
        return std::make_shared<Bound>(self, tensors(constants), std::move(scalars));
      });
}

}  // namespace hg::plan
