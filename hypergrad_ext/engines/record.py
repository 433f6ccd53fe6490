"""Records one Hessian-vector product: which operations lead from the vector to the result, and on what data.

The product that is recorded is an ordinary backward pass through the gradient's graph. So everything that
does not depend on the vector (the forward pass, random masks, the branch that the user's code took, values
captured by closures) has been computed by torch, in this solve, and enters as a constant. There is nothing
that could go stale: what is kept beyond the solve is only the sequence of operations, found again by `key`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypergrad_ext import _native

Name = str
"""``v0``: a part of the vector, ``c0``: a constant tensor, ``s0``: a float, ``n0``: the result of a call."""


class Untraceable(Exception):
    """This product cannot be replayed; the text says why."""


@dataclass(frozen=True)
class Text:
    """A literal string, as against the name of a value."""

    value: str


class Call(NamedTuple):
    """One operation; arguments are names, literals, or tuples of them."""

    op: Any
    args: tuple
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[Name | None, ...]
    single: bool


class Recording:
    """One product, taken apart.

    Attributes:
        key: Equal for two recordings if and only if one program computes both: operations, how they are
            connected, every literal but floats, and the layout of every constant.
        constants: ``c0, c1, ...``: saved tensors, parameters, and whatever else does not depend on the vector.
        scalars: ``s0, s1, ...``.
        link: How the constants come about, if that was asked for and is known; see `linked`.
        mixed: Of every tensor by which the product is followed by the mixed derivative, whether it has a part of it.
    """

    def __init__(
        self,
        key: Hashable,
        constants: list[Tensor],
        scalars: list[float],
        details: Callable[[], Details] | None = None,
        link: Any | None = None,
        mixed: Sequence[bool] = (),
    ) -> None:
        """Keep what every solve needs; ``details`` are for the solve that compiles."""
        self.key = key
        self.constants = constants
        self.scalars = scalars
        self.link = link
        self.mixed = list(mixed)
        self._details = details

    @functools.cached_property
    def details(self) -> Details:
        """The operations."""
        assert self._details is not None
        return self._details()


class Details(NamedTuple):
    """What a program is compiled from.

    Attributes:
        calls: The operations that depend on the vector, in order; none writes to its arguments.
        outputs: Names of the result's parts.
        tensors: Tensor by name, for layouts. Not kept after compilation.
        zeros: Constants that are zeros in every solve with this key, as far as that is known.
    """

    calls: list[Call]
    outputs: list[Name]
    tensors: dict[Name, Tensor]
    zeros: frozenset[Name] = frozenset()


def record(
    product: Callable[[Sequence[Tensor]], Sequence[Tensor]], v: Sequence[Tensor], graph: Any | None = None
) -> tuple[Recording, list]:
    """Run ``product(v)`` and note how it was computed.

    Args:
        product: A backward pass through a retained graph.
        v: The vector. Its values do not matter, but should be such as occur.
        graph: That graph as a `_C.Graph`, to find out where constants come from.

    Returns:
        The recording, and the product itself.

    Raises:
        Untraceable: If the operations depend on the vector's values, or write where it cannot be followed.
    """
    # Aliases of the caller's tensors: what the pass does to them is seen under these names only.
    own = [t.detach() for t in v]
    if _native._C is not None and v[0].device.type == "cpu":
        compiled = _native._C.Recorder(own, graph)
        # One recording at a time in a process; a second thread takes the slow way.
        if compiled.start():
            try:
                result = list(product(own))
            finally:
                compiled.stop()
            if not compiled.finish(result):
                raise Untraceable(compiled.refusal)
            return _compiled_recording(compiled), result
    mode = _Recorder(own)
    with mode:
        result = list(product(own))
    return mode.finish(result), result


def _compiled_recording(compiled: Any) -> Recording:
    """The recording of the compiled module, whose operations become Python's only if they are asked for."""

    def details() -> Details:
        calls = []
        for name, overload, args, kwargs, outputs, single, in_place in compiled.calls(Text):
            namespace, op_name = name.split("::")
            op = getattr(getattr(getattr(torch.ops, namespace), op_name), overload or "default")
            functional = _functional(op) if in_place else op
            if functional is None:
                raise Untraceable(f"{op} writes to its arguments")
            calls.append(Call(functional, args, kwargs, outputs, single))
        return Details(calls, compiled.outputs, compiled.tensors, frozenset(compiled.zeros))

    return Recording(compiled.key, compiled.constants, compiled.scalars, details, compiled.link())


def layout(t: Tensor) -> tuple:
    """All that a program may assume about a tensor."""
    return tuple(t.shape), t.stride(), t.dtype, t.device


