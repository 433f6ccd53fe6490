"""The networks of the experiments, and one L2 penalty per weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hypergrad_ext.demo.data import CLASSES, Examples

Shape = tuple[int, int, int]
"""Channels, height, width."""


def linear(shape: Shape) -> nn.Module:
    """Softmax regression: 650 weights on digits, 7,850 on MNIST, 30,730 on CIFAR-10. Starts at zero."""
    layer = nn.Linear(shape[0] * shape[1] * shape[2], CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer)


def mlp(shape: Shape) -> nn.Module:
    """One hidden layer as wide as the input, as in the paper: 4,810 weights on digits, 623,290 on MNIST."""
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, pixels), nn.ReLU(), nn.Linear(pixels, CLASSES))


def cnn(shape: Shape) -> nn.Module:
    """Two convolutions and a hidden layer: 38,282 weights on digits."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 2) * (width // 2), 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def alexnet(shape: Shape) -> nn.Module:
    """The paper's AlexNet for small images: 20,125,386 weights on MNIST, 23,272,266 on CIFAR-10."""
    channels, height, width = shape
    convolutions = nn.Sequential(
        nn.Conv2d(channels, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    features = 256 * (height // 16) * (width // 16)
    return nn.Sequential(
        *convolutions, nn.Linear(features, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, CLASSES)
    )


MODELS: dict[str, Callable[[Shape], nn.Module]] = {"linear": linear, "mlp": mlp, "cnn": cnn, "alexnet": alexnet}


def loss(model: nn.Module, examples: Examples) -> Tensor:
    """Mean cross-entropy."""
    return cross_entropy(model(examples.x), examples.y)


def size(model: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in model.parameters())


def penalties(model: nn.Module, log_penalty: float) -> list[Tensor]:
    """One logarithm of an L2 penalty per weight: the hyperparameters, one tensor per parameter."""
    return [torch.full_like(p, log_penalty).requires_grad_() for p in model.parameters()]


def penalty(weights: Iterable[Tensor], log_penalties: Iterable[Tensor]) -> Tensor:
    r""":math:`\sum_i e^{\lambda_i} w_i^2`; its Hessian is diagonal, :math:`2 e^{\lambda_i}`."""
    terms = zip(log_penalties, weights, strict=True)
    return torch.stack([(lam.exp() * w.square()).sum() for lam, w in terms]).sum()
