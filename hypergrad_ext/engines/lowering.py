"""From torch ops to the instructions of a native plan; those with instructions of their own are in lower_*.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad_ext.engines import lower_convolution, lower_matrix, lower_pointwise
from hypergrad_ext.engines.layout import COPY, Instruction
from hypergrad_ext.engines.program import Program, names_in
from hypergrad_ext.engines.record import Call, Name, Recording, Text
from hypergrad_ext.engines.views import Root, View, expanded, extent
from hypergrad_ext.structure import contiguous_strides

aten = torch.ops.aten


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
        self.tensors = recording.details.tensors
        self.dtype = dtype
        self.views: dict[Name, View] = {}
        self._derived_names: dict[Any, Name] = {}
        self._scalars = len(recording.scalars)
        self._constants = len(recording.constants)
        self.products: dict[Root, Instruction] = {}
        for name, t in recording.details.tensors.items():
            if name[0] in "vc":
                root = Root(name[0], int(name[1:]), extent(t.shape, t.stride()))
                self.views[name] = View(root, 0, tuple(t.shape), t.stride())
        self._bases = {n: c.args[0] for c in program.calls if _is_view(c) for n in c.outputs if n}
        self.reads = Counter(self.base(n) for c in program.calls if not _is_view(c) for n in names_in(c))
        self.reads.update(self.base(n) for n in program.outputs)

    def call(self, call: Call) -> None:
        """Add the instructions of one op."""
        if _is_view(call):
            return self._view(call)
        outputs = [self.tensors[name] for name in call.outputs if name]
        if all(t.dtype == self.dtype and t.numel() for t in outputs) and self._special(call):
            return None
        return self._aten(call)

    def finish(self, outputs: Sequence[Name]) -> list[Instruction]:
        """The instructions, with the results in the plan's outputs."""
        writers = {id(root): i for i in self.instructions for root in i.writes}
        taken: set[int] = set()
        for index, name in enumerate(outputs):
            view = self.views[name]
            out = Root("out", index, math.prod(view.sizes))
            direct = view.root.kind == "arena" and view.contiguous and view.whole and id(view.root) in writers
            if direct and id(view.root) not in taken:
                taken.add(id(view.root))
                view.root.kind, view.root.index = "out", index
            else:
                self.pointwise(View(out, 0, view.sizes, contiguous_strides(view.sizes)), [(COPY, view)])
        return self.instructions

    def _view(self, call: Call) -> None:
        source, view = self.tensors[call.args[0]], self.views[call.args[0]]
        for name in filter(None, call.outputs):
            t = self.tensors[name]
            if t.dtype != self.dtype:
                raise Unsupported(f"{call.op} looks at numbers as {t.dtype}")
            offset = view.offset + int(t.storage_offset()) - int(source.storage_offset())
            self.views[name] = View(view.root, offset, tuple(t.shape), t.stride())

    def _special(self, call: Call) -> bool:
        lower = _OPS.get(call.op)
        return lower is not None and lower(self, call)

    def base(self, name: Name) -> Name:
        """The value that a name is a view of."""
        while name in self._bases:
            name = self._bases[name]
        return name

    def _aten(self, call: Call) -> None:
        """A call of the op itself, on tensors made from views."""
        outputs: list[View | None] = []
        for name in call.outputs:
            if name is None:
                outputs.append(None)
                continue
            t = self.tensors[name]
            if not t.numel():
                raise Unsupported(f"{call.op} gives a tensor without elements")
            if t.dtype != self.dtype:
                raise Unsupported(f"{call.op} gives {t.dtype} where parameters are {self.dtype}")
            root = Root("dynamic", self.dynamic, extent(t.shape, t.stride()))
            self.dynamic += 1
            self.views[name] = View(root, 0, tuple(t.shape), t.stride())
            outputs.append(self.views[name])
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
        if name[0] == "c":
            return ("constant", int(name[1:]))
        if not math.prod(self.views[name].sizes):
            raise Unsupported("an op takes a tensor without elements")
        return self.views[name]

    def result(self, call: Call) -> View:
        """Memory for the result of a call."""
        return self.memory(call.outputs[0] or "")

    def memory(self, name: Name) -> View:
        """Memory for a value, laid out as it was recorded."""
        t = self.tensors[name]
        self.views[name] = self.arena(tuple(t.shape), t.stride())
        return self.views[name]

    def arena(self, sizes: tuple[int, ...], strides: tuple[int, ...]) -> View:
        """New memory."""
        return View(Root("arena", extent=extent(sizes, strides)), 0, tuple(sizes), tuple(strides))

    def operand(self, name: Any) -> View | None:
        """The view of a value in the plan's dtype; small constants of other dtypes are converted once per solve."""
        if type(name) is not str or name[0] == "s":
            return None
        t = self.tensors[name]
        if t.dtype == self.dtype:
            return self.views[name]
        if name[0] != "c" or not (t.is_floating_point() or t.dtype == torch.bool or t.dim() == 0):
            return None
        i, dtype = int(name[1:]), self.dtype
        return self.views[self.derive(("cast", name), lambda c, s: c[i].to(dtype).contiguous())]

    def contiguous_operand(self, name: Name) -> View:
        """The view of a value, or of a contiguous copy."""
        view = self.views[name]
        if view.contiguous:
            return view
        copy = self.arena(view.sizes, contiguous_strides(view.sizes))
        self.pointwise(copy, [(COPY, view)])
        return copy

    def derive(self, key: Any, function: Callable[[Sequence[Tensor], Sequence[float]], Tensor]) -> Name:
        """A constant that is computed from the others once per solve; equal keys share it."""
        key = repr(key)
        if key not in self._derived_names:
            name = f"d{len(self.derived)}"
            self._derived_names[key] = name
            with torch.no_grad():
                t = function(self._recording.constants, self._recording.scalars)
            root = Root("c", self._constants + len(self.derived), extent(t.shape, t.stride()))
            self.views[name] = View(root, 0, tuple(t.shape), t.stride())
            self.derived.append(function)
        return self._derived_names[key]

    def number(self, x: Any) -> int:
        """Place of a number among scalars and immediates."""
        if type(x) is str:
            return int(x[1:])
        self.immediates.append(float(x))
        return self._scalars + len(self.immediates) - 1

    def emit(self, call: Call, ops: list[tuple]) -> bool:
        """A pointwise op for a call; False if an input has no view in the plan's dtype."""
        if any(x is None for op in ops for x in op):
            return False
        self.pointwise(self.result(call), ops)
        return True

    def pointwise(self, out: View, ops: list[tuple]) -> None:
        """One op; inputs are broadcast to ``out``, and walked in the order of its memory."""
        (code, *inputs) = ops[0]
        scalar = inputs.pop() if inputs and isinstance(inputs[-1], int) else -1
        order = sorted(range(len(out.sizes)), key=lambda d: -out.strides[d])
        order = [d for d in order if out.sizes[d] != 1]
        views = [out, *(expanded(x, out.sizes) for x in inputs)]
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


def _is_view(call: Call) -> bool:
    """Whether the results are views of the first argument."""
    returned = call.op._schema.returns
    if not call.args or type(call.args[0]) is not str or len(returned) != 1:
        return False
    alias = returned[0].alias_info
    return call.op is aten._unsafe_view.default or (alias is not None and not alias.is_write)


_OPS = {**lower_pointwise.OPS, **lower_matrix.OPS, **lower_convolution.OPS}
