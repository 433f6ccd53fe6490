"""The truncated Neumann series, one fused step per Hessian-vector product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count, check_number

# A norm that grows by less than this is rounding, or too slow to matter within any sensible number of steps.
_GROWTH = 1 + 1e-4


@dataclass(frozen=True)
class Neumann(Solver):
    r"""Neumann series :math:`x_K = \alpha \sum_{j=0}^{K} (I - \alpha (H + d I))^j b`.

    It converges to :math:`(H + d I)^{-1} b` if and only if :math:`0 < \lambda < 2 / \alpha` for all
    eigenvalues of :math:`H + d I`; the error then shrinks by :math:`\max |1 - \alpha \lambda|` per
    step. Growing terms are noticed and reported as ``diverged``.

    Cost: K Hessian-vector products, and 5 more for ``alpha=None``, once per operator.

    Args:
        steps: K, the number of updates; K + 1 terms are summed. K = 0 gives ``alpha * b``.
        alpha: Step size. None takes ``1 / (1.1 estimate + d)`` with an estimate of the largest
            eigenvalue from 5 power iterations.
        tol: Stop early once ``|b - (H + d I) x| <= tol |b|``; None always takes all steps.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``steps`` is negative, or ``alpha`` or ``tol`` is not positive.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation", AISTATS 2020, Algorithm 3.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> sol = hg.solve(hg.DenseMatrix(A), torch.tensor([2.0, 2.0]), hg.Neumann(steps=60, alpha=0.25))
        >>> sol.value
        tensor([1.0000, 0.5000])
    """

    steps: int = 20
    alpha: float | None = None
    tol: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        check_count("steps", self.steps, 0)
        if self.alpha is not None:
            check_number("alpha", self.alpha, positive=True)
        if self.tol is not None:
            check_number("tol", self.tol, positive=True)

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Sum the series: ``v <- v - alpha (H + d I) v``, ``p <- p + v``, from ``v = p = b``."""
        rows = b.shape[0] if b.dim() == 2 else 1
        alpha = self.alpha
        if alpha is None:
            largest = 1.1 * system.lambda_max() + system.damping
            if not math.isfinite(largest):
                return Outcome(b, [Status.NON_FINITE_OPERATOR] * rows, 0)
            if largest == 0:
                return Outcome(b, [Status.SINGULAR] * rows, 0, "H v = 0 for a random v")
            alpha = 1 / largest

        watch = Watch(b, b_norm, self.tol)
        system.prepare(self.steps, b)
        x, step = series(system, b, self.steps, alpha, watch)
        return Outcome(x, watch.statuses(), step, f"alpha {alpha:.3g}{watch.detail}", alpha=alpha)


def series(system: System, b: Tensor, steps: int, alpha: float, watch: Watch | None = None) -> tuple[Tensor, int]:
    """``alpha`` times the sum of ``steps + 1`` terms, and the steps taken; overwrites ``b``."""
    whole = _in_one_call(system, b, steps, alpha, watch)
    if whole is not None:
        return whole
    v, p = b, b.clone()
    views = system.views(v)
    step_ = system.kernel(ops.neumann_step_)
    stats = torch.zeros(*b.shape[:-1], 2, dtype=torch.float64, device=b.device)
    step = 0
    for step in range(1, steps + 1):
        step_([v], [p], system.product(views), stats, alpha, system.damping)
        if watch and system.looks(step, steps) and watch.over(stats.view(-1, 2).tolist(), step):
            break
    return p.mul_(alpha), step


def _in_one_call(system: System, b: Tensor, steps: int, alpha: float, watch: Watch | None) -> tuple[Tensor, int] | None:
    rows = b if b.dim() == 2 else b[None]
    result = system.prepared.neumann_series(
        rows, alpha, system.damping, steps, watch.stop(b) if watch else _never(rows), system.backend
    )
    if result is None:
        return None
    x, history = result
    step = 0
    for step, stats in enumerate(history.tolist(), 1):
        if stats[0][0] == -1:
            step -= 1
            break
        if watch and watch.over(stats, step):
            break
    system.hvps += step * len(rows)
    return x.view_as(b), step


def _never(rows: Tensor) -> Tensor:
    return torch.full((len(rows),), -1.0, dtype=torch.float64, device=rows.device)


class Watch:
    """Reads norms and flags of the terms and says when there is nothing to gain from another step.

    For ``0 <= H + d I`` and ``alpha < 2 / lambda_max`` the norms of the terms never grow; so two
    growing norms in a row, or one above that of ``b``, prove that the series diverges. The term after
    K updates is the residual of the partial sum before it, so a tolerance costs nothing.
    """

    def __init__(self, b: Tensor, b_norm: Tensor, tol: float | None) -> None:
        """Watch the rows that start from ``b``, with tolerances that refer to ``b_norm``."""
        self._stop = [tol * norm if tol is not None else -1.0 for norm in b_norm.reshape(-1).tolist()]
        self._first = torch.linalg.vector_norm(b, dim=-1, dtype=torch.float64).reshape(-1).tolist()
        self._last = self._first
        self._grew = [0] * len(self._stop)
        self._failed: list[Status | None] = [None] * len(self._stop)
        self.detail = ""

    def stop(self, b: Tensor) -> Tensor:
        """Squared norms at which rows are done, ``(k,)``, on the device of ``b``."""
        squares = [limit * limit if limit >= 0 else -1.0 for limit in self._stop]
        return torch.tensor(squares, dtype=torch.float64, device=b.device)

    def over(self, stats: list[list[float]], step: int) -> bool:
        """Take in the stats after a step; True when every row has converged or failed."""
        norms = []
        for row, (square, non_finite) in enumerate(stats):
            norm = math.sqrt(square) if square < math.inf else math.inf
            norms.append(norm)
            self._grew[row] = self._grew[row] + 1 if norm > self._last[row] * _GROWTH else 0
            if non_finite and step == 1:
                self._fail(row, Status.NON_FINITE_OPERATOR, "at the first step")
            elif non_finite or not norm < math.inf or self._grew[row] >= 2 or norm > 1.01 * self._first[row]:
                self._fail(row, Status.DIVERGED, f"|v_{step}| = {norm / (self._first[row] or 1):.3g} |b|")
        self._last = norms
        return all(failed or self._converged(row) for row, failed in enumerate(self._failed))

    def statuses(self) -> list[Status]:
        """One status per row."""
        return [
            failed or (Status.CONVERGED if self._converged(row) else Status.MAX_STEPS)
            for row, failed in enumerate(self._failed)
        ]

    def _converged(self, row: int) -> bool:
        return self._last[row] <= self._stop[row]

    def _fail(self, row: int, status: Status, detail: str) -> None:
        if self._failed[row] is None:
            self._failed[row] = status
            self.detail = f", {detail}"
