"""Lowers a program to a native plan: flat instructions over preallocated memory, run by the compiled module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hypergrad_ext import _native
from hypergrad_ext.engines import codegen
from hypergrad_ext.engines.bands import bands
from hypergrad_ext.engines.layout import Instruction, allocate, group
from hypergrad_ext.engines.lowering import Lowering, Unsupported
from hypergrad_ext.engines.program import Program
from hypergrad_ext.engines.record import Recording
from hypergrad_ext.engines.sweep import sweeps
from hypergrad_ext.engines.views import Root, View
from hypergrad_ext.structure import views


class Plan:
    """A program as the compiled module runs it. Holds no tensors of a solve."""

    def __init__(self, make: Callable[[bool], Any], derived: list[Callable], shapes: list[torch.Size]) -> None:
        """Wrap what makes compiled plans, by bands or not, with the shapes of their results."""
        self.compiled = cache(make)
        self.shapes = shapes
        self._derived = derived
        self.compiled(_banded())

    def bind(self, constants: Sequence[Tensor], scalars: Sequence[float]) -> Bound:
        """The plan with the data of one solve, and memory of its own."""
        with torch.no_grad():
            all_constants = [*constants, *(f(constants, scalars) for f in self._derived)]
        return Bound(self, all_constants, list(scalars))


def _banded(vectors: int = 1) -> bool:
    """Whether threads share a product; of several vectors, each thread makes products of its own."""
    return vectors == 1 and torch.get_num_threads() > 1


class Bound:
    """The products of one solve."""

    def __init__(self, plan: Plan, constants: list[Tensor], scalars: list[float]) -> None:
        """Bind a plan."""
        self._bind = cache(lambda banded: plan.compiled(banded).bind(constants, scalars))
        self._shapes = plan.shapes
        self._bind(_banded())

    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` in new tensors."""
        return views(self._bind(_banded()).product(v), self._shapes)

    def products(self, v: Sequence[Tensor]) -> list[Tensor]:
        """The same for tensors with a leading dimension k; torch's threads make whole products, if there is work."""
        k = len(v[0])
        return views(self._bind(_banded(k)).product(v, k), self._shapes)

    def neumann_series(
        self, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LinearOperator.neumann_series`."""
        return self._bind(_banded(len(b))).neumann_series(b, alpha, damping, steps, stop)

    def conjugate_gradients(
        self, b: Tensor, damping: float, steps: int, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `LinearOperator.conjugate_gradients`."""
        return self._bind(_banded(len(b))).conjugate_gradients(b, damping, steps, state)


def lower(program: Program, recording: Recording, compile_kernels: bool = False) -> Plan:
    """The native plan of a program.

    Args:
        program: What to compute.
        recording: A recording with this program's key, for layouts.
        compile_kernels: Have all but matrix products and convolutions compiled for these shapes.

    Returns:
        The plan.

    Raises:
        Unsupported: If the compiled module is missing, or dtype or device are not its own.
        codegen.NoCompiler: If kernels cannot be compiled.
    """
    module = _native._C
    if module is None:
        raise Unsupported(_native.MISSING)
    leaves, outputs = (
        [recording.details.tensors[name] for name in names]
        for names in ([f"v{i}" for i in range(program.leaves)], program.outputs)
    )
    dtype = leaves[0].dtype
    if dtype not in (torch.float32, torch.float64) or any(t.dtype != dtype for t in leaves):
        raise Unsupported("the native plan needs parameters that are all float32 or all float64")
    if any(t.dtype != dtype or not t.numel() for t in outputs):
        raise Unsupported("the native plan gives results of the parameters' dtype, with elements")
    if any(t.device.type != "cpu" for t in (*leaves, *recording.constants)):
        raise Unsupported("the native plan runs on the CPU")
    lowering = Lowering(program, recording, dtype)
    for call in program.calls:
        lowering.call(call)
    grouped = sweeps(group(lowering.finish(program.outputs)))
    constants = len(recording.constants) + len(lowering.derived)
    counts = constants, lowering.dynamic, len(recording.scalars), lowering.immediates
    sizes = [t.numel() for t in leaves], [t.numel() for t in outputs]
    slots = 1, len(leaves), constants, lowering.dynamic

    # Called again in later solves: it must not hold on to tensors of this one.
    def make(banded: bool) -> Any:
        instructions = bands(grouped) if banded else grouped
        if compile_kernels:
            instructions = codegen.compiled(instructions, dtype)
        arena = allocate(instructions)
        return module.Plan(dtype == torch.float64, arena, *sizes, *counts, serialised(instructions, slots))

    return Plan(make, lowering.derived, [t.shape for t in outputs])


def serialised(instructions: Sequence[Instruction], counts: tuple[int, int, int, int]) -> list[tuple]:
    """Instructions with slots for roots: the arena, the vector's parts, constants, what ATen allocates, outputs."""
    first = dict(zip(("arena", "v", "c", "dynamic", "out"), accumulate((0, *counts)), strict=True))

    def slot(root: Root) -> int:
        return first[root.kind] + root.index

    def write(x: Any) -> Any:
        if isinstance(x, View):
            return slot(x.root), x.root.position + x.offset, x.sizes, x.strides
        if isinstance(x, Instruction):
            return x.kind, write(x.fields)
        return type(x)(map(write, x)) if type(x) in (tuple, list) else x

    dead: list[list[int]] = []
    seen: set[Root] = set()
    for i in reversed(instructions):
        here = {r for r in (*(v.root for v in i.views()), *i.writes) if r.kind == "dynamic" and r not in seen}
        dead.append([slot(root) for root in here])
        seen |= here
    return [(i.kind, write(i.fields), frees) for i, frees in zip(instructions, reversed(dead), strict=True)]
