"""Solvers that need a symmetric operator refuse any other: one that is declared, and one that is found out."""

from __future__ import annotations

import torch

from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers import Outcome, Solver, System
from hypergrad_ext.solvers.lanczos import dot

_WAY_OUT = (
    "solve with Direct, or give CG the normal equations: hg.Callable(lambda v: A_transposed(A(v)), like=b) and "
    "A_transposed(b) in the place of b"
)
# Ends of a solve that an operator other than symmetric may be behind; and all steps, if what is left is no less than b.
_SUSPECT = (Status.STAGNATED, Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.DIVERGED)
# Of the Frobenius norm: rounding inside a product is below that, or below so many eps of a lower precision.
_ASYMMETRY = 1e-2
_EPS = 10


def refuse_declared(operator: LinearOperator, solver: Solver) -> None:
    """Refuse an operator that says of itself that it is not symmetric.

    Raises:
        ValueError: If it does, and the solver needs one that is.
    """
    if solver.needs_symmetry and not operator.symmetric:
        name = type(solver).__name__
        raise ValueError(f"operator: expected a symmetric operator for {name}, got one that is not; {_WAY_OUT}")


def refuse_found(system: System, solver: Solver, outcome: Outcome, relative: list[float] | None) -> None:
    r"""After a solve that went wrong: refuse an operator that is only said to be symmetric, and is not.

    For Gaussian u and v, :math:`u \cdot H v - v \cdot H u` is about the Frobenius norm of :math:`H - H^\top`.

    Cost: two products, once for an operator.

    Raises:
        ValueError: If it is not symmetric, and the solver needs one that is.
    """
    operator = system.operator
    if operator.surely_symmetric or not solver.needs_symmetry:
        return
    missed = Status.MAX_STEPS in outcome.statuses and getattr(solver, "tol", None) is not None
    missed = missed and relative is not None and max(relative) >= 1
    if not missed and not any(status in _SUSPECT for status in outcome.statuses):
        return
    space = operator.space
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(space.numel, generator=generator, device="cpu").to(space.device, space.dtype) for _ in range(2))
    hu, hv = system.product_of_given(u), system.product_of_given(v)
    one, other = dot(u, hv), dot(v, hu)
    size = float(torch.linalg.vector_norm(torch.stack([hu, hv]), dtype=torch.float64)) / 2**0.5
    allowed = max(_ASYMMETRY, _EPS * max(torch.finfo(dtype).eps for dtype in space.dtypes))
    if abs(one - other) > allowed * size:
        raise ValueError(
            f"operator: expected a symmetric operator for {type(solver).__name__}, got one with u.Hv = {one:.3g} but "
            f"v.Hu = {other:.3g} for some u and v (or with another H in every product); {_WAY_OUT}"
        )
    operator.surely_symmetric = True
