"""A low-rank Nystrom sketch of H: inverted by itself, or as a preconditioner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad_ext.norms import power_of_two_scale
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count


class Sketch(NamedTuple):
    """``H`` is close to ``basis^T diag(values) basis``: orthonormal rows ``(r, n)`` and values, largest first."""

    basis: Tensor
    values: Tensor

    def inverse(self, r: Tensor, damping: float) -> Tensor:
        """``(U L U^T + d I)^{-1} r`` for d > 0, by the Woodbury identity; the pseudo-inverse for d = 0."""
        inside = r @ self.basis.mT
        x = (inside / (self.values + damping)) @ self.basis
        if damping == 0 or len(self.values) == r.shape[-1]:
            return x
        # Twice, because what the first projection leaves of r inside is rounding, and is divided by the damping.
        outside = r - inside @ self.basis
        outside -= (outside @ self.basis.mT) @ self.basis
        return x.add_(outside, alpha=1 / damping)

    def precondition(self, r: Tensor, damping: float) -> Tensor:
        """``M r`` with eigenvalue ``(l_r + d) / (l_i + d)`` along ``u_i``, and 1 across all of them."""
        shrink = (self.values - self.values[-1]) / (self.values + damping)
        return r - ((r @ self.basis.mT) * shrink) @ self.basis


@dataclass(frozen=True)
class Nystrom(Solver):
    r"""The Nystrom method: :math:`H \approx Y (\Omega^\top Y)^{-1} Y^\top = U \Lambda U^\top` with :math:`Y = H\Omega`.

    As a solver it is direct: :math:`x = (U \Lambda U^\top + d I)^{-1} b`, exact up to what the sketch leaves out of H,
    for any number of right-hand sides; without damping the pseudo-inverse. As a preconditioner,
    ``CG(preconditioner=Nystrom(20))``, it divides the largest eigenvalues by what they are above the ``rank``-th
    (likewise for `Neumann` and `Chebyshev`), and the solve is as exact as its tolerance.

    H has to be positive semi-definite, at least where it is large: negative values of the sketch are left out.

    Cost: ``rank`` Hessian-vector products, as one batch, and ``rank`` vectors of memory.

    Args:
        rank: r, columns of :math:`\Omega`, which are Gaussian; at most the number of weights is used.

    Raises:
        TypeError: If ``rank`` is not an integer.
        ValueError: If ``rank`` is less than 1.

    References:
        Hataya, Yamada, "Nystrom Method for Accurate and Scalable Implicit Differentiation", AISTATS 2023.
        Frangella, Tropp, Udell, "Randomized Nystrom Preconditioning", SIAM Journal on Matrix Analysis and
        Applications 44, 2023.

    Example:
        >>> A, b = torch.diag(torch.tensor([9.0, 3.0, 0.0])), torch.ones(3)
        >>> hg.solve(hg.DenseMatrix(A), b, hg.Nystrom(rank=2), damping=1.0).value
        tensor([0.1000, 0.2500, 1.0000])
    """

    rank: int = 20

    def __post_init__(self) -> None:
        """Check the settings."""
        check_count("rank", self.rank, 1)

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Sketch and solve."""
        rows = b.shape[0] if b.dim() == 2 else 1
        sketch = sketch_of(system, self.rank)
        if sketch is None:
            return Outcome(b, [Status.NON_FINITE_OPERATOR] * rows, 0)
        if len(sketch.values) == 0:
            if system.damping:
                return Outcome(b / system.damping, [Status.MAX_STEPS] * rows, 0, "H has no positive eigenvalue")
            return Outcome(b, [Status.SINGULAR] * rows, 0, "H has no positive eigenvalue")
        detail = f"rank {len(sketch.values)}, eigenvalues {sketch.values[0]:.3g} to {sketch.values[-1]:.3g}"
        return Outcome(sketch.inverse(b, system.damping), [Status.MAX_STEPS] * rows, 0, detail)


def sketch_of(system: System, rank: int) -> Sketch | None:
    """The positive part of a Nystrom approximation of ``H``; None if a product was not finite."""
    space = system.operator.space
    n, rank = space.numel, min(rank, space.numel)
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(n, rank, generator=generator, device="cpu").to(space.device, space.dtype)
    omega = torch.linalg.qr(omega).Q.mT.contiguous()
    parts = system.product(system.views(omega))
    y = torch.cat([t.reshape(rank, -1).to(space.dtype) for t in parts], dim=1)
    if not bool(y.isfinite().all()):
        return None
    scale = power_of_two_scale(y.reshape(-1))
    y *= scale
    core = (omega @ y.mT).double()
    core_values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    # What rounding leaves of a product, times a margin: below it the core says nothing.
    noise = 10 * math.sqrt(n) * torch.finfo(space.dtype).eps * float(core_values.abs().max())
    keep = core_values > noise
    if not bool(keep.any()):
        return Sketch(y[:0], y.new_zeros(0))
    # H is close to B^T B with B = core^{-1/2} Y.
    root = (vectors[:, keep] / core_values[keep].sqrt()).mT.to(y.dtype)
    _, sizes, basis = torch.linalg.svd(root @ y, full_matrices=False)
    values = sizes.square()
    large = values > torch.finfo(y.dtype).eps * values[0]
    return Sketch(basis[large], values[large] / scale)
