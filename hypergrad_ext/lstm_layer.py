"""One direction of one LSTM layer, whose recurrence is one fused op in each of three passes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hypergrad_ext import ops, reference_lstm
from hypergrad_ext.lstm_cell import by_torch, cell, or_zeros
from hypergrad_ext.rules import with_rules


def lstm_layer(
    x: Tensor, w_ih: Tensor, bias: Tensor | None, w_hh: Tensor, h0: Tensor, c0: Tensor
) -> tuple[Tensor, Tensor]:
    """One direction of one LSTM layer: `lstm_cell` of ``x[t] w_ih^T + bias + h[t - 1] w_hh^T`` for every step t.

    What is not recurrent is one matrix product over all steps. The recurrence is one loop over the steps in each of
    forward, backward and the backward of the backward, in C++ on the CPU. Under ``torch.func`` and in forward mode
    the steps run one by one.

    Args:
        x: ``(steps, batch, features)``.
        w_ih: ``(4 units, features)``.
        bias: ``(4 units,)``, or None.
        w_hh: ``(4 units, units)``.
        h0: ``(batch, units)``.
        c0: ``(batch, units)``.

    Returns:
        ``h`` and ``c`` of every step, ``(steps, batch, units)``.
    """
    return _layer(x, w_ih, bias, w_hh, h0, c0)[:2]


def _without_rules(
    x: Tensor, w_ih: Tensor, bias: Tensor | None, w_hh: Tensor, h0: Tensor, c0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_layer`, with the activations as a third output."""
    rows = _rows(x) @ w_ih.T if bias is None else torch.addmm(bias, _rows(x), w_ih.T)
    return ops.lstm_layer(rows.view(*x.shape[:2], len(w_ih)), w_hh, h0, c0)


