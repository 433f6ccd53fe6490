"""Double backward through a gradient graph that is built once and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What torch.autograd.grad calls once it has compared shapes that we know to agree: with 44 tensors the
# comparison takes a tenth of a product.
_run_backward = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)


class RetainedGradient:
    """The gradient of a loss with its graph: every product with the Hessian is one backward pass through it.

    The forward pass ran once, so random masks and buffer updates happened once: all products of
    one solve see the same function.
    """

    def __init__(self, grads: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> None:
        """Keep gradients that have a graph.

        Args:
            grads: Gradient by each leaf, built with ``create_graph=True``; None where there is none.
            leaves: The tensors it was taken by.
        """
        self.leaves = list(leaves)
        self.used = [g is not None for g in grads]
        self._zeros: dict[int, Tensor] = {}
        # A gradient without a graph is constant: its row of the Hessian is zero.
        self._curved = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._outputs = [g for g in grads if g is not None and g.requires_grad]

    @property
    def curved(self) -> bool:
        """Whether any part of the gradient depends on anything: else H is zero."""
        return bool(self._outputs)

    @classmethod
    def of(cls, loss: Tensor, leaves: Sequence[Tensor]) -> RetainedGradient:
        """Build the gradient graph of a scalar loss."""
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, list(leaves), create_graph=True, allow_unused=True)
        return cls(grads, leaves)

    def hvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``, one tensor per leaf. Cost: one backward pass through the gradient's graph."""
        if not self._outputs:
            return [self._zero(i) for i in range(len(self.leaves))]
        return [self._zero(i) if h is None else h for i, h in enumerate(self._pull(self.leaves, v))]

    def mixed(self, x: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor | None]:
        """``d <gradient, x> / d others``; None where the gradient does not depend on a tensor."""
        if not self._outputs:
            return [None] * len(others)
        return list(self._pull(others, x))

    def _pull(self, inputs: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        vectors = [v[i] for i in self._curved]
        if _run_backward is None:
            return torch.autograd.grad(
                self._outputs, inputs, grad_outputs=vectors, retain_graph=True, allow_unused=True
            )
        return _run_backward(
            tuple(self._outputs),
            tuple(vectors),
            True,
            False,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )

    def _zero(self, i: int) -> Tensor:
        if i not in self._zeros:
            self._zeros[i] = torch.zeros_like(self.leaves[i], memory_format=torch.contiguous_format).detach()
        return self._zeros[i]
