"""Models whose Hessian products, solves, hypergradients and memory are measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models import Attention, Recurrent, Residual


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
    return net, torch.randn(256, 784), torch.randint(10, (256,))


def lstm() -> tuple[nn.Module, Tensor, Tensor]:
    return Recurrent(nn.LSTMCell, 64, 64), torch.randn(64, 20, 64), torch.randint(3, (64,))


def deep() -> tuple[nn.Module, Tensor, Tensor]:
    layers = [part for _ in range(60) for part in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(32, 10)), torch.randn(64, 32), torch.randint(10, (64,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(Attention(64, 4), Attention(64, 4), nn.Flatten(0, 1), nn.Linear(64, 10))
    return net, torch.randn(16, 32, 64), torch.randint(10, (512,))


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 10),
    )
    return net, torch.randn(64, 1, 28, 28), torch.randint(10, (64,))


def tiny() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2))
    return net, torch.randn(32, 20), torch.randint(2, (32,))


def residual() -> tuple[nn.Module, Tensor, Tensor]:
    return Residual(16, 32), torch.randn(32, 16, 16, 16), torch.randint(3, (32,))


MODELS = {
    "MLP 784-256-256-10, batch 256": mlp,
    "MLP 20-64-2, batch 32": tiny,
    "60 layers of 32, batch 64": deep,
    "LSTM cell, 20 steps, 64 wide, batch 64": lstm,
    "transformer, 2 layers, 64 wide, 16 x 32": transformer,
    "CNN 16-32, 28 x 28, batch 64": cnn,
    "ResNet block, 32 wide, 16 x 16, batch 32": residual,
}
OVERHEAD_BOUND = list(MODELS)[1:5]
COMPILED = list(MODELS)[2:6]
