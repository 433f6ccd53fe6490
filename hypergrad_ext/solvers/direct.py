"""The dense matrix, factorised: small systems, and the truth for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad_ext.norms import norms
from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_count

# Of b: where rounding alone may leave a residual of this size, the smallest pivot was nothing but rounding.
_LOST = 0.01


@dataclass(frozen=True)
class Direct(Solver):
    r"""Form :math:`H + d I` column by column and solve by LU factorisation. Exact, also for indefinite H.

    A right-hand side of which rounding alone may leave more than a hundredth, ``eps ||H + d I| |x|| > 0.01 |b|``, is
    reported as ``singular``.

    Cost: n Hessian-vector products for n weights, :math:`n^2` numbers of memory, :math:`2 n^3 / 3` flops.

    Args:
        max_size: Refuse systems with more unknowns than this.

    Raises:
        TypeError: If ``max_size`` is not an integer.
        ValueError: If ``max_size`` is less than 1, or a system has more unknowns.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> hg.solve(hg.DenseMatrix(A), torch.tensor([3.0, 0.0]), hg.Direct()).value
        tensor([-1.,  2.])
    """

    max_size: int = 5000

    needs_symmetry = False
    gains_from_start = False

    def __post_init__(self) -> None:
        """Check the settings."""
        check_count("max_size", self.max_size, 1)

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Factorise and solve for all rows at once."""
        n, rows = b.shape[-1], b.shape[0] if b.dim() == 2 else 1
        if n > self.max_size:
            raise ValueError(
                f"max_size: expected at most {self.max_size} unknowns for Direct, got {n}; use CG or raise it"
            )
        matrix = system.operator.dense()
        if type(system.operator).dense is LinearOperator.dense:
            system.hvps += n
        if not bool(matrix.isfinite().all()):
            return Outcome(b, [Status.NON_FINITE_OPERATOR] * rows, 0)
        diagonal = matrix.diagonal()
        diagonal += system.damping
        # Parameters that the loss ignores have zero rows and a zero right-hand side: any pivot gives zero.
        for part, used in zip(diagonal.split(system.operator.space.sizes), system.operator.used, strict=True):
            if not used and not system.damping:
                part.fill_(1)
        factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
        x = torch.linalg.lu_solve(factors, pivots, b.reshape(rows, n).T).T.reshape(b.shape)
        # NaN where x is not finite.
        rounding = torch.finfo(b.dtype).eps * norms(x.reshape(rows, n).abs() @ matrix.abs().mT)
        fine = (rounding <= _LOST * norms(b.reshape(rows, n))).tolist()
        return Outcome(x, [Status.CONVERGED if ok and not bool(info) else Status.SINGULAR for ok in fine], 0)
