"""Runs of instructions that keep the rows of a batch apart: every thread does all of them for a band of rows.

Shared one by one, small instructions leave threads waiting for each other most of the time. What adds up over the
batch, the products that give the gradient by a weight, is moved behind a run; those are independent of each other, and
threads take them one by one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

from hypergrad_ext.engines.layout import Instruction
from hypergrad_ext.engines.views import Root, View

# Multiply-adds of an instruction from which on its own work is worth sharing.
_LARGE = 1 << 22
# Elements that a run may keep: nothing in it takes the memory of what is no longer needed.
_MOST_KEPT = 1 << 20
# Numbers of rows that are tried.
_TRIED = 10


def bands(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Instructions in which runs by rows are one instruction each.

    Args:
        instructions: Those of a plan, in groups, before its memory is laid out.

    Returns:
        The instructions, fewer; what stands between those of a run is moved before or behind it.
    """
    votes: Counter[int] = Counter()
    for i in instructions:
        votes[_rows(i)] += operations(i)
    best, most = list(instructions), 0
    uses = list(map(_use, instructions))
    for rows in sorted(n for n, _ in votes.most_common(_TRIED) if n > 1):
        found = _banded(uses, rows)
        within = sum(operations(i) for i in found if i.kind == "bands")
        if within > most:
            best, most = found, within
    return best


def operations(i: Instruction) -> int:
    """Multiply-adds, roughly."""
    if i.kind in ("bands", "tasks"):
        return sum(map(operations, i.parts()))
    if i.kind == "gemm":
        a, _, out, _ = i.fields
        return math.prod(out.sizes) * a.sizes[2]
    if i.kind == "convolution":
        _, w, y, *_ = i.fields
        return math.prod(y.sizes) * math.prod(w.sizes[1:])
    if i.kind == "pointwise":
        return math.prod(i.fields[0]) * len(i.fields[2])
    return max((math.prod(v.sizes) for v in i.views()), default=0)


def _rows(i: Instruction) -> int:
    """The rows that an instruction suggests: the first of its sizes."""
    if i.kind == "gemm":
        batch, rows, _ = i.fields[2].sizes
        return batch if batch > 1 else rows
    if i.kind in ("pointwise", "sum"):
        return i.fields[0][0] if i.fields[0] else 0
    return i.fields[2].sizes[0] if i.kind == "convolution" else 0


class _Use(NamedTuple):
    """An instruction with what it touches."""

    instruction: Instruction
    operations: int
    written: frozenset[Root]
    seen: frozenset[Root]


def _use(i: Instruction) -> _Use:
    written = frozenset(i.writes)
    return _Use(i, operations(i), written, written.union(v.root for v in i.views()))


def _banded(uses: Sequence[_Use], rows: int) -> list[Instruction]:
    result: list[Instruction] = []
    rest = list(uses)
    while rest:
        run = _Run(rows)
        taken = next((at for at, use in enumerate(rest) if not run.take(use)), len(rest))
        result += run.result()
        rest = [*run.after, *rest[taken:]]
    return result


class _Run:
    """A run of instructions by rows, and what is moved out of its way.

    Attributes:
        after: What needs the run, or what needs that.
    """

    def __init__(self, rows: int) -> None:
        self.after: list[_Use] = []
        self._rows = rows
        self._run: list[Instruction] = []
        self._before: list[_Use] = []
        self._written: set[Root] = set()  # by the run, like the next
        self._seen: set[Root] = set()
        self._later_written: set[Root] = set()
        self._later_seen: set[Root] = set()
        self._kept = 0

    def take(self, use: _Use) -> bool:
        """Find the instruction a place; False if the run is full."""
        i, count, written, seen = use
        later = not (seen.isdisjoint(self._later_written) and written.isdisjoint(self._later_seen))
        # What the run has read, maybe all of it, no band may overwrite.
        over = not (written - self._written).isdisjoint(self._seen)
        if not (later or over) and count <= _LARGE and self._keeps_rows(i, written):
            new = sum(root.extent for root in written - self._written if root.kind == "arena")
            if self._run and self._kept + new > _MOST_KEPT:
                return False
            self._kept += new
            self._run.append(i)
            self._written |= written
            self._seen |= seen
        elif later or not (seen.isdisjoint(self._written) and written.isdisjoint(self._seen)):
            self.after.append(use)
            self._later_written |= written
            self._later_seen |= seen
        else:
            self._before.append(use)
        return True

    def result(self) -> list[Instruction]:
        """All that was taken but for what is moved behind."""
        if len(self._run) < 2:
            return [*_tasks(self._before), *self._run]
        roots = list(dict.fromkeys(root for i in self._run for root in i.writes))
        return [*_tasks(self._before), Instruction("bands", [self._rows, self._run], roots)]

    def _keeps_rows(self, i: Instruction, written: Set[Root]) -> bool:
        """Whether a band of what it writes depends on the same band of what the run writes."""
        rows, made = self._rows, self._written | written
        whole: list[View] = []
        if i.kind == "gemm":
            a, b, out, _ = i.fields
            d = 0 if out.sizes[0] > 1 else 1
            banded = [(a, d), (out, d)]
            if d == 0:
                banded.append((b, 0))
            else:
                whole.append(b)
        elif i.kind == "pointwise":
            banded = [(v, 0) for v in i.fields[1]]
        elif i.kind == "sum":
            banded = [(v, 0) for v in i.fields[1:]]
        elif i.kind == "softmax":
            _, count, columns, *views = i.fields
            banded = [(View(v.root, v.offset, (count, columns), (columns, 1)), 0) for v in views]
        elif i.kind == "convolution" and not i.fields[6]:
            x, w, y, *_ = i.fields
            banded = [(x, 0), (y, 0)]
            whole.append(w)
        else:
            return False
        cut = all(v.sizes and v.sizes[d] % rows == 0 for v, d in banded)
        kept = cut and all(_by_rows(v, d) for v, d in banded if v.root in made)
        return kept and all(v.root not in made for v in whole)


def _by_rows(v: View, d: int) -> bool:
    """Whether bands of dimension ``d`` are bands of the memory: nothing else walks beyond one step of it."""
    return v.strides[d] * v.sizes[d] == v.root.extent


def _tasks(uses: Sequence[_Use]) -> Iterator[Instruction]:
    """Instructions in an order of levels, of which the small ones are independent tasks."""
    levels: list[list[_Use]] = []
    write: dict[Root, int] = {}  # the level after that which writes a root
    touch: dict[Root, int] = {}  # or reads it
    for use in uses:
        level = max((write.get(root, 0) for root in use.seen), default=0)
        level = max([level, *(touch.get(root, 0) for root in use.written)])
        levels.extend([] for _ in range(level + 1 - len(levels)))
        levels[level].append(use)
        write.update(dict.fromkeys(use.written, level + 1))
        for root in use.seen:
            touch[root] = max(touch.get(root, 0), level + 1)
    for uses in levels:
        tasks: list[Instruction] = []
        for i, count, *_ in uses:
            if i.kind in ("aten", "sweep") or count > _LARGE:
                yield i
            else:
                tasks.append(i)
        if len(tasks) > 1:
            yield Instruction("tasks", [tasks], [root for i in tasks for root in i.writes])
        else:
            yield from tasks
