"""Chebyshev iteration: a fixed number of products, no dot product that decides anything, the best polynomial."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

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

# Of the largest magnitude, added to the largest Ritz value with its error, so that the largest eigenvalue is inside.
_MARGIN = 0.1
# Of the smallest Ritz value, where its error is too large to tell.
_GUARD = 0.2


@dataclass(frozen=True)
class Chebyshev(Solver):
    r"""Chebyshev iteration: the polynomial in :math:`H + d I` of least residual on an interval of eigenvalues.

    .. math:: x_{k+1} = x_k + \omega_k \frac{2}{l + u} M (b - (H + d I) x_k) + (\omega_k - 1)(x_k - x_{k-1})

    from :math:`x_0 = 0`, with :math:`\omega_0 = 1` and the bounds :math:`[l, u]` of the eigenvalues of
    :math:`M (H + d I)`. The residual shrinks by :math:`(\sqrt\kappa - 1) / (\sqrt\kappa + 1)` per step,
    :math:`\kappa = u / l`, where the Neumann series has :math:`(\kappa - 1) / (\kappa + 1)` at best. Eigenvalues below
    l are solved more slowly; one above u, or below zero, makes it diverge, which is noticed once the residual is
    above that of x = 0.

    The step sizes depend on the bounds alone, so that nothing waits for the device but the check for divergence.

    Cost: K Hessian-vector products, and 10 more for ``bounds=None``, once per operator (with a preconditioner, per
    solve) or while a `SolverState` keeps what they showed.

    Args:
        steps: K, the number of products; K = 0 gives ``2 / (l + u) M b``.
        bounds: Bounds of the eigenvalues, damping and preconditioner included. None takes them from 10 Lanczos steps:
            above the largest Ritz value by its error and a tenth, below the smallest likewise, by a factor of 5 at
            most. Without ``tol`` the lower one is lower still where K steps can divide residuals by a million there,
            and it is never below the damping or what K steps can resolve.
        tol: Stop early with the first iterate of which ``|b - (H + d I) x| <= tol |b|`` is known, which is the last but
            one; None always takes all steps.
        preconditioner: P close to ``H + d I``, of which M is the inverse: its diagonal in the structure of the
            parameters (positive; applied by the fused step); `Jacobi` or `Nystrom`; or a function or operator that
            multiplies by M.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``steps`` is negative, ``tol`` is not positive, or ``bounds`` are not ``0 < l <= u``.

    References:
        Golub, Varga, "Chebyshev semi-iterative methods, successive overrelaxation iterative methods, and second
        order Richardson iterative methods", Numerische Mathematik 3, 1961.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> sol = hg.solve(hg.DenseMatrix(A), torch.tensor([2.0, 2.0]), hg.Chebyshev(steps=12, bounds=(2, 4)))
        >>> sol.value
        tensor([1.0000, 0.5000])
    """

    steps: int = 20
    bounds: tuple[float, float] | None = None
    tol: float | None = None
    preconditioner: PreconditionerChoice = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        object.__setattr__(self, "preconditioner", held(self.preconditioner))
        check_count("steps", self.steps, 0)
        if self.tol is not None:
            check_tolerance(self.tol, "steps")
        if self.bounds is not None:
            if not isinstance(self.bounds, tuple) or len(self.bounds) != 2:
                raise TypeError(f"bounds: expected a pair (lower, upper), got {self.bounds!r}")
            for bound in self.bounds:
                check_number("bounds", bound, positive=True)
            if self.bounds[0] > self.bounds[1]:
                raise ValueError(f"bounds: expected lower <= upper, got {self.bounds}")

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Iterate from ``x = 0``."""
        rows = b.shape[0] if b.dim() == 2 else 1
        m = Preconditioner.of(self.preconditioner, system)
        kept = False
        if self.bounds is None:
            before = system.hvps
            found = spectrum_of(system, b, m)
            kept = system.hvps == before
            damping = system.damping if m is None else 0.0
            if not math.isfinite(found.high):
                return Outcome(b, [Status.NON_FINITE_OPERATOR] * rows, 0)
            size = found.size + damping
            if size == 0:
                return Outcome(b, [Status.SINGULAR] * rows, 0, "H v = 0 for a random v")
            if found.low + damping < -10 * torch.finfo(b.dtype).eps * size:
                # A Ritz value lies between eigenvalues: the iteration would diverge for sure.
                residuals = norms(b).reshape(-1).tolist()
                detail = f"Ritz value {found.low + damping:.3g}"
                return Outcome(b.zero_(), [Status.NEGATIVE_CURVATURE] * rows, 0, detail, residuals=residuals)
            low, high = self._bounds_from(found, damping)
        else:
            low, high = (float(bound) for bound in self.bounds)

        watch = Watch(b, b_norm, self.tol, m, regrowth=math.inf)
        system.prepare(self.steps, b)
        x, step = _iterate(system, b, self.steps, (low, high), m, watch)
        if kept and Status.DIVERGED in watch.statuses():
            # The spectrum was that of an earlier outer step: look again.
            system.operator.spectrum = system.state.preconditioned = None
            return self.run(system, b, b_norm)
        detail = f"bounds {low:.3g} and {high:.3g}{watch.detail}"
        return Outcome(x, watch.statuses(), step, detail, residuals=watch.residuals())

    def _bounds_from(self, found: Spectrum, damping: float) -> tuple[float, float]:
        """Bounds from Ritz values, and from what so many steps can do: divide a residual by 7 to 10^6."""
        margin = _MARGIN * found.size
        high = found.high + found.high_error + margin + damping
        least = high / (self.steps + 1) ** 2
        if found.low < 0:
            return max((1 + _MARGIN) * (found.low - found.low_error) + damping, least), high
        low = max((found.low - found.low_error) / (1 + _MARGIN), _GUARD * found.low) + damping
        if self.tol is None:  # steps to spare go to smaller eigenvalues than Lanczos saw
            low = min(low, 7.25**2 * least)
        return max(low, least, damping), high


