"""Plain torch implementations of the fused ops of multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypergrad_ext.reference import conjugate_gradients, neumann_series


def mlp_hvp(
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
    deltas: Sequence[Tensor],
    probabilities: Tensor | None,
    v: Tensor,
    scale: float,
    biases: bool,
    l2: float,
) -> Tensor:
    """Hessian of an MLP's mean loss times the rows of ``v``, by Pearlmutter's R-operator, R = d/dt at w + t v.

    Layer l takes ``hidden[l]`` to ``a = h W^T + b`` and, but for the last, to ``act(a)``. ``slopes`` are
    ``act'(a)``, ``bends`` are ``act''(a) dL/dh`` with the h that ``a`` leads to (none if ``act''`` is zero
    everywhere); ``deltas`` are ``dL/da`` from the second layer on. With ``probabilities`` p the loss is cross
    entropy, its Hessian by the outputs ``scale (diag(p) - p p^T)``; else ``scale I``. A row of ``v`` holds for
    every layer the weight and then, if there are any, the biases; ``l2 ||W||^2`` is added to the loss.

    Returns:
        A tensor like ``v``.
    """
    k, last = len(v), len(weights) - 1
    sizes = [size for w in weights for size in ([w.numel(), len(w)] if biases else [w.numel()])]
    parts = v.split(sizes, dim=1)
    v_w = [part.view(k, *w.shape) for part, w in zip(parts[:: 1 + biases], weights, strict=True)]
    r_a: list[Tensor] = []
    r_h: list[Tensor] = []  # of hidden[1:]; that of the inputs is zero
    for layer, (w, h) in enumerate(zip(weights, hidden, strict=True)):
        r = h @ v_w[layer].mT
        if biases:
            r = r + parts[2 * layer + 1][:, None]
        r_a.append(r + r_h[-1] @ w.T if layer else r)
        if layer < last:
            r_h.append(slopes[layer] * r_a[-1])

    z, p = r_a[-1], probabilities
    r_delta = scale * (z if p is None else p * (z - (p * z).sum(2, keepdim=True)))
    out: list[Tensor] = []
    for layer in range(last, -1, -1):
        product = r_delta.mT @ hidden[layer] + 2 * l2 * v_w[layer]
        if layer:
            product = product + deltas[layer - 1].T @ r_h[layer - 1]
        out[:0] = [product.flatten(1), *([r_delta.sum(1)] if biases else [])]
        if layer:
            r_e = r_delta @ weights[layer] + deltas[layer - 1] @ v_w[layer]
            r_delta = slopes[layer - 1] * r_e
            if bends:
                r_delta = r_delta + bends[layer - 1] * r_a[layer - 1]
    return torch.cat(out, 1)


def mlp_neumann_solve(
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
    deltas: Sequence[Tensor],
    probabilities: Tensor | None,
    b: Tensor,
    scale: float,
    biases: bool,
    l2: float,
    alpha: float,
    damping: float,
    steps: int,
    stop: Tensor,
) -> tuple[Tensor, Tensor]:
    """`glm_neumann_solve` for a multilayer perceptron, its arguments as in `mlp_hvp`."""
    model = weights, hidden, slopes, bends, deltas, probabilities
    return neumann_series(lambda v: mlp_hvp(*model, v, scale, biases, l2), b, alpha, damping, steps, stop)


def mlp_cg_solve(
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
    deltas: Sequence[Tensor],
    probabilities: Tensor | None,
    b: Tensor,
    scale: float,
    biases: bool,
    l2: float,
    damping: float,
    steps: int,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`glm_cg_solve` for a multilayer perceptron, its arguments as in `mlp_hvp`."""
    model = weights, hidden, slopes, bends, deltas, probabilities
    return conjugate_gradients(lambda p: mlp_hvp(*model, p, scale, biases, l2), b, damping, steps, state)
