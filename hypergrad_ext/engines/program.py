"""The part of a Hessian-vector product that depends on the vector, as a flat function of torch ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad_ext.engines.record import Call, Details, Name, Recording, Text

_ZEROS = {torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default, torch.ops.aten.zeros.default}


class Program:
    """Calls without those that nothing uses and those that were made before, and a function that makes them.

    Holds no tensor: parameters, batches and saved tensors are arguments of every call.

    Attributes:
        calls: The operations.
        outputs: Names of the result's parts.
        run: ``run(v, constants, scalars)`` gives the result's parts as a list.
    """

    def __init__(self, recording: Recording, results: slice = slice(None)) -> None:
        """Simplify a recording, as far as it leads to some of its results, and compile its function."""
        details = recording.details
        self.calls, self.outputs = _without_repeats(details.calls, details.outputs[results])
        self.calls, self.outputs = _without_zeros(self.calls, self.outputs, details)
        self.calls = _without_unused(self.calls, self.outputs)
        self.leaves = sum(name[0] == "v" for name in recording.details.tensors)
        self.run = self._compile()

    def _compile(self) -> Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[float]], list[Tensor]]:
        globals_: dict[str, Any] = {}

        def write(a: Any) -> str:
            if type(a) is str:
                return a
            if isinstance(a, Text):
                return repr(a.value)
            if isinstance(a, tuple):
                return f"[{', '.join(write(x) for x in a)}]"
            if a is None or isinstance(a, (bool, int)):
                return repr(a)
            name = f"k{len(globals_)}"
            globals_[name] = a
            return name

        ops: dict[Any, str] = {}
        used = {name for call in self.calls for name in names_in(call)} | set(self.outputs)
        lines = [f"{name} = {_source(name)}" for name in sorted(used) if name[0] != "n"]
        for call, dead in zip(self.calls, last_uses(self.calls, self.outputs), strict=True):
            op = ops.setdefault(call.op, f"op{len(ops)}")
            arguments = ", ".join([*map(write, call.args), *(f"{k}={write(a)}" for k, a in call.kwargs)])
            targets = call.outputs[0] if call.single else ", ".join(name or "_" for name in call.outputs) + ","
            lines.append(f"{targets} = {op}({arguments})")
            # Memory is given back as early as autograd does it.
            lines += [f"del {', '.join(dead)}"] if dead else []
        lines.append(f"return [{', '.join(self.outputs)}]")
        source = "def run(v, constants, scalars):\n    " + "\n    ".join(lines)
        globals_ |= {name: op for op, name in ops.items()}
        exec(compile(source, "<traced product>", "exec"), globals_)
        run = globals_["run"]
        return run


def names_in(call: Call) -> Iterator[Name]:
    """Names of the values that a call reads."""
    stack = [*call.args, *(a for _, a in call.kwargs)]
    while stack:
        a = stack.pop()
        if type(a) is str:
            yield a
        elif isinstance(a, tuple):
            stack.extend(a)


def last_uses(calls: Sequence[Call], outputs: Sequence[Name]) -> list[list[Name]]:
    """For every call, the results of calls that nothing reads after it."""
    alive = set(outputs)
    dead: list[list[Name]] = []
    for call in reversed(calls):
        touched = {name for name in names_in(call) if name[0] == "n"} | {name for name in call.outputs if name}
        dead.append(sorted(touched - alive))
        alive |= touched
    return dead[::-1]


def _source(name: Name) -> str:
    return f"{ {'v': 'v', 'c': 'constants', 's': 'scalars'}[name[0]] }[{name[1:]}]"


def _without_repeats(calls: Sequence[Call], outputs: Sequence[Name]) -> tuple[list[Call], list[Name]]:
    """Merge calls of one op with the same arguments."""
    same: dict[Name, Name] = {}
    seen: dict[Any, Call] = {}
    kept = []
    for call in calls:
        new = _renamed(call, same)
        # Literals compare by type too: 1 == True.
        key = (new.op, repr((new.args, new.kwargs)))
        first = seen.setdefault(key, new)
        if first is new:
            kept.append(new)
        else:
            same.update({a: b for a, b in zip(new.outputs, first.outputs, strict=True) if a and b})
    return kept, [same.get(name, name) for name in outputs]


def _renamed(call: Call, names: dict[Name, Name]) -> Call:
    """The call with other names for some of the values that it reads."""

    def renamed(a: Any) -> Any:
        if type(a) is str:
            return names.get(a, a)
        return tuple([renamed(x) for x in a]) if isinstance(a, tuple) else a

    kwargs = tuple([(k, renamed(a)) for k, a in call.kwargs])
    return Call(call.op, renamed(call.args), kwargs, call.outputs, call.single)


def _without_zeros(calls: Sequence[Call], outputs: Sequence[Name], details: Details) -> tuple[list[Call], list[Name]]:
    """Leave out sums with zeros, which autograd writes where a gradient is not there, unless they change a layout."""
    tensors, zeros = details.tensors, set(details.zeros)
    same: dict[Name, Name] = {}
    kept = []
    for call in calls:
        new = _renamed(call, same)
        name = new.outputs[0]
        if name and new.op in _ZEROS:
            zeros.add(name)
        elif name and new.op is torch.ops.aten.add.Tensor and len(new.args) == 2 and not new.kwargs:
            a, b = new.args
            for other, zero in ((a, b), (b, a)):
                if zero in zeros and other in tensors and _alike(tensors[other], tensors[name]):
                    same[name] = other
                    break
        if name not in same:
            kept.append(new)
    return kept, [same.get(name, name) for name in outputs]


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _without_unused(calls: Sequence[Call], outputs: Sequence[Name]) -> list[Call]:
    needed = set(outputs)
    kept = []
    for call in reversed(calls):
        if any(name in needed for name in call.outputs):
            kept.append(call)
            needed.update(names_in(call))
    return kept[::-1]


def without_grad(run: Callable) -> Callable:
    """The function as solvers call it: constants may require grad, the result does not."""

    def product(*args: Any) -> list[Tensor]:
        with torch.no_grad():
            return run(*args)

    return product