def _in_any_mode(
    x: Tensor, w_ih: Tensor, bias: Tensor | None, w_hh: Tensor, h0: Tensor, c0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, differentiable."""
    if not _transformed():
        return _Layer.apply(x, w_ih, bias, w_hh, h0, c0)
    h, c, steps = h0, c0, []
    for gates in torch.nn.functional.linear(x, w_ih, bias).unbind(0):
        h, c, activations = cell(gates + h @ w_hh.T, c)
        steps.append((h, c, activations))
    return tuple(torch.stack(each) for each in zip(*steps, strict=True))  # type: ignore[return-value]


def _transformed() -> bool:
    """Whether a transform of torch.func or forward mode is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


class _Layer(Function):
    """``lstm_layer``, with the activations as a third output.

    Without ``setup_context``, for which torch would look up the signature of ``forward`` in every call.
    """

    @staticmethod
    def forward(ctx: Any, x, w_ih, bias, w_hh, h0, c0) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        h, c, activations = _without_rules(x, w_ih, bias, w_hh, h0, c0)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(activations, h, c, x, w_ih, w_hh, h0, c0)
        ctx.set_materialize_grads(False)
        return h, c, activations

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_activations: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # a checkpoint lets them be read once
        grad_h = or_zeros(grad_h, saved[1])
        wanted = ctx.needs_input_grad[0], ctx.has_bias, ctx.needs_input_grad[4]
        return _LayerBackward.apply(wanted, *saved, grad_h, grad_c, grad_activations)[:6]


class _LayerBackward(Function):
    """Gradients by the inputs of `_Layer`; then those by the gates, and what reached h and c of every step.

    ``wanted``: by ``x``, ``bias`` and ``h0``? The others are None.
    """

    @staticmethod
    def forward(ctx: Any, wanted, *inputs: Any) -> Any:  # type: ignore[no-untyped-def]
        activations, h, c, x, w_ih, w_hh, h0, c0, grad_h, grad_c, grad_activations = inputs
        gates, grad_c0, dh, dc = ops.lstm_layer_backward(activations, c, c0, w_hh, grad_h, grad_c, grad_activations)
        ctx.mark_non_differentiable(gates, dh, dc)
        ctx.wanted = wanted
        ctx.save_for_backward(*inputs, gates, dh, dc)
        ctx.set_materialize_grads(False)
        return *_through_gates(wanted, gates, h, x, w_ih, w_hh, h0), grad_c0, gates, dh, dc

    @staticmethod
    def backward(ctx: Any, v_x, v_ih, v_bias, v_hh, v_h0, v_c0, *_: None) -> Any:  # type: ignore[no-untyped-def]
        *inputs, gates, dh, dc = ctx.saved_tensors
        activations, h, c, x, w_ih, w_hh, h0, c0, _, grad_c, grad_activations = inputs
        if grad_activations is not None or torch.is_grad_enabled():  # only in a third derivative
            like = [x, w_ih, activations.new_empty(activations.shape[-1]), w_hh, h0, c0]
            given = [*ctx.wanted[:1], True, ctx.wanted[1], True, ctx.wanted[2], True]
            v = [or_zeros(t, s) for t, s in zip((v_x, v_ih, v_bias, v_hh, v_h0, v_c0), like, strict=True)]
            v = [t for t, is_given in zip(v, given, strict=True) if is_given]
            return None, *by_torch(functools.partial(_layer_backward, ctx.wanted), inputs, v)
        # What the gradients by the gates meet: the tangent of the gates.
        v_gates = _tangent_of_gates([(v_x, w_ih), (x, v_ih)], (h0, h, v_hh), v_bias, activations)
        by_activations, by_c, by_c0, by_grad_h, by_grad_c = ops.lstm_layer_double_backward(
            activations, c, c0, w_hh, dh, dc, v_gates, or_zeros(v_h0, h0), or_zeros(v_c0, c0)
        )
        rows = _rows(gates)
        by_ih = None if v_x is None else rows.T @ _rows(v_x)
        by_hh = _by_recurrent_weights(gates, v_h0, by_grad_h)
        by_x = (rows @ v_ih).view_as(x) if v_ih is not None and ctx.needs_input_grad[4] else None
        by_h = by_h0 = None
        if v_hh is not None:
            by_before = torch.empty(len(h) + 1, *h0.shape, dtype=h.dtype, device=h.device)
            torch.mm(rows, v_hh, out=_rows(by_before[:-1]))
            by_before[-1].zero_()
            by_h, by_h0 = by_before[1:], by_before[0]
        if grad_c is None:
            by_grad_c = None
        return None, by_activations, by_h, by_c, by_x, by_ih, by_hh, by_h0, by_c0, by_grad_h, by_grad_c, None


# Not one of `ops.ALL`: it has no kernel of its own.
_layer = with_rules(
    ops.Op(
        "lstm_layer_from_inputs(Tensor x, Tensor w_ih, Tensor? bias, Tensor w_hh, Tensor h0, Tensor c0)"
        " -> (Tensor, Tensor, Tensor)",
        reference=_without_rules,
        fake=lambda x, w_ih, bias, w_hh, h0, c0: (
            *(c0.new_empty(x.shape[0], *c0.shape) for _ in range(2)),
            c0.new_empty(*x.shape[:2], len(w_ih)),
        ),
        device_of=5,
        native=(),
    ),
    _in_any_mode,
)


def _through_gates(wanted: tuple, gates: Tensor, h: Tensor, x: Tensor, w_ih: Tensor, w_hh: Tensor, h0: Tensor) -> Any:
    """Gradients by ``x``, ``w_ih``, ``bias``, ``w_hh`` and ``h0`` from those by the gates."""
    of_x, of_bias, of_h0 = wanted
    rows = _rows(gates)
    return (
        (rows @ w_ih).view_as(x) if of_x else None,
        rows.T @ _rows(x),
        rows.sum(0) if of_bias else None,
        _by_recurrent_weights(gates, h0, h),
        gates[0] @ w_hh if of_h0 else None,
    )


def _layer_backward(wanted, activations, h, c, x, w_ih, w_hh, h0, c0, grad_h, grad_c, grad_activations):
    """The differentiable outputs of `_LayerBackward` in plain torch, without those that are None."""
    gates, grad_c0, _, _ = reference_lstm.lstm_layer_backward(
        activations, c, c0, w_hh, grad_h, grad_c, grad_activations
    )
    grads = *_through_gates(wanted, gates, h, x, w_ih, w_hh, h0), grad_c0
    return tuple(grad for grad in grads if grad is not None)


def _tangent_of_gates(inputs: Any, recurrent: Any, v_bias: Tensor | None, like: Tensor) -> Tensor:
    """What the gates change by; ``inputs`` are pairs of sequence and weights, ``recurrent`` is ``h0``, ``h``, ``v_hh``.

    Returns:
        ``v_bias + sum_i a_i b_i^T + h_before v_hh^T`` without the pairs that hold None, of the shape of ``like``.
    """
    total: Tensor | None = None
    for a, b in inputs:
        if a is None or b is None:
            continue
        if total is not None:
            total.addmm_(_rows(a), b.T)
        elif v_bias is not None:
            total = torch.addmm(v_bias, _rows(a), b.T)
        else:
            total = _rows(a) @ b.T
    if total is None:
        # A copy also of a single row: what is written to must not be the caller's.
        contiguous = torch.contiguous_format
        total = torch.zeros_like(like) if v_bias is None else v_bias.expand_as(like).clone(memory_format=contiguous)
    total = total.view_as(like)
    h0, h, v_hh = recurrent
    if v_hh is not None:
        total[0].addmm_(h0, v_hh.T)
        _rows(total[1:]).addmm_(_rows(h[:-1]), v_hh.T)
    return total


def _by_recurrent_weights(gates: Tensor, h0: Tensor | None, h: Tensor) -> Tensor:
    """Sum over the steps of ``gates[t]^T h[t - 1]``; ``h0`` None is zero.

    h and h0 stay where they are, since memory for a copy is dear.

    Returns:
        Like the recurrent weights.
    """
    total = _rows(gates[1:]).T @ _rows(h[:-1])
    return total if h0 is None else total.addmm_(gates[0].T, h0)


def _rows(t: Tensor) -> Tensor:
    """A sequence as one matrix, (steps x batch, features)."""
    return t.flatten(0, 1)
