"""The Neumann series of some of the models by jitted JAX: ``linearize`` once, ``scan`` over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import hypergrad_ext as hg
from hypergrad_ext.solvers import System
from hypergrad_ext.solvers.neumann import series
from tests.models import loss_of

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

STEPS = 10
ALPHA = 1e-3


def neumann(operator: hg.Hessian, b: Tensor) -> Callable[[], Tensor]:
    return lambda: series(System(operator, 0.0, None), b.clone(), STEPS, ALPHA)[0]


def jax_series(name: str, model: nn.Module, x: Tensor, y: Tensor, b: Tensor) -> Callable[[], object] | None:
    """The same series by JAX; None where it is not installed, or the model has no twin."""
    forward = next(
        (
            f
            for kind, f in {"MLP": _jax_mlp, "60 layers": _jax_mlp, "transformer": _jax_transformer}.items()
            if name.startswith(kind)
        ),
        None,
    )
    if jax is None or forward is None:
        return None
    names = [n for n, _ in model.named_parameters()]
    params = {n: jnp.asarray(p.detach().numpy()) for n, p in model.named_parameters()}
    parts = hg.Hessian(lambda p: p, model).space.views(b)
    start = {n: jnp.asarray(t.numpy()) for n, t in zip(names, parts, strict=True)}
    inputs, classes = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

    def loss(params):
        return -jnp.take_along_axis(jax.nn.log_softmax(forward(params, inputs)), classes[:, None], 1).mean()

    @jax.jit
    def run(params, b):
        _, product = jax.linearize(jax.grad(loss), params)

        def step(state, _):
            v, p = state
            v = jax.tree.map(lambda a, h: a - ALPHA * h, v, product(v))
            return (v, jax.tree.map(jnp.add, p, v)), None

        return jax.lax.scan(step, (b, b), None, length=STEPS)[0][1]

    def once():
        return jax.block_until_ready(run(params, start))

    found = torch.cat([torch.from_numpy(ALPHA * jnp.ravel(t).__array__()) for t in once().values()])
    truth = neumann(hg.Hessian(loss_of(model, x, y), model, engine="eager"), b)()
    # A dict comes back sorted by name.
    order = sorted(range(len(names)), key=names.__getitem__)
    truth = torch.cat([hg.Hessian(lambda p: p, model).space.views(truth)[i].reshape(-1) for i in order])
    error = float((found - truth).norm() / truth.norm())
    assert error < 1e-4, f"JAX computes something else: {error}"
    return once


def _jax_mlp(params, h):
    weights = sorted((n for n in params if n.endswith("weight")), key=lambda n: int(n.split(".")[0]))
    for i, n in enumerate(weights):
        h = (jnp.tanh(h) if i else h) @ params[n].T + params[n.replace("weight", "bias")]
    return h


def _jax_transformer(params, x, heads=4):
    def linear(x, name):
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]

    b, s, d = x.shape
    for layer in "01":
        split = linear(norm(x, f"{layer}.norm1"), f"{layer}.qkv").reshape(b, s, 3, heads, d // heads)
        q, k, v = split.transpose(2, 0, 3, 1, 4)
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(d // heads))
        x = x + linear((weights @ v).swapaxes(1, 2).reshape(b, s, d), f"{layer}.out")
        hidden = jax.nn.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.up"), approximate=False)
        x = x + linear(hidden, f"{layer}.down")
    return linear(x.reshape(-1, d), "3")
