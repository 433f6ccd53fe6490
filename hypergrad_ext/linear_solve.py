"""A linear solve from checks to message: what `inverse_hvp`, `hypergradient` and `solve` share."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hypergrad_ext.carry_over import begin, finish, used_part, warm
from hypergrad_ext.compilation import never_compiled
from hypergrad_ext.error_bound import check_lower, solution_bound
from hypergrad_ext.norms import finite_rows, norms, powers_of_two, safe_norms
from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.solution import Solution, SolveError, SolveWarning, Status, worst
from hypergrad_ext.solvers import MINRES, Auto, LiSSA, Outcome, Solver, SolverState, System
from hypergrad_ext.solvers.base import check_number
from hypergrad_ext.solvers.lanczos import lanczos
from hypergrad_ext.solvers.watch import times
from hypergrad_ext.structure import Packed, Tree
from hypergrad_ext.surroundings import without_autocast
from hypergrad_ext.symmetry import refuse_declared, refuse_found

SolverChoice = Solver | Literal["auto"]

# A true residual this far above the tolerance means that rounding, not the stopping test, decided.
_STAGNATION = 2.0
# Steps in low precision after which that is looked into, asked or not.
_CHECKED = 20
# Norm of a right-hand side, or multiple of it, from which on the solution may not fit the dtype.
_LARGE = 1e9
# For automatic damping: steps that look for the most negative eigenvalue, what is not rounding, and the first increase.
_DAMPING_STEPS = 20
_NEGATIVE = 1e-6
_DAMPING_LEAST = 1e-3


@never_compiled
def solve(
    operator: LinearOperator,
    b: Tree,
    solver: SolverChoice = "auto",
    *,
    damping: float | Literal["auto"] = 0.0,
    x0: Tree | None = None,
    state: SolverState | None = None,
    lower: float | None = None,
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
        lower: A number that no eigenvalue of H (without damping) is below, if you know one: the least L2 penalty of a
            convex loss, 0 for a Gauss-Newton matrix. With it `Solution.error_bound` is certain up to rounding. By
            default the operator's own ``lower``. Refused where the solution shows it to be wrong.
        throw: Raise `SolveError` on failure instead of returning it as a status.
        history: Keep the residual's norm at every step in `Solution.history`.
        residual: Spend one more product per right-hand side on the true residual. Below float64 that is done in any
            case after 20 steps to a tolerance, where rounding may have hidden what the recurrence knows; of an operator
            with ``stochastic`` never.
        backend: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``.

    Returns:
        The `Solution`: value, status, steps, products spent, true relative residual.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or value, the solver needs a symmetric operator and this
            one is not (or, where a solve went wrong, was found not to be), or one and the same matrix and this is
            ``stochastic``, or an eigenvalue is below ``lower``.
        SolveError: If the solve failed and ``throw``.

    Cost: the solver's products, one for ``residual``, one for ``x0``, and for ``damping="auto"`` 20 and up to three
    failed solves, which `Solution.detail` names and `Solution.hvps` counts. After a solve that went wrong, two on
    whether a `Callable` or an operator of your own is symmetric, once for each.

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
        lower=lower,
    )
    if throw and solution.useless:
        raise SolveError(solution)
    return solution


def choose(solver: SolverChoice, operator: LinearOperator) -> Solver:
    """The solver to run for ``"auto"``, which is `LiSSA` where the operator is stochastic, or the one given.

    Returns:
        The solver.

    Raises:
        TypeError: If ``solver`` is neither.
        ValueError: If it needs a symmetric operator or one and the same matrix, and this one is not.
    """
    if isinstance(solver, str) and solver == "auto":
        solver = LiSSA() if operator.stochastic else Auto()
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: expected 'auto' or a solver such as Neumann(steps=20), got {solver!r}")
    refuse_declared(operator, solver)
    if operator.stochastic and solver.needs_one_matrix:
        raise ValueError(
            "solver: expected LiSSA, Neumann or Identity beside stochastic=True, where every product is with another "
            f"batch's matrix, got {type(solver).__name__}; or leave out stochastic"
        )
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
    lower: float | None = None,
) -> Solution:
    """Check the arguments, one of which is called ``argument`` by its user, and solve."""
    solver = choose(solver, operator)
    if isinstance(damping, str):
        if damping != "auto":
            raise ValueError(f"damping: expected a number or 'auto', got {damping!r}")
    else:
        check_number("damping", damping, positive=False)
    lower = check_lower(operator.lower if lower is None else lower)
    packed = operator.space.pack(argument, b)
    start = None if x0 is None else operator.space.pack("x0", x0, rows=packed.rows or 0).flat
    if state is not None:
        if not isinstance(state, SolverState):
            raise TypeError(f"state: expected a SolverState, got {type(state).__name__}")
        state.check(operator.space)
    residual = residual and not operator.stochastic  # that of one batch means nothing
    with torch.no_grad(), without_autocast(operator.space.device):
        if isinstance(damping, str):
            return _solve_damped(operator, backend, state, packed, start, solver, residual, history, lower)
        system = System(operator, damping, backend, state)
        system.history = [] if history else None
        return _solve_packed(system, packed, start, solver, residual, lower)


def _solve_damped(
    operator: LinearOperator,
    backend: str | None,
    state: SolverState | None,
    packed: Packed,
    start: Tensor | None,
    solver: Solver,
    residual: bool,
    history: bool,
    lower: float | None,
) -> Solution:
    """Solve with damping from the most negative Ritz value, and more if that was not enough."""
    state = SolverState() if state is None else state  # what an attempt has seen is for the next
    system = System(operator, 0.0, backend, state)
    found = lanczos(system, _DAMPING_STEPS, packed.flat.nan_to_num(0, 0, 0))
    if math.isfinite(found.size):
        operator.spectrum = found
    spent, damping = system.hvps, 0.0
    said: list[str] = []
    if found.low < -_NEGATIVE * found.size:
        damping = 1.25 * (found.low_error - found.low)
    for attempt in range(4):
        system = System(operator, damping, backend, state)
        system.hvps, system.history = spent, [] if history else None
        kept = replace(packed, flat=packed.flat.clone())
        solution = _solve_packed(system, kept, None if start is None else start.clone(), solver, residual, lower)
        negative = solution.indefinite or solution.status in (Status.NEGATIVE_CURVATURE, Status.DIVERGED)
        if not negative or not math.isfinite(found.size) or attempt == 3:
            break
        how = "indefinite" if solution.indefinite else solution.status
        said.append(f"with damping {damping:.3g} {how}, {system.hvps - spent} products")
        spent = system.hvps
        # The next attempt counts for this one, too.
        state.hvps -= spent
        state.solves -= 1
        damping = max(10 * damping, _DAMPING_LEAST * found.size)
    return replace(solution, detail="; ".join([*said, *([solution.detail] if solution.detail else [])]))


def _solve_packed(
    system: System, packed: Packed, x0: Tensor | None, solver: Solver, residual: bool, lower: float | None
) -> Solution:
    """What all solvers share: input check, unused parameters, warm start, scaling, true residual."""
    operator = system.operator
    b, x0 = used_part(system, packed.flat), None if x0 is None else used_part(system, x0)

    # Numbers on the host where there is one per row: a dozen operations of torch take longer than a small solve.
    b_norm, sizes = safe_norms(b)
    finite = finite_rows(b, sizes)
    if x0 is not None:
        others = finite_rows(x0, norms(x0).reshape(-1).tolist())
        finite = [ok and other for ok, other in zip(finite, others, strict=True)]
    if not any(finite):
        x = torch.full_like(b, torch.nan)
        return _solution(packed, x, Outcome(x, [Status.NON_FINITE_INPUT] * len(finite), 0), system, solver, None, None)
    if not all(finite):
        good = torch.tensor(finite, device=b.device).view(b_norm.shape)
        b, b_norm = torch.where(good[..., None], b, 0), torch.where(good, b_norm, 0)
        x0 = None if x0 is None else torch.where(good[..., None], x0, 0)
        sizes = [size if ok else 0.0 for size, ok in zip(sizes, finite, strict=True)]

    if x0 is not None:
        rhs = b - system.apply(x0)
    elif solver.gains_from_start and not operator.stochastic:
        x0, rhs = warm(system, b, b_norm, getattr(solver, "tol", None))
    else:
        rhs = b
    begin(system)
    starts = sizes if x0 is None else safe_norms(rhs)[1]
    overflow = [row for row, start in enumerate(starts) if not math.isfinite(start)]
    if overflow:  # of a product with x0: the other rows go on
        rhs.view(len(starts), -1)[overflow] = 0
    scales = powers_of_two(rhs, starts)
    # One number, or one per row.
    scale = scales[0] if len(scales) == 1 else torch.tensor(scales, dtype=b.dtype, device=b.device)
    per_row = scale[..., None] if isinstance(scale, Tensor) else scale
    relative, bound, tol = None, None, getattr(solver, "tol", None)
    # In low precision the residual of a long recurrence is not taken on trust; `Auto` and `MINRES` look for themselves.
    doubtful = tol is not None and b.dtype is not torch.float64 and not isinstance(solver, (Auto, MINRES))
    doubtful = doubtful and not operator.stochastic
    # In place where the right-hand side is not needed again: new memory costs more than the multiplication.
    scaled = rhs * per_row if residual or doubtful else rhs.mul_(per_row)
    outcome = solver.run(system, scaled, b_norm * scale)
    for row in overflow:
        outcome.statuses[row] = Status.NON_FINITE_OPERATOR
    _drop_worse_than_start(outcome, times(starts, scales))
    x = outcome.x.div_(per_row)
    if min(scales) * _LARGE < 1 or (getattr(solver, "alpha", None) or 0) > _LARGE:
        _drop_what_does_not_fit(outcome, x)
    if x0 is not None:
        x += x0

    if residual or doubtful and outcome.steps >= _CHECKED:
        ax = system.apply(x)
        r = b - ax
        r_norm, residuals = safe_norms(r)
        relative = _relative_to(residuals, sizes)
        if lower is not None:
            bound = solution_bound(system, x, r_norm, ax, lower)
        for row, value in enumerate(relative):
            if tol is not None and outcome.statuses[row] is Status.CONVERGED and not value <= _STAGNATION * tol:
                outcome.statuses[row] = Status.STAGNATED
            elif outcome.statuses[row] in (Status.CONVERGED, Status.MAX_STEPS) and not math.isfinite(value):
                outcome.statuses[row] = Status.NON_FINITE_OPERATOR
        lost = [
            status in (Status.STAGNATED, Status.NON_FINITE_OPERATOR) and not value < start
            for status, value, start in zip(outcome.statuses, residuals, starts, strict=True)
        ]
        if any(lost):
            gone = torch.tensor(lost, device=b.device).view_as(r_norm)
            x = torch.where(gone[..., None], 0 if x0 is None else x0, x)
            values = _relative_to(starts, sizes)
            relative = [other if bad else value for bad, other, value in zip(lost, values, relative, strict=True)]
            if bound is not None:
                before = torch.tensor(starts, dtype=torch.float64, device=b.device).view_as(r_norm)
                bound = torch.where(gone, before / (r_norm / bound), bound)
    refuse_found(system, outcome.solver or solver, outcome, relative)
    if not all(finite):
        x = torch.where(good[..., None], x, torch.nan)
        outcome.statuses = [
            status if ok else Status.NON_FINITE_INPUT for ok, status in zip(finite, outcome.statuses, strict=True)
        ]
        if relative is not None:
            relative = [value if ok else math.nan for ok, value in zip(finite, relative, strict=True)]
        if bound is not None:
            bound = torch.where(good, bound, torch.nan)
    solution = _solution(packed, x, outcome, system, solver, relative, times(sizes, scales), bound)
    finish(system, x, solution)
    return solution


def _drop_worse_than_start(outcome: Outcome, starts: list[float]) -> None:
    """Set failed rows to zero, the start, unless their residual is known to be below it."""
    doubtful = (Status.NEGATIVE_CURVATURE, Status.STAGNATED)
    failed = [row for row, s in enumerate(outcome.statuses) if s.failed or s in doubtful]
    if not failed:
        return
    x = outcome.x if outcome.x.dim() == 2 else outcome.x[None]
    residuals = outcome.residuals or [math.inf] * len(starts)
    for row in failed:
        if not residuals[row] < starts[row]:
            x[row].zero_()


def _drop_what_does_not_fit(outcome: Outcome, x: Tensor) -> None:
    """Set rows to zero, the start, that are too large for their dtype in the units of the right-hand side."""
    fits = x.isfinite().all(-1)
    if bool(fits.all()):
        return
    for row, ok in enumerate(fits.reshape(-1).tolist()):
        if not ok:
            x.view(-1, x.shape[-1])[row] = 0
            outcome.statuses[row] = Status.SINGULAR
            outcome.detail += f"{'; ' if outcome.detail else ''}|x| is beyond {x.dtype}"


def _relative_to(norms: list[float], of: list[float]) -> list[float]:
    # Of a zero right-hand side the norm itself.
    return [norm / size if size > 0 else norm for norm, size in zip(norms, of, strict=True)]


def _solution(
    packed: Packed,
    x: Tensor,
    outcome: Outcome,
    system: System,
    solver: Solver,
    relative: list[float] | None,
    sizes: list[float] | None,
    bound: Tensor | None = None,
) -> Solution:
    status, history = worst(outcome.statuses), system.history
    useless = status.failed
    if relative is not None:
        useless |= any(
            s is Status.STAGNATED and not value < 1 for s, value in zip(outcome.statuses, relative, strict=True)
        )
    if outcome.residuals is not None and sizes is not None:
        # On an indefinite operator the iterate before the bad direction can be worse than zero.
        doubtful = (Status.NEGATIVE_CURVATURE, Status.STAGNATED)
        useless |= any(
            s in doubtful and not residual < size
            for s, residual, size in zip(outcome.statuses, outcome.residuals, sizes, strict=True)
        )
    batch = packed.rows is not None
    residual_norm: float | Tensor | None = None
    if relative is not None:
        residual_norm = torch.tensor(relative, dtype=torch.float64, device=x.device) if batch else relative[0]
    return Solution(
        value=packed.restore(x),
        status=status,
        steps=outcome.steps,
        hvps=system.hvps,
        residual_norm=residual_norm,
        error_bound=bound if bound is None or batch else float(bound),
        history=None if history is None or sizes is None else [_relative_to(row, sizes) for row in history],
        solver=outcome.solver or solver,
        detail=outcome.detail,
        alpha=outcome.alpha,
        damping=system.damping,
        indefinite=outcome.indefinite,
        useless=useless,
        statuses=tuple(outcome.statuses) if batch else None,
        engine=system.operator.engine,
    )


def report(solution: Solution, throw: bool) -> None:
    """For callers that get only the value: raise a failure, warn where a tolerance was missed."""
    if throw and solution.useless:
        raise SolveError(solution)
    missed = solution.status is Status.MAX_STEPS and getattr(solution.solver, "tol", None) is not None
    doubtful = solution.status in (Status.NEGATIVE_CURVATURE, Status.STAGNATED)
    if solution.useless or missed or solution.indefinite or doubtful:
        warnings.warn(solution.message, SolveWarning, stacklevel=3)
