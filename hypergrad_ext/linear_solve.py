"""A linear solve from checks to message: what `inverse_hvp`, `hypergradient` and `solve` share."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.solution import Solution, SolveError, SolveWarning, Status, worst
from hypergrad_ext.solvers import Auto, Outcome, Solver, SolverState, System
from hypergrad_ext.solvers.base import check_number
from hypergrad_ext.solvers.lanczos import Spectrum, lanczos
from hypergrad_ext.structure import Packed, Tree, power_of_two_scale

SolverChoice = Solver | Literal["auto"]

# A true residual this far above the tolerance means that rounding, not the stopping test, decided.
_STAGNATION = 2.0
# For automatic damping: steps that look for the most negative eigenvalue, what is not rounding, and the first increase.
_DAMPING_STEPS = 20
_NEGATIVE = 1e-6
_DAMPING_LEAST = 1e-3


def solve(
    operator: LinearOperator,
    b: Tree,
    solver: SolverChoice = "auto",
    *,
    damping: float | Literal["auto"] = 0.0,
    x0: Tree | None = None,
    state: SolverState | None = None,
    throw: bool = False,
    residual: bool = True,
    history: bool = False,
    backend: str | None = None,
) -> Solution:
    r"""Solve :math:`(H + d I) x = b` and say how it went.

    Args:
        operator: What H is: `Hessian`, `DenseMatrix`, `Callable`, or your own `LinearOperator`.
        b: Right-hand side with one leaf per parameter, or a batch with one more leading dimension k.
        solver: ``"auto"`` or a solver.
        damping: d >= 0; or ``"auto"``: none where 20 Lanczos steps see no negative eigenvalue, else what lifts the most
            negative one to a quarter of its magnitude; ten times more, up to three times, where a solve meets negative
            curvature or diverges all the same. `Solution.damping` is what was taken.
        x0: Start from this instead of zero.
        state: What the last solve of a slowly changing system left; see `SolverState`.
        throw: Raise `SolveError` on failure instead of returning it as a status.
        history: Keep the residual's norm at every step in `Solution.history`.
        residual: Spend one more product per right-hand side on the true residual.
        backend: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``.

    Returns:
        The `Solution`: value, status, steps, products spent, true relative residual.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or value, or the solver needs a
            symmetric operator and this one is not.
        SolveError: If the solve failed and ``throw``.

    Cost: the solver's products, one for ``residual``, one for ``x0`` and 20 for ``damping="auto"``.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, -4.0]], dtype=torch.float64)
        >>> sol = hg.solve(hg.DenseMatrix(A), torch.ones(2, dtype=torch.float64), hg.CG())
        >>> str(sol.status)
        'negative_curvature'
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            f"operator: expected a LinearOperator (Hessian, DenseMatrix, Callable), got {type(operator).__name__}"
        )
    solution = solve_for(
        operator,
        b,
        "b",
        solver,
        damping=damping,
        x0=x0,
        residual=residual,
        backend=backend,
        state=state,
        history=history,
    )
    if throw and solution.useless:
        raise SolveError(solution)
    return solution


def choose(solver: SolverChoice, operator: LinearOperator) -> Solver:
    """The solver to run for ``"auto"``, or the one given.

    Returns:
        The solver.

    Raises:
        TypeError: If ``solver`` is neither.
        ValueError: If it needs a symmetric operator and this one is not.
    """
    if isinstance(solver, str) and solver == "auto":
        solver = Auto()
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: expected 'auto' or a solver such as Neumann(steps=20), got {solver!r}")
    if solver.needs_symmetry and not operator.symmetric:
        raise ValueError(f"operator: expected a symmetric operator for {type(solver).__name__}, got one that is not")
    return solver


