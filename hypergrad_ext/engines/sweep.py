"""Both products of a narrow layer with its input become one instruction that reads the input once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypergrad_ext.engines.layout import Instruction
from hypergrad_ext.engines.views import Root, View

# As in csrc/plan.h.
_NARROW, _NARROW_DEPTH = 16, 64
# Elements of a row beyond which a block of 32 rows does not stay in the second cache.
_LONGEST = 4096
# What may be moved behind a sweep: a layer has a bias, a network has everything.
_MOST_AFTER = 8


def sweeps(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Instructions in which ``X v``, what is done to its rows, and ``(...)' X`` are one sweep over X.

    Args:
        instructions: Those of a plan, in groups, before its memory is laid out.

    Returns:
        The instructions, fewer; what stands between those of a sweep is moved before or behind it.
    """
    result: list[Instruction] = []
    rest = list(instructions)
    while rest:
        found = _Run(rest[0]).complete(rest) if _begins(rest[0]) else None
        if found is None:
            result.append(rest.pop(0))
        else:
            result += found.before
            rest[: found.length] = found.after
            first, *between, last = found.run
            fields = [first.fields, between, last.fields]
            result.append(Instruction("sweep", fields, [root for i in found.run for root in i.writes]))
    return result


class _Run:
    """The instructions of one sweep, and what can be moved out of its way.

    Attributes:
        run: Those of the sweep.
        before: What neither needs them nor what is behind them.
        after: What needs them.
    """

    def __init__(self, first: Instruction) -> None:
        self.run = [first]
        self.before: list[Instruction] = []
        self.after: list[Instruction] = []
        self._x, self._v, out, _ = first.fields
        self._rows = out.sizes[1]

    @property
    def length(self) -> int:
        """How many instructions it is about."""
        return len(self.run) + len(self.before) + len(self.after)

    def complete(self, instructions: Sequence[Instruction]) -> _Run | None:
        """Itself, with all instructions up to the second product; None if there is none."""
        for i in instructions[1:]:
            if not any(_depend(other, i) for other in (*self.run, *self.after)):
                self.before.append(i)
            elif any(_depend(other, i) for other in self.after):
                self.after.append(i)
            elif i.kind == "gemm" and self._ends(i):
                self.run.append(i)
                return self
            elif i.kind in ("pointwise", "softmax") and self._keeps_rows(i):
                self.run.append(i)
            else:
                self.after.append(i)
            if len(self.after) > _MOST_AFTER:
                break
        return None

    @property
    def _written(self) -> set[Root]:
        return {root for i in self.run for root in i.writes}

    def _ends(self, gemm: Instruction) -> bool:
        """Whether this multiplies X, from the left, by what was written by rows."""
        (a, b, out, _), x = gemm.fields, self._x
        same = b.root is x.root and (b.offset, b.sizes, b.strides[1:]) == (x.offset, x.sizes, x.strides[1:])
        turned = View(a.root, a.offset, a.sizes[:0:-1], a.strides[:0:-1])
        left = a.root in self._written and _by_rows(turned, self._rows)
        return same and left and a.sizes[1] <= _NARROW and out.strides[2] == 1 and out.root not in self._written

    def _keeps_rows(self, i: Instruction) -> bool:
        """Whether rows of what it writes depend on the same rows of what was written before."""
        if i.kind == "softmax":
            fits, operands = i.fields[1] == self._rows, i.fields[3:]
        else:
            sizes, operands, _ = i.fields
            fits = bool(sizes) and sizes[0] % self._rows == 0
        new = self._written | set(i.writes)
        kept = all(_by_rows(v, self._rows) for v in operands if v.root in new)
        return fits and kept and new.isdisjoint((self._x.root, self._v.root))


def _begins(i: Instruction) -> bool:
    """Whether it is a product of a matrix with long, dense rows and few other ones."""
    if i.kind != "gemm":
        return False
    a, b, out, accumulate = i.fields
    batch, rows, columns = out.sizes
    fits = batch == 1 and columns <= _NARROW <= rows and _NARROW_DEPTH <= a.sizes[2] <= _LONGEST
    return fits and a.strides[2] == 1 and b.strides[1] == 1 and _by_rows(out, rows) and not accumulate


def _depend(first: Instruction, second: Instruction) -> bool:
    """Whether their order matters."""
    ours, theirs = ({v.root for v in i.views()} | set(i.writes) for i in (first, second))
    return not ours.isdisjoint(second.writes) or not theirs.isdisjoint(first.writes)


def _by_rows(v: View, rows: int) -> bool:
    """Whether it goes through new memory from end to end, in so many rows."""
    return v.contiguous and v.whole and v.root.kind == "arena" and math.prod(v.sizes) % rows == 0
