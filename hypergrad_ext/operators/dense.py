"""A matrix given by its entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.operators.base import LinearOperator
from hypergrad_ext.structure import Space, take_apart


class DenseMatrix(LinearOperator):
    r"""The operator :math:`v \mapsto A v` of a square matrix.

    Args:
        matrix: ``(n, n)``, real floating point. Whether it is symmetric is checked once, to the
            rounding of its dtype.

    Raises:
        TypeError: If ``matrix`` is not a real floating point tensor.
        ValueError: If ``matrix`` is not square.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> hg.solve(hg.DenseMatrix(A), torch.tensor([2.0, 2.0]), hg.CG(tol=1e-6)).value
        tensor([1.0000, 0.5000])
    """

    surely_symmetric = True

    def __init__(self, matrix: Tensor) -> None:  # noqa: D107 (documented in the class)
        if not isinstance(matrix, Tensor):
            raise TypeError(f"matrix: expected a tensor, got {type(matrix).__name__}")
        leaves = take_apart("matrix", matrix)
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix: expected shape (n, n), got {tuple(matrix.shape)}")
        self.matrix = matrix.detach()
        self.space = Space(take_apart("matrix", matrix.detach()[0] if matrix.numel() else leaves.tensors[0]))
        tolerance = 8 * torch.finfo(matrix.dtype).eps
        difference = (self.matrix - self.matrix.mT).abs().amax()
        self.symmetric = bool(difference <= tolerance * self.matrix.abs().amax()) or not bool(difference.isfinite())

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``A v`` for ``v[0]`` of shape ``(n,)``."""
        return [self.matrix @ v[0]]

    def matmat(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``A v`` for every row of ``v[0]``, shape ``(k, n)``."""
        return [v[0] @ self.matrix.mT]

    def neumann_series(
        self, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor] | None:
        """The whole series in one call, for a matrix on the CPU in the dtype of ``b``."""
        kernel = self._kernel(ops.dense_neumann_solve, b, backend)
        return None if kernel is None else kernel(self.matrix, b, alpha, damping, steps, stop)

    def conjugate_gradients(
        self, b: Tensor, damping: float, steps: int, state: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The whole solve in one call, likewise."""
        kernel = self._kernel(ops.dense_cg_solve, b, backend)
        return None if kernel is None else kernel(self.matrix, b, damping, steps, state)

    def _kernel(self, op: ops.Op, b: Tensor, backend: str | None) -> Callable | None:
        fits = b.device.type == "cpu" and self.matrix.dtype == b.dtype
        return op.kernel_if_any(b.device, backend) if fits else None

    def dense(self) -> Tensor:
        """A copy of the matrix, in the dtype of the solver state."""
        return self.matrix.to(self.space.dtype, copy=True)
