"""Instructions of a native plan: pointwise ones in groups, and their results in one arena."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypergrad_ext.engines.views import Root, View

# Elements that buffers are aligned to: a cache line of float32.
_ALIGNMENT = 16
# As in csrc/plan.h.
MAX_OPERANDS = 64
# Codes of pointwise ops, likewise: out = a op b, or with a number; MULADD is a b + c, SELECT is a where b is not 0.
COPY, FILL, ADD, SUB, MUL, DIV, AXPY, SCALE, MULADD, SELECT = range(10)


@dataclass(eq=False)
class Instruction:
    """One step of a plan.

    Attributes:
        kind: ``"gemm"``, ``"pointwise"``, ``"sum"``, ``"softmax"``, ``"convolution"``, ``"sweep"``, ``"compiled"``,
            ``"bands"``, ``"tasks"`` or ``"aten"``.
        fields: What `csrc/plan.h` says for this kind, with views where it has memory, and instructions where it has
            parts.
        writes: Roots that it fills or changes.
    """

    kind: str
    fields: list[Any]
    writes: list[Root] = field(default_factory=list)

    def views(self) -> Iterator[View]:
        """All views in it."""
        stack: list[Any] = [self.fields]
        while stack:
            x = stack.pop()
            if isinstance(x, View):
                yield x
            elif isinstance(x, (list, tuple)):
                stack.extend(x)
            elif isinstance(x, Instruction):
                stack.append(x.fields)

    def parts(self) -> Sequence[Instruction]:
        """The instructions that bands or tasks consist of."""
        return self.fields[-1] if self.kind in ("bands", "tasks") else ()


def group(instructions: list[Instruction]) -> list[Instruction]:
    """Join neighbouring pointwise instructions over the same indices: a block stays in the cache between them.

    Fields of a pointwise instruction: sizes, operands, ops. An op may read what an op before it wrote only
    at the same index, which equal views guarantee.

    Returns:
        The instructions, fewer.
    """
    result: list[Instruction] = []
    for new in instructions:
        last = result[-1] if result else None
        if last is not None and last.kind == new.kind == "pointwise" and _joins(last, new):
            sizes, operands, ops = last.fields
            moved = len(operands)
            operands = [*operands, *new.fields[1]]
            ops = [*ops, *((code, *(i + moved if i >= 0 else i for i in at), s) for code, *at, s in new.fields[2])]
            result[-1] = Instruction("pointwise", [sizes, operands, ops], last.writes + new.writes)
        else:
            result.append(new)
    reads = Counter(view.root for i in result for view in _read(i))
    return [
        replace(i, fields=_coalesced(*_multiply_added(reads, *i.fields))) if i.kind == "pointwise" else i
        for i in result
    ]


def _read(instruction: Instruction) -> Iterator[View]:
    """Every view that is read, as often as it is."""
    if instruction.kind != "pointwise":
        yield from instruction.views()
        return
    _, operands, ops = instruction.fields
    for _, _, *inputs, _ in ops:
        yield from (operands[i] for i in inputs if i >= 0)


def _multiply_added(
    reads: Counter[Root], sizes: tuple[int, ...], operands: list[View], ops: list[tuple]
) -> tuple[tuple[int, ...], list[View], list[tuple]]:
    """A product that only one addition of the same group reads becomes part of it."""
    products: dict[Root, int] = {}
    result: list[tuple | None] = []
    for op in ops:
        code, out, a, b, _, _ = op
        if code == MUL and operands[out].root.kind == "arena" and reads[operands[out].root] == 1:
            products[operands[out].root] = len(result)
        elif code == ADD:
            for factor, other in ((a, b), (b, a)):
                at = products.pop(operands[factor].root, None)
                product = None if at is None else result[at]
                if at is not None and product is not None and operands[product[1]] == operands[factor]:
                    result[at] = None
                    op = (MULADD, out, product[2], product[3], other, -1)
                    break
        result.append(op)
    return sizes, operands, [op for op in result if op is not None]


def _joins(last: Instruction, new: Instruction) -> bool:
    if last.fields[0] != new.fields[0] or len(last.fields[1]) + len(new.fields[1]) > MAX_OPERANDS:
        return False
    written = {id(v.root): v for v in _written(last)}
    read = {id(v.root) for v in last.fields[1]}
    for view in new.fields[1]:
        if id(view.root) in written and view != written[id(view.root)]:
            return False
    # Writing to what was read at other indices would spoil blocks to come.
    return all(id(root) not in read for root in new.writes)


def _written(instruction: Instruction) -> Iterator[View]:
    _, operands, ops = instruction.fields
    for op in ops:
        yield operands[op[1]]


def _coalesced(sizes: tuple[int, ...], operands: list[View], ops: list[tuple]) -> list[Any]:
    """Equal operands once, unused ones not at all, and dimensions joined that all walk through as one."""
    used = {i for _, *at, _ in ops for i in at if i >= 0}
    places: dict[tuple, int] = {}
    position = [
        places.setdefault((id(v.root), *v[1:]), len(places)) if i in used else -1 for i, v in enumerate(operands)
    ]
    unique = {at: view for at, view in zip(position, operands, strict=True) if at >= 0}
    views = [unique[i] for i in range(len(unique))]
    ops = [(code, *(position[i] if i >= 0 else i for i in at), s) for code, *at, s in ops]
    return [*coalesced(sizes, views), ops]


def coalesced(sizes: tuple[int, ...], views: list[View]) -> tuple[tuple[int, ...], list[View]]:
    """Sizes and views with neighbouring dimensions joined where all views walk through them as one."""
    joined: list[tuple[int, list[int]]] = []
    for d, size in enumerate(sizes):
        strides = [v.strides[d] for v in views]
        if size == 1:
            continue
        if joined and all(a == b * size for a, b in zip(joined[-1][1], strides, strict=True)):
            joined[-1] = (joined[-1][0] * size, strides)
        else:
            joined.append((size, strides))
    new = tuple(size for size, _ in joined)
    return new, [View(v.root, v.offset, new, tuple(s[i] for _, s in joined)) for i, v in enumerate(views)]


def allocate(instructions: list[Instruction]) -> int:
    """Place the arena's roots so that those in use at one time do not overlap; returns the arena's elements."""
    first: dict[Root, int] = {}
    last: dict[Root, int] = {}
    for i, instruction in enumerate(instructions):
        for root in [*(v.root for v in instruction.views()), *instruction.writes]:
            if root.kind == "arena":
                first.setdefault(root, i)
                last[root] = i
    ends: dict[int, list[Root]] = {}
    for root, i in last.items():
        ends.setdefault(i, []).append(root)
    starts: dict[int, list[Root]] = {}
    for root, i in first.items():
        starts.setdefault(i, []).append(root)
    free: list[tuple[int, int]] = []  # position, elements; in order, none adjacent
    total = 0
    for i in range(len(instructions)):
        for root in starts.get(i, []):
            size = -(-max(root.extent, 1) // _ALIGNMENT) * _ALIGNMENT
            fits = [(elements, position) for position, elements in free if elements >= size]
            if fits:
                elements, position = min(fits)
                free.remove((position, elements))
                if elements > size:
                    free.append((position + size, elements - size))
            else:
                position, total = total, total + size
            root.position = position
        for root in ends.get(i, []):
            size = -(-max(root.extent, 1) // _ALIGNMENT) * _ALIGNMENT
            free = _merged([*free, (root.position, size)])
    return total


def _merged(free: list[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for position, elements in sorted(free):
        if result and result[-1][0] + result[-1][1] == position:
            result[-1] = (result[-1][0], result[-1][1] + elements)
        else:
            result.append((position, elements))
    return result
