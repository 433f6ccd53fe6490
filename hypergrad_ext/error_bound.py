"""What is certain about the error of a solve and of a hypergradient, where no eigenvalue is below a known number."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from hypergrad_ext.engines import RetainedGradient
from hypergrad_ext.norms import norms
from hypergrad_ext.solvers import System

# Hyperparameters, counted by element, up to which a bound for each of them is worth a backward pass for each.
MOST_HPARAMS = 64
# Roundings of the largest term by which a Rayleigh quotient may miss its true value.
_ROUNDINGS = 100


def check_lower(lower: object) -> float | None:
    """A lower bound of the eigenvalues as a float, or None.

    Returns:
        The bound.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is not finite.
    """
    if lower is None:
        return None
    if not isinstance(lower, numbers.Real) or isinstance(lower, bool):
        raise TypeError(f"lower: expected a number or None, got {lower!r}")
    if not math.isfinite(lower):
        raise ValueError(f"lower: expected a finite number, got {lower}")
    return float(lower)


def solution_bound(system: System, x: Tensor, r_norm: Tensor, ax: Tensor, lower: float) -> Tensor | None:
    r"""``|r| / (lower + d)``, which the error of ``x`` is not above, up to rounding; None where that says nothing.

    Args:
        system: The system.
        x: The solution, ``(n,)`` or ``(k, n)``.
        r_norm: Norm of its residual, ``()`` or ``(k,)``.
        ax: ``(H + d I) x``.
        lower: What no eigenvalue of H is below.

    Returns:
        Shape ``()`` or ``(k,)``, float64.

    Raises:
        ValueError: If the Rayleigh quotient of ``x`` is below ``lower``, which therefore is none.
    """
    squares = x.double().square().sum(-1)
    products = (x.double() * ax.double()).sum(-1)
    size = norms(x) * norms(ax)
    slack = _ROUNDINGS * torch.finfo(x.dtype).eps * (size + abs(system.damping) * squares)
    wrong = products + slack < (lower + system.damping) * squares
    if bool(wrong.any()):
        least = float((products / squares)[wrong].min()) - system.damping
        raise ValueError(
            f"lower: expected a number that no eigenvalue of H is below, got {lower:.3g}, but v.H v / v.v is "
            f"{least:.3g} for a v"
        )
    if lower + system.damping <= 0:
        return None
    return r_norm / (lower + system.damping)


def mixed_norms(gradient: RetainedGradient, hparams: Sequence[Tensor]) -> list[Tensor] | None:
    r"""Norms of the columns of :math:`\partial^2 L / \partial w\, \partial \lambda`, in the shapes of ``hparams``.

    With e the error of x, that of the hypergradient by :math:`\lambda_j` is :math:`|m_j^\top e| \le |m_j| |e|`.

    Cost: a backward pass through the graph of the gradient, and one more for every element of ``hparams``.

    Args:
        gradient: Of the training loss, with its graph.
        hparams: The hyperparameters.

    Returns:
        One float64 tensor per hyperparameter; None if they have more than 64 elements, or the loss has operations that
        cannot be differentiated once more.
    """
    if sum(t.numel() for t in hparams) > MOST_HPARAMS:
        return None
    outputs = gradient.outputs
    norms = [torch.zeros(t.numel(), dtype=torch.float64, device=t.device) for t in hparams]
    try:
        with torch.enable_grad(), gradient.around():
            u = [torch.zeros_like(t, requires_grad=True) for t in outputs]
            pulled = torch.autograd.grad(outputs, hparams, u, create_graph=True, allow_unused=True) if outputs else []
            for part, norm in zip(pulled, norms, strict=False):
                if part is None or not part.requires_grad:
                    continue
                for j, element in enumerate(part.reshape(-1)):
                    column = torch.autograd.grad(element, u, retain_graph=True, allow_unused=True)
                    norm[j] = torch.stack([t.double().square().sum() for t in column if t is not None]).sum().sqrt()
    except RuntimeError:
        return None
    return [norm.view_as(t) for norm, t in zip(norms, hparams, strict=True)]
