"""Hessian-vector products of general models, by every engine, against backward passes and against jitted JAX.

What users run today is a backward pass through the retained gradient graph and an update of the vectors; the
baseline is that pass with our fused update, so ratios show what the engine alone gains. Four tables:

- a Neumann step: ten steps of a series, the product recorded before;
- a whole solve: what `inverse_hvp` takes with 20 steps, from the loss function on, with the forward pass, the
  gradient's graph and the recording;
- many vectors: one product with 8 and 32 vectors, against one backward pass after another, and against all at once;
- compiled: a Neumann step by a native plan whose pointwise parts are compiled for the model's shapes.

JAX runs ``linearize`` once and ``scan`` over the steps in one jitted function. One thread is timed by the process's
own clock, on which other jobs do not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import hypergrad_ext as hg
from bench import measure
from bench.measure import interleave, median, ratio
from hypergrad_ext.engines import choose, traced
from hypergrad_ext.solvers import System
from hypergrad_ext.solvers.neumann import series
from tests.models import Attention, Recurrent, Residual, loss_of

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

STEPS = 10
ALPHA = 1e-3
SOLVER = hg.Neumann(20, alpha=ALPHA)
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


@pytest.fixture(params=[1, 2], ids=["threads1", "threads2"])
def threads(request) -> Iterator[int]:
    """Torch's number of threads, and of cores; nothing is known of any model yet."""
    traced.clear_cache()
    choose.clear_histories()
    torch.manual_seed(0)
    with measure.threads(request.param):
        yield request.param


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


def neumann(operator: hg.Hessian, b: Tensor) -> Callable[[], Tensor]:
    return lambda: series(System(operator, 0.0, None), b.clone(), STEPS, ALPHA)[0]


def spread(seconds: dict[str, list[float]], slow: str, fast: str) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratio(seconds, slow, fast)) if fast in seconds and slow in seconds else "-"


