"""A preconditioner: the inverse of some P close to ``H + d I``, cheap to apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.ops import Op
from hypergrad_ext.structure import Space, Tree, take_apart

PreconditionerChoice = Tree | Callable[[Tree], Tree] | LinearOperator | None
"""The diagonal of P in the structure of the parameters; or ``v -> P^{-1} v``, as a function or an operator."""


class Preconditioner:
    """``M = P^{-1}``: a diagonal, which the fused steps apply as they go, or a function.

    Attributes:
        diagonal: The diagonal of M, flat ``(n,)`` in the dtype of the solver state; None for a function.
    """

    def __init__(self, choice: PreconditionerChoice, space: Space) -> None:
        """Check what a user gave for a system in ``space``.

        Args:
            choice: Diagonal of P, or what applies its inverse.
            space: The space of the vectors.

        Raises:
            TypeError: If a leaf of a diagonal has the wrong type or dtype.
            ValueError: If a diagonal does not fit the parameters or has entries that are not positive and finite;
                if an operator has another space.
        """
        self._space = space
        self.diagonal: Tensor | None = None
        self._operator: LinearOperator | None = None
        if isinstance(choice, LinearOperator):
            if choice.space.shapes != space.shapes:
                expected, got = ([tuple(s) for s in shapes] for shapes in (space.shapes, choice.space.shapes))
                raise ValueError(f"preconditioner: expected an operator on the shapes {expected}, got {got}")
            self._operator = choice
        elif callable(choice) and not isinstance(choice, torch.nn.Module):
            self._function = choice
        else:
            self.diagonal = self._checked_inverse(choice)

    @classmethod
    def of(cls, choice: PreconditionerChoice, space: Space) -> Preconditioner | None:
        """The preconditioner for what a user gave, None for None."""
        return None if choice is None else cls(choice, space)

    @property
    def argument(self) -> list[Tensor] | Callable[[Tensor], Tensor]:
        """What a step takes for M: the diagonal as a list, or the function."""
        return self.times if self.diagonal is None else [self.diagonal]

    def step(self, op: Op, kernel: Callable) -> Callable:
        """The function that takes a step of ``op`` with this preconditioner.

        Returns:
            ``kernel`` for a diagonal; the reference, whose torch ops can call a function in between, for a function.
        """
        return kernel if self.diagonal is not None else op.kernels["torch"]

    def times(self, r: Tensor) -> Tensor:
        """``M r`` for flat vectors ``(n,)`` or ``(k, n)``, as a new tensor."""
        if self.diagonal is not None:
            return self.diagonal * r
        rows = r.reshape(-1, r.shape[-1])
        return torch.stack([self._times_one(row) for row in rows]).view_as(r)

    def norm(self, r: Tensor) -> Tensor:
        """The square root of ``r.M r`` per row.

        Returns:
            Shape ``()`` or ``(k,)``, float64.

        Raises:
            ValueError: If that is not a real number, because M is not positive definite.
        """
        square = (r.double() * self.times(r).double()).sum(-1)
        if not bool(((square > 0) & square.isfinite() | (r == 0).all(-1)).all()):
            least = float(square.min())
            raise ValueError(f"preconditioner: expected a positive definite one, got v.M v = {least:.3g} for some v")
        return square.sqrt()

    def _times_one(self, r: Tensor) -> Tensor:
        v = [t.to(dtype) for t, dtype in zip(self._space.views(r), self._space.dtypes, strict=True)]
        product = self._call(v) if self._operator is None else self._operator.matvec(v)
        return torch.cat([t.detach().reshape(-1).to(r.dtype) for t in product])

    def _call(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        product = take_apart("preconditioner(v)", self._function(self._space.leaves.rebuild(v))).tensors
        if [t.shape for t in product] != self._space.shapes:
            expected, got = ([tuple(s) for s in shapes] for shapes in (self._space.shapes, [t.shape for t in product]))
            raise ValueError(f"preconditioner(v): expected the shapes of v, {expected}, got {got}")
        return product

    def _checked_inverse(self, diagonal: Tree) -> Tensor:
        packed = self._space.pack("preconditioner", diagonal)
        if packed.rows is not None:
            raise ValueError("preconditioner: expected one diagonal for all right-hand sides, got a batch of them")
        inverse = packed.flat.reciprocal()
        # Also refuses what has no finite reciprocal.
        if not bool(((inverse > 0) & inverse.isfinite()).all()):
            low, high = packed.flat.aminmax()
            raise ValueError(
                "preconditioner: expected positive entries with finite reciprocals, "
                f"got values from {float(low):.3g} to {float(high):.3g}"
            )
        return inverse
