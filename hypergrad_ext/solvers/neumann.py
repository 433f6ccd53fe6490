"""The truncated Neumann series, one fused step per Hessian-vector product."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.norms import norms
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count, check_number, check_tolerance
from hypergrad_ext.solvers.lanczos import Spectrum, spectrum_of
from hypergrad_ext.solvers.preconditioner import Preconditioner, PreconditionerChoice
from hypergrad_ext.solvers.watch import Watch
from hypergrad_ext.structure import held

# Times that a step size may be decreased.
_RETRIES = 6
# Steps that follow a decrease at least, fewer if K is: one undoes what has grown, the others get on.
_AFTER = 10
# Of 2 / lambda_max, as far as Lanczos steps tell it: on 88 problems their bound was 0.93 of the truth at the least.
_SAFE = 0.95
# A Ritz value this far below zero, relative to the largest, is not rounding.
_NEGATIVE = 1e-6


@dataclass(frozen=True)
class Neumann(Solver):
    r"""Neumann series :math:`x_K = \alpha \sum_{j=0}^{K} (I - \alpha (H + d I))^j b`.

    It converges to :math:`(H + d I)^{-1} b` if and only if :math:`0 < \lambda < 2 / \alpha` for all
    eigenvalues of :math:`H + d I`; the error then shrinks by :math:`\max |1 - \alpha \lambda|` per
    step. Growing terms are noticed within a few steps: ``alpha`` is decreased or the solve reported as ``diverged``.

    With a preconditioner M it is the Richardson iteration :math:`x \leftarrow x + \alpha M (b - (H + d I) x)` from
    :math:`x = \alpha M b`, the same series for :math:`M (H + d I)`: one penalty per weight, say, can raise the
    largest eigenvalue to where any alpha is too small for the rest, and its diagonal undoes that.

    A diagonal that knows the penalties and not the loss leaves the loss's eigenvalues, divided by P: ``alpha=1`` is
    right only where P is close to all of ``H + d I``.

    Cost: K Hessian-vector products, and 10 more for ``alpha=None``, once per operator (with a preconditioner, per
    solve) or while a `SolverState` keeps what they showed.

    Args:
        steps: K, the number of updates; K + 1 terms are summed. K = 0 gives ``alpha * b``.
        alpha: Step size. None takes the one that leaves the least error after K steps in the spectrum that 10 Lanczos
            steps see, below ``1.9 / (largest eigenvalue + d)``.
        tol: Stop early with the first sum or iterate of which ``|b - (H + d I) x| <= tol |b|`` is known, which is the
            last but one; None always takes all steps.
        preconditioner: P close to ``H + d I``, of which M is the inverse: its diagonal in the structure of the
            parameters (positive; applied by the fused step); `Jacobi` or `Nystrom`; or a function or operator that
            multiplies by M.
        adaptive: Where terms grow, divide ``alpha`` by two, or by more if they grow faster, and go on from the sum so
            far, or anew where that is worse than nothing, up to 6 times; where that happens near the end, up to 10
            more steps follow each time. False only does so where alpha was found.
        form: ``"series"`` sums terms; ``"richardson"`` iterates on the solution, which moves 16 bytes per float32
            weight instead of 20 and does not drift in long solves, but knows divergence from rounding less early. The
            same iterates but for rounding. None takes ``"richardson"`` with a preconditioner and to be adaptive, which
            it can do from the start again, else ``"series"``.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``steps`` is negative, ``alpha`` or ``tol`` is not positive, or ``form`` is unknown or cannot
            have the preconditioner.

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
    adaptive: bool = False
    form: Literal["series", "richardson"] | None = None

    needs_one_matrix = False

    def __post_init__(self) -> None:
        """Check the settings."""
        object.__setattr__(self, "preconditioner", held(self.preconditioner))
        check_count("steps", self.steps, 0)
        if self.alpha is not None:
            check_number("alpha", self.alpha, positive=True)
        if self.tol is not None:
            check_tolerance(self.tol, "steps")
        if self.form not in (None, "series", "richardson"):
            raise ValueError(f"form: expected 'series', 'richardson' or None, got {self.form!r}")
        if self.form == "series" and self.preconditioner is not None:
            raise ValueError("form: expected 'richardson' or None beside a preconditioner, got 'series'")

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Sum the series, or iterate."""
        rows = b.shape[0] if b.dim() == 2 else 1
        m = Preconditioner.of(self.preconditioner, system)
        alpha, retries = self.alpha, _RETRIES if self.adaptive else 0
        if alpha is None:
            found = spectrum_of(system, b, m)
            damping = system.damping if m is None else 0.0
            if not math.isfinite(found.size):
                return Outcome(b, [Status.NON_FINITE_OPERATOR] * rows, 0)
            if found.size + damping == 0:
                return Outcome(b, [Status.SINGULAR] * rows, 0, "H v = 0 for a random v")
            alpha = best_alpha(found, self.steps, damping)
            # No step size helps where there are negative eigenvalues.
            retries = 0 if found.low + damping < -_NEGATIVE * found.size else _RETRIES

        system.prepare(self.steps, b)
        form = self.form or ("series" if m is None and not self.adaptive else "richardson")
        if form == "series":
            watch = Watch(b, b_norm, self.tol, retries=retries)
            x, step, last = series(system, b, self.steps, alpha, watch)
        else:
            watch = Watch(b, b_norm, self.tol, m, regrowth=10, retries=retries)
            x, step, last = richardson(system, b, self.steps, alpha, m, watch)
        found_alpha = f"alpha {last:.3g}" if last == alpha else f"alpha {last:.3g}, decreased from {alpha:.3g}"
        detail = found_alpha + watch.detail
        return Outcome(x, watch.statuses(), step, detail, residuals=watch.residuals(), alpha=last)


def best_alpha(found: Spectrum, steps: int, damping: float) -> float:
    r"""The step size of the least error after so many steps, by the quadrature of a spectrum, without divergence.

    The error has the square :math:`\sum_i w_i ((1 - \alpha \lambda_i)^{K + 1} / \lambda_i)^2`.

    Returns:
        The step size.
    """
    low, size = found.low + damping, max(abs(found.low + damping), abs(found.high + damping))
    if low < -_NEGATIVE * size:
        return 1 / (1.1 * size)
    highest = _SAFE * 2 / (found.high + found.high_error + damping)
    alphas = highest * torch.linspace(0.1, 1, 181, dtype=torch.float64, device="cpu")
    values = (torch.tensor(found.values, dtype=torch.float64, device="cpu") + damping).clamp_min(1e-12 * size)
    weights = torch.tensor(found.weights, dtype=torch.float64, device="cpu")
    # By logarithms, because of large powers.
    powers = 2 * (steps + 1) * (1 - alphas[:, None] * values).abs().log()
    errors = torch.logsumexp(powers + (weights / values.square()).log(), 1)
    return float(alphas[int(errors.argmin())])


def series(
    system: System, b: Tensor, steps: int, alpha: float, watch: Watch | None = None
) -> tuple[Tensor, int, float]:
    """``v <- v - alpha (H + d I) v``, ``p <- p + v``, from ``v = p = b``, which it overwrites.

    The terms shrink from step to step as long as the series converges, also in low precision, where residuals end
    in rounding noise: so the first that grow prove that it does not. That is why this is not `richardson`, whose
    step moves 16 bytes per float32 weight and not 20.

    Args:
        system: The operator and its damping.
        b: Right-hand sides.
        steps: Steps at the most.
        alpha: Step size.
        watch: What looks at the norms; None takes all steps, whatever happens.

    Returns:
        The solution, the steps taken and the last step size.
    """
    whole = _in_one_call(system, b, steps, alpha, watch) if system.history is None else None
    if whole is not None:
        return whole
    v, p = b, b.clone()
    views = system.views(v)
    step_ = system.kernel(ops.neumann_step_)
    stats = torch.zeros(*b.shape[:-1], 2, dtype=torch.float64, device=b.device)
    terms, sums = v.view(-1, v.shape[-1]), p.view(-1, p.shape[-1])

    def advance() -> None:
        step_([v], [p], system.product(views), stats, alpha, system.damping)

    def over(step: int) -> bool:
        nonlocal alpha
        assert watch is not None
        rows = stats.view(-1, 2).tolist()
        system.record(row[0] for row in rows)
        over = watch.over(rows, step, lambda row: alpha * (sums[row] - terms[row]))
        shrink = watch.shrink()
        if shrink > 1:
            # v is the residual of the sum before this step, and the next term of a series in any step size.
            p.sub_(v)
            if step == 1:
                v.copy_(p)  # back to b
                watch.restart(step)
            else:
                p.mul_(shrink).add_(v)
            alpha /= shrink
        return over

    step = _iterate(system, steps, advance, over, watch)
    done = watch.converged() if watch else []
    if len(done) == len(terms):
        p.sub_(v)
    elif done:
        sums[done] -= terms[done]
    p.mul_(alpha)
    return p if watch is None else watch.best(p), step, alpha


def richardson(
    system: System, b: Tensor, steps: int, alpha: float, m: Preconditioner | None, watch: Watch
) -> tuple[Tensor, int, float]:
    """``x <- x + alpha M (b - (H + d I) x)`` from ``x = alpha M b``: the solution, the steps, the last step size."""
    x = (b.clone() if m is None else m.times(b)).mul_(alpha)
    views = system.views(x)
    step_ = system.kernel(ops.richardson_step_)
    step_ = step_ if m is None else m.step(ops.richardson_step_, step_)
    argument = [] if m is None else m.argument
    stats = torch.zeros(*b.shape[:-1], 3, dtype=torch.float64, device=b.device)
    iterates = x.view(-1, x.shape[-1])
    before: Tensor | None = None

    def advance() -> None:
        nonlocal before
        before = iterates.clone() if watch.near() else None
        step_([x], system.product(views), [b], argument, stats, alpha, system.damping)

    def over(step: int) -> bool:
        nonlocal alpha
        rows = stats.view(-1, 3).tolist()
        system.record(row[0] for row in rows)
        over = watch.over(rows, step, lambda row: iterates[row].clone(), ahead=True)
        shrink = watch.shrink()
        if shrink > 1:
            alpha /= shrink
            if watch.worse:
                x.copy_(b if m is None else m.times(b)).mul_(alpha)
                watch.restart(step)
        return over

    step = _iterate(system, steps, advance, over, watch)
    done = watch.converged()
    if done and before is not None:
        iterates[done] = before[done]
    elif done:  # sooner than could be foreseen: the iterate that it was is gone, the last may be any worse
        truth, starts = (norms(t).reshape(-1).tolist() for t in (b - system.apply(x), b))
        for row in done:
            watch.settle(row, truth[row], starts[row])
    return watch.best(x), step, alpha


def _iterate(
    system: System, steps: int, advance: Callable[[], None], over: Callable[[int], bool], watch: Watch | None
) -> int:
    """Take the steps, and more where alpha was decreased near the end: the number taken."""
    if watch is None:
        return system.iterate(steps, advance, None)
    step = system.iterate(steps, advance, over)
    while not watch.done and (more := watch.decreased + min(steps, _AFTER) - step) > 0:
        step += system.iterate(more, advance, functools.partial(_shifted, over, step))
    return step


def _shifted(over: Callable[[int], bool], before: int, step: int) -> bool:
    return over(before + step)


def _in_one_call(
    system: System, b: Tensor, steps: int, alpha: float, watch: Watch | None
) -> tuple[Tensor, int, float] | None:
    rows = b if b.dim() == 2 else b[None]
    while True:
        stop = watch.stop(b) if watch else torch.full((len(rows),), -1.0, dtype=torch.float64, device=b.device)
        whole = _whole(system, rows, steps, alpha, stop)
        if whole is None:
            return None
        x, history = whole
        if watch is None or watch.calm(history):
            return x.view_as(b), len(history), alpha
        over, step, shrink = False, 0, 1.0
        for step, stats in enumerate(history, 1):
            # The call has gone on with terms that grow: what there was before them is summed once more.
            over = watch.over(stats, step, _shorter(system, rows, step - 1, alpha, stop))
            shrink = watch.shrink()
            if over or shrink > 1:
                break
        if shrink == 1:
            if step < len(history):  # all rows are over, but the call went on for those that have failed
                again = _whole(system, rows, step, alpha, stop)
                assert again is not None
                x = again[0]
            return watch.best(x).view_as(b), step, alpha
        alpha /= shrink
        watch.restart()


def _whole(
    system: System, rows: Tensor, steps: int, alpha: float, stop: Tensor
) -> tuple[Tensor, list[list[list[float]]]] | None:
    """The sums, and the stats of the steps taken."""
    result = system.prepared.neumann_series(rows, alpha, system.damping, steps, stop, system.backend)
    if result is None:
        return None
    # Lists, because a dozen operations of torch take longer than a small solve.
    x, history = result[0], result[1].tolist()
    while history and history[-1][0][0] == -1:
        history.pop()
    system.hvps += len(history) * len(rows)
    return x, history


def _shorter(
    system: System, rows: Tensor, steps: int, alpha: float, stop: Tensor
) -> Callable[[int], Callable[[], Tensor]]:
    """For every row what sums it to fewer terms, once that is called."""

    def of(row: int) -> Callable[[], Tensor]:
        def again() -> Tensor:
            one = slice(row, row + 1)
            whole = _whole(system, rows[one], steps, alpha, stop[one])
            assert whole is not None
            return whole[0][0]

        return again

    return of
