"""MINRES: the smallest residual of a Krylov space, for any symmetric operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad_ext import ops, reference_minres
from hypergrad_ext.norms import norms
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count, check_tolerance

_STATUS = {
    reference_minres.RUNNING: Status.MAX_STEPS,
    reference_minres.CONVERGED: Status.CONVERGED,
    reference_minres.BROKEN: Status.NON_FINITE_OPERATOR,
    reference_minres.SINGULAR: Status.SINGULAR,
}
# A true residual this far above the tolerance means that rounding, not the stopping test, decided.
_STAGNATION = 2.0
_FLAG, _STEP = (reference_minres.COLUMNS.index(name) for name in ("flag", "step"))


@dataclass(frozen=True)
class MINRES(Solver):
    r"""Minimal residuals on :math:`(H + d I) x = b` for any symmetric H: the way out of negative curvature.

    After k steps x has the smallest residual in the space of :math:`b, A b, \dots, A^{k-1} b`,
    :math:`A = H + d I`, so that the residual never grows. On a definite operator it needs about as many steps as CG,
    on an indefinite one about twice as many for the same ratio of eigenvalues. Each right-hand side of a batch
    stops by itself. An operator that is singular for ``b`` is found out and reported, at the latest by the true
    residual.

    Mind that on an indefinite Hessian :math:`H^{-1} b` belongs to a saddle point of the training loss: it is what
    was asked for, but no response of a minimum.

    Cost: one Hessian-vector product per step, and one for the true residual.

    Args:
        tol: Stop once ``|b - (H + d I) x| <= tol |b|``.
        max_steps: Stop after so many steps at the latest.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``tol`` is not positive or ``max_steps`` is less than 1.

    References:
        Paige, Saunders, "Solution of Sparse Indefinite Systems of Linear Equations", SIAM Journal on Numerical
        Analysis 12, 1975.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
        >>> sol = hg.solve(hg.DenseMatrix(A), torch.tensor([3.0, 0.0], dtype=torch.float64), hg.MINRES(tol=1e-10))
        >>> sol.value, str(sol.status)
        (tensor([-1.0000,  2.0000], dtype=torch.float64), 'converged')
    """

    tol: float = 1e-5
    max_steps: int = 500

    def __post_init__(self) -> None:
        """Check the settings."""
        check_tolerance(self.tol)
        check_count("max_steps", self.max_steps, 1)

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Iterate from ``x = 0``; all scalars stay in ``state``, on the device."""
        norm = norms(b)
        stop = self.tol * b_norm
        rows = b.shape[0] if b.dim() == 2 else 1
        x = torch.zeros_like(b)
        if bool((norm <= stop).all()):
            return Outcome(x, [Status.CONVERGED] * rows, 0, residuals=norm.reshape(-1).tolist())
        system.prepare(self.max_steps, b)
        new, old = [(t, system.views(t)) for t in (b.clone(), torch.zeros_like(b))]
        w, w_old = torch.zeros_like(b), torch.zeros_like(b)
        products = [system.product(new[1])]
        state = reference_minres.start(norm, stop, _magnitude(products[0], rows).view_as(norm) + system.damping)
        flags = state[..., _FLAG]
        step_ = system.kernel(ops.minres_step_)

        def advance() -> None:
            nonlocal new, old, w, w_old
            (v, views), (v_old, _) = new, old
            hv = products.pop() if products else system.product(views)
            step_([x], [v], [v_old], [w], [w_old], hv, state, system.damping)
            (new, old), (w, w_old) = (old, new), (w_old, w)

        def over(_: int) -> bool:
            if system.history is not None:
                system.record(state[..., 0].square().reshape(-1).tolist())
            return reference_minres.RUNNING not in flags.reshape(-1).tolist()

        step = system.iterate(self.max_steps, advance, over)
        # Rows that were still running have their last step to take.
        last = state[..., _STEP, None]
        x = torch.where(last != 0, x + last.to(x.dtype) * w, x)
        statuses = [_STATUS[flag] for flag in flags.reshape(-1).tolist()]
        residuals: list[float] = state[..., 0].reshape(-1).tolist()
        # Rounding hides from the recurrence what it is blind to, an operator that is singular: x grows without bound
        # along its null space, while the residual that the recurrence knows goes on shrinking.
        truth = norms(b - system.apply(x)).reshape(-1).tolist()
        starts, limits = norm.reshape(-1).tolist(), (_STAGNATION * stop).reshape(-1).tolist()
        for row, size in enumerate(truth):
            if statuses[row] is Status.NON_FINITE_OPERATOR:
                continue
            residuals[row] = size
            if statuses[row] is Status.CONVERGED and not size <= limits[row]:
                statuses[row] = Status.STAGNATED
            elif statuses[row] is Status.MAX_STEPS and not size <= starts[row]:
                statuses[row] = Status.SINGULAR
        return Outcome(x, statuses, step, residuals=residuals)


def _magnitude(product: Sequence[Tensor], rows: int) -> Tensor:
    """Largest magnitude of a product per row; 1 where that is zero or not finite."""
    largest = torch.cat([t.reshape(rows, -1) for t in product], dim=1).abs().amax(1).double()
    return torch.where((largest > 0) & largest.isfinite(), largest, 1)
