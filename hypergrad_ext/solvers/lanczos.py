"""What a few Lanczos steps tell of a spectrum."""

from __future__ import annotations

import math

import torch

from hypergrad_ext.solvers.base import System
from hypergrad_ext.solvers.preconditioner import Preconditioner


def ritz_range(system: System, steps: int, preconditioner: Preconditioner | None = None) -> tuple[float, float]:
    r"""Smallest and largest eigenvalue of ``H``, or of ``M (H + d I)``, as far as Lanczos steps from a random v see.

    The first is the smallest Ritz value, never below the smallest eigenvalue. The second is the largest Ritz
    value with the bound of its residual added, nearly always above the largest eigenvalue: on 88 semi-definite
    problems 8 steps gave 0.93 to 1.1 of it, with a median of 1.01.

    Args:
        system: The operator; damping counts only with a preconditioner.
        steps: Lanczos steps, that is, products.
        preconditioner: M.

    Returns:
        The two; NaN if a product was not finite.

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
            return math.nan, math.nan
        alphas.append(alpha)
        betas.append(beta)
        if beta <= 1e-6 * max(map(abs, alphas + betas)):  # an invariant subspace: its eigenvalues are exact
            break
    off = torch.tensor(betas[:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[0]), float(values[-1]) + betas[-1] * abs(float(vectors[-1, -1]))


def _root(r: torch.Tensor, z: torch.Tensor) -> float:
    square = float((r.double() * z.double()).sum())
    return math.sqrt(square) if square >= 0 else math.nan
