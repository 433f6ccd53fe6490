"""Plain torch implementations of the fused ops of LSTM cells and layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pointwise part of an LSTM step: ``c' = f c + i g``, ``h' = o tanh(c')``.

    ``gates`` is ``(rows, 4 units)``: what sigmoid turns into i and f, tanh into g, sigmoid into o; ``c`` is
    ``(rows, units)``.

    Returns:
        ``h'``, ``c'``, and the activations ``(i, f, g, o)``, like ``gates``.
    """
    exact = torch.promote_types(c.dtype, torch.float32)
    i, f, g, o = gates.to(exact).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_next = f * c + i * g
    activations = torch.cat([i, f, g, o], -1)
    return (o * c_next.tanh()).to(c.dtype), c_next.to(c.dtype), activations.to(c.dtype)


def lstm_cell_backward(
    activations: Tensor,
    c: Tensor,
    c_next: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    grad_activations: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients by ``gates`` and ``c`` of `lstm_cell`, from those by ``h'``, ``c'`` and the activations."""
    exact = torch.promote_types(c.dtype, torch.float32)
    i, f, g, o = activations.to(exact).chunk(4, -1)
    t, grad_h = c_next.to(exact).tanh(), grad_h.to(exact)
    d = grad_c + grad_h * o * (1 - t * t)  # what reaches c' both ways
    grad = torch.cat([d * g, d * c, d * i, grad_h * t], -1)
    if grad_activations is not None:
        grad = grad + grad_activations
    slopes = torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
    return (grad * slopes).to(c.dtype), (d * f).to(c.dtype)


def lstm_cell_double_backward(
    activations: Tensor, c: Tensor, c_next: Tensor, grad_h: Tensor, grad_c: Tensor, v_gates: Tensor, v_c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``<(v_gates, v_c), lstm_cell_backward(...)>`` by its first five arguments.

    The last two, those by ``grad_h`` and ``grad_c``, are how much ``h'`` and ``c'`` change when ``gates`` and ``c``
    change by the vectors.

    Returns:
        Tensors like ``activations``, ``c``, ``c_next``, ``grad_h`` and ``grad_c``.
    """
    exact = torch.promote_types(c.dtype, torch.float32)
    i, f, g, o = activations.to(exact).chunk(4, -1)
    v_i, v_f, v_g, v_o = v_gates.to(exact).chunk(4, -1)
    t, grad_h, v_c = c_next.to(exact).tanh(), grad_h.to(exact), v_c.to(exact)
    d = grad_c + grad_h * o * (1 - t * t)
    w_i, w_f, w_g, w_o = v_i * i * (1 - i), v_f * f * (1 - f), v_g * (1 - g * g), v_o * o * (1 - o)
    by_d = g * w_i + c * w_f + i * w_g + f * v_c
    by_activations = torch.cat(
        [
            d * g * v_i * (1 - 2 * i) + d * w_g,
            d * c * v_f * (1 - 2 * f) + d * v_c,
            d * w_i - 2 * g * d * i * v_g,
            grad_h * t * v_o * (1 - 2 * o) + by_d * grad_h * (1 - t * t),
        ],
        -1,
    )
    by_c_next = (grad_h * w_o - 2 * t * grad_h * o * by_d) * (1 - t * t)
    by_grad_h = by_d * o * (1 - t * t) + t * w_o
    out = by_activations, d * w_f, by_c_next, by_grad_h, by_d
    return tuple(x.to(c.dtype) for x in out)  # type: ignore[return-value]


def lstm_layer(
    x_gates: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, *, cell: Callable = lstm_cell
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of an LSTM layer: `lstm_cell` of ``x_gates[t] + h[t - 1] W^T`` for every step t.

    ``x_gates`` is ``(steps, batch, 4 units)``, the inputs' part of the gates with all biases; ``w_hh`` is
    ``(4 units, units)``; ``h0`` and ``c0`` are ``(batch, units)``. ``cell`` computes the pointwise part.

    Returns:
        ``h`` and ``c`` of every step, ``(steps, batch, units)``, and the activations, like ``x_gates``.
    """
    h, c, steps = h0, c0, []
    for x in x_gates:
        h, c, activations = cell(torch.addmm(x, h, w_hh.T), c)
        steps.append((h, c, activations))
    return tuple(torch.stack(each) for each in zip(*steps, strict=True))  # type: ignore[return-value]


def lstm_layer_backward(
    activations: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    grad_h: Tensor,
    grad_c: Tensor | None = None,
    grad_activations: Tensor | None = None,
    *,
    cell: Callable = lstm_cell_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by ``x_gates`` and ``c0`` of `lstm_layer`, from those by ``h``, ``c`` and the activations.

    That by ``w_hh`` is ``sum_t grad_gates[t]^T h[t - 1]``, that by ``h0`` is ``grad_gates[0] W``.

    Returns:
        Both, and all that reaches ``h`` and ``c`` of every step, also through later steps.
    """
    steps: list[tuple[Tensor, ...]] = []
    d_c = torch.zeros_like(c0)
    for t in reversed(range(len(c))):
        d_h = torch.addmm(grad_h[t], steps[0][0], w_hh) if steps else grad_h[t]
        d_c = d_c if grad_c is None else d_c + grad_c[t]
        more = None if grad_activations is None else grad_activations[t]
        grad_gates, d_c_before = cell(activations[t], c[t - 1] if t else c0, c[t], d_h, d_c, more)
        steps.insert(0, (grad_gates, d_h, d_c))
        d_c = d_c_before
    all_gates, all_h, all_c = (torch.stack(each) for each in zip(*steps, strict=True))
    return all_gates, d_c, all_h, all_c


def lstm_layer_double_backward(
    activations: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    dh: Tensor,
    dc: Tensor,
    v_gates: Tensor,
    v_h0: Tensor,
    v_c0: Tensor,
    *,
    cell: Callable = lstm_cell_double_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``<v_gates, grad_gates> + <v_h0, grad_gates[0] W> + <v_c0, grad_c0>`` of `lstm_layer_backward`.

    ``dh`` and ``dc`` are the last two that it returned.

    Returns:
        The gradients by its ``activations``, ``c``, ``c0``, ``grad_h`` and ``grad_c``. With the next to last, r,
        the gradient by ``w_hh`` is ``grad_gates[0]^T v_h0 + sum_t grad_gates[t]^T r[t - 1]``.
    """
    steps: list[tuple[Tensor, ...]] = []
    v_h, v_c = v_h0, v_c0
    for t in range(len(c)):
        v = torch.addmm(v_gates[t], v_h, w_hh.T)
        steps.append(cell(activations[t], c[t - 1] if t else c0, c[t], dh[t], dc[t], v, v_c))
        _, _, _, v_h, v_c = steps[-1]
    by_activations, by_c_before, by_c_after, by_grad_h, by_grad_c = (torch.stack(s) for s in zip(*steps, strict=True))
    by_c = torch.cat([by_c_after[:-1] + by_c_before[1:], by_c_after[-1:]])
    return by_activations, by_c, by_c_before[0], by_grad_h, by_grad_c
