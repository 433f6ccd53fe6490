"""scikit-learn's digits: 1797 labelled images of 8x8 pixels, shipped with the library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 10
PIXELS = 64


@dataclass(frozen=True)
class Examples:
    """Images ``x``, shape ``(n, 64)`` in [0, 1], and their labels ``y``, shape ``(n,)``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.y)

    def to(self, dtype: torch.dtype) -> Examples:
        """The same examples with pixels of another dtype."""
        return Examples(self.x.to(dtype), self.y)

    def __add__(self, other: Examples) -> Examples:
        """These examples followed by others."""
        return Examples(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of examples."""

    train: Examples
    validation: Examples
    test: Examples


def digits(seed: int, *, train: int, validation: int) -> Split:
    """Shuffle the digits by ``seed`` and cut them; the test set is what is left.

    Args:
        seed: Seed of the shuffle.
        train: Number of training examples.
        validation: Number of validation examples.

    Returns:
        The split, in float64.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(bunch.data / 16)[order]
    y = torch.tensor(bunch.target)[order]
    sizes = [train, validation, len(y) - train - validation]
    return Split(*(Examples(*pair) for pair in zip(x.split(sizes), y.split(sizes), strict=True)))
