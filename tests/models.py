"""Small models of the kinds that people train, each with a loss of its dict of parameters and a batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Loss = Callable[[dict[str, Tensor]], Tensor]


class Attention(nn.Module):
    """A transformer block whose attention is written out."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class MathAttention(nn.Module):
    """Attention by torch's own function, with the kernel that can be differentiated twice."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


class Recurrent(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell: type, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell, self.head = cell(inputs, hidden), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Residual(nn.Module):
    """A residual block with batch normalisation and a strided shortcut."""

    def __init__(self, inputs: int = 3, width: int = 5) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, width, 3, 2, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut, self.head = nn.Conv2d(inputs, width, 1, stride=2), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.head(F.relu(h + self.shortcut(x)).mean((2, 3)))


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.embedding(x))), self.embedding.weight).mean(1)


class Cube(torch.autograd.Function):
    """A function of the user's own, twice differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Custom(nn.Module):
    """A network with that function in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Cube.apply(torch.sin(self.first(x))))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(45, 3),
    )


def _strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(5, 4, (3, 2), dilation=2, padding=(2, 1)),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(100, 3),
    )


def _mlp(activation: type) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), activation(), nn.Linear(9, 7), activation(), nn.Linear(7, 3))


# Name, module, shape of one input (None: words).
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "mlp_tanh": (lambda: _mlp(nn.Tanh), (6,)),
    "mlp_relu": (lambda: _mlp(nn.ReLU), (6,)),
    "mlp_gelu": (lambda: _mlp(nn.GELU), (6,)),
    "mlp_elu": (lambda: _mlp(nn.ELU), (6,)),
    "mlp_silu": (lambda: _mlp(nn.SiLU), (6,)),
    "linear": (lambda: nn.Linear(6, 3), (6,)),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 3)), (6,)),
    "cnn_train": (_cnn, (1, 10, 10)),
    "cnn_eval": (lambda: _cnn().eval(), (1, 10, 10)),
    "cnn_strided": (_strided, (1, 10, 10)),
    "residual": (Residual, (3, 8, 8)),
    "lstm_cell": (lambda: Recurrent(nn.LSTMCell, 4, 5), (6, 4)),
    "gru_cell": (lambda: Recurrent(nn.GRUCell, 4, 5), (6, 4)),
    "rnn_cell": (lambda: Recurrent(nn.RNNCell, 4, 5), (6, 4)),
    "transformer": (lambda: nn.Sequential(Attention(8, 2), Attention(8, 2), nn.Flatten(), nn.Linear(40, 3)), (5, 8)),
    "sdpa": (lambda: nn.Sequential(MathAttention(8), nn.Flatten(), nn.Linear(40, 3)), (5, 8)),
    "tied": (Tied, None),
    "custom": (Custom, (6,)),
}


def batch(name: str, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and classes for a model."""
    shape = MODELS[name][1]
    x = torch.randint(11, (n, 5)) if shape is None else torch.randn(n, *shape).to(dtype)
    return x, torch.randint(11 if shape is None else 3, (n,))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    """Cross entropy as a function of the parameters."""
    return lambda params: F.cross_entropy(functional_call(model, params, (x,)), y)


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return MODELS[name][0]().to(dtype)


def random_like(model: nn.Module, k: int | None = None) -> dict:
    lead = () if k is None else (k,)
    return {name: torch.randn(*lead, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
