"""The contract of an operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hypergrad_ext.compilation import never_compiled
from hypergrad_ext.structure import Space, Tree
from hypergrad_ext.surroundings import without_autocast


class LinearOperator(ABC):
    """A linear map ``H`` from the space of some parameters to itself.

    A subclass sets ``space`` and writes ``matvec``, on plain lists of tensors in the parameters'
    order; it overrides ``matmat`` where it can apply itself to many vectors at once.

    Attributes:
        space: Shapes, dtypes and device of the vectors.
        symmetric: Whether ``H = H^T``; solvers that need it refuse the operator otherwise.
        surely_symmetric: Whether that follows from what the operator is. If not, a solve that goes wrong spends two
            products on finding out, and a hypergradient one on the true residual.
        stochastic: Whether every product is with another ``H``: solvers that need one and the same refuse the operator.
        used: For every parameter, whether ``H`` depends on it at all.
        lower: A number that no eigenvalue of ``H`` is below, if one is known; set it where you know one.
        spectrum: What Lanczos steps of a solver saw, kept for later solves.
    """

    space: Space
    symmetric: bool = True
    surely_symmetric: bool = False
    stochastic: bool = False
    lower: float | None = None
    spectrum: tuple | None = None

    @property
    def engine(self) -> str | None:
        """What runs the products of a loss; None for operators that are not one's Hessian."""
        return None

    @property
    def used(self) -> list[bool]:
        """For every parameter, whether its rows of ``H`` can be other than zero."""
        return [True] * len(self.space.names)

    @abstractmethod
    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``: tensors of the parameters' shapes in, the same out.

        May return its input unchanged, and write every product into the same buffer. It must not write into its input,
        nor return parts of it in other places than their own, which a step overwrites before it has read them.
        """

    def matmat(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` for a batch: every tensor has a leading dimension k."""
        first = self.matvec([t[0] for t in v])
        batch = [t.new_empty(len(v[0]), *t.shape) for t in first]
        for j in range(len(v[0])):
            # Copied at once: an operator may write all its products into one buffer.
            for rows, part in zip(batch, self.matvec([t[j] for t in v]) if j else first, strict=True):
                rows[j] = part
        return batch

    def prepare(self, products: int, rows: int) -> LinearOperator:
        """An equal operator that is faster for about this many products with ``rows`` vectors, or itself."""
        return self

    def neumann_series(
        self, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor] | None:
        """The whole Neumann series in one call, for operators that have a kernel for it.

        Args:
            b: Right-hand sides, flat, ``(k, n)``.
            alpha: Step size.
            damping: Damping.
            steps: Steps at the most.
            stop: Squared norm at which a row's terms are small enough, ``(k,)``.
            backend: Backend asked for.

        Returns:
            The sum and the stats of every step, ``(steps, k, 2)``, -1 for steps not taken; None without a kernel.
        """
        return None

    def conjugate_gradients(
        self, b: Tensor, damping: float, steps: int, state: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """A whole CG solve in one call, for operators that have a kernel for it.

        Args:
            b: Right-hand sides, flat, ``(k, n)``.
            damping: Damping.
            steps: Steps at the most.
            state: Scalars of `ops.cg_step_`, ``(k, 4)``.
            backend: Backend asked for.

        Returns:
            The solution, the final state, the number of steps; None without a kernel.
        """
        return None

    @never_compiled
    def __matmul__(self, v: Tree) -> Tree:
        """``H v`` in the structure of ``v``: one vector, or a batch with a leading dimension on every leaf."""
        packed = self.space.pack("v", v)
        with torch.no_grad(), without_autocast(self.space.device):
            leaves = [t.to(dtype) for t, dtype in zip(self.space.views(packed.flat), self.space.dtypes, strict=True)]
            product = self.matvec(leaves) if packed.rows is None else self.matmat(leaves)
            lead = packed.flat.shape[:-1]
            flat = torch.cat([t.reshape(*lead, -1).to(self.space.dtype) for t in product], dim=-1)
        return packed.restore(flat)

    def dense(self) -> Tensor:
        """The matrix of ``H`` as a new tensor, shape ``(n, n)``, in the dtype of the solver state. Costs n products."""
        n = self.space.numel
        matrix = torch.empty(n, n, dtype=self.space.dtype, device=self.space.device)
        basis = torch.zeros(n, dtype=self.space.dtype, device=self.space.device)
        views = self.space.views(basis)
        with torch.no_grad(), without_autocast(self.space.device):
            for j in range(n):
                basis[j] = 1
                product = self.matvec([t.to(dtype) for t, dtype in zip(views, self.space.dtypes, strict=True)])
                for row, part in zip(matrix[:, j].split(self.space.sizes), product, strict=True):
                    row.copy_(part.reshape(-1))
                basis[j] = 0
        return matrix
