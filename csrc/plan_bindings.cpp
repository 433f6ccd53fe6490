// hypergrad_ext._C.Plan: native plans, read from the tuples that engines/native.py writes.
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan_host.h"
#include "tensors.h"

namespace py = pybind11;

namespace torch::jit {
// From torch/csrc/jit/python/pybind_utils.h, which takes a minute to compile.
c10::IValue toIValue(py::handle object, const c10::TypePtr& type, std::optional<int32_t> n);
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

class Reader {
 public:
  explicit Reader(Plan& plan) : plan_(plan) {}

  Instruction instruction(const py::tuple& object) {
    const auto kind = py::cast<std::string>(object[0]);
    const auto fields = py::cast<py::list>(object[1]);
    Instruction i;
    i.frees = integers(object[2]);
    if (kind == "gemm") {
      i.work = Gemm{view(fields[0]), view(fields[1]), view(fields[2]), py::cast<bool>(fields[3])};
    } else if (kind == "pointwise") {
      i.work = pointwise(fields);
    } else if (kind == "sum") {
      i.work = Sum{integers(fields[0]), view(fields[1]), view(fields[2])};
    } else if (kind == "softmax") {
      i.work = Softmax{py::cast<bool>(fields[0]),
                       py::cast<int64_t>(fields[1]),
                       py::cast<int64_t>(fields[2]),
                       view(fields[3]),
                       view(fields[4]),
                       view(fields[5])};
    } else {
      i.work = aten(fields);
    }
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

std::shared_ptr<Plan> make(bool is_double, int64_t arena, std::vector<int64_t> leaves, int64_t constants,
                           int64_t dynamic, int64_t scalars, std::vector<double> immediates,
                           const py::list& instructions) {
  auto plan = std::make_shared<Plan>();
  plan->is_double = is_double, plan->arena = arena, plan->leaves = std::move(leaves);
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

}  // namespace

void bind(py::module_& m) {
  m.attr("has_blas") = has_blas();
  py::class_<Bound, std::shared_ptr<Bound>>(m, "BoundPlan")
      .def("product",
           [](Bound& self, const py::sequence& v) {
             const auto parts = tensors(v);
             return wrap(released([&] { return self.product(parts); }));
           })
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
