"""Products with the Hessian of a generalised linear model, differentiable in the vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.functional.batching import one_by_one
from hypergrad_ext.rules import refuse_grad, refuse_tangents, with_rules


def glm_hvp(
    x: Tensor,
    weights: Tensor,
    v: Tensor,
    *,
    l2: Tensor | None = None,
    scale: float | None = None,
    intercept: bool = False,
) -> Tensor:
    r"""The Hessian of a generalised linear model's loss, times ``v``: :math:`(s X^\top D X + \mathrm{diag}(l_2))\,v`.

    X is read once for all vectors, by the kernel behind `hypergrad_ext.GLMHessian`, which makes D from a family and
    parameters. With ``intercept``, X has one more column, of ones.

    Linear and symmetric in ``v``, and differentiable in it any number of times, in reverse and forward mode and under
    ``torch.func.vmap``: a batch of ``v`` is more vectors of one call, a batch of anything else a loop.

    Cost: one product with every vector; so does each derivative.

    Args:
        x: X, ``(n, d)``: float64, float32, or bfloat16 beside float32 vectors.
        weights: ``(n,)``, the diagonal of D; or ``(n, classes)``, probabilities p with ``D = diag(p) - p p^T`` in
            every row: softmax and cross-entropy.
        v: ``(m,)``, or ``(k, m)`` for k vectors: ``classes * d`` weights (``d`` where ``weights`` is a diagonal), class
            after class, then the intercepts, if any.
        l2: ``(m,)``, the diagonal of the penalty's Hessian: ``2 * penalty`` for ``penalty * w**2``.
        scale: s; 1/n if not given, for a mean loss.
        intercept: Whether the model has intercepts.

    Returns:
        A tensor like ``v``.

    Raises:
        ValueError: If shapes do not go together, or a tensor other than ``v`` requires grad: pass it detached
            (`glm_solve` is differentiable in all of them).
        TypeError: If dtypes do not go together.

    Example:
        >>> from hypergrad_ext import functional
        >>> x, weights = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([1.0, 0.5])
        >>> v = torch.ones(2, requires_grad=True)
        >>> functional.glm_hvp(x, weights, v)
        tensor([1.2500, 1.5000], grad_fn=<ViewBackward0>)
    """
    check_model("v", x, weights, v, l2, intercept)
    refuse_grad("v", x=x, weights=weights, l2=l2, scale=scale)
    return product(x, weights, torch.atleast_2d(v), l2, scale_of(x, scale), intercept).view(v.shape)


def scale_of(x: Tensor, scale: float | None) -> float:
    """The scale given, or that of a mean loss."""
    return 1 / max(1, x.shape[0]) if scale is None else float(scale)


def check_model(name: str, x: Tensor, weights: Tensor, v: Tensor, l2: Tensor | None, intercept: bool) -> None:
    """Refuse shapes and dtypes that do not go together.

    Raises:
        ValueError: Naming the argument, what was expected and what came.
        TypeError: Likewise.
    """
    for other, t in (("x", x), ("weights", weights), (name, v), ("l2", l2)):
        if not isinstance(t, Tensor) and not (t is None and other == "l2"):
            raise TypeError(f"{other}: expected a tensor, got {type(t).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a dense tensor, got one of layout {x.layout}")
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (n, d), got {tuple(x.shape)}")
    n, d = x.shape
    if weights.dim() not in (1, 2) or weights.shape[0] != n or (weights.dim() == 2 and weights.shape[1] < 2):
        raise ValueError(f"weights: expected shape ({n},) or ({n}, classes >= 2), got {tuple(weights.shape)}")
    m = (weights.shape[1] if weights.dim() == 2 else 1) * (d + intercept)
    if v.dim() not in (1, 2) or v.shape[-1] != m:
        raise ValueError(f"{name}: expected shape ({m},) or (k, {m}), got {tuple(v.shape)}")
    if l2 is not None and l2.shape != (m,):
        raise ValueError(f"l2: expected shape ({m},), got {tuple(l2.shape)}")
    if v.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"{name}: expected torch.float64 or torch.float32, got {v.dtype}")
    if x.dtype != v.dtype and (x.dtype, v.dtype) != (torch.bfloat16, torch.float32):
        raise TypeError(f"x: expected {v.dtype} like {name}, or bfloat16 beside float32, got {x.dtype}")
    for other, t in (("weights", weights), ("l2", l2)):
        if t is not None and t.dtype != v.dtype:
            raise TypeError(f"{other}: expected {v.dtype} like {name}, got {t.dtype}")


def product(x: Tensor, weights: Tensor, v: Tensor, l2: Tensor | None, scale: float, intercept: bool) -> Tensor:
    """`glm_hvp` for ``v`` of shape ``(k, m)``, unchecked."""
    x = x if x.stride(1) == 1 else x.contiguous()
    l2 = None if l2 is None else l2.contiguous()
    return _product(x, weights.contiguous(), v.contiguous(), l2, scale, intercept)


class _Product(torch.autograd.Function):
    """Linear in ``v``, and its own adjoint."""

    @staticmethod
    def forward(x: Tensor, weights: Tensor, v: Tensor, l2: Tensor | None, scale: float, intercept: bool) -> Tensor:
        return ops.glm_hvp(x, weights, v, l2, scale, intercept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weights, _, l2, ctx.scale, ctx.intercept = inputs
        ctx.save_for_backward(x, weights, l2)
        ctx.save_for_forward(x, weights, l2)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 6
        x, weights, l2 = ctx.saved_tensors
        return None, None, product(x, weights, grad, l2, ctx.scale, ctx.intercept), None, None, None

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, weights_t: Tensor | None, v_t: Tensor, l2_t: Tensor | None, *_: Any
    ) -> Tensor:
        refuse_tangents("v", x=x_t, weights=weights_t, l2=l2_t)
        x, weights, l2 = ctx.saved_tensors
        return product(x, weights, v_t, l2, ctx.scale, ctx.intercept)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        """A batch of ``v`` is more vectors; of anything else, a loop."""
        x, weights, v, l2, scale, intercept = arguments
        if any(dim is not None for dim in (*in_dims[:2], in_dims[3])):
            return one_by_one(product, info.batch_size, in_dims, *arguments), 0
        v = v.movedim(in_dims[2], 0)
        return product(x, weights, v.flatten(0, -2), l2, scale, intercept).view(v.shape), 0


_product = with_rules(ops.glm_hvp, _Product.apply, only="v")