def solve_for(
    operator: LinearOperator,
    b: Tree,
    argument: str,
    solver: SolverChoice,
    *,
    damping: float | Literal["auto"],
    x0: Tree | None,
    residual: bool,
    backend: str | None,
    state: SolverState | None = None,
    history: bool = False,
) -> Solution:
    """Check the arguments, one of which is called ``argument`` by its user, and solve."""
    solver = choose(solver, operator)
    if isinstance(damping, str):
        if damping != "auto":
            raise ValueError(f"damping: expected a number or 'auto', got {damping!r}")
    else:
        check_number("damping", damping, positive=False)
    packed = operator.space.pack(argument, b)
    start = None if x0 is None else operator.space.pack("x0", x0, rows=packed.rows or 0).flat
    if state is None:
        state = SolverState()
    elif not isinstance(state, SolverState):
        raise TypeError(f"state: expected a SolverState, got {type(state).__name__}")
    state.check(operator.space)
    with torch.no_grad():
        if isinstance(damping, str):
            return _solve_damped(operator, backend, state, packed, start, solver, residual, history)
        system = System(operator, damping, backend, state)
        system.history = [] if history else None
        return _solve_packed(system, packed, start, solver, residual)


def _solve_damped(
    operator: LinearOperator,
    backend: str | None,
    state: SolverState,
    packed: Packed,
    start: Tensor | None,
    solver: Solver,
    residual: bool,
    history: bool,
) -> Solution:
    """Solve with damping from the most negative Ritz value, and more if that was not enough."""
    system = System(operator, 0.0, backend, state)
    found = lanczos(system, _DAMPING_STEPS, packed.flat.nan_to_num(0, 0, 0))
    if math.isfinite(found.size):
        operator.spectrum = found
    spent, damping = system.hvps, 0.0
    if found.low < -_NEGATIVE * found.size:
        damping = 1.25 * (found.low_error - found.low)
    for attempt in range(4):
        system = System(operator, damping, backend, state)
        system.hvps, system.history = spent, [] if history else None
        kept = replace(packed, flat=packed.flat.clone())
        solution = _solve_packed(system, kept, None if start is None else start.clone(), solver, residual)
        negative = solution.indefinite or solution.status in (Status.NEGATIVE_CURVATURE, Status.DIVERGED)
        if not negative or not math.isfinite(found.size) or attempt == 3:
            break
        spent = system.hvps
        damping = max(10 * damping, _DAMPING_LEAST * found.size)
    return solution


def _solve_packed(system: System, packed: Packed, x0: Tensor | None, solver: Solver, residual: bool) -> Solution:
    """What all solvers share: input check, unused parameters, warm start, scaling, true residual."""
    b, operator = packed.flat, system.operator
    if not system.damping:
        for flat in (b,) if x0 is None else (b, x0):
            for part, used in zip(flat.split(operator.space.sizes, dim=-1), operator.used, strict=True):
                if not used:
                    part.zero_()

    finite = b.isfinite().all(-1) if x0 is None else b.isfinite().all(-1) & x0.isfinite().all(-1)
    bad = [not ok for ok in finite.reshape(-1).tolist()]
    if all(bad):
        x = torch.full_like(b, torch.nan)
        return _solution(
            packed, x, Outcome(x, [Status.NON_FINITE_INPUT] * len(bad), 0), system, solver, None, b_norm=None
        )
    if any(bad):
        b = torch.where(finite[..., None], b, 0)
        x0 = None if x0 is None else torch.where(finite[..., None], x0, 0)

    b_norm = torch.linalg.vector_norm(b, dim=-1, dtype=torch.float64)
    if x0 is not None:
        rhs = b - system.apply(x0)
    else:
        x0, rhs = _warm(system, b, b_norm)
    _begin(system)
    scale = power_of_two_scale(rhs)
    outcome = solver.run(system, rhs * scale[..., None], b_norm * scale)
    x = outcome.x / scale[..., None]
    if x0 is not None:
        x += x0

    relative = None
    if residual:
        norms = torch.linalg.vector_norm(b - system.apply(x), dim=-1, dtype=torch.float64)
        relative = torch.where(b_norm > 0, norms / b_norm, norms)
        tol = getattr(solver, "tol", None)
        for row, value in enumerate(relative.reshape(-1).tolist()):
            if tol is not None and outcome.statuses[row] is Status.CONVERGED and not value <= _STAGNATION * tol:
                outcome.statuses[row] = Status.STAGNATED
    if any(bad):
        x = torch.where(finite[..., None], x, torch.nan)
        outcome.statuses = [
            Status.NON_FINITE_INPUT if row_bad else status
            for row_bad, status in zip(bad, outcome.statuses, strict=True)
        ]
    solution = _solution(packed, x, outcome, system, solver, relative, b_norm * scale, b_norm)
    _finish(system, x, solution)
    return solution


