"""Any function that multiplies a vector by H."""

from __future__ import annotations

from collections.abc import Callable as Function
from collections.abc import Sequence

import torch
from torch import Tensor

from hypergrad_ext.operators.base import LinearOperator
from hypergrad_ext.structure import Space, Tree, check_real, take_apart, versions

_LOW = (torch.bfloat16, torch.float16)


class Callable(LinearOperator):
    r"""The operator of a function :math:`v \mapsto H v`: a Gauss-Newton product, a matrix of another library.

    Args:
        matvec: Takes and returns the structure of ``like``. It must be linear, and must not write
            into its argument. The keys of dicts may come in any order.
        like: Tensor, list, tuple, dict or ``nn.Module`` with the shapes, dtypes and device of the vectors.
        symmetric: Whether ``H = H^T``; solvers that need symmetry refuse the operator otherwise, and also one that
            they find not to be symmetric after a solve that went wrong.

    Raises:
        TypeError: If ``matvec`` is not callable or a leaf of ``like`` is not real floating point.

    Example:
        >>> scale = hg.Callable(lambda v: 4.0 * v, like=torch.zeros(3))
        >>> hg.solve(scale, torch.ones(3), hg.CG(tol=1e-6)).value
        tensor([0.2500, 0.2500, 0.2500])
    """

    def __init__(  # noqa: D107 (documented in the class)
        self, matvec: Function[[Tree], Tree], like: Tree, *, symmetric: bool = True
    ) -> None:
        if not callable(matvec):
            raise TypeError(f"matvec: expected a function of one vector, got {type(matvec).__name__}")
        self.space = Space(take_apart("like", like))
        self.symmetric = symmetric
        self._matvec = matvec

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` by the function given.

        Returns:
            One tensor per leaf, without a graph.

        Raises:
            TypeError: If the function returns something other than real tensors of the precision of ``v`` or less.
            ValueError: If it returns other shapes or keys than it was given, or writes into its argument.
        """
        before = versions(v)
        result = take_apart("matvec(v)", self._matvec(self.space.leaves.rebuild(v)))
        if versions(v) != before:
            raise ValueError("matvec: expected a function that leaves its argument alone, got one that writes into it")
        order = self.space.order("matvec(v)", result)
        product = [result.tensors[i].detach() for i in order]
        if [t.shape for t in product] != self.space.shapes:
            raise ValueError(
                f"matvec(v): expected the shapes of v, {[tuple(s) for s in self.space.shapes]}, "
                f"got {[tuple(t.shape) for t in product]}"
            )
        check_real(result)
        allowed = (self.space.dtype, *self.space.dtypes, *(_LOW if self.space.dtype is torch.float32 else ()))
        for i, t in zip(order, product, strict=True):
            if t.dtype not in allowed:
                raise TypeError(f"{result.names[i]}: expected {self.space.dtype}, got {t.dtype}")
        if self.space.uniform and any(t.dtype is not product[0].dtype for t in product):
            product = [t.to(self.space.dtype) for t in product]
        # A step overwrites v as it reads the product, element by element: parts of v in other places are copied first.
        mine = {t.untyped_storage().data_ptr() for t in v}
        return [
            t.clone()
            if t.untyped_storage().data_ptr() in mine and (t.data_ptr(), t.stride()) != (own.data_ptr(), own.stride())
            else t
            for t, own in zip(product, v, strict=True)
        ]
