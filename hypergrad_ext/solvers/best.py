"""The best iterate of every right-hand side, for iterations whose residuals may grow again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# Times the kept: below that the last iterate is what was asked for, a series of so many terms.
_REGROWN = 1.5


class _Kept(NamedTuple):
    size: float
    norm: float
    iterate: Tensor | Callable[[], Tensor]


class Best:
    """Keeps iterates where residuals begin to grow; while they shrink nothing is copied.

    What is kept is the first iterate after the best one, of which nobody knows that it is before the next look.
    """

    def __init__(self, b: Tensor) -> None:
        """Keep iterates of as many rows as ``b`` has."""
        self._count = b.shape[0] if b.dim() == 2 else 1
        self._least = [math.inf] * self._count
        self._kept: dict[int, _Kept] = {}

    def look(
        self, sizes: list[float], norms: list[float], iterate: Callable[[int], Tensor | Callable[[], Tensor]]
    ) -> None:
        """Take in residuals, and iterates that have them where they grew.

        Args:
            sizes: Of the residuals, one per row, in the norm that the iteration makes smaller.
            norms: Their Euclidean norms.
            iterate: A copy of the iterate of a row, ``(n,)``, or what makes one if it is needed.
        """
        for row, (size, norm) in enumerate(zip(sizes, norms, strict=True)):
            if size < self._least[row]:
                self._least[row] = size
            elif size < math.inf and (row not in self._kept or size < self._kept[row].size):
                self._kept[row] = _Kept(size, norm, iterate(row))

    def restore(self, x: Tensor, sizes: list[float], norms: list[float], failed: list[int]) -> list[float]:
        """Put what was kept into the rows of ``x`` that have become much worse since, or worse and failed.

        Args:
            x: The last iterates, ``(n,)`` or ``(k, n)``; written to.
            sizes: Of their residuals.
            norms: Their Euclidean norms.
            failed: Rows that have failed.

        Returns:
            The Euclidean norms of what ``x`` is now.
        """
        norms = list(norms)
        for row, kept in self._kept.items():
            if not sizes[row] <= kept.size * (1 if row in failed else _REGROWN):
                x.view(self._count, -1)[row] = kept.iterate() if callable(kept.iterate) else kept.iterate
                norms[row] = kept.norm
        return norms
