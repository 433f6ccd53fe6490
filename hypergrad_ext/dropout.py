"""Dropout that is differentiable in its rate, for rates that are hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def concrete_mask(
    logit: Tensor, shape: Sequence[int], *, temperature: float = 0.1, generator: torch.Generator | None = None
) -> Tensor:
    r"""A random dropout mask that is differentiable in the logit of its rate: the concrete relaxation.

    .. math::

        m = \frac{1 - z}{1 - p}, \qquad
        z = \sigma\!\left(\frac{\ell + \ln u - \ln(1 - u)}{T}\right), \qquad p = \sigma(\ell), \quad u \sim U(0, 1).

    As T goes to 0, z is 1 with probability p, and m is the mask of ordinary dropout. Multiply by it what is to be
    dropped: the outputs of a layer with one mask for all steps is variational dropout, a recurrent weight is
    DropConnect (`nn.LSTM`), the rows of an embedding is word dropout.

    Args:
        logit: :math:`\ell`, broadcastable to ``shape``: one for all, or one per unit or weight.
        shape: Of the mask.
        temperature: T > 0.
        generator: Of u; None takes torch's own.

    Returns:
        The mask, of ``shape``, with dtype and device of ``logit``.

    Raises:
        ValueError: If ``temperature`` is not positive, or ``logit`` does not broadcast to ``shape``.
        TypeError: If ``logit`` is not a floating point tensor.

    References:
        Gal, Hron, Kendall, "Concrete Dropout", NeurIPS 2017.

    Example:
        >>> from hypergrad_ext import functional
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> mask = functional.concrete_mask(logit, (2, 3))
        >>> mask.shape, mask.requires_grad
        (torch.Size([2, 3]), True)
    """
    if not isinstance(logit, Tensor) or not logit.is_floating_point():
        got = logit.dtype if isinstance(logit, Tensor) else type(logit).__name__
        raise TypeError(f"logit: expected a floating point tensor, got {got}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    shape = torch.Size(shape)
    try:
        fits = torch.broadcast_shapes(logit.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"logit: expected a shape that broadcasts to {tuple(shape)}, got {tuple(logit.shape)}")
    u = torch.rand(shape, dtype=logit.dtype, device=logit.device, generator=generator)
    # 0 may be drawn, 1 is not.
    noise = torch.logit(u, eps=torch.finfo(logit.dtype).eps)
    # By logarithms, so that rates near 1 do not divide zero by zero.
    return torch.exp(F.logsigmoid(-(logit + noise) / temperature) - F.logsigmoid(-logit))
