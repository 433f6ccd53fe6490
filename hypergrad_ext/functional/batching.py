"""What the functions' rules for ``torch.func.vmap`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def batched(t: Tensor, dim: int | None, at: int, size: int) -> Tensor:
    """The batch dimension ``dim`` moved to position ``at``, or made there."""
    if dim is not None:
        return t.movedim(dim, at)
    t = t.unsqueeze(at)
    return t.expand(*t.shape[:at], size, *t.shape[at + 1 :])


def one_by_one(function: Callable[..., Tensor], size: int, in_dims: tuple, *arguments: object) -> Tensor:
    """``function`` for every member of a batch in turn, stacked; a dimension of None is not batched.

    Returns:
        Like a batch of the third argument, the vectors.
    """
    if size == 0:
        v: Any = arguments[2]
        return batched(v, in_dims[2], 0, size)

    def member(i: int) -> list[object]:
        return [
            t.select(dim, i) if dim is not None and isinstance(t, Tensor) else t
            for t, dim in zip(arguments, in_dims, strict=True)
        ]

    return torch.stack([function(*member(i)) for i in range(size)])