def step_sizes(bounds: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """``alpha`` and ``momentum`` of every step, the first of which starts from zero."""
    low, high = bounds
    centre, square, omega = (low + high) / 2, ((high - low) / (high + low)) ** 2, 1.0
    while True:
        yield omega / centre, omega - 1
        # Of two starting values the recurrence has this one.
        omega = 1 / (1 - square * omega / (2 if omega == 1.0 else 4))


def _iterate(
    system: System,
    b: Tensor,
    steps: int,
    bounds: tuple[float, float],
    m: Preconditioner | None,
    watch: Watch,
) -> tuple[Tensor, int]:
    sizes = step_sizes(bounds)
    start, _ = next(sizes)
    x_old, x = torch.zeros_like(b), (b.clone() if m is None else m.times(b)).mul_(start)
    # The step writes over the older iterate: two buffers in turn.
    old, new = (x_old, system.views(x_old)), (x, system.views(x))
    step_ = system.kernel(ops.chebyshev_step_)
    step_ = step_ if m is None else m.step(ops.chebyshev_step_, step_)
    argument = [] if m is None else m.argument
    stats = torch.zeros(*b.shape[:-1], 3, dtype=torch.float64, device=b.device)

    def advance() -> None:
        nonlocal old, new
        alpha, momentum = next(sizes)
        (x_old, _), (x, views) = old, new
        step_([x_old], [x], system.product(views), [b], argument, stats, alpha, momentum, system.damping)
        old, new = new, old

    def over(step: int) -> bool:
        rows = stats.view(-1, 3).tolist()
        system.record(row[0] for row in rows)
        before = old[0].view(-1, b.shape[-1])
        return watch.over(rows, step, lambda row: before[row].clone())

    step = system.iterate(steps, advance, over)
    done = watch.converged()
    if len(done) == len(stats.view(-1, 3)):
        new = old
    elif done:
        new[0][done] = old[0][done]
    return watch.best(new[0]), step