class _Recorder(TorchDispatchMode):
    def __init__(self, v: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors: dict[Name, Tensor] = {}
        self.names: dict[int, Name] = {}
        # Constants by identity, and what keeps those identities from being used again.
        self.fixed: dict[int, Name] = {}
        self.alive: list[Tensor] = []
        self.places: dict[tuple, Name] = {}
        self.calls: list[Call] = []
        self.constants: list[Tensor] = []
        self.versions: list[int] = []
        self.scalars: list[float] = []
        self.count = 0
        self.leaves = len(v)
        # Storages that depend on the vector, and how many tensors look into each. Every tensor with a name is
        # kept alive, so that neither its identity nor its memory is used again.
        self.dependent: dict[int, int] = {}
        for i, t in enumerate(v):
            self._name(t, f"v{i}")

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not (self._depends(args) or (kwargs and self._depends(kwargs.values()))):
            return op(*args, **kwargs) if kwargs else op(*args)
        kwargs = kwargs or {}
        if _is_mutable(op):
            return self._in_place(op, args, kwargs)
        encoded = tuple([self._encode(a) for a in args])
        encoded_kwargs = tuple([(k, self._encode(a)) for k, a in kwargs.items()]) if kwargs else ()
        result = op(*args, **kwargs)
        self._call(op, encoded, encoded_kwargs, result)
        return result

    def _call(self, op: Any, args: tuple, kwargs: tuple, result: Any) -> None:
        if isinstance(result, Tensor) and result.is_floating_point() and result.layout is torch.strided:
            name = self._name(result, f"n{self.count}")
            self.count += 1
            self.calls.append(Call(op, args, kwargs, (name,), True))
            return
        single = isinstance(result, Tensor)
        outputs: list[Name | None] = []
        for t in (result,) if single else result if isinstance(result, (tuple, list)) else (result,):
            if t is None:
                outputs.append(None)
                continue
            if not isinstance(t, Tensor) or not t.is_floating_point():
                raise Untraceable(f"{op} turns the vector into {_kind(t)}, which decides what happens next")
            if t.layout != torch.strided:
                raise Untraceable(f"{op} gives a sparse tensor")
            outputs.append(self._name(t, f"n{self.count}"))
            self.count += 1
        self.calls.append(Call(op, args, kwargs, tuple(outputs), single))

    def _in_place(self, op: Any, args: tuple, kwargs: dict) -> Any:
        """Note ``x.op_(...)`` as ``op(x, ...)`` whose result is called x from then on."""
        functional, target = _functional(op), args[0] if args else None
        if functional is None or not isinstance(target, Tensor):
            raise Untraceable(f"{op} writes to its arguments")
        if target.layout != torch.strided:
            raise Untraceable(f"{op} writes to a sparse tensor")
        if self.dependent.get(_memory(target), 0) > (id(target) in self.names):
            raise Untraceable(f"{op} writes to memory that has several views")
        encoded_self = self.names.get(id(target)) or self._constant(target.clone(memory_format=torch.preserve_format))
        encoded = (encoded_self, *self._encode(args[1:])), tuple((k, self._encode(a)) for k, a in kwargs.items())
        before = layout(target)
        result = op(*args, **kwargs)
        if layout(target) != before:
            raise Untraceable(f"{op} changes the layout of its argument")
        name = f"n{self.count}"
        self.count += 1
        self._name(target, name)
        self.calls.append(Call(functional, *encoded, (name,), True))
        return result

    def _name(self, t: Tensor, name: Name) -> Name:
        self.tensors[name] = t
        memory = _memory(t)
        self.dependent[memory] = self.dependent.get(memory, 0) + (id(t) not in self.names)
        self.names[id(t)] = name
        return name

    def _depends(self, args: Iterable) -> bool:
        names = self.names
        for a in args:
            if id(a) in names:
                return True
            if isinstance(a, (list, tuple)) and self._depends(a):
                return True
        return False

    def _encode(self, a: Any) -> Any:
        name = self.names.get(id(a)) or self.fixed.get(id(a))
        if name is not None:
            return name
        if isinstance(a, Tensor):
            if a.layout is torch.strided and a.numel() and _memory(a) in self.dependent:
                raise Untraceable("a tensor shares memory with one that depends on the vector")
            return self._constant(a)
        if type(a) is float:
            self.scalars.append(a)
            return f"s{len(self.scalars) - 1}"
        if isinstance(a, (list, tuple)):
            return tuple([self._encode(x) for x in a])
        return Text(a) if isinstance(a, str) else a

    def _constant(self, t: Tensor) -> Name:
        if t.layout != torch.strided or type(t) not in (Tensor, torch.nn.Parameter):
            raise Untraceable(f"a constant is a {type(t).__name__} with layout {t.layout}")
        # Every unpacking of a saved tensor makes a new object for the same memory.
        place = (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (id(t),)
        name = self.places.get(place)
        if name is None:
            name = self.places[place] = f"c{len(self.constants)}"
            self.constants.append(t)
            self.versions.append(_version(t))
            self.tensors[name] = t
        self.fixed[id(t)] = name
        self.alive.append(t)
        return name

    def finish(self, result: Sequence[Tensor]) -> Recording:
        outputs = [self._encode(t) for t in result]
        if [_version(t) for t in self.constants] != self.versions:
            raise Untraceable("a constant was overwritten during the product")
        v = tuple(layout(self.tensors[f"v{i}"]) for i in range(self.leaves))
        calls = tuple((c.op, c.args, c.kwargs, c.outputs) for c in self.calls)
        key = (calls, tuple(outputs), v, tuple(layout(t) for t in self.constants), len(self.scalars))
        details = Details(self.calls, outputs, self.tensors)
        return Recording(key, self.constants, self.scalars, lambda: details)


@functools.cache
def _is_mutable(op: Any) -> bool:
    return op._schema.is_mutable


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _kind(result: Any) -> str:
    return f"a tensor of {result.dtype}" if isinstance(result, Tensor) else f"a {type(result).__name__}"


def _functional(op: Any) -> Any:
    """The overload that computes what an in-place one writes, or None."""
    namespace, name = op._schema.name.split("::")
    if not name.endswith("_") or name.endswith("__") or len([a for a in op._schema.arguments if a.is_write]) != 1:
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, op._overloadname, None) if packet is not None else None
