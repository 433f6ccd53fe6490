"""The problems' losses in JAX, on the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from torch import Tensor

from bench.peers.problems import Problem

Params = dict[str, Any]


class Twin:
    """A problem for JAX: weights, penalties and batches as arrays, and losses as pure functions of them."""

    def __init__(self, problem: Problem) -> None:
        self.names, self.penalised = list(problem.params), list(problem.log_l2)
        self.params = arrays(problem.params)
        self.log_l2 = arrays(problem.log_l2)
        self.train = tuple(_array(t) for t in problem.train)
        self.val = tuple(_array(t) for t in problem.val)
        self.b = arrays(dict(zip(self.names, problem.b, strict=True)))
        self._forward = FORWARD[problem.name]

    def cross_entropy(self, params: Params, batch: tuple[Any, Any]) -> Any:
        """Mean cross entropy of a batch."""
        x, y = batch
        return -jnp.take_along_axis(jax.nn.log_softmax(self._forward(params, x)), y[:, None], 1).mean()

    def train_loss(self, params: Params, log_l2: Params, batch: tuple[Any, Any]) -> Any:
        """With the penalties; an empty dict for none."""
        penalty = sum((jnp.exp(t) * params[n] ** 2).sum() for n, t in log_l2.items())
        return self.cross_entropy(params, batch) + penalty

    def vectors(self, problem: Problem, k: int) -> Params:
        """The problem's right-hand sides."""
        return arrays(dict(zip(self.names, problem.vectors(k), strict=True)))

    def listed(self, result: Params) -> list[Any]:
        """Arrays in the problem's order, when they are ready: a dict comes back from JAX sorted by name."""
        jax.block_until_ready(result)
        return [result[n] for n in (self.names if len(result) == len(self.names) else self.penalised)]


def arrays(tensors: dict[str, Tensor]) -> Params:
    """Tensors as arrays."""
    return {n: _array(t) for n, t in tensors.items()}


def _array(t: Tensor) -> Any:
    return jnp.asarray(t.detach().numpy())


def _linear(p: Params, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _mlp(p: Params, h: Any) -> Any:
    layers = sorted({int(n.split(".")[0]) for n in p})
    for i in layers:
        h = _linear(p, str(i), jnp.tanh(h) if i else h)
    return h


def _convolution(p: Params, name: str, x: Any, stride: int = 1, padding: int = 1) -> Any:
    y = jax.lax.conv_general_dilated(
        x,
        p[f"{name}.weight"],
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return y + p[f"{name}.bias"][:, None, None]


def _pool(x: Any) -> Any:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def _cnn(p: Params, x: Any) -> Any:
    for name in ("0", "3"):
        x = _pool(jax.nn.relu(_convolution(p, name, x)))
    return _linear(p, "7", x.reshape(len(x), -1))


def _lstm(p: Params, x: Any) -> Any:
    def step(state: Any, x: Any) -> Any:
        h, c = state
        gates = x @ p["cell.weight_ih"].T + p["cell.bias_ih"] + h @ p["cell.weight_hh"].T + p["cell.bias_hh"]
        i, f, g, o = jnp.split(gates, 4, 1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    zeros = jnp.zeros((len(x), p["cell.weight_hh"].shape[1]))
    (h, _), _ = jax.lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))
    return _linear(p, "head", h)


def _norm(p: Params, name: str, x: Any, axes: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    centred = x - x.mean(axes, keepdims=True)
    scale = jax.lax.rsqrt((centred**2).mean(axes, keepdims=True) + 1e-5)
    return centred * scale * p[f"{name}.weight"].reshape(shape) + p[f"{name}.bias"].reshape(shape)


def _transformer(p: Params, x: Any, heads: int = 4) -> Any:
    b, s, d = x.shape
    for i in ("0", "1"):
        split = _linear(p, f"{i}.qkv", _norm(p, f"{i}.norm1", x, (-1,), (-1,)))
        q, k, v = split.reshape(b, s, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / (d // heads) ** 0.5)
        x = x + _linear(p, f"{i}.out", (weights @ v).transpose(0, 2, 1, 3).reshape(b, s, d))
        up = _linear(p, f"{i}.up", _norm(p, f"{i}.norm2", x, (-1,), (-1,)))
        x = x + _linear(p, f"{i}.down", jax.nn.gelu(up, approximate=False))
    return _linear(p, "3", x.reshape(b * s, d))


def _resnet(p: Params, x: Any) -> Any:
    def norm(name: str, x: Any) -> Any:
        return _norm(p, name, x, (0, 2, 3), (-1, 1, 1))

    h = jax.nn.relu(norm("norm1", _convolution(p, "conv1", x, stride=2)))
    h = norm("norm2", _convolution(p, "conv2", h)) + _convolution(p, "shortcut", x, stride=2, padding=0)
    return _linear(p, "head", jax.nn.relu(h).mean((2, 3)))


FORWARD: dict[str, Callable[[Params, Any], Any]] = {
    "logistic": _mlp,
    "mlp": _mlp,
    "deep": _mlp,
    "cnn": _cnn,
    "lstm": _lstm,
    "transformer": _transformer,
    "resnet": _resnet,
}
