"""Products with the Hessian of a multilayer perceptron, differentiable in the vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad_ext.compilation import for_compile
from hypergrad_ext.operators import MLPHessian
from hypergrad_ext.structure import Tree


def mlp_hvp(operator: MLPHessian, v: Tree) -> Tree:
    """``operator @ v``, differentiable in ``v``: the Hessian of a multilayer perceptron's loss, in closed form.

    Linear and symmetric in ``v``, and differentiable in it any number of times, in reverse and forward mode and under
    ``torch.func.vmap``, where a batch of ``v`` is more vectors of one call. Not differentiable in what the operator was
    made from: that would be a third derivative of the loss. For a batch of data sets or of networks, loop over
    operators: each of them is prepared once and serves any number of products.

    Cost: one product with every vector; so does each derivative.

    Args:
        operator: The Hessian at some parameters.
        v: In the structure of the parameters, or with one more leading dimension on every leaf for a batch.

    Returns:
        A tree like ``v``.

    Raises:
        TypeError: If ``operator`` is not an `MLPHessian`, or dtypes do not match the parameters.
        ValueError: If number, names, shapes or device do not match the parameters.

    Example:
        >>> from hypergrad_ext import functional
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [0.0]])
        >>> operator = hg.MLPHessian(x, [torch.tensor([[1.0, -1.0]])], y, loss="squared")
        >>> v = torch.ones(1, 2, requires_grad=True)
        >>> (product,) = functional.mlp_hvp(operator, [v])
        >>> torch.autograd.grad((product * v).sum(), v)
        (tensor([[2., 8.]]),)
    """
    if not isinstance(operator, MLPHessian):
        raise TypeError(f"operator: expected an MLPHessian, got {type(operator).__name__}")
    packed = operator.space.pack("v", v, graph=True)
    flat = packed.flat
    return packed.restore(_product(operator, torch.atleast_2d(flat)).view(flat.shape))


def _product(operator: MLPHessian, v: Tensor) -> Tensor:
    return for_compile(_Reverse, _Product).apply(operator, v)


class _Reverse(torch.autograd.Function):
    """``v`` (k, m); linear in it, and its own adjoint."""

    @staticmethod
    def forward(operator: MLPHessian, v: Tensor) -> Tensor:
        return operator.product(v.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, _product(ctx.operator, grad)


class _Product(_Reverse):
    """The same with forward mode and batching."""

    @staticmethod
    def jvp(ctx: Any, operator_t: None, v_t: Tensor) -> Tensor:
        return _product(ctx.operator, v_t)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, operator: MLPHessian, v: Tensor) -> tuple:
        """A batch of ``v`` is more vectors."""
        v = v.movedim(in_dims[1], 0)
        return _product(operator, v.flatten(0, -2)).view(v.shape), 0
