"""The stochastic Neumann series: one batch per product, averaged over repeats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.norms import norms
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count, check_number
from hypergrad_ext.solvers.lanczos import spectrum_of

# Of 2 / lambda_max for alpha=None: a single batch has larger eigenvalues than the mean over batches.
_SAFE = 0.5


@dataclass(frozen=True)
class LiSSA(Solver):
    r"""Linear-time stochastic second-order estimate: a Neumann series whose every product sees another batch.

    .. math:: x_{j+1} = \alpha b + (I - \alpha (H_j + d I)) x_j, \quad x_0 = \alpha b

    with independent, unbiased estimates :math:`H_j` of H, averaged over ``repeats`` runs. Made for
    ``Hessian(loss, params, batches=loader, stochastic=True)``, whose products take one batch each; on any
    other operator all runs are equal, and `Neumann` is the same for less.

    The mean is unbiased for the truncated series if batches come at random: those of a list do, a loader has to
    shuffle. Its variance falls as 1 / ``repeats``, and what the runs differ by is in ``Solution.detail`` as the
    standard error of the mean, relative to the solution.

    Cost: ``steps * repeats`` Hessian-vector products, each of one batch, and 10 more for ``alpha=None``, once per
    operator.

    Args:
        steps: Products of one run.
        repeats: Runs.
        alpha: Step size; no batch may have an eigenvalue above ``2 / alpha``. None takes half of what is safe by the
            spectrum that 10 Lanczos steps see, which they estimate from batches, too.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``steps`` is negative, ``repeats`` is less than 1, or ``alpha`` is not positive.

    References:
        Agarwal, Bullins, Hazan, "Second-Order Stochastic Optimization for Machine Learning in Linear Time", JMLR 18,
        2017; Koh, Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017.

    Example:
        >>> batches = [torch.tensor(1.99), torch.tensor(2.01)]
        >>> w = torch.ones(1, requires_grad=True)
        >>> H = hg.Hessian(lambda w, c: (c * w**2).sum() / 2, w, batches=batches, stochastic=True)
        >>> hg.solve(H, torch.ones(1), hg.LiSSA(steps=50, repeats=4, alpha=0.5), residual=False).value.round(decimals=2)
        tensor([0.5000])
    """

    steps: int = 100
    repeats: int = 8
    alpha: float | None = None

    needs_one_matrix = False
    gains_from_start = False  # but from the residual of a single batch it would take over that batch's error

    def __post_init__(self) -> None:
        """Check the settings."""
        check_count("steps", self.steps, 0)
        check_count("repeats", self.repeats, 1)
        if self.alpha is not None:
            check_number("alpha", self.alpha, positive=True)

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Average runs; no product is used to decide anything, so nothing waits for the device."""
        rows = b.shape[0] if b.dim() == 2 else 1
        alpha = self.alpha
        if alpha is None:
            found = spectrum_of(system, b)
            if not math.isfinite(found.size):
                return Outcome(b, [Status.NON_FINITE_OPERATOR] * rows, 0)
            if found.size + system.damping == 0:
                return Outcome(b, [Status.SINGULAR] * rows, 0, "H v = 0 for a random v")
            alpha = _SAFE * 2 / (found.size + system.damping)
        system.prepare(self.steps * self.repeats, b)
        step_ = system.kernel(ops.richardson_step_)
        stats = torch.zeros(*b.shape[:-1], 3, dtype=torch.float64, device=b.device)
        x = torch.empty_like(b)
        views = system.views(x)
        mean, squares = torch.zeros_like(b), torch.zeros_like(b)
        for run in range(1, self.repeats + 1):
            torch.mul(b, alpha, out=x)
            for _ in range(self.steps):
                step_([x], system.product(views), [b], [], stats, alpha, system.damping)
            # Welford's update of mean and sum of squared differences.
            difference = x - mean
            mean.add_(difference, alpha=1 / run)
            squares.addcmul_(difference, x - mean)
        size = norms(mean)
        # With eigenvalues from zero to 2 / alpha in every batch, no factor I - alpha H_j enlarges anything.
        limit = 1.01 * alpha * (self.steps + 1) * norms(b)
        fine = (size <= limit).reshape(-1).tolist()
        detail = f"alpha {alpha:.3g}"
        if self.repeats > 1:
            error = (squares.double().sum(-1) / (self.repeats * (self.repeats - 1))).sqrt() / size
            worst = float(error.nan_to_num().max())
            # Batches in one order say nothing about how far off it takes them.
            detail += f", standard error {worst:.2g}" if worst else ", all runs are equal"
        statuses = [Status.MAX_STEPS if ok else Status.DIVERGED for ok in fine]
        return Outcome(mean, statuses, self.steps * self.repeats, detail, alpha=alpha)
