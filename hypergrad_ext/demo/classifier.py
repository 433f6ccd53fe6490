"""Softmax regression, and an inner solver exact enough for the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hypergrad_ext.demo.data import CLASSES, PIXELS, Examples


def zero_weights() -> Tensor:
    """Weights ``(65, 10)``: a row per pixel, and one for the bias."""
    return torch.zeros(PIXELS + 1, CLASSES, dtype=torch.float64, requires_grad=True)


def logits(w: Tensor, x: Tensor) -> Tensor:
    """``x W + bias``, shape ``(n, 10)``."""
    return torch.addmm(w[-1], x, w[:-1])


def loss(w: Tensor, data: Examples) -> Tensor:
    """Mean cross-entropy."""
    return cross_entropy(logits(w, data.x), data.y)


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy, and the share of examples classified correctly."""

    loss: float
    accuracy: float


def score(w: Tensor, data: Examples) -> Score:
    """Evaluate weights on some examples."""
    with torch.no_grad():
        correct = logits(w, data.x).argmax(1) == data.y
        return Score(float(loss(w, data)), float(correct.double().mean()))


def fit(
    objective: Callable[[], Tensor], params: Sequence[Tensor], *, tol: float = 1e-7, max_steps: int = 1000
) -> float:
    """Minimise ``objective`` over ``params`` in place by L-BFGS, from where they are.

    The implicit function theorem speaks of weights at a minimum: how far they are from one is returned.

    Args:
        objective: The training loss at the present ``params``.
        params: Weights that require grad.
        tol: Stop once no entry of the gradient is larger.
        max_steps: Stop after so many steps at the latest.

    Returns:
        The largest entry of the gradient that is left.
    """
    optimizer = torch.optim.LBFGS(
        params,
        max_iter=max_steps,
        max_eval=4 * max_steps,
        tolerance_grad=tol,
        tolerance_change=0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value = objective()
        for p, g in zip(params, torch.autograd.grad(value, params), strict=True):
            p.grad = g
        return value.detach()

    optimizer.step(closure)
    return max(float(g.abs().max()) for g in torch.autograd.grad(objective(), params))
