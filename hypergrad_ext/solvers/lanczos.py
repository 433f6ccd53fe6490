"""What a few Lanczos steps tell of a spectrum."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from hypergrad_ext.solvers.base import System
from hypergrad_ext.solvers.preconditioner import Preconditioner


class RitzRange(NamedTuple):
    """The outermost Ritz values, between the outermost eigenvalues; an eigenvalue is within ``error`` of each."""

    low: float
    low_error: float
    high: float
    high_error: float


def ritz_range(system: System, steps: int, preconditioner: Preconditioner | None = None) -> RitzRange:
    r"""What Lanczos steps from a random vector see of the spectrum of ``H``, or of ``M (H + d I)``.

    The largest Ritz value with its error added is nearly always above the largest eigenvalue: on 88
    semi-definite problems 8 steps gave 0.93 of it at the least, with a median of 1.01. The smallest eigenvalue
    can be far below the smallest Ritz value.

    Args:
        system: The operator; damping counts only with a preconditioner.
        steps: Lanczos steps, that is, products.
        preconditioner: M.

    Returns:
        The range; NaN if a product was not finite.

    Cost: ``steps`` Hessian-vector products.
    """
    space = system.operator.space
    damping = system.damping if preconditioner is not None else 0.0
    times = preconditioner.times if preconditioner is not None else lambda r: r
    generator = torch.Generator().manual_seed(0)
    # Drawn in float64, so that one problem has one range in every precision.
    r = torch.randn(space.numel, generator=generator, dtype=torch.float64).to(space.device, space.dtype)
    v_old, z = torch.zeros_like(r), times(r)
    beta = _root(r, z)
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(steps, space.numel)):
        v, v_m = r / beta, z / beta
        product = system.product_of_given(v_m)
        alpha = float((v_m.double() * product.double()).sum()) + damping * float(v_m.double().square().sum())
        r = product + damping * v_m - alpha * v - beta * v_old if alphas else product + damping * v_m - alpha * v
        v_old, z = v, times(r)
        beta = _root(r, z)
        if not math.isfinite(alpha + beta):
            return RitzRange(math.nan, math.nan, math.nan, math.nan)
        alphas.append(alpha)
        betas.append(beta)
        if beta <= 1e-6 * max(map(abs, alphas + betas)):  # an invariant subspace: its eigenvalues are exact
            break
    off = torch.tensor(betas[:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    low_error, high_error = (betas[-1] * vectors[-1, [0, -1]].abs()).tolist()
    return RitzRange(float(values[0]), low_error, float(values[-1]), high_error)


def _root(r: torch.Tensor, z: torch.Tensor) -> float:
    square = float((r.double() * z.double()).sum())
    return math.sqrt(square) if square >= 0 else math.nan
