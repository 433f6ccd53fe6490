"""A preconditioner: the inverse of some P close to ``H + d I``, cheap to apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.ops import Op
from hypergrad_ext.solvers.base import System, check_count
from hypergrad_ext.solvers.nystrom import Nystrom, Sketch, sketch_of
from hypergrad_ext.structure import Space, Tree, check_real, take_apart, versions


@dataclass(frozen=True)
class Jacobi:
    r"""The diagonal of :math:`H + d I` as a preconditioner, estimated as :math:`\sum_j v_j \odot H v_j / m`.

    The m probes v have independent random signs. The estimate of an entry is off by about the norm of the rest of its
    row, divided by :math:`\sqrt m`: it is good for a matrix whose diagonal dominates, as one penalty per weight makes
    it. Entries are raised to a thousandth of their mean where the estimate is below that, so that P is positive. Where
    the diagonal is known, give it instead.

    Cost: ``probes`` Hessian-vector products per solve, as one batch.

    Args:
        probes: m.

    Raises:
        TypeError: If ``probes`` is not an integer.
        ValueError: If ``probes`` is less than 1.

    References:
        Bekas, Kokiopoulou, Saad, "An Estimator for the Diagonal of a Matrix", Applied Numerical Mathematics 57, 2007.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 100.0]))
        >>> hg.solve(hg.DenseMatrix(A), torch.ones(2), hg.Neumann(steps=20, preconditioner=hg.Jacobi())).value
        tensor([1.0000, 0.0100])
    """

    probes: int = 10

    def __post_init__(self) -> None:
        """Check the settings."""
        check_count("probes", self.probes, 1)

    def diagonal(self, system: System) -> Tensor:
        """The estimate for ``H + d I``, flat; not finite where a product was not."""
        space = system.operator.space
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (self.probes, space.numel), generator=generator, device="cpu") * 2 - 1
        signs = signs.to(space.device, space.dtype)
        products = system.product(system.views(signs))
        diagonal = sum_of_products(signs, [t.reshape(self.probes, -1) for t in products]) / self.probes
        diagonal = diagonal.abs() + system.damping
        return diagonal.clamp_min(1e-3 * float(diagonal.mean()))


def sum_of_products(signs: Tensor, products: Sequence[Tensor]) -> Tensor:
    """``sum_j v_j * (H v)_j`` for rows j, flat."""
    widths = [t.shape[1] for t in products]
    return torch.cat([(s * t).sum(0) for s, t in zip(signs.split(widths, 1), products, strict=True)])


PreconditionerChoice = Tree | Callable[[Tree], Tree] | LinearOperator | Nystrom | Jacobi | None
"""The diagonal of P in the structure of the parameters, or `Jacobi`, which estimates it; `Nystrom`; or
``v -> P^{-1} v``, as a function or an operator."""


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
            if not choice.symmetric:
                raise ValueError("preconditioner: expected a symmetric operator, got one that is not")
            self._operator = choice
        elif callable(choice) and not isinstance(choice, torch.nn.Module):
            self._function = choice
        else:
            self.diagonal = self._checked_inverse(choice)

    @classmethod
    def of(cls, choice: PreconditionerChoice, system: System) -> Preconditioner | None:
        """The preconditioner for what a user gave, None for None, or where products are not finite."""
        space = system.operator.space
        if isinstance(choice, Preconditioner):  # `Auto` has made one
            return choice
        if isinstance(choice, Nystrom):
            sketch = sketch_of(system, choice.rank)
            return None if sketch is None or len(sketch.values) == 0 else SketchPreconditioner(sketch, system)
        if isinstance(choice, Jacobi):
            diagonal = choice.diagonal(system)
            if not bool((diagonal > 0).all() & diagonal.isfinite().all()):
                return None
            choice = space.views(diagonal)
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
            raise not_definite(float(square.min()))
        return square.sqrt()

    def _times_one(self, r: Tensor) -> Tensor:
        dtypes = (self._space if self._operator is None else self._operator.space).dtypes
        v = [t.to(dtype) for t, dtype in zip(self._space.views(r), dtypes, strict=True)]
        product = self._call(v) if self._operator is None else self._operator.matvec(v)
        return torch.cat([t.detach().reshape(-1).to(r.dtype) for t in product])

    def _call(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        before = versions(v)
        leaves = take_apart("preconditioner(v)", self._function(self._space.leaves.rebuild(v)))
        check_real(leaves)
        if versions(v) != before:
            raise ValueError(
                "preconditioner: expected a function that leaves its argument alone, got one that writes into it"
            )
        product = [leaves.tensors[i] for i in self._space.order("preconditioner(v)", leaves)]
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


def not_definite(least: float) -> ValueError:
    """What to raise where ``v.M v`` is ``least`` for some v."""
    return ValueError(f"preconditioner: expected a positive definite one, got v.M v = {least:.3g} for some v")


class SketchPreconditioner(Preconditioner):
    """A Nystrom sketch, flattened: applied by two matrix products of ``rank`` columns."""

    def __init__(self, sketch: Sketch, system: System) -> None:
        """Precondition ``H + d I`` of a system by a sketch of ``H``."""
        self._space = system.operator.space
        self._sketch, self._damping = sketch, system.damping
        self.diagonal = None

    def times(self, r: Tensor) -> Tensor:
        """``M r`` for flat vectors ``(n,)`` or ``(k, n)``."""
        return self._sketch.precondition(r, self._damping)
