"""Divergence and convergence read off the norms that a fused step computes anyway."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from hypergrad_ext.norms import norms
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.best import Best
from hypergrad_ext.solvers.preconditioner import Preconditioner

# A norm that grows by less than this is rounding, or too slow to matter within any sensible number of steps.
_GROWTH = 1 + 1e-4
# Of the first: above it a norm is not noise yet, and where there is a retry one that grew once is reason enough.
_PLAIN = 0.1
# Times the tolerance.
_NEAR = 10.0


class Watch:
    """Reads norms and flags after steps and says when there is nothing to gain from another one.

    What it watches are residuals r, or the terms of a Neumann series, which are residuals too: the term after K
    updates is that of the partial sum before it, so a tolerance costs nothing. For ``0 <= H + d I`` and a step size
    or bounds that fit the spectrum, no step takes ``r.M r`` above where it began.

    Attributes:
        decreased: The step after which the step size was last decreased.
        worse: Whether some residual was then larger than at the start.
        detail: What to say about a failure.
    """

    def __init__(
        self,
        b: Tensor,
        b_norm: Tensor,
        tol: float | None,
        preconditioner: Preconditioner | None = None,
        regrowth: float = 1.0,
        retries: int = 0,
    ) -> None:
        """Watch the rows that start from ``b``, with tolerances that refer to ``b_norm``.

        Args:
            b: Right-hand sides, ``(n,)`` or ``(k, n)``.
            b_norm: The norm that ``tol`` refers to, per row.
            tol: Tolerance for ``|r|``, or None.
            preconditioner: M; the identity by default.
            regrowth: How far above the smallest value yet ``sqrt(r.M r)`` has to be, and growing, to prove
                divergence. The norms of a series' terms can only shrink: 1. Those of recomputed residuals end in
                rounding noise: more. Infinity where theory does not say that they shrink from step to step.
            retries: How many times a solve may go on with a smaller step size before growth is a failure.
        """
        self._norm: list[float] = norms(b).reshape(-1).tolist()
        rows = len(self._norm)
        self._stop = [-1.0] * rows if tol is None else [tol * norm for norm in b_norm.reshape(-1).tolist()]
        self._first = list(self._norm) if preconditioner is None else preconditioner.norm(b).reshape(-1).tolist()
        self._last, self._least = self._first, list(self._first)
        self._regrowth = regrowth
        self._retries, self._shrink = retries, 1.0
        self._grew = [0] * len(self._stop)
        self._failed: list[Status | None] = [None] * len(self._stop)
        self._best = Best(b)
        self._start = self._first
        self._step, self.decreased, self.worse = 0, 0, False
        self.detail = ""

    def stop(self, b: Tensor) -> Tensor:
        """Squared norms at which rows are done, ``(k,)``, on the device of ``b``."""
        squares = [limit * limit if limit >= 0 else -1.0 for limit in self._stop]
        return torch.tensor(squares, dtype=torch.float64, device=b.device)

    def over(
        self,
        stats: list[list[float]],
        step: int,
        iterate: Callable[[int], Tensor | Callable[[], Tensor]] | None = None,
        *,
        ahead: bool = False,
    ) -> bool:
        """Take in what a step computed.

        Args:
            stats: Per row ``r.r``, a non-finite flag and, with a preconditioner, ``r.M r``.
            step: Number of the step.
            iterate: A copy of the iterate of a row that has this residual, or what makes one; None where there is none.
            ahead: Whether it is the iterate after that, of which the residual is only guessed: it grows on as it did.

        Returns:
            Whether all rows are done.
        """
        sizes: list[float] = []
        for row, (square, non_finite, *energy) in enumerate(stats):
            self._norm[row] = math.sqrt(square) if square < math.inf else math.inf
            size = math.sqrt(energy[0]) if energy and 0 <= energy[0] < math.inf else self._norm[row]
            sizes.append(size)
            self._grew[row] = self._grew[row] + 1 if size > self._last[row] * _GROWTH else 0
            self._least[row] = min(self._least[row], size)
            grows = self._grew[row] >= 2 and size > self._regrowth * self._least[row]
            grows |= self._retries > 0 and self._grew[row] > 0 and size > _PLAIN * self._first[row]
            if non_finite and step == 1:
                self._fail(row, Status.NON_FINITE_OPERATOR, "at the first step")
            elif non_finite or not size < math.inf or grows or size > 1.01 * self._first[row]:
                # What has grown from zero does not come from H: no step size helps.
                if self._retries and not non_finite and size < math.inf and self._last[row] > 0:
                    self._shrink = max(self._shrink, 2, 1 + (size / self._last[row]) ** (1 / (step - self._step)))
                else:
                    self._fail(row, Status.DIVERGED, f"|r_{step}| = {size / (self._first[row] or 1):.3g} |b|")
        if iterate is not None and self._shrink == 1:
            growth = [max(1.0, a / b) if ahead and b else 1.0 for a, b in zip(sizes, self._last, strict=True)]
            self._best.look(times(sizes, growth), times(self._norm, growth), iterate)
        self._last, self._step = sizes, step
        if self._shrink > 1:
            self._retries -= 1
            self.decreased = step
            self.worse = any(size > start for size, start in zip(sizes, self._start, strict=True))
            self._first = [max(first, size) for first, size in zip(self._first, sizes, strict=True)]
            self._least, self._grew = list(sizes), [0] * len(sizes)
            return False
        return self.done

    def calm(self, history: list[list[list[float]]]) -> bool:
        """Take in the stats of all steps of a solve, without a preconditioner, at once if no norm of theirs grew.

        The same as `over` for each of them, which takes longer than a small solve.

        Returns:
            Whether it did; else nothing has changed.
        """
        if not history:
            return False
        rows = [[stats[row][0] for stats in history] for row in range(len(self._stop))]
        for row, (squares, last, first) in enumerate(zip(rows, self._last, self._first, strict=True)):
            limits = [_GROWTH**2 * square for square in (last * last, *squares[:-1])]
            if any(stats[row][1] for stats in history) or not all(map(operator.le, squares, limits)):
                return False
            most = 1.01 * first
            # Not a power: Python raises where that overflows.
            if max(squares) > most * most:
                return False
        self._norm = [math.sqrt(squares[-1]) for squares in rows]
        self._last, self._least = list(self._norm), [math.sqrt(min(squares)) for squares in rows]
        self._grew = [0] * len(rows)
        self._step += len(history)
        return True

    @property
    def done(self) -> bool:
        """Whether all rows have converged or failed."""
        return all(failed or self._converged(row) for row, failed in enumerate(self._failed))

    def shrink(self) -> float:
        """What to divide the step size by before the next step, once: 1 unless terms grew and a retry is left."""
        shrink, self._shrink = self._shrink, 1.0
        return shrink

    def restart(self, step: int = 0) -> None:
        """Back to the start, after a `shrink` at ``step``; 0 where steps are counted anew."""
        self._step = step
        self._first = list(self._start)
        self._last, self._least, self._grew = self._first, list(self._first), [0] * len(self._first)

    def near(self) -> bool:
        """Whether some row may meet its tolerance in the next step."""
        return any(norm <= _NEAR * stop for norm, stop in zip(self._norm, self._stop, strict=True))

    def converged(self) -> list[int]:
        """Rows that have met their tolerance after a step: with what that step knew, the iterate before it."""
        return [row for row, status in enumerate(self.statuses()) if self._step and status is Status.CONVERGED]

    def settle(self, row: int, size: float, start: float) -> None:
        """Take in the true residual of a row, which began with ``start``."""
        self._norm[row] = size
        if not size <= start:
            self._fail(row, Status.DIVERGED, f"|r| = {size:.3g} from {start:.3g}")

    def failures(self) -> list[int]:
        """Rows that have failed."""
        return [row for row, failed in enumerate(self._failed) if failed]

    def best(self, x: Tensor) -> Tensor:
        """The last iterates, those that were much better once replaced by what was kept of them, in place."""
        self._norm = self._best.restore(x, self._last, self._norm, self.failures())
        return x

    def statuses(self) -> list[Status]:
        """One status per row."""
        return [
            failed or (Status.CONVERGED if self._converged(row) else Status.MAX_STEPS)
            for row, failed in enumerate(self._failed)
        ]

    def residuals(self) -> list[float]:
        """Norm of the last residual of every row, or of what `best` put in its place."""
        return self._norm

    def _converged(self, row: int) -> bool:
        return self._norm[row] <= self._stop[row]

    def _fail(self, row: int, status: Status, detail: str) -> None:
        if self._failed[row] is None:
            self._failed[row] = status
            self.detail = f", {detail}"


def times(a: list[float], b: list[float]) -> list[float]:
    """Products of what is one number per row."""
    return [x * y for x, y in zip(a, b, strict=True)]
