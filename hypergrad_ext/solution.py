"""What a solve returns: the value, and how far to trust it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from hypergrad_ext.structure import Tree

if TYPE_CHECKING:
    from hypergrad_ext.solvers.base import Solver


class Status(str, enum.Enum):
    """How a solve ended; compares equal to its name in lower case."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    STAGNATED = "stagnated"
    NEGATIVE_CURVATURE = "negative_curvature"
    SINGULAR = "singular"
    DIVERGED = "diverged"
    NON_FINITE_INPUT = "non_finite_input"
    NON_FINITE_OPERATOR = "non_finite_operator"

    def __str__(self) -> str:
        """The bare value, the same on every Python version."""
        return self.value

    @property
    def message(self) -> str:
        """What happened, the likely cause, and the knob to turn."""
        return _MESSAGES[self]

    @property
    def failed(self) -> bool:
        """Whether the value is of no use."""
        return _ORDER.index(self) >= _ORDER.index(Status.SINGULAR)


_MESSAGES = {
    Status.CONVERGED: "The relative residual is within the tolerance, or the method is exact.",
    Status.MAX_STEPS: (
        "All steps were taken without the residual reaching a tolerance. "
        "If that is not what you wanted, raise the number of steps, add damping, or loosen tol."
    ),
    Status.STAGNATED: (
        "The recurrence converged, but the true residual is larger: the precision of the dtype is exhausted. "
        "Use float64, add damping, or loosen tol."
    ),
    Status.NEGATIVE_CURVATURE: (
        "The operator is not positive definite: a direction of zero or negative curvature was met, and the solve "
        "ended with the iterate before it. Add damping above the magnitude of the most negative eigenvalue, train the "
        "inner problem further, use a Gauss-Newton operator, or solve the indefinite system as it is with MINRES."
    ),
    Status.SINGULAR: "The operator is singular to working precision. Add damping.",
    Status.DIVERGED: (
        "The residuals grow instead of shrinking: alpha is above 2 / lambda_max, Chebyshev's upper bound is below "
        "lambda_max, or the operator has negative eigenvalues. Decrease alpha or raise the bound (None finds one), "
        "add damping, or use CG or MINRES."
    ),
    Status.NON_FINITE_INPUT: (
        "The right-hand side or x0 holds NaN or infinity before any step was taken. "
        "Look at the validation loss and its gradient."
    ),
    Status.NON_FINITE_OPERATOR: (
        "A product H v holds NaN or infinity although v is finite. Look at the training loss and the parameters: "
        "an overflow, a division by zero, or a function without a second derivative at this point (norm or sqrt at 0)."
    ),
}
# From best to worst: a batch reports the worst of its members.
_ORDER = list(Status)


def worst(statuses: list[Status]) -> Status:
    """The worst status of a batch."""
    return max(statuses, key=_ORDER.index)


@dataclass(frozen=True)
class Solution:
    r"""Result of solving :math:`(H + d I) x = b`.

    Attributes:
        value: ``x`` in the structure, shapes and dtypes of ``b``. Where residuals grew again: the iterate from where
            they began to; of conjugate gradients the last, whose error is the least in the energy norm. Where the
            solve failed or met negative curvature: the iterate before that, if its residual is below that of the
            start, else the start (``x0`` or zero). NaN where ``b`` is not finite.
        status: How the solve ended; for a batch, the worst of its members.
        steps: Steps taken; for a batch, by the member that took most.
        hvps: Hessian-vector products spent, those for the step size and the residual included; a
            product with a batch of k vectors counts k.
        residual_norm: True relative residual ``|b - (H + d I) x| / |b|``: a float, or a ``(k,)`` tensor
            for a batch; None if it was not measured, as where every product takes another batch.
        error_bound: Bound ``|b - (H + d I) x| / (lower + d)`` of the error ``|x - (H + d I)^{-1} b|``, up to
            rounding, where ``lower`` is known (given, or by the operator) and the residual was asked for: a float or a
            ``(k,)`` tensor.
        hypergradient_bound: For every element of the hyperparameters, what a hypergradient may be off by because of
            ``error_bound``: the norm of its column of the mixed derivative times that. In the structure of the
            hyperparameters, float64; None unless `hypergradient` had ``lower``, and for more than 64 elements.
        history: If asked for, relative norms of the residual as the solver saw them: one list per step, of one number
            per right-hand side. Empty for solvers that know none: `Direct`, `Identity`, `LiSSA`, `Nystrom`.
        solver: The solver that ran, after any automatic choice.
        detail: The numbers behind the status.
        alpha: The step size of a series, given or found.
        damping: The damping d that was used, given or found.
        indefinite: Whether the operator was found to have negative eigenvalues, though the solve went on.
        useless: Whether the value is no better than none: the solve failed, or met negative curvature or
            stagnated while the residual was not below that of ``x = 0``.
        statuses: For a batch, the status of every member.
        engine: What ran the products of a loss at the end of the solve: ``"eager"``, ``"traced"``, ``"native"``,
            ``"cuda_graph"`` or ``"compiled"``; None for other operators.
    """

    value: Tree = field(repr=False)  # or print(solution) would be pages of weights
    status: Status
    steps: int
    hvps: int
    residual_norm: float | Tensor | None
    solver: Solver
    error_bound: float | Tensor | None = None
    hypergradient_bound: Tree | None = None
    history: list[list[float]] | None = field(default=None, repr=False)
    detail: str = ""
    alpha: float | None = None
    damping: float = 0.0
    indefinite: bool = False
    useless: bool = False
    statuses: tuple[Status, ...] | None = None
    engine: str | None = None

    @property
    def converged(self) -> bool:
        """Whether every right-hand side met its tolerance."""
        return self.status is Status.CONVERGED

    @property
    def message(self) -> str:
        """Status, numbers, cause and remedy in one text."""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{type(self.solver).__name__}: {self.status}{detail}. {self.status.message}"


class SolveError(RuntimeError):
    """A solve failed and its value is of no use; ``solution`` holds what there is."""

    def __init__(self, solution: Solution) -> None:
        """Raise for ``solution``, with its message."""
        super().__init__(solution.message)
        self.solution = solution


class SolveWarning(UserWarning):
    """A solve returned an approximation that did not meet its tolerance."""
