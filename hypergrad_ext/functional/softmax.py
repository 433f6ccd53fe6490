"""The Hessian of cross-entropy in the logits, differentiable in the vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.functional.batching import batched
from hypergrad_ext.rules import refuse_grad, refuse_tangents, with_rules


def softmax_hessian(logits: Tensor, u: Tensor, scale: float = 1.0, weights: Tensor | None = None) -> Tensor:
    r"""The Hessian of cross-entropy in the logits, times ``u``.

    :math:`s\,w_i\,p_i \odot (u_i - \langle p_i, u_i\rangle)` for every row i, with the softmax :math:`p_i` of its
    logits: the middle of every Gauss-Newton product with a classifier or language model. The
    probabilities are computed row by row inside the kernel and never stored: memory is the logits, ``u`` and the
    result. `hypergrad_ext.ops.softmax_hessian_` overwrites ``u``, so that not even the result is a second buffer.

    Linear and symmetric in ``u``, and differentiable in it any number of times, in reverse and forward mode and
    under ``torch.func.vmap``; not with ``is_grads_batched=True``.

    Args:
        logits: ``(..., classes)``: float64, float32, bfloat16 or float16 (the last two computed in float32). A
            class whose logit is ``-inf`` is masked: its result is 0.
        u: Like the logits, or ``(k, ..., classes)`` for k vectors.
        scale: Factor of all rows, 1 / tokens for a mean.
        weights: ``(...)``, factors of single rows; a row of weight 0 (a token that the loss ignores) is not read.

    Returns:
        A tensor like ``u``.

    Raises:
        ValueError: If shapes do not go together, or a tensor other than ``u`` requires grad: pass it detached.
        TypeError: If ``logits`` and ``u`` are not of one floating dtype.

    Example:
        >>> from hypergrad_ext import functional
        >>> functional.softmax_hessian(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.2500, -0.2500]])
    """
    refuse_grad("u", logits=logits, scale=scale, weights=weights)
    many = u.dim() == logits.dim() + 1
    if logits.dim() == 0 or u.shape[many:] != logits.shape:
        expected = f"{tuple(logits.shape)} or (k, {', '.join(map(str, logits.shape))})"
        raise ValueError(f"u: expected shape {expected}, got {tuple(u.shape)}")
    if u.dtype != logits.dtype:
        raise TypeError(f"u: expected {logits.dtype} like logits, got {u.dtype}")
    if weights is not None and weights.shape != logits.shape[:-1]:
        raise ValueError(f"weights: expected shape {tuple(logits.shape[:-1])}, got {tuple(weights.shape)}")
    rows = logits.shape[:-1].numel()
    flat = logits.reshape(rows, logits.shape[-1])
    vectors = u.reshape(u.shape[0] if many else 1, *flat.shape)
    flat_weights = None if weights is None else weights.reshape(rows)
    return _product(flat, vectors, scale, flat_weights).view(u.shape)


def _product(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None) -> Tensor:
    return _with_rules(_contiguous_rows(logits), _contiguous_rows(u), scale, weights)


class _SoftmaxHessian(torch.autograd.Function):
    """``logits`` (rows, classes), ``u`` (k, rows, classes); linear in ``u``, and its own adjoint."""

    @staticmethod
    def forward(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None) -> Tensor:
        return ops.softmax_hessian(logits, u, scale, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        logits, _, ctx.scale, weights = inputs
        ctx.save_for_backward(logits, weights)
        ctx.save_for_forward(logits, weights)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return None, None, None, None
        logits, weights = ctx.saved_tensors
        return None, _product(logits, grad, ctx.scale, weights), None, None

    @staticmethod
    def jvp(ctx: Any, logits_t: Tensor | None, u_t: Tensor, scale_t: None, weights_t: Tensor | None) -> Tensor:
        refuse_tangents("u", logits=logits_t, weights=weights_t)
        logits, weights = ctx.saved_tensors
        return _product(logits, u_t, ctx.scale, weights)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, logits: Tensor, u: Tensor, scale: float, weights: Tensor | None) -> tuple:
        """A batch of ``u`` is more vectors; a batch of logits is more rows."""
        size, (logits_dim, u_dim, _, weights_dim) = info.batch_size, in_dims
        if logits_dim is None and weights_dim is None:
            u = u.movedim(u_dim, 0)
            out = _product(logits, u.flatten(0, 1), scale, weights)
            return out.view(u.shape), 0
        logits = batched(logits, logits_dim, 0, size)
        u = batched(u, u_dim, 1, size)
        if weights is not None:
            weights = batched(weights, weights_dim, 0, size).flatten()
        out = _product(logits.flatten(0, 1), u.flatten(1, 2), scale, weights)
        return out.view(u.shape), 1


_with_rules = with_rules(ops.softmax_hessian, _SoftmaxHessian.apply, only="u")


def _contiguous_rows(t: Tensor) -> Tensor:
    # Gradients of a sum, for one, come with a stride of 0.
    return t if t.stride(-1) == 1 else t.contiguous()
