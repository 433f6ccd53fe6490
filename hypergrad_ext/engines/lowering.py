"""From torch ops to the instructions of a native plan, one method per kind of op."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad_ext.engines.layout import (
    ADD,
    AXPY,
    COPY,
    DIV,
    FILL,
    MUL,
    SCALE,
    SUB,
    Instruction,
    Root,
    View,
    coalesced,
)
from hypergrad_ext.engines.program import Program, names_in
from hypergrad_ext.engines.record import Call, Name, Recording, Text

aten = torch.ops.aten

# Multiply the vector's part by something that only constants decide: found once per solve.
_DIAGONAL = {
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
    aten.threshold_backward.default,
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.softplus_backward.default,
    aten.elu_backward.default,
    aten.leaky_relu_backward.default,
    aten.hardtanh_backward.default,
}


class Unsupported(Exception):
    """The compiled module cannot run this program; the text says why."""


class Lowering:
    """Collects the instructions of one program.

    Attributes:
        instructions: What there is so far.
        derived: Functions of constants and scalars that give more constants, once per solve.
        immediates: Literal numbers that pointwise ops use; the solve's scalars come before them.
        dynamic: How many results ATen allocates.
    """

    def __init__(self, program: Program, recording: Recording, dtype: torch.dtype) -> None:
        """Start with the vector's parts and the constants of ``recording``."""
        self.instructions: list[Instruction] = []
        self.derived: list[Callable[[Sequence[Tensor], Sequence[float]], Tensor]] = []
        self.immediates: list[float] = []
        self.dynamic = 0
        self._recording = recording
        self._tensors = recording.details.tensors
        self._dtype = dtype
        self._views: dict[Name, View] = {}
        self._derived_names: dict[Any, Name] = {}
        self._scalars = len(recording.scalars)
        self._constants = len(recording.constants)
        self._gemms: dict[Root, Instruction] = {}
        for name, t in recording.details.tensors.items():
            if name[0] in "vc":
                root = Root(name[0], int(name[1:]), _extent(t.shape, t.stride()))
                self._views[name] = View(root, 0, tuple(t.shape), t.stride())
        self._bases = {n: c.args[0] for c in program.calls if _is_view(c) for n in c.outputs if n}
        self._reads = Counter(self._base(n) for c in program.calls if not _is_view(c) for n in names_in(c))
        self._reads.update(self._base(n) for n in program.outputs)

    def call(self, call: Call) -> None:
        """Add the instructions of one op."""
        if _is_view(call):
            return self._view(call)
        if call.single:
            out = self._tensors[call.outputs[0] or ""]
            if out.dtype == self._dtype and out.numel() and self._special(call):
                return None
        return self._aten(call)

    def finish(self, outputs: Sequence[Name]) -> list[Instruction]:
        """The instructions, with the results in the plan's outputs."""
        writers = {id(root): i for i in self.instructions for root in i.writes}
        taken: set[int] = set()
        for index, name in enumerate(outputs):
            view = self._views[name]
            out = Root("out", index, math.prod(view.sizes))
            direct = view.root.kind == "arena" and view.contiguous and view.whole and id(view.root) in writers
            if direct and id(view.root) not in taken:
                taken.add(id(view.root))
                view.root.kind, view.root.index = "out", index
            else:
                self._pointwise(View(out, 0, view.sizes, _contiguous(view.sizes)), [(COPY, view)])
        return self.instructions

    # Views.

    def _view(self, call: Call) -> None:
        source, view = self._tensors[call.args[0]], self._views[call.args[0]]
        for name in filter(None, call.outputs):
            t = self._tensors[name]
            offset = view.offset + int(t.storage_offset()) - int(source.storage_offset())
            self._views[name] = View(view.root, offset, tuple(t.shape), t.stride())

    # Ops with instructions of their own.

    def _special(self, call: Call) -> bool:
        lower = _SPECIAL.get(call.op)
        return lower is not None and lower(self, call)

    def _binary(self, call: Call, code: int) -> bool:
        a, b = call.args[:2]
        alpha = dict(call.kwargs).get("alpha", call.args[2] if len(call.args) > 2 else 1)
        if type(b) is str and b[0] == "s" or isinstance(b, (int, float)):
            if code == MUL:
                return self._emit(call, [(SCALE, self._operand(a), self._number(b))])
            return False
        x, y = self._operand(a), self._operand(b)
        if x is None or y is None:
            return False
        if code in (ADD, SUB) and alpha != 1:
            if type(alpha) is str:
                return False
            return self._emit(call, [(AXPY, x, y, self._number(alpha if code == ADD else -alpha))])
        if code == ADD and self._accumulate(call, a, b):
            return True
        return self._emit(call, [(code, x, y)])

    def _divide(self, call: Call) -> bool:
        a, b = call.args
        if type(b) is str and b[0] != "s":
            x, y = self._operand(a), self._operand(b)
            return x is not None and y is not None and self._emit(call, [(DIV, x, y)])
        dtype = self._dtype

        def inverse(constants: Sequence[Tensor], scalars: Sequence[float]) -> Tensor:
            return torch.tensor(1 / _value(b, scalars), dtype=dtype)

        reciprocal = self._derive(("reciprocal", b), inverse)
        return self._emit(call, [(MUL, self._operand(a), self._views[reciprocal])])

    def _negate(self, call: Call) -> bool:
        return self._emit(call, [(SCALE, self._operand(call.args[0]), self._number(-1.0))])

    def _diagonal(self, call: Call) -> bool:
        """``op(g, constants)`` as ``g * op(1, constants)``."""
        rest = call.args[1:]
        named = list(names_in(Call(None, rest, call.kwargs, (), True)))
        constants = [n for n in named if n[0] == "c"]
        if not constants or any(n[0] not in "cs" for n in named) or call.args[0][0] not in "vn":
            return False
        op, kwargs = call.op, call.kwargs
        shape = self._views[call.args[0]].sizes

        def slope(constants: Sequence[Tensor], scalars: Sequence[float]) -> Tensor:
            values = [_resolve(a, constants, scalars) for a in rest]
            like = next(a for a in values if isinstance(a, Tensor))
            ones = torch.ones(shape, dtype=self_dtype, device=like.device)
            return op(ones, *values, **{k: _resolve(a, constants, scalars) for k, a in kwargs})

        self_dtype = self._dtype
        if any(self._views[n].sizes != shape for n in constants):
            return False
        name = self._derive((op, repr((rest, kwargs))), slope)
        return self._emit(call, [(MUL, self._operand(call.args[0]), self._views[name])])

    def _copy(self, call: Call) -> bool:
        x = self._operand(call.args[0])
        return x is not None and self._emit(call, [(COPY, x)])

    def _zeros(self, call: Call) -> bool:
        return self._emit(call, [(FILL, self._number(0.0))])

    def _concatenate(self, call: Call) -> bool:
        dim = call.args[1] if len(call.args) > 1 else 0
        parts = [x for x in map(self._operand, call.args[0]) if x is not None]
        if len(parts) < len(call.args[0]):
            return False
        out = self._result(call)
        if call.op is aten.stack.default:
            dim %= len(out.sizes)
            parts = [View(x.root, x.offset, _insert(x.sizes, dim, 1), _insert(x.strides, dim, 0)) for x in parts]
        dim %= len(out.sizes)
        at = 0
        for x in parts:
            if len(x.sizes) != len(out.sizes):
                continue  # torch lets an empty vector join anything
            sizes = x.sizes
            self._pointwise(View(out.root, out.offset + at * out.strides[dim], sizes, out.strides), [(COPY, x)])
            at += sizes[dim]
        return True

    def _slice_backward(self, call: Call) -> bool:
        grad, x = call.args[0], self._operand(call.args[0])
        if x is None or type(grad) is not str:
            return False
        out = self._result(call)
        self._pointwise(out, [(FILL, self._number(0.0))])
        if call.op is aten.select_backward.default:
            _, sizes, dim, index = call.args
            dim, step = dim % len(sizes), 1
            start = index % sizes[dim]
            x = View(x.root, x.offset, _insert(x.sizes, dim, 1), _insert(x.strides, dim, 0))
        else:
            _, sizes, dim, start, _, step = call.args
            dim %= len(sizes)
            start = min(max(start + sizes[dim] if start < 0 else start, 0), sizes[dim])
        strides = tuple(s * step if d == dim else s for d, s in enumerate(out.strides))
        if math.prod(x.sizes):
            self._pointwise(View(out.root, out.offset + start * out.strides[dim], x.sizes, strides), [(COPY, x)])
        return True

    def _sum(self, call: Call) -> bool:
        x = self._operand(call.args[0])
        if x is None or any(k == "dtype" and a is not None for k, a in call.kwargs):
            return False
        rank = len(x.sizes)
        dims = call.args[1] if len(call.args) > 1 else None
        reduced = {d % rank for d in dims} if dims else set(range(rank))
        out = self._result(call)
        kept = call.args[2] if len(call.args) > 2 else False
        strides, position = [], 0
        for d in range(rank):
            if d in reduced:
                strides.append(0)
                position += bool(kept)
            else:
                strides.append(out.strides[position])
                position += 1
        self._pointwise(out, [(FILL, self._number(0.0))])
        if math.prod(x.sizes):
            order = sorted(range(rank), key=lambda d: -x.strides[d])
            target = View(out.root, out.offset, tuple(x.sizes[d] for d in order), tuple(strides[d] for d in order))
            source = View(x.root, x.offset, target.sizes, tuple(x.strides[d] for d in order))
            sizes, views = coalesced(target.sizes, [target, source])
            self.instructions.append(Instruction("sum", [sizes, *views], [out.root]))
        return True

    def _softmax(self, call: Call) -> bool:
        grad, output, dim = call.args[:3]
        t = self._tensors[grad]
        if output[0] != "c" or dim % t.dim() != t.dim() - 1:
            return False
        log = call.op is aten._log_softmax_backward_data.default
        if log:
            i = int(output[1:])
            output = self._derive(("exp", output), lambda c, s: c[i].exp().contiguous())
        g, y = self._contiguous_operand(grad), self._contiguous_operand(output)
        out = self._result(call)
        if not out.contiguous:
            return False
        columns = t.shape[-1]
        self.instructions.append(Instruction("softmax", [log, t.numel() // columns, columns, g, y, out], [out.root]))
        return True

    # Matrix products.

    def _mm(self, call: Call) -> bool:
        return self._gemm(self._result(call), self._views[call.args[0]], self._views[call.args[1]])

    def _addmm(self, call: Call) -> bool:
        c, a, b = call.args[:3]
        if any(x != 1 for x in (*call.args[3:], *(x for _, x in call.kwargs))):
            return False
        bias = self._operand(c)
        if bias is None:
            return False
        out = self._result(call)
        self._pointwise(out, [(COPY, _expanded(bias, out.sizes))])
        return self._gemm(out, self._views[a], self._views[b], accumulate=True)

    def _gemm(self, out: View, a: View, b: View, accumulate: bool = False) -> bool:
        a, b, out = (x if len(x.sizes) == 3 else _insert_dim(x) for x in (a, b, out))
        a, b = self._matrix(a), self._matrix(b)
        if not _rows_are_dense(out):
            return False
        self.instructions.append(Instruction("gemm", [a, b, out, accumulate], [out.root]))
        if not accumulate:
            self._gemms[out.root] = self.instructions[-1]
        return True

    def _matrix(self, x: View) -> View:
        """A batch of matrices with unit stride along rows or columns; a copy where there is none."""
        _, rows, columns = x.sizes
        _, down, along = x.strides
        if (along == 1 and (down >= columns or rows == 1)) or (down == 1 and (along >= rows or columns == 1)):
            return x
        copy = self._arena(x.sizes, _contiguous(x.sizes))
        self._pointwise(copy, [(COPY, x)])
        return copy

    def _accumulate(self, call: Call, a: Name, b: Name) -> bool:
        """``x + A B`` where nothing else needs x or A B: the product is added to x in place."""
        name = call.outputs[0] or ""
        out = self._tensors[name]
        for x_name, product_name in ((a, b), (b, a)):
            x, product = self._views[x_name], self._views[product_name]
            gemm = self._gemms.get(product.root)
            once = self._reads[self._base(x_name)] == self._reads[self._base(product_name)] == 1
            if gemm is None or not once or x.root.kind != "arena" or x.root is product.root:
                continue
            if not (x.whole and product.whole and x.sizes == product.sizes == tuple(out.shape)):
                continue
            left, right, target = gemm.fields[0], gemm.fields[1], _same_walk(gemm.fields[2], product, x)
            if x.strides != out.stride() or target is None:
                continue
            if not _rows_are_dense(target):
                left, right, target = _transposed(right), _transposed(left), _transposed(target)
            if not _rows_are_dense(target):
                continue
            self.instructions.remove(gemm)
            # From here on the memory of x holds the sum, which is no bare product.
            del self._gemms[product.root]
            self._gemms.pop(x.root, None)
            self.instructions.append(Instruction("gemm", [left, right, target, True], [x.root]))
            self._views[name] = x
            return True
        return False

    def _base(self, name: Name) -> Name:
        """The value that a name is a view of."""
        while name in self._bases:
            name = self._bases[name]
        return name

    # Everything else.

    def _aten(self, call: Call) -> None:
        """A call of the op itself, on tensors made from views."""
        outputs: list[View | None] = []
        for name in call.outputs:
            if name is None:
                outputs.append(None)
                continue
            t = self._tensors[name]
            if t.dtype != self._dtype:
                raise Unsupported(f"{call.op} gives {t.dtype} where parameters are {self._dtype}")
            root = Root("dynamic", self.dynamic, _extent(t.shape, t.stride()))
            self.dynamic += 1
            self._views[name] = View(root, 0, tuple(t.shape), t.stride())
            outputs.append(self._views[name])
        arguments = [*call.args]
        named = dict(call.kwargs)
        for argument in call.op._schema.arguments[len(arguments) :]:
            arguments.append(named.get(argument.name, _Default(argument)))
        written = [self._argument(a) for a in arguments]
        roots = [view.root for view in outputs if view is not None]
        fields = [call.op._schema.name, call.op._schema.overload_name, written, outputs]
        self.instructions.append(Instruction("aten", fields, roots))

    def _argument(self, a: Any) -> tuple:
        if isinstance(a, _Default):
            return ("literal", a.value)
        if type(a) is str:
            return ("number", int(a[1:])) if a[0] == "s" else ("tensor", self._as_argument(a))
        if isinstance(a, tuple) and any(type(x) is str and x[0] != "s" for x in a):
            return ("list", [None if x is None else self._as_argument(x) for x in a])
        if isinstance(a, tuple):
            return ("literal", [self._plain(x) for x in a])
        return ("literal", a.value if isinstance(a, Text) else a)

    def _plain(self, x: Any) -> Any:
        if type(x) is str:
            raise Unsupported("an op takes a list of floats")
        return x

    def _as_argument(self, name: Name) -> Any:
        """Constants go to ATen as they are, whatever their dtype."""
        return ("constant", int(name[1:])) if name[0] == "c" else self._views[name]

    # Helpers.

    def _result(self, call: Call) -> View:
        t = self._tensors[call.outputs[0] or ""]
        view = self._arena(tuple(t.shape), t.stride())
        self._views[call.outputs[0] or ""] = view
        return view

    def _arena(self, sizes: tuple[int, ...], strides: tuple[int, ...]) -> View:
        return View(Root("arena", extent=_extent(sizes, strides)), 0, tuple(sizes), tuple(strides))

    def _operand(self, name: Any) -> View | None:
        """The view of a value in the plan's dtype; small constants of other dtypes are converted once per solve."""
        if type(name) is not str or name[0] == "s":
            return None
        t = self._tensors[name]
        if t.dtype == self._dtype:
            return self._views[name]
        if name[0] != "c" or not (t.is_floating_point() or t.dtype == torch.bool or t.dim() == 0):
            return None
        i, dtype = int(name[1:]), self._dtype
        return self._views[self._derive(("cast", name), lambda c, s: c[i].to(dtype).contiguous())]

    def _contiguous_operand(self, name: Name) -> View:
        view = self._views[name]
        if view.contiguous:
            return view
        copy = self._arena(view.sizes, _contiguous(view.sizes))
        self._pointwise(copy, [(COPY, view)])
        return copy

    def _derive(self, key: Any, function: Callable[[Sequence[Tensor], Sequence[float]], Tensor]) -> Name:
        key = repr(key)
        if key not in self._derived_names:
            name = f"d{len(self.derived)}"
            self._derived_names[key] = name
            with torch.no_grad():
                t = function(self._recording.constants, self._recording.scalars)
            root = Root("c", self._constants + len(self.derived), _extent(t.shape, t.stride()))
            self._views[name] = View(root, 0, tuple(t.shape), t.stride())
            self.derived.append(function)
        return self._derived_names[key]

    def _number(self, x: Any) -> int:
        """Place of a number among scalars and immediates."""
        if type(x) is str:
            return int(x[1:])
        self.immediates.append(float(x))
        return self._scalars + len(self.immediates) - 1

    def _emit(self, call: Call, ops: list[tuple]) -> bool:
        if any(x is None for op in ops for x in op):
            return False
        self._pointwise(self._result(call), ops)
        return True

    def _pointwise(self, out: View, ops: list[tuple]) -> None:
        """One op; inputs are broadcast to ``out``, and walked in the order of its memory."""
        (code, *inputs) = ops[0]
        scalar = inputs.pop() if inputs and isinstance(inputs[-1], int) else -1
        order = sorted(range(len(out.sizes)), key=lambda d: -out.strides[d])
        order = [d for d in order if out.sizes[d] != 1]
        views = [out, *(_expanded(x, out.sizes) for x in inputs)]
        views = [
            View(x.root, x.offset, tuple(x.sizes[d] for d in order), tuple(x.strides[d] for d in order)) for x in views
        ]
        places = [i + 1 if i < len(inputs) else -1 for i in range(3)]
        self.instructions.append(
            Instruction("pointwise", [views[0].sizes, views, [(code, 0, *places, scalar)]], [out.root])
        )


class _Default:
    def __init__(self, argument: Any) -> None:
        self.value = argument.default_value


def _resolve(a: Any, constants: Sequence[Tensor], scalars: Sequence[float]) -> Any:
    if type(a) is str:
        return constants[int(a[1:])] if a[0] == "c" else scalars[int(a[1:])]
    return a.value if isinstance(a, Text) else a


def _value(a: Any, scalars: Sequence[float]) -> float:
    return scalars[int(a[1:])] if type(a) is str else float(a)


def _extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _contiguous(sizes: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _insert(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at:])


def _insert_dim(x: View) -> View:
    return View(x.root, x.offset, (1, *x.sizes), (0, *x.strides))


def _transposed(x: View) -> View:
    (n, r, c), (s, down, along) = x.sizes, x.strides
    return View(x.root, x.offset, (n, c, r), (s, along, down))


def _expanded(x: View, sizes: tuple[int, ...]) -> View:
    lead = len(sizes) - len(x.sizes)
    strides = tuple(
        0 if d < lead or (x.sizes[d - lead] == 1 and size != 1) else x.strides[d - lead] for d, size in enumerate(sizes)
    )
    return View(x.root, x.offset, tuple(sizes), strides)


def _rows_are_dense(x: View) -> bool:
    return x.sizes[2] == 1 or x.strides[2] == 1


def _same_walk(product: View, as_read: View, x: View) -> View | None:
    """The elements of ``x`` in the order of ``product``, when ``as_read`` shows the memory of ``product``."""
    moved = dict(zip(as_read.strides, zip(as_read.sizes, x.strides, strict=True), strict=True))
    if all(size == 1 or a == b for size, a, b in zip(x.sizes, as_read.strides, x.strides, strict=True)):
        return View(x.root, x.offset, product.sizes, product.strides)
    strides = []
    for size, stride in zip(product.sizes, product.strides, strict=True):
        if size != 1 and moved.get(stride, (0, 0))[0] != size:
            return None
        strides.append(moved[stride][1] if size != 1 else 0)
    return View(x.root, x.offset, product.sizes, tuple(strides))


def _is_view(call: Call) -> bool:
    """Whether the results are views of the first argument."""
    returned = call.op._schema.returns
    if not call.args or type(call.args[0]) is not str or len(returned) != 1:
        return False
    alias = returned[0].alias_info
    return call.op is aten._unsafe_view.default or (alias is not None and not alias.is_write)


_SPECIAL: dict[Any, Callable[[Lowering, Call], bool]] = {
    aten.add.Tensor: lambda lowering, call: lowering._binary(call, ADD),
    aten.sub.Tensor: lambda lowering, call: lowering._binary(call, SUB),
    aten.mul.Tensor: lambda lowering, call: lowering._binary(call, MUL),
    aten.mul.Scalar: lambda lowering, call: lowering._binary(call, MUL),
    aten.div.Tensor: Lowering._divide,
    aten.div.Scalar: Lowering._divide,
    aten.neg.default: Lowering._negate,
    aten.clone.default: Lowering._copy,
    aten.zeros_like.default: Lowering._zeros,
    aten.new_zeros.default: Lowering._zeros,
    aten.cat.default: Lowering._concatenate,
    aten.stack.default: Lowering._concatenate,
    aten.select_backward.default: Lowering._slice_backward,
    aten.slice_backward.default: Lowering._slice_backward,
    aten.sum.dim_IntList: Lowering._sum,
    aten.sum.default: Lowering._sum,
    aten._softmax_backward_data.default: Lowering._softmax,
    aten._log_softmax_backward_data.default: Lowering._softmax,
    aten.mm.default: Lowering._mm,
    aten.bmm.default: Lowering._mm,
    aten.addmm.default: Lowering._addmm,
    **dict.fromkeys(_DIAGONAL, Lowering._diagonal),
}
