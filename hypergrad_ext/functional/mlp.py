"""Products with the Hessian of a multilayer perceptron, differentiable in the vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hypergrad_ext import ops
from hypergrad_ext.operators import MLPHessian
from hypergrad_ext.rules import with_rules
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
    return packed.restore(_product(*operator._model(torch.atleast_2d(flat))).view(flat.shape))


V = 6
"""The place of ``v`` among the arguments."""


def _product(*arguments: Any) -> Tensor:
    return _with_rules(*arguments[:V], arguments[V].contiguous(), *arguments[V + 1 :])


class _Product(torch.autograd.Function):
    """``v`` (k, m); linear in it, and its own adjoint."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return ops.mlp_hvp(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.before, ctx.after = inputs[:V], inputs[V + 1 :]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        before, after = ctx.before, ctx.after
        return *(None for _ in before), _product(*before, grad, *after), *(None for _ in after)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _product(*ctx.before, tangents[V], *ctx.after)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        """A batch of ``v`` is more vectors."""
        if any(dim is not None for dim in tree_leaves((in_dims[:V], in_dims[V + 1 :]))):
            raise ValueError("operator: expected one network for the whole batch; loop over operators")
        v = arguments[V].movedim(in_dims[V], 0)
        return _product(*arguments[:V], v.flatten(0, -2), *arguments[V + 1 :]).view(v.shape), 0


_with_rules = with_rules(ops.mlp_hvp, _Product.apply, only="v")
