"""What one solve of a slowly changing system leaves to the next, in a `SolverState`: a start, and a spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad_ext.norms import norms
from hypergrad_ext.solution import Solution, Status
from hypergrad_ext.solvers import System
from hypergrad_ext.solvers.lanczos import Spectrum

# Times the tolerance: from there on a better start is worth a product.
_FAR = 5.0


def used_part(system: System, flat: Tensor) -> Tensor:
    """``flat`` with zeros for parameters that the loss does not depend on, where there is no damping; else itself."""
    operator = system.operator
    if system.damping or all(operator.used):
        return flat
    flat = flat.clone()
    for part, used in zip(flat.split(operator.space.sizes, dim=-1), operator.used, strict=True):
        if not used:
            part.zero_()
    return flat


def warm(system: System, b: Tensor, b_norm: Tensor, tol: float | None) -> tuple[Tensor | None, Tensor]:
    """The last solution and its residual, or none and ``b``, for every row to which it is worse than zero."""
    x, change = system.state.x, system.state.change
    if x is None or x.shape != b.shape:
        return None, b
    # The loss, or the damping, may have had a part in them when they were found.
    x, change = used_part(system, x), None if change is None else used_part(system, change)
    rhs = b - system.apply(x)
    norm = norms(rhs)
    if change is not None and tol is not None and bool((norm > _FAR * tol * b_norm).any()):
        along = system.apply(change)
        # The least error in the energy norm; nothing where there is no such norm.
        curvature = (change * along).sum(-1, dtype=torch.float64)
        far = (
            torch.where(curvature > 0, (change * rhs).sum(-1, dtype=torch.float64) / curvature, 0)
            .nan_to_num(0, 0, 0)
            .to(x.dtype)
        )
        x = x + far[..., None] * change
        rhs -= far[..., None] * along
        norm = norms(rhs)
    better = norm < b_norm
    if not bool(better.any()):
        return None, b
    return torch.where(better[..., None], x, 0), torch.where(better[..., None], rhs, b)


def begin(system: System) -> None:
    """Hand the state's spectrum to an operator that has none of its own."""
    state = system.state
    if state.spectrum is not None and state.spectrum_age < state.refresh and system.operator.spectrum is None:
        system.operator.spectrum = state.spectrum


def finish(system: System, x: Tensor, solution: Solution) -> None:
    """Leave in the state what the next solve can use."""
    if not system.kept:
        return
    state, spectrum = system.state, system.operator.spectrum
    state.solves += 1
    state.hvps += solution.hvps
    state.steps = solution.steps
    state.sketch_age += 1
    old = spectrum == state.spectrum
    state.spectrum_age = state.spectrum_age + 1 if old else 1
    state.spectrum = None if spectrum is None else Spectrum(*spectrum)
    state.preconditioned_age += 1
    if solution.useless or solution.indefinite or solution.status is Status.NEGATIVE_CURVATURE:
        state.forget()
        if old:
            system.operator.spectrum = None
    else:
        state.change = None if state.x is None or state.x.shape != x.shape else x - state.x
        state.x = x.clone()  # the solution is its owner's to write to
