"""Labelled images, and scikit-learn's digits: 1797 of them with 8x8 pixels, shipped with the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 10
PIXELS = 64


@dataclass(frozen=True)
class Examples:
    """Images ``x`` in [0, 1], ``(n, pixels)`` or ``(n, channels, height, width)``, and their labels ``y``, ``(n,)``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.y)

    def __add__(self, other: Examples) -> Examples:
        """These examples followed by others."""
        return Examples(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))

    def __getitem__(self, index: Tensor | slice) -> Examples:
        """Some of the examples."""
        return Examples(self.x[index], self.y[index])

    def to(self, target: torch.dtype | torch.device) -> Examples:
        """The same examples with pixels of another dtype, or all of them on another device."""
        return Examples(self.x.to(target), self.y.to(target) if isinstance(target, torch.device) else self.y)

    def flat(self) -> Examples:
        """The same examples as rows of pixels, ``(n, channels * height * width)``."""
        return Examples(self.x.flatten(1), self.y)


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of examples."""

    train: Examples
    validation: Examples
    test: Examples

    def map(self, change: Callable[[Examples], Examples]) -> Split:
        """The same change to all three, such as ``lambda part: part.flat()``."""
        return Split(change(self.train), change(self.validation), change(self.test))


def all_digits() -> Examples:
    """All digits as rows of pixels.

    Returns:
        The examples, in float64.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Examples(torch.tensor(bunch.data / 16), torch.tensor(bunch.target))


def digits(seed: int, *, train: int, validation: int) -> Split:
    """Shuffle the digits by ``seed`` and cut them; the test set is what is left.

    Args:
        seed: Seed of the shuffle.
        train: Number of training examples.
        validation: Number of validation examples.

    Returns:
        The split, in float64.
    """
    everything = all_digits()
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    cuts = slice(train), slice(train, train + validation), slice(train + validation, None)
    return Split(*(everything[order[cut]] for cut in cuts))
