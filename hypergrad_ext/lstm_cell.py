"""The LSTM cell as a function that is differentiable twice by fused ops, and any number of times by torch's own rules.

The activations are an output of the forward pass, and all that the backward pass needs besides the memory. So the
backward of the backward hands its gradients by them to the forward pass, whose backward runs anyway for what
comes back from the loss: one recurrence for both, where torch runs two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hypergrad_ext import ops, reference_lstm
from hypergrad_ext.rules import with_rules


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    r"""The pointwise part of an LSTM step.

    .. math:: c' = \sigma(f)\,c + \sigma(i)\tanh(g), \qquad h' = \sigma(o)\tanh(c')

    for ``gates`` :math:`(i, f, g, o) = x W_{ih}^\top + b_{ih} + h W_{hh}^\top + b_{hh}`, in the order of
    `torch.nn.LSTMCell`. Forward, backward and the backward of the backward are one fused pass each; between them the
    activations and both memories are kept, six numbers per unit. Third derivatives run in plain torch. Works in forward
    mode and under ``torch.func.vmap``.

    Args:
        gates: ``(..., 4 units)``: float64, float32, bfloat16 or float16 (the last two computed in float32).
        c: ``(..., units)``, the memory, of the same dtype.

    Returns:
        ``h'`` and ``c'``, like ``c``.

    Raises:
        ValueError: If the shapes do not go together.
        TypeError: If the dtypes differ or are not floating point.

    Example:
        >>> from hypergrad_ext import functional
        >>> h, c = functional.lstm_cell(torch.zeros(1, 8), torch.ones(1, 2))
        >>> c
        tensor([[0.5000, 0.5000]])
    """
    if c.dim() == 0 or gates.shape != (*c.shape[:-1], 4 * c.shape[-1]):
        expected = f"(..., 4 units) for c of shape (..., units) = {tuple(c.shape)}"
        raise ValueError(f"gates: expected shape {expected}, got {tuple(gates.shape)}")
    if gates.dtype != c.dtype or not c.is_floating_point():
        raise TypeError(f"gates and c: expected one floating dtype, got {gates.dtype} and {c.dtype}")
    rows = c.shape[:-1].numel()
    h, c_next, _ = cell(gates.reshape(rows, gates.shape[-1]), c.reshape(rows, c.shape[-1]))
    return h.view(c.shape), c_next.view(c.shape)


class _Cell(Function):
    """``gates`` (rows, 4 units), ``c`` (rows, units) -> ``h'``, ``c'``, activations."""

    @staticmethod
    def forward(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.lstm_cell(gates, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, c_next, activations = output
        ctx.save_for_backward(activations, inputs[1], c_next)
        ctx.save_for_forward(activations, inputs[1], c_next)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_activations: Tensor | None) -> Any:
        activations, c, c_next = ctx.saved_tensors
        grads = or_zeros(grad_h, c), or_zeros(grad_c, c), grad_activations
        return _cell_backward(activations, c, c_next, *grads)

    @staticmethod
    def jvp(ctx: Any, gates_t: Tensor | None, c_t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        activations, c, c_next = ctx.saved_tensors
        gates_t, c_t, zero = or_zeros(gates_t, activations), or_zeros(c_t, c), torch.zeros_like(c)
        *_, h_t, c_next_t = _cell_double_backward(activations, c, c_next, zero, zero, gates_t, c_t)
        i, f, g, o = activations.chunk(4, -1)
        slopes = torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
        return h_t, c_next_t, slopes * gates_t

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Tensor) -> tuple:
        return _more_rows(_Cell, info.batch_size, in_dims, args)


class _CellBackward(Function):
    @staticmethod
    def forward(
        activations: Tensor, c: Tensor, c_next: Tensor, grad_h: Tensor, grad_c: Tensor, grad_activations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return ops.lstm_cell_backward(activations, c, c_next, grad_h, grad_c, grad_activations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, v_gates: Tensor | None, v_c: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        activations, c, *_, grad_activations = saved
        v = or_zeros(v_gates, activations), or_zeros(v_c, c)
        if grad_activations is not None:  # only in a third derivative
            return by_torch(reference_lstm.lstm_cell_backward, saved, v)
        return *_cell_double_backward(*saved[:5], *v), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        primals = [t for t in ctx.saved_tensors if t is not None]
        tangents = tuple(or_zeros(d, t) for d, t in zip(tangents, primals, strict=False))
        # The adjoint of the adjoint: inside forward mode there is no second forward mode.
        _, c, *_ = primals
        pullback = torch.func.vjp(reference_lstm.lstm_cell_backward, *primals)[1]
        pushforward = torch.func.vjp(pullback, (torch.zeros_like(primals[0]), torch.zeros_like(c)))[1]
        return pushforward(tangents)[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Tensor | None) -> tuple:
        return _more_rows(_CellBackward, info.batch_size, in_dims, args)


class _CellDoubleBackward(Function):
    @staticmethod
    def forward(
        activations: Tensor, c: Tensor, c_next: Tensor, grad_h: Tensor, grad_c: Tensor, v_gates: Tensor, v_c: Tensor
    ) -> tuple[Tensor, ...]:
        return ops.lstm_cell_double_backward(activations, c, c_next, grad_h, grad_c, v_gates, v_c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return by_torch(reference_lstm.lstm_cell_double_backward, ctx.saved_tensors, grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Tensor) -> tuple:
        return _more_rows(_CellDoubleBackward, info.batch_size, in_dims, args)


cell = with_rules(ops.lstm_cell, _Cell.apply)
_cell_backward = with_rules(ops.lstm_cell_backward, _CellBackward.apply)
_cell_double_backward = with_rules(ops.lstm_cell_double_backward, _CellDoubleBackward.apply)


def by_torch(function: Any, inputs: Any, cotangents: Any) -> tuple[Tensor | None, ...]:
    """Gradients of ``function`` by its inputs that are not None, differentiable by torch's own rules."""
    given = [i for i, t in enumerate(inputs) if t is not None]

    def of_given(*tensors: Tensor) -> Any:
        every: list[Tensor | None] = [None] * len(inputs)
        for i, t in zip(given, tensors, strict=True):
            every[i] = t
        return function(*every)

    pullback = torch.func.vjp(of_given, *(inputs[i] for i in given))[1]
    grads = dict(zip(given, pullback(tuple(cotangents)), strict=True))
    return tuple(grads.get(i) for i in range(len(inputs)))


def _more_rows(function: Any, size: int, in_dims: tuple, args: tuple) -> tuple:
    """Vmap of a function of rows: a batch of them is more rows."""
    folded = []
    for t, dim in zip(args, in_dims, strict=True):
        if t is not None:
            t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            rows = t.shape[1]
            t = t.reshape(size * rows, t.shape[-1])
        folded.append(t)
    out = function.apply(*folded)
    return tuple(t.view(size, rows, t.shape[-1]) for t in out), (0,) * len(out)


def or_zeros(t: Tensor | None, like: Tensor) -> Tensor:
    """A tensor, or zeros in the place of None."""
    return torch.zeros_like(like) if t is None else t
