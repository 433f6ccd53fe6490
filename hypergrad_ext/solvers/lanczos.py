"""What a few Lanczos steps tell of a spectrum."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad_ext.solvers.base import System
from hypergrad_ext.solvers.preconditioner import Preconditioner, not_definite

STEPS = 10
# Of a preconditioner, from one solve to the next: it may change as slowly as H.
_DRIFT = 0.3
# Of |r| |M r|: an r.M r that is more negative is not rounding.
_ROUNDING = 1e-5


class Spectrum(NamedTuple):
    """Ritz values, between the outermost eigenvalues, and their weights in the start vector.

    An eigenvalue is within ``low_error`` of the smallest Ritz value, and one within ``high_error`` of the largest.
    The pairs are a Gauss quadrature: sums over them are what a spectrum's polynomials do to the start vector.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]
    low_error: float
    high_error: float

    @property
    def low(self) -> float:
        """The smallest Ritz value."""
        return self.values[0]

    @property
    def high(self) -> float:
        """The largest Ritz value."""
        return self.values[-1]

    @property
    def size(self) -> float:
        """The largest magnitude of a Ritz value; NaN if a product was not finite."""
        return max(abs(self.low), abs(self.high))


NOT_FINITE = Spectrum((math.nan,), (math.nan,), math.nan, math.nan)


def spectrum_of(system: System, b: Tensor, preconditioner: Preconditioner | None = None) -> Spectrum:
    """The spectrum of ``H`` as a few Lanczos steps see it, kept on the operator; or that of ``M (H + d I)``.

    The latter depends on M, so only a `SolverState` keeps it, while M changes as slowly as H, and d not at all.

    Args:
        system: The operator; damping counts only with a preconditioner.
        b: Right-hand sides: the start vector is close to them.
        preconditioner: M.

    Returns:
        The spectrum.

    Cost: 10 Hessian-vector products, or none.
    """
    if preconditioner is not None:
        state = system.state
        damping, size = state.preconditioned_of or (math.nan, math.nan)
        now = float(preconditioner.norm(b.new_ones(b.shape[-1])))
        same = damping == system.damping and math.isclose(size, now, rel_tol=_DRIFT)
        if not same or state.preconditioned is None or state.preconditioned_age >= state.refresh:
            found = lanczos(system, STEPS, b, preconditioner)
            if not math.isfinite(found.size):
                return found
            state.preconditioned, state.preconditioned_age = found, 0
        state.preconditioned_of = system.damping, now
        return state.preconditioned
    if system.operator.spectrum is None:
        found = lanczos(system, STEPS, b)
        if not math.isfinite(found.size):
            return found
        system.operator.spectrum = found
    return Spectrum(*system.operator.spectrum)


def lanczos(
    system: System, steps: int, b: Tensor | None = None, preconditioner: Preconditioner | None = None
) -> Spectrum:
    r"""What Lanczos steps see of the spectrum of ``H``, or of ``M (H + d I)``.

    The largest Ritz value with its error added is nearly always above the largest eigenvalue: on 88
    semi-definite problems 8 steps gave 0.93 of it at the least, with a median of 1.01. The smallest eigenvalue
    can be far below the smallest Ritz value.

    Args:
        system: The operator; damping counts only with a preconditioner.
        steps: Lanczos steps, that is, products.
        b: Right-hand sides ``(n,)`` or ``(k, n)`` to start from, with some noise, so that nothing stays unseen;
            None starts from noise.
        preconditioner: M.

    Returns:
        The spectrum; NaN if a product was not finite.

    Raises:
        ValueError: If the preconditioner is found not to be positive definite.

    Cost: ``steps`` Hessian-vector products.
    """
    damping = system.damping if preconditioner is not None else 0.0
    times = preconditioner.times if preconditioner is not None else lambda r: r
    r = _start(system, b)
    v_old, z = torch.zeros_like(r), times(r)
    beta = _root(r, z)
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(steps, len(r))):
        v, v_m = r / beta, z / beta
        r = system.product_of_given(v_m)
        if damping:
            r.add_(v_m, alpha=damping)
        alpha = dot(v_m, r)
        r.sub_(v, alpha=alpha)
        if alphas:
            r.sub_(v_old, alpha=beta)
        v_old, z = v, times(r)
        beta = _root(r, z)
        if not math.isfinite(alpha + beta):
            return NOT_FINITE
        alphas.append(alpha)
        betas.append(beta)
        if beta <= 1e-6 * max(map(abs, alphas + betas)):  # an invariant subspace: its eigenvalues are exact
            break
    diagonal, off = (torch.tensor(t, dtype=torch.float64, device="cpu") for t in (alphas, betas[:-1]))
    matrix = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    low_error, high_error = (betas[-1] * vectors[-1, [0, -1]].abs()).tolist()
    return Spectrum(tuple(values.tolist()), tuple(vectors[0].square().tolist()), low_error, high_error)


def dot(a: Tensor, b: Tensor) -> float:
    """``a.b``, summed in float64 without a float64 copy of long vectors."""
    return float(sum((x.double() @ y.double() for x, y in zip(a.split(1 << 22), b.split(1 << 22), strict=True))))


def _start(system: System, b: Tensor | None) -> Tensor:
    space = system.operator.space
    generator = torch.Generator().manual_seed(0)

    def noise(n: int) -> Tensor:
        # Drawn in float32, so that one problem has one spectrum in every precision.
        return torch.randn(n, generator=generator, device="cpu").to(space.device, space.dtype)

    r = noise(space.numel)
    for part, used in zip(r.split(space.sizes), system.operator.used, strict=True):
        if not used:  # its eigenvalue is known to be zero, and the right-hand side need not have a part in it
            part.zero_()
    r /= torch.linalg.vector_norm(r)
    if b is None:
        return r
    mean = b if b.dim() == 1 else noise(len(b)) @ b
    norm = torch.linalg.vector_norm(mean)
    return mean / norm + r / 2 if float(norm) > 0 else r


def _root(r: Tensor, z: Tensor) -> float:
    square = dot(r, z)
    if square < 0 and square < -_ROUNDING * math.sqrt(dot(r, r) * dot(z, z)):
        raise not_definite(square)
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan
