"""The default: conjugate gradients that know when something else is better, and say so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hypergrad_ext.norms import norms, power_of_two_scale
from hypergrad_ext.operators import DenseMatrix
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count, check_tolerance
from hypergrad_ext.solvers.cg import CG
from hypergrad_ext.solvers.direct import Direct
from hypergrad_ext.solvers.minres import MINRES
from hypergrad_ext.solvers.nystrom import sketch_of
from hypergrad_ext.solvers.preconditioner import SketchPreconditioner

# What an exact solve is weighed against.
_EXPECTED_STEPS = 60
# Steps in low precision after which the residual of the recurrence is not taken on trust.
_CHECKED = 20
# Numbers that a sketch may hold, beside all the vectors of the solve.
_SKETCH_NUMBERS = 1 << 27


@dataclass(frozen=True)
class Auto(Solver):
    r"""What ``solver="auto"`` runs: the least work to a tolerance, whatever the spectrum.

    1. A matrix that is there, or cheaper to form than to multiply by (`GLMHessian` with few columns), is factorised.
    2. Else conjugate gradients, from the last solution where a `SolverState` is held. Once a solve with that state
       took more than ``long`` steps, the next ones are preconditioned by a `Nystrom` sketch of ``rank`` products,
       made anew once its age has cost as many steps as it did.
    3. Where they meet negative curvature, `MINRES` solves the system as it is; `Solution.indefinite` says so, and
       `inverse_hvp` warns, since a saddle point of the training loss has no implicit function.
    4. Where rounding hid the residual, they start again from what there is, in what the dtype can give.

    ``Solution.detail`` says which of these were taken and why, ``Solution.solver`` what ran in the end.

    Cost: one Hessian-vector product per step, and ``rank`` for a sketch.

    Args:
        tol: Stop once ``|b - (H + d I) x| <= tol |b|``.
        max_steps: Stop after so many steps at the latest, of MINRES again so many.
        on_negative_curvature: ``"minres"``, or ``"stop"`` to end as `CG` does.
        rank: Rank of a sketch; 0 never makes one.
        long: Steps above which a solve is worth one.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 2.0, -1.0]))
        >>> operator = hg.Callable(lambda v: A @ v, torch.ones(3))
        >>> sol = hg.solve(operator, torch.ones(3))
        >>> sol.value, sol.indefinite, type(sol.solver).__name__
        (tensor([ 0.3333,  0.5000, -1.0000]), True, 'MINRES')
    """

    tol: float = 1e-4
    max_steps: int = 500
    on_negative_curvature: Literal["minres", "stop"] = "minres"
    rank: int = 30
    long: int = 20

    def __post_init__(self) -> None:
        """Check the settings."""
        check_tolerance(self.tol)
        check_count("max_steps", self.max_steps, 1)
        check_count("rank", self.rank, 0)
        check_count("long", self.long, 0)
        if self.on_negative_curvature not in ("minres", "stop"):
            raise ValueError(f"on_negative_curvature: expected 'minres' or 'stop', got {self.on_negative_curvature!r}")

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Choose and solve."""
        rows = b.shape[0] if b.dim() == 2 else 1
        state = system.state
        expected = state.steps or _EXPECTED_STEPS
        prepared = system.prepared = system.operator.prepare(expected, rows)
        # Cholesky's n^3 / 3 multiply-adds against those of the steps, which wait for memory and run 8 times as long.
        if isinstance(prepared, DenseMatrix) and len(prepared.matrix) <= 24 * expected * rows:
            return _exactly(system, prepared.dense(), b)
        solver = CG(self.tol, self.max_steps)
        said = []
        if self.rank and (state.steps > self.long or state.sketch is not None):
            preconditioner, why = self._sketched(system)
            solver = replace(solver, preconditioner=preconditioner)
            said.append(why)
        outcome = solver.run(system, b.clone(), b_norm)
        said = [f"CG, {outcome.steps} steps", *said, *([outcome.detail] if outcome.detail else [])]
        outcome.solver = solver
        if outcome.steps >= _CHECKED and b.dtype is not torch.float64 and Status.CONVERGED in outcome.statuses:
            again = self._checked(system, b, b_norm, solver, outcome)
            said += [f"{again} more after a look at the true residual"] if again else []
        if state.sketch is not None:
            state.sketch_steps = state.sketch_steps or outcome.steps
            state.sketch_lost += max(outcome.steps - state.sketch_steps, 0)
            if Status.NEGATIVE_CURVATURE in outcome.statuses:
                state.sketch = None
        if self.on_negative_curvature == "minres" and Status.NEGATIVE_CURVATURE in outcome.statuses:
            outcome = self._indefinite(system, b, b_norm, outcome)
            said.append(f"so MINRES, {outcome.steps} steps")
        outcome.detail = "; ".join(said)
        return outcome

    def _checked(self, system: System, b: Tensor, b_norm: Tensor, solver: CG, outcome: Outcome) -> int:
        """Steps taken from the true residual, where rounding has kept it above the tolerance."""
        r = b - system.apply(outcome.x)
        r_norm = norms(r)
        if bool((r_norm.reshape(-1) <= 2 * self.tol * b_norm.reshape(-1)).all()):
            return 0
        scale = power_of_two_scale(r, r_norm)
        again = solver.run(system, r * scale[..., None], b_norm * scale)
        outcome.x += again.x / scale[..., None]
        outcome.steps += again.steps
        outcome.statuses = [
            after if before is Status.CONVERGED else before
            for before, after in zip(outcome.statuses, again.statuses, strict=True)
        ]
        return again.steps

    def _sketched(self, system: System) -> tuple[SketchPreconditioner | None, str]:
        """The preconditioner of the state's sketch, made or kept."""
        state = system.state
        if state.sketch is not None and state.sketch_lost < len(state.sketch.values):
            why = f"preconditioned by a sketch of rank {len(state.sketch.values)} from {state.sketch_age} solves ago"
            return SketchPreconditioner(state.sketch, system), why
        rank = min(self.rank, system.operator.space.numel // 4, _SKETCH_NUMBERS // system.operator.space.numel)
        state.sketch, state.sketch_age, state.sketch_steps, state.sketch_lost = None, 0, 0, 0
        sketch = sketch_of(system, rank) if rank else None
        if sketch is None or len(sketch.values) < 2:
            return None, "no sketch: too few weights, too many, or no positive curvature"
        state.sketch = sketch
        return SketchPreconditioner(sketch, system), f"preconditioned by a new sketch of rank {len(sketch.values)}"

    def _indefinite(self, system: System, b: Tensor, b_norm: Tensor, before: Outcome) -> Outcome:
        """MINRES for the rows that met negative curvature."""
        rows = [i for i, status in enumerate(before.statuses) if status is Status.NEGATIVE_CURVATURE]
        solver = MINRES(self.tol, self.max_steps)
        if b.dim() == 1:
            outcome = solver.run(system, b, b_norm)
        else:
            assert before.residuals is not None
            history, system.history = system.history or [], None if system.history is None else []
            outcome = solver.run(system, b[rows], b_norm[rows])
            assert outcome.residuals is not None
            for some in system.history or []:  # the rows that are over keep their last residual
                history.append(list(history[-1]))
                for row, norm in zip(rows, some, strict=True):
                    history[-1][row] = norm
            system.history = None if system.history is None else history
            before.x[rows] = outcome.x
            for row, status, residual in zip(rows, outcome.statuses, outcome.residuals, strict=True):
                before.statuses[row], before.residuals[row] = status, residual
            outcome.x, outcome.statuses, outcome.residuals = before.x, before.statuses, before.residuals
        outcome.solver, outcome.indefinite = solver, True
        return outcome


def _exactly(system: System, matrix: Tensor, b: Tensor) -> Outcome:
    """By Cholesky, and where the matrix is not positive definite by LU."""
    rows = b.shape[0] if b.dim() == 2 else 1
    if not bool(matrix.isfinite().all()):
        return Outcome(b, [Status.NON_FINITE_OPERATOR] * rows, 0, solver=Direct())
    matrix.diagonal().add_(system.damping)
    n = len(matrix)
    scale = matrix.diagonal().abs().amax()
    factor, info = torch.linalg.cholesky_ex(matrix)
    columns = b.reshape(rows, n).T
    if not int(info) and float(factor.diagonal().min()) ** 2 > torch.finfo(b.dtype).eps * float(scale):
        x, how = torch.cholesky_solve(columns, factor), "Cholesky"
        return Outcome(x.T.reshape(b.shape), [Status.CONVERGED] * rows, 0, f"{how}, n = {n}", solver=Direct())
    factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
    x = torch.linalg.lu_solve(factors, pivots, columns).T.reshape(b.shape)
    tiny = float(factors.diagonal().abs().min()) <= torch.finfo(b.dtype).eps * float(scale)
    status = Status.SINGULAR if int(info) or tiny or not bool(x.isfinite().all()) else Status.CONVERGED
    detail = f"LU, n = {n}: not positive definite"
    return Outcome(x, [status] * rows, 0, detail, solver=Direct(), indefinite=status is Status.CONVERGED)
