"""The truncated Neumann series, one fused step per Hessian-vector product."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count, check_number
from hypergrad_ext.solvers.lanczos import ritz_range
from hypergrad_ext.solvers.preconditioner import Preconditioner, PreconditionerChoice
from hypergrad_ext.solvers.watch import Watch


@dataclass(frozen=True)
class Neumann(Solver):
    r"""Neumann series :math:`x_K = \alpha \sum_{j=0}^{K} (I - \alpha (H + d I))^j b`.

    It converges to :math:`(H + d I)^{-1} b` if and only if :math:`0 < \lambda < 2 / \alpha` for all
    eigenvalues of :math:`H + d I`; the error then shrinks by :math:`\max |1 - \alpha \lambda|` per
    step. Growing terms are noticed and reported as ``diverged``.

    With a preconditioner M it is the Richardson iteration :math:`x \leftarrow x + \alpha M (b - (H + d I) x)` from
    :math:`x = \alpha M b`, the same series for :math:`M (H + d I)`: one penalty per weight, say, can raise the
    largest eigenvalue to where any alpha is too small for the rest, and its diagonal undoes that.

    Cost: K Hessian-vector products, and 5 more for ``alpha=None``, once per operator; with a preconditioner 5 more
    per solve.

    Args:
        steps: K, the number of updates; K + 1 terms are summed. K = 0 gives ``alpha * b``.
        alpha: Step size. None takes ``1 / (1.1 estimate + d)`` with an estimate of the largest
            eigenvalue from 5 power iterations.
        tol: Stop early once ``|b - (H + d I) x| <= tol |b|``; None always takes all steps.
        preconditioner: P close to ``H + d I``, of which M is the inverse: its diagonal in the structure of the
            parameters (positive; applied by the fused step), or a function or operator that multiplies by M.

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
    preconditioner: PreconditionerChoice = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        check_count("steps", self.steps, 0)
        if self.alpha is not None:
            check_number("alpha", self.alpha, positive=True)
        if self.tol is not None:
            check_number("tol", self.tol, positive=True)

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Sum the series, or iterate where there is a preconditioner."""
        rows = b.shape[0] if b.dim() == 2 else 1
        m = Preconditioner.of(self.preconditioner, system.operator.space)
        alpha = self.alpha
        if alpha is None:
            largest = _largest(system, m)
            if not math.isfinite(largest):
                return Outcome(b, [Status.NON_FINITE_OPERATOR] * rows, 0)
            if largest == 0:
                return Outcome(b, [Status.SINGULAR] * rows, 0, "H v = 0 for a random v")
            alpha = 1 / largest

        system.prepare(self.steps, b)
        if m is None:
            watch = Watch(b, b_norm, self.tol)
            x, step = series(system, b, self.steps, alpha, watch)
        else:
            watch = Watch(b, b_norm, self.tol, m, regrowth=10)
            x, step = richardson(system, b, self.steps, alpha, m, watch)
        return Outcome(x, watch.statuses(), step, f"alpha {alpha:.3g}{watch.detail}", alpha=alpha)


def _largest(system: System, m: Preconditioner | None) -> float:
    """An estimate of the largest eigenvalue, above it with a margin."""
    if m is None:
        return 1.1 * system.lambda_max() + system.damping
    found = ritz_range(system, 5, m)
    return 1.1 * max(abs(found.low), abs(found.high))


def series(system: System, b: Tensor, steps: int, alpha: float, watch: Watch | None = None) -> tuple[Tensor, int]:
    """``v <- v - alpha (H + d I) v``, ``p <- p + v``, from ``v = p = b``, which it overwrites.

    The terms shrink from step to step as long as the series converges, also in low precision, where residuals end
    in rounding noise: so the first that grow prove that it does not. That is why this is not `richardson`, whose
    step moves 16 bytes per float32 weight and not 20.

    Returns:
        ``alpha`` times the sum of ``steps + 1`` terms, and the steps taken.
    """
    whole = _in_one_call(system, b, steps, alpha, watch)
    if whole is not None:
        return whole
    v, p = b, b.clone()
    views = system.views(v)
    step_ = system.kernel(ops.neumann_step_)
    stats = torch.zeros(*b.shape[:-1], 2, dtype=torch.float64, device=b.device)

    def advance() -> None:
        step_([v], [p], system.product(views), stats, alpha, system.damping)

    def over(step: int) -> bool:
        return watch is not None and watch.over(stats.view(-1, 2).tolist(), step)

    step = system.iterate(steps, advance, over if watch else None)
    return p.mul_(alpha), step


def richardson(
    system: System, b: Tensor, steps: int, alpha: float, m: Preconditioner, watch: Watch
) -> tuple[Tensor, int]:
    """``x <- x + alpha M (b - (H + d I) x)`` from ``x = alpha M b``: the solution and the steps taken."""
    x = m.times(b).mul_(alpha)
    views = system.views(x)
    step_ = m.step(ops.richardson_step_, system.kernel(ops.richardson_step_))
    stats = torch.zeros(*b.shape[:-1], 3, dtype=torch.float64, device=b.device)

    def advance() -> None:
        step_([x], system.product(views), [b], m.argument, stats, alpha, system.damping)

    step = system.iterate(steps, advance, lambda step: watch.over(stats.view(-1, 3).tolist(), step))
    return x, step


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