def exact_product(name: str, model: nn.Module, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """In float64 by a backward pass."""
    double = MODELS[name]()[0].double()
    double.load_state_dict(model.state_dict())
    exact = hg.Hessian(loss_of(double, x.double(), y), double, engine="eager")
    return torch.cat([t.reshape(-1) for t in exact.matvec(exact.space.views(b.double()))])


@pytest.mark.parametrize("name", MODELS)
def test_neumann_step(name, threads, benchmark, report, quick):
    model, x, y = MODELS[name]()
    operators = {engine: hg.Hessian(loss_of(model, x, y), model, engine=engine) for engine in ENGINES}
    b = torch.randn(operators["eager"].space.numel)
    truth = exact_product(name, model, x, y, b)
    errors = {}
    with torch.no_grad():
        for engine, operator in operators.items():
            for _ in range(2):
                product = operator.matvec(operator.space.views(b))
            errors[engine] = float((torch.cat([t.reshape(-1) for t in product]) - truth).norm() / truth.norm())
            assert operator.engine == engine
            assert errors[engine] <= 2 * errors["eager"] + 1e-6, f"{engine} {errors}"
        variants: dict[str, Callable[[], object]] = {e: neumann(operator, b) for e, operator in operators.items()}
        gradient, first = operators["eager"].gradient, operators["eager"].space.views(b)
        variants["start"] = lambda: traced.TracedGradient(gradient, "native").start(first)
        compiled = jax_series(name, model, x, y, b)
        if compiled is not None:
            variants["jitted JAX"] = compiled
        seconds = interleave(variants, 3 if quick else 9, warmup=1, clock=measure.clock_for(threads))
        benchmark.pedantic(variants["native"], rounds=1)
    eager = median(seconds["eager"]) / STEPS
    report(
        f"engines_step_threads{threads}",
        {
            "model": name,
            "rel. error": errors["native"],
            "eager ms": eager * 1e3,
            "native ms": median(seconds["native"]) / STEPS * 1e3,
            "x traced": spread(seconds, "eager", "traced"),
            "x native": spread(seconds, "eager", "native"),
            "start, products": median(seconds["start"]) / eager,
            "x native to JAX": spread(seconds, "jitted JAX", "native"),
        },
    )


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_step(name, threads, benchmark, report, quick):
    model, x, y = MODELS[name]()
    operators = {e: hg.Hessian(loss_of(model, x, y), model, engine=e) for e in ("eager", "native", "compiled")}
    b = torch.randn(operators["eager"].space.numel)
    truth = exact_product(name, model, x, y, b)
    with torch.no_grad():
        begin = time.perf_counter()
        operators["compiled"].matvec(operators["compiled"].space.views(b))
        compiling = time.perf_counter() - begin
        product = torch.cat([t.reshape(-1) for t in operators["compiled"].matvec(operators["compiled"].space.views(b))])
        assert operators["compiled"].engine == "compiled"
        error = float((product - truth).norm() / truth.norm())
        assert error < 1e-5, error
        variants: dict[str, Callable[[], object]] = {e: neumann(operator, b) for e, operator in operators.items()}
        seconds = interleave(variants, 3 if quick else 9, warmup=1, clock=measure.clock_for(threads))
        benchmark.pedantic(variants["compiled"], rounds=1)
    report(
        f"engines_compiled_threads{threads}",
        {
            "model": name,
            "rel. error": error,
            "compiling s": compiling,
            "eager ms": median(seconds["eager"]) / STEPS * 1e3,
            "x compiled": spread(seconds, "eager", "compiled"),
            "x native": spread(seconds, "eager", "native"),
        },
    )


@pytest.mark.parametrize("name", MODELS)
def test_whole_solve(name, threads, benchmark, report, quick):
    """From a new loss function to the solution; ``auto`` has had calls to make up its mind in."""
    model, x, y = MODELS[name]()
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def solve(engine: str) -> Callable[[], hg.Solution]:
        return lambda: hg.solve(
            hg.Hessian(loss_of(model, x, y), model, engine=engine), v, SOLVER, damping=0.0, residual=False
        )

    variants = {engine: solve(engine) for engine in ("eager", "native", "auto")}
    found = {engine: variants[engine]() for engine in variants}
    truth = torch.cat([t.reshape(-1) for t in found["eager"].value.values()])
    for engine, solution in found.items():
        difference = torch.cat([t.reshape(-1) for t in solution.value.values()]) - truth
        assert float(difference.norm() / truth.norm()) < 1e-5, engine
    seconds = interleave(variants, 5 if quick else 15, warmup=2, clock=measure.clock_for(threads))
    benchmark.pedantic(variants["auto"], rounds=1)
    report(
        f"engines_solve_threads{threads}",
        {
            "model": name,
            "eager ms": median(seconds["eager"]) * 1e3,
            "auto ms": median(seconds["auto"]) * 1e3,
            "x native": spread(seconds, "eager", "native"),
            "x auto": spread(seconds, "eager", "auto"),
            "auto runs": variants["auto"]().engine,
        },
    )


@pytest.mark.parametrize("k", [8, 32])
@pytest.mark.parametrize("name", OVERHEAD_BOUND)
def test_many_vectors(name, k, threads, benchmark, report, quick):
    model, x, y = MODELS[name]()
    operator, replayed = (hg.Hessian(loss_of(model, x, y), model, engine=e) for e in ("eager", "native"))
    v = operator.space.views(torch.randn(k, operator.space.numel))
    rows = [[t[j] for t in v] for j in range(k)]
    gradient = operator.gradient
    with torch.no_grad():
        for value, truth in zip(replayed.matmat(v), gradient._one_by_one(v), strict=True):
            assert float((value - truth).norm()) <= 1e-4 * float(truth.norm()) + 1e-6
        variants: dict[str, Callable[[], object]] = {
            "loop": lambda: [operator.matvec(row) for row in rows],
            "at once": lambda: gradient._at_once(v),
            "native": lambda: replayed.matmat(v),
        }
        seconds = interleave(variants, 3 if quick else 9, warmup=1, clock=measure.clock_for(threads))
        benchmark.pedantic(variants["native"], rounds=1)
    report(
        f"engines_vectors_threads{threads}",
        {
            "model": name,
            "k": k,
            "loop ms": median(seconds["loop"]) * 1e3,
            "x at once": spread(seconds, "loop", "at once"),
            "x native": spread(seconds, "loop", "native"),
        },
    )
