"""Memory of a native plan: values are strided views of roots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(eq=False)
class Root:
    """Memory that is written at once: part of the arena, or what comes from outside.

    Attributes:
        kind: ``"arena"``, ``"v"`` (part of the vector), ``"c"`` (constant), ``"dynamic"`` (allocated by ATen),
            ``"out"`` (part of the result).
        index: Which one of its kind.
        extent: Elements.
        position: Where in the arena.
    """

    kind: str
    index: int = 0
    extent: int = 0
    position: int = 0


class View(NamedTuple):
    """A strided view of a root."""

    root: Root
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether elements follow each other in memory in the order of their indices."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def whole(self) -> bool:
        """Whether it shows every element of its root once."""
        order = sorted((stride, size) for size, stride in zip(self.sizes, self.strides, strict=True) if size != 1)
        expected = 1
        for stride, size in order:
            if stride != expected:
                return False
            expected *= size
        return self.offset == 0 and expected == self.root.extent


def extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last that a view with these strides reaches."""
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def inserted(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    """The values with one more at a place."""
    return (*values[:at], value, *values[at:])


def batched(x: View) -> View:
    """A matrix as a batch of one."""
    return View(x.root, x.offset, (1, *x.sizes), (0, *x.strides))


def transposed(x: View) -> View:
    """A batch of matrices, transposed."""
    (n, r, c), (s, down, along) = x.sizes, x.strides
    return View(x.root, x.offset, (n, c, r), (s, along, down))


def expanded(x: View, sizes: tuple[int, ...]) -> View:
    """A view broadcast to sizes."""
    lead = len(sizes) - len(x.sizes)
    strides = tuple(
        0 if d < lead or (x.sizes[d - lead] == 1 and size != 1) else x.strides[d - lead] for d, size in enumerate(sizes)
    )
    return View(x.root, x.offset, tuple(sizes), strides)


def rows_are_dense(x: View) -> bool:
    """Whether elements of one row of a batch of matrices follow each other."""
    return x.sizes[2] == 1 or x.strides[2] == 1
