"""Conjugate gradients with exits that can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.norms import norms
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count, check_tolerance
from hypergrad_ext.solvers.preconditioner import (
    Preconditioner,
    PreconditionerChoice,
    SketchPreconditioner,
    not_definite,
)
from hypergrad_ext.structure import held

_STATUS = {
    0.0: Status.MAX_STEPS,
    1.0: Status.CONVERGED,
    2.0: Status.NEGATIVE_CURVATURE,
    3.0: Status.NON_FINITE_OPERATOR,
}


@dataclass(frozen=True)
class CG(Solver):
    r"""Conjugate gradients on :math:`(H + d I) x = b`.

    Needs a positive definite operator: a direction of zero or negative curvature ends the solve with
    the iterate before it; `MINRES` goes on. The error shrinks at least by
    :math:`(\sqrt\kappa - 1) / (\sqrt\kappa + 1)` per step, in a few steps per cluster of eigenvalues; with a
    preconditioner M, those of :math:`M (H + d I)`. Each right-hand side of a batch stops by itself.

    Cost: one Hessian-vector product per step.

    Args:
        tol: Stop once ``|b - (H + d I) x| <= tol |b|``.
        max_steps: Stop after so many steps at the latest.
        preconditioner: P close to ``H + d I``, of which M is the inverse: its diagonal in the structure of the
            parameters (positive; applied by the fused step); `Jacobi` or `Nystrom`; or a function or operator that
            multiplies by M.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``tol`` is not positive or ``max_steps`` is less than 1.

    References:
        Hestenes, Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> sol = hg.solve(hg.DenseMatrix(A), torch.ones(2, dtype=torch.float64), hg.CG(tol=1e-10))
        >>> sol.value, sol.steps, str(sol.status)
        (tensor([0.4000, 0.2000], dtype=torch.float64), 2, 'converged')
    """

    tol: float = 1e-5
    max_steps: int = 250
    preconditioner: PreconditionerChoice = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        object.__setattr__(self, "preconditioner", held(self.preconditioner))
        check_tolerance(self.tol)
        check_count("max_steps", self.max_steps, 1)

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Iterate from ``x = 0``; all scalars stay in ``state``, on the device."""
        m = Preconditioner.of(self.preconditioner, system)
        # Residual and threshold are squared norms; curvature and flag start at 0.
        squared = norms(b).square()
        stop = (self.tol * b_norm).square()
        columns = [squared, stop, torch.zeros_like(squared), (squared <= stop).double()]
        if m is not None:
            columns.append(m.norm(b).square())
        state = torch.stack(columns, dim=-1)
        whole = None
        if m is None and system.history is None:
            rows = b if b.dim() == 2 else b[None]
            whole = system.prepared.conjugate_gradients(
                rows, system.damping, self.max_steps, state.view(-1, 4), system.backend
            )
        if whole is None:
            x, step = self._loop(system, b, state, m)
        else:
            x, state, steps = whole
            x, step = x.view_as(b), int(steps)
            system.hvps += step * len(rows)
        residual, _, curvature, flags, *energies = state.reshape(-1, len(columns)).T.tolist()
        if energies and not isinstance(m, SketchPreconditioner):  # which is, but for rounding
            least = min((energy for energy, flag in zip(energies[0], flags, strict=True) if flag == 2.0), default=1.0)
            if least <= 0:
                raise not_definite(least)
        negative = [c for c, flag in zip(curvature, flags, strict=True) if flag == 2.0]
        detail = f"step {step}, curvature {min(negative):.3g}" if negative else ""
        return Outcome(
            x, [_STATUS[flag] for flag in flags], step, detail, residuals=[math.sqrt(square) for square in residual]
        )

    def _loop(self, system: System, b: Tensor, state: Tensor, m: Preconditioner | None) -> tuple[Tensor, int]:
        x, r, p = torch.zeros_like(b), b, b.clone() if m is None else m.times(b)
        views = system.views(p)
        flags = state[..., 3]

        def over(_: int) -> bool:
            if system.history is not None:
                system.record(state.reshape(-1, state.shape[-1])[:, 0].tolist())
            return 0.0 not in flags.reshape(-1).tolist()

        if m is None:
            step_ = system.kernel(ops.cg_step_)

            def advance() -> None:
                step_([x], [r], [p], system.product(views), state, system.damping)
        else:
            step_ = m.step(ops.pcg_step_, system.kernel(ops.pcg_step_))

            def advance() -> None:
                step_([x], [r], [p], system.product(views), m.argument, state, system.damping)

        return x, 0 if over(0) else system.iterate(self.max_steps, advance, over)