def _warm(system: System, b: Tensor, b_norm: Tensor) -> tuple[Tensor | None, Tensor]:
    """The last solution and its residual, or none and ``b``, for every row to which it is worse than zero."""
    x = system.state.x
    if x is None or x.shape != b.shape:
        return None, b
    rhs = b - system.apply(x)
    better = torch.linalg.vector_norm(rhs, dim=-1, dtype=torch.float64) < b_norm
    if not bool(better.any()):
        return None, b
    return torch.where(better[..., None], x, 0), torch.where(better[..., None], rhs, b)


def _begin(system: System) -> None:
    """Hand the state's spectrum to an operator that has none of its own."""
    state = system.state
    if state.spectrum is not None and state.spectrum_age < state.refresh and system.operator.spectrum is None:
        system.operator.spectrum = state.spectrum


def _finish(system: System, x: Tensor, solution: Solution) -> None:
    """Leave in the state what the next solve can use."""
    state, spectrum = system.state, system.operator.spectrum
    state.solves += 1
    state.hvps += solution.hvps
    state.steps = solution.steps
    state.sketch_age += 1
    state.spectrum_age = state.spectrum_age + 1 if spectrum == state.spectrum else 1
    state.spectrum = None if spectrum is None else Spectrum(*spectrum)
    if solution.useless or solution.indefinite or solution.status is Status.NEGATIVE_CURVATURE:
        state.x = state.spectrum = state.sketch = None
    else:
        state.x = x


def _solution(
    packed: Packed,
    x: Tensor,
    outcome: Outcome,
    system: System,
    solver: Solver,
    relative: Tensor | None,
    b_norm: Tensor | None,
    true_norm: Tensor | None = None,
) -> Solution:
    status, history = worst(outcome.statuses), system.history
    useless = status.failed
    lower = system.operator.lower
    bound = None
    if relative is not None and lower is not None and lower + system.damping > 0 and true_norm is not None:
        bound = relative * torch.where(true_norm > 0, true_norm, 1) / (lower + system.damping)
    if outcome.residuals is not None and b_norm is not None:
        # On an indefinite operator the iterate before the bad direction can be worse than zero.
        useless |= any(
            s is Status.NEGATIVE_CURVATURE and residual >= norm
            for s, residual, norm in zip(outcome.statuses, outcome.residuals, b_norm.reshape(-1).tolist(), strict=True)
        )
    return Solution(
        value=packed.restore(x),
        status=status,
        steps=outcome.steps,
        hvps=system.hvps,
        residual_norm=relative if relative is None or packed.rows is not None else float(relative),
        error_bound=bound if bound is None or packed.rows is not None else float(bound),
        history=None if history is None or b_norm is None else _relative(history, b_norm),
        solver=outcome.solver or solver,
        detail=outcome.detail,
        alpha=outcome.alpha,
        damping=system.damping,
        indefinite=outcome.indefinite,
        useless=useless,
        statuses=None if packed.rows is None else tuple(outcome.statuses),
        engine=system.operator.engine,
    )


def _relative(history: list[list[float]], b_norm: Tensor) -> list[list[float]]:
    norms = b_norm.reshape(-1).tolist()
    return [[value / (norm or 1) for value, norm in zip(row, norms, strict=True)] for row in history]


def report(solution: Solution, throw: bool) -> None:
    """For callers that get only the value: raise a failure, warn where a tolerance was missed."""
    if throw and solution.useless:
        raise SolveError(solution)
    missed = solution.status is Status.MAX_STEPS and getattr(solution.solver, "tol", None) is not None
    doubtful = solution.status in (Status.NEGATIVE_CURVATURE, Status.STAGNATED)
    if solution.useless or missed or solution.indefinite or doubtful:
        warnings.warn(solution.message, SolveWarning, stacklevel=3)
