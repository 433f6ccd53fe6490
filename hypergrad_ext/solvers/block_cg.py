"""Conjugate gradients for many right-hand sides that share one Krylov space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad_ext.norms import norms
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count, check_tolerance

# Of the tolerance: directions that all residuals together have less of are dropped.
_DEFLATION = 0.1
# Of the largest pivot: above it a Cholesky factor makes rows that are orthogonal to 1e-10, and 1e-4 in float32. Only
# how good the next directions are depends on that: x and the residual go by the same directions, whatever these are.
_REGULAR = {torch.float64: 1e-3, torch.float32: 0.1}


@dataclass(frozen=True)
class BlockCG(Solver):
    r"""Block conjugate gradients: every right-hand side gains from the products of all others.

    For a batch of k right-hand sides, :math:`X_j` minimises the energy norm of each error over the sum of k Krylov
    spaces. With :math:`R = W S` and orthonormal columns of W, one step is

    .. math:: X \leftarrow X + P (P^\top A P)^{-1} S, \quad W \zeta = W - A P (P^\top A P)^{-1}, \quad
              S \leftarrow \zeta S, \quad P \leftarrow W + P \zeta^\top

    Directions of which no residual has more than a tenth of its tolerance leave the block: dependent right-hand
    sides, and those that have converged, cost nothing more. `CG` on a batch runs k independent recurrences: the same
    product per step, and more steps, as far as outlying eigenvalues are few against k; but less vector algebra, which
    here takes :math:`O(n k^2)` per step. One vector is the same as `CG`.

    Needs a positive definite operator; `CG` says what happens if it is not.

    Cost: one batched product per step, of as many vectors as there are directions left.

    Args:
        tol: Stop once ``|b - (H + d I) x| <= tol |b|`` for every right-hand side.
        max_steps: Stop after so many steps at the latest.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``tol`` is not positive or ``max_steps`` is less than 1.

    References:
        O'Leary, "The block conjugate gradient algorithm and related methods", Linear Algebra and its Applications 29,
        1980; Dubrulle, "Retooling the method of block conjugate gradients", ETNA 12, 2001.

    Example:
        >>> A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.eye(3)
        >>> sol = hg.solve(hg.DenseMatrix(A), b, hg.BlockCG())
        >>> sol.steps, sol.value.diagonal()
        (1, tensor([1.0000, 0.5000, 0.2500]))
    """

    tol: float = 1e-5
    max_steps: int = 500

    def __post_init__(self) -> None:
        """Check the settings."""
        check_tolerance(self.tol)
        check_count("max_steps", self.max_steps, 1)

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Iterate from ``X = 0``; blocks are rows."""
        rows = b.reshape(-1, b.shape[-1])
        norm = norms(rows)
        stop = self.tol * torch.where(b_norm.reshape(-1) > 0, b_norm.reshape(-1), norm)
        # Residuals in units of their tolerances: one threshold is right for all.
        weight = torch.where(stop > 0, 1 / stop, 0).to(b.dtype)
        drop = _DEFLATION / len(rows) ** 0.5
        system.prepare(self.max_steps, b)
        x = torch.zeros_like(rows)
        w, s = _orthonormal(rows * weight[:, None], None, drop)
        p, views = w.clone(), list[Tensor]()
        status, detail, step = Status.MAX_STEPS, "", 0
        while step < self.max_steps and not _done(s):
            if not views or len(views[0]) != len(p):
                views = system.views(p)
            ap = system.operator.space.joined(system.product(views)).to(p.dtype)
            if system.damping:
                ap = ap.add(p, alpha=system.damping)  # an operator may have returned p itself
            step += 1
            # Of the curvature the lower triangle is read, and what is not finite ends in a pivot that is not.
            factor, info = torch.linalg.cholesky_ex(p @ ap.mT)
            if int(info) or not math.isfinite(float(factor[-1, -1])):
                curvature = (p @ ap.mT).double()
                if not bool(curvature.isfinite().all()):
                    status = Status.NON_FINITE_OPERATOR
                    break
                least = torch.linalg.eigvalsh(curvature + curvature.mT)[0] / (2 * len(p))
                status, detail = Status.NEGATIVE_CURVATURE, f"step {step}, curvature {float(least):.3g}"
                break
            # A small inverse and products are many times faster than solves with long rows.
            root = _inverse(factor)
            inverse = root.mT @ root
            x.addmm_((inverse @ s).mT, p)
            # W - A P (P^T A P)^{-1}: what is left is the next block, times zeta.
            w, zeta = _orthonormal(w.addmm_(inverse, ap, alpha=-1), s, drop)
            s = zeta @ s
            if system.history is not None:
                system.record((s.double() * stop).square().sum(0).tolist())
            direction = w.addmm(zeta, p)
            p = p.copy_(direction) if len(direction) == len(p) else direction
        residuals = torch.linalg.vector_norm(s.double(), dim=0) * stop
        done = (residuals <= stop).tolist()
        statuses = [Status.CONVERGED if row_done else status for row_done in done]
        x *= stop.to(x.dtype)[:, None]
        note = f"{len(p)} of {len(rows)} directions left"
        return Outcome(
            x.view_as(b), statuses, step, f"{detail}; {note}" if detail else note, residuals=residuals.tolist()
        )


def _done(s: Tensor) -> bool:
    """Whether every column of S, a residual in units of its tolerance, is within it."""
    return not len(s) or float(torch.linalg.vector_norm(s, dim=0).max()) <= 1


def _orthonormal(block: Tensor, s: Tensor | None, drop: float) -> tuple[Tensor, Tensor]:
    """``W`` with orthonormal rows and ``Z`` with ``block = Z^T W``, but for directions that are small in ``Z S``."""
    fast = _by_cholesky(block, s, drop)
    if fast is not None:
        return fast
    q, r = torch.linalg.qr(block.mT)
    # Left singular vectors of Z S are the principal directions of all residuals.
    u, sizes, _ = torch.linalg.svd(r if s is None else r @ s, full_matrices=False)
    u = u[:, sizes > drop]
    return u.mT @ q.mT, u.mT @ r


def _by_cholesky(block: Tensor, s: Tensor | None, drop: float) -> tuple[Tensor, Tensor] | None:
    """The same from the Gram matrix, many times faster, where it is far from singular and nothing is to be dropped."""
    lower, info = torch.linalg.cholesky_ex(block @ block.mT)
    diagonal = lower.diagonal()
    inside = lower.mT.double() if s is None else lower.mT.double() @ s.double()
    inside = inside @ inside.mT
    # All directions are larger than `drop` if what is left without it is positive definite.
    inside.diagonal().sub_(drop * drop)
    small = torch.linalg.cholesky_ex(inside).info
    if not bool((info == 0) & (small == 0) & (diagonal.min() > _REGULAR[block.dtype] * diagonal.max())):
        return None
    return _inverse(lower) @ block, lower.mT


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of a small triangular matrix."""
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False)
