"""The two networks whose hypergradients are timed, at a minimum of their training loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hypergrad_ext.demo import classifier
from hypergrad_ext.demo.data import CLASSES, PIXELS, Examples, Split

# The start of the paper's per-weight penalties.
LOG_PENALTY = -7.0


class Residual(nn.Module):
    """``x + tanh(W x + b)``: what keeps a deep narrow network trainable."""

    def __init__(self, width: int) -> None:
        """A square layer."""
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return x + self.linear(x).tanh()


@dataclass
class Problem:
    """A trained network with one log-penalty per weight.

    Attributes:
        name: What the table calls it.
        network: The network.
        penalties: One tensor per parameter, of its shape.
        data: Training and validation set in the network's dtype.
    """

    name: str
    network: nn.Module
    penalties: list[Tensor]
    data: Split

    @property
    def params(self) -> list[nn.Parameter]:
        """The weights."""
        return list(self.network.parameters())

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(p.numel() for p in self.params)

    def train_loss(self) -> Tensor:
        """Cross-entropy plus one L2 penalty per weight."""
        penalty = sum((lam.exp() * w.square()).sum() for lam, w in zip(self.penalties, self.params, strict=True))
        return self._cross_entropy(self.data.train) + penalty

    def val_loss(self) -> Tensor:
        """Cross-entropy on the validation set."""
        return self._cross_entropy(self.data.validation)

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy in another precision."""
        data = self.data.map(lambda part: part.to(dtype))
        penalties = [lam.detach().to(dtype).requires_grad_() for lam in self.penalties]
        return Problem(self.name, copy.deepcopy(self.network).to(dtype), penalties, data)

    def _cross_entropy(self, data: Examples) -> Tensor:
        return cross_entropy(self.network(data.x), data.y)


def shallow(width: int = 64) -> nn.Module:
    """64 pixels, one hidden layer, 10 classes."""
    return nn.Sequential(nn.Linear(PIXELS, width), nn.Tanh(), nn.Linear(width, CLASSES))


def deep(depth: int = 20, width: int = 32) -> nn.Module:
    """Many small layers, where the bookkeeping around every product matters most."""
    return nn.Sequential(nn.Linear(PIXELS, width), *(Residual(width) for _ in range(depth)), nn.Linear(width, CLASSES))


def trained(name: str, network: nn.Module, data: Split, *, max_steps: int = 400) -> Problem:
    """Train in float64 until hardly any negative curvature is left, and return the problem in float32.

    Args:
        name: What the table calls it.
        network: The network, with its initial weights.
        data: Training and validation set.
        max_steps: Steps of L-BFGS. After 400 the least eigenvalue was above -1e-3 (seeds 0 and 8).

    Returns:
        The problem.
    """
    penalties = [torch.full_like(p, LOG_PENALTY).requires_grad_() for p in network.parameters()]
    problem = Problem(name, network, penalties, data).to(torch.float64)
    fixed = [lam.detach() for lam in problem.penalties]
    inner = Problem(name, problem.network, fixed, problem.data)
    classifier.fit(inner.train_loss, inner.params, max_steps=max_steps)
    return problem.to(torch.float32)
