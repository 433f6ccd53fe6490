"""What the functions' rules for ``torch.func.vmap`` share, and their check of what they are not differentiable in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def refuse_grad(variable: str, **tensors: Tensor | float | None) -> None:
    """Refuse tensors that require grad, in reverse or forward mode, where only ``variable`` may.

    Raises:
        ValueError: If one does: its gradient would silently be missing.
    """
    for name, t in tensors.items():
        if isinstance(t, Tensor) and ((t.requires_grad and torch.is_grad_enabled()) or _has_tangent(t)):
            raise ValueError(
                f"{name}: expected a tensor that does not require grad, since the product is differentiable in "
                f"{variable} only; pass {name}.detach()"
            )


def refuse_tangents(variable: str, **tangents: Tensor | None) -> None:
    """Refuse tangents in the rule of forward mode, where only ``variable`` may have one.

    Raises:
        ValueError: If there is one: it would silently be taken for zero.
    """
    for name, tangent in tangents.items():
        if tangent is not None:
            raise ValueError(f"{name}: expected no tangent, since the product is differentiable in {variable} only")


def _has_tangent(t: Tensor) -> bool:
    level = torch.autograd.forward_ad._current_level
    return level >= 0 and torch.autograd.forward_ad.unpack_dual(t, level=level).tangent is not None


def batched(t: Tensor, dim: int | None, at: int, size: int) -> Tensor:
    """The batch dimension ``dim`` moved to position ``at``, or made there."""
    if dim is not None:
        return t.movedim(dim, at)
    t = t.unsqueeze(at)
    return t.expand(*t.shape[:at], size, *t.shape[at + 1 :])


def one_by_one(function: Callable[..., Tensor], size: int, in_dims: tuple, *arguments: object) -> Tensor:
    """``function`` for every member of a batch in turn, stacked; a dimension of None is not batched."""

    def member(i: int) -> list[object]:
        return [
            t.select(dim, i) if dim is not None and isinstance(t, Tensor) else t
            for t, dim in zip(arguments, in_dims, strict=True)
        ]

    return torch.stack([function(*member(i)) for i in range(size)])
