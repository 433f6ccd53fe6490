"""One Neumann step of general models (product and update), by every engine, against backward passes.

The baseline is what any other package runs: a backward pass through the retained gradient graph, then our
fused update. Every timed call makes a whole series of ten steps; recording is timed by itself. Times are CPU
time of the thread where there is one thread, so that a busy machine disturbs them little.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad_ext as hg
from bench.measure import interleave, median, ratio
from hypergrad_ext.engines import traced
from hypergrad_ext.solvers import System
from hypergrad_ext.solvers.neumann import series
from tests.models import Attention, Recurrent

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

STEPS = 10
ALPHA = 1e-3
ENGINES = ("eager", "traced", "native")


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


MODELS = {
    "MLP 784-256-256-10, batch 256": mlp,
    "LSTM cell, 20 steps, 64 wide, batch 64": lstm,
    "60 layers of 32, batch 64": deep,
    "transformer, 2 layers, 64 wide, 16 x 32": transformer,
    "CNN 16-32, 28 x 28, batch 64": cnn,
}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda params: F.cross_entropy(functional_call(model, params, (x,)), y)


def neumann(operator: hg.Hessian, b: Tensor) -> Callable[[], Tensor]:
    return lambda: series(System(operator, 0.0, None), b.clone(), STEPS, ALPHA)[0]


def jax_series(model: nn.Module, x: Tensor, y: Tensor, b: Tensor) -> Callable[[], object] | None:
    """Of a multilayer perceptron: ``linearize`` once, ``scan`` over the steps, in one jitted function."""
    if jax is None or not isinstance(model, nn.Sequential) or not isinstance(model[0], nn.Linear):
        return None
    params = [jnp.asarray(p.detach().numpy()) for p in model.parameters()]
    parts = [jnp.asarray(t.numpy()) for t in hg.Hessian(lambda p: p, model).space.views(b)]
    inputs, classes = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

    def loss(params):
        h = inputs
        for layer in range(0, len(params), 2):
            h = (jnp.tanh(h) if layer else h) @ params[layer].T + params[layer + 1]
        return -jnp.take_along_axis(jax.nn.log_softmax(h), classes[:, None], 1).mean()

    @jax.jit
    def run(params, b):
        _, product = jax.linearize(jax.grad(loss), params)

        def step(state, _):
            v, p = state
            v = [a - ALPHA * h for a, h in zip(v, product(v), strict=True)]
            return (v, [a + c for a, c in zip(p, v, strict=True)]), None

        return jax.lax.scan(step, (b, b), None, length=STEPS)[0][1]

    return lambda: jax.block_until_ready(run(params, parts))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_neumann_step(name, threads, benchmark, report, quick):
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    operators = {engine: hg.Hessian(loss_of(model, x, y), model, engine=engine) for engine in ENGINES}
    b = torch.randn(operators["eager"].space.numel)
    exact_model = MODELS[name]()[0].double()
    exact_model.load_state_dict(model.state_dict())
    double = x.double() if x.is_floating_point() else x
    exact = hg.Hessian(loss_of(exact_model, double, y), exact_model, engine="eager")
    truth = torch.cat([t.reshape(-1) for t in exact.matvec(exact.space.views(b.double()))])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        errors = {}
        for engine, operator in operators.items():
            with torch.no_grad():
                for _ in range(2):
                    product = operator.matvec(operator.space.views(b))
            errors[engine] = float((torch.cat([t.reshape(-1) for t in product]) - truth).norm() / truth.norm())
            assert operator.engine == engine
            assert errors[engine] <= 2 * errors["eager"] + 1e-6, f"{engine} {errors}"
        variants: dict[str, Callable[[], object]] = {e: neumann(operator, b) for e, operator in operators.items()}
        gradient = operators["eager"].gradient
        variants["recording"] = lambda: traced.TracedGradient(gradient, "native").start(
            operators["eager"].space.views(b)
        )
        compiled = jax_series(model, x, y, b)
        if compiled is not None:
            variants["jitted JAX"] = compiled
        with torch.no_grad():
            clock = time.thread_time if threads == 1 else time.perf_counter
            seconds = interleave(variants, 3 if quick else 9, warmup=1, clock=clock)
            benchmark.pedantic(variants["native"], rounds=1)
    finally:
        torch.set_num_threads(before)
    eager = median(seconds["eager"]) / STEPS
    row = {"model": name, "threads": threads, "rel. error": errors["native"], "eager ms": eager * 1e3}
    for other in ("traced", "native"):
        row[f"x {other}"] = "{:.2f} ({:.2f}-{:.2f})".format(*ratio(seconds, "eager", other))
    row["recording, products"] = median(seconds["recording"]) / eager
    known = "jitted JAX" in variants
    row["x native to JAX"] = "{:.2f} ({:.2f}-{:.2f})".format(*ratio(seconds, "jitted JAX", "native")) if known else "-"
    report("hvp", row)
