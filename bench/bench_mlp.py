"""Products with the Hessian of a multilayer perceptron against torch's ways to them, and jitted JAX.

The baselines are the retained double backward that any other package runs (one vector after another),
``torch.func.linearize`` of the gradient, and the same closed form in plain torch. Every timed call makes
20 products, as many as a series has by default, or four where one takes long; a short call is timed after another
one of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypergrad_ext as hg
from bench import measure
from bench.ceilings import Floor
from bench.measure import interleave, median, spread
from hypergrad_ext import ops, reference_mlp

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

# Products of a timed call, fewer where they make more multiply-adds, and seconds that the rounds of one row may take.
PRODUCTS, FEW, LONG, BUDGET, TWICE = 20, 4, 1e8, 4.0, 0.05
# Name, layer sizes, batch, activation.
PROBLEMS = [
    ("784-256-256-10", (784, 256, 256, 10), 256, "relu"),
    ("784-256-256-10", (784, 256, 256, 10), 256, "tanh"),
    ("60 x 32", (32,) * 60 + (10,), 256, "tanh"),
    ("60 x 32", (32,) * 60 + (10,), 32, "tanh"),
    ("20-64-2", (20, 64, 2), 100, "tanh"),
]
IDS = [f"{name} {activation} batch {n}" for name, _, n, activation in PROBLEMS]


class Problem:
    """A network with cross entropy at a random point."""

    def __init__(self, sizes: tuple[int, ...], n: int, activation: str, k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = []
        for i, o in zip(sizes, sizes[1:], strict=False):
            self.params.append(torch.randn(o, i, generator=generator) / i**0.5)
            self.params.append(0.1 * torch.randn(o, generator=generator))
        self.x = torch.randn(n, sizes[0], generator=generator)
        self.y = torch.randint(sizes[-1], (n,), generator=generator)
        self.activation, self.sizes = activation, sizes
        self.operator = hg.MLPHessian(self.x, self.params, self.y, activation=activation)
        self.v = torch.randn(k, self.operator.space.numel, generator=generator)
        self.rows = [self.operator.space.views(row) for row in self.v]
        # Looked up once, as solvers do.
        self.kernel = ops.mlp_hvp.kernel(self.v.device)
        self.products = PRODUCTS if self.flops() < 2 * LONG else FEW

    def loss(self, params: list[Tensor], x: Tensor) -> Tensor:
        h = x
        for layer in range(0, len(params), 2):
            h = getattr(torch, self.activation)(h) if layer else h
            h = F.linear(h, params[layer], params[layer + 1])
        return F.cross_entropy(h, self.y)

    def flops(self) -> float:
        """Those of the products of matrices: two per weight in the first layer, six in the others."""
        first, *others = (i * o for i, o in zip(self.sizes, self.sizes[1:], strict=False))
        return 2.0 * len(self.x) * len(self.v) * (2 * first + 6 * sum(others))

    def fused(self) -> Tensor:
        return self.kernel(*self.operator._model(self.v))

    def in_torch(self) -> Tensor:
        return reference_mlp.mlp_hvp(*self.operator._model(self.v))

    def exact(self) -> Tensor:
        """The retained double backward in float64."""
        params, x = [p.double() for p in self.params], self.x.double()
        operator = hg.Hessian(lambda p: self.loss(p, x), params)
        products = operator.matmat(operator.space.views(self.v.double()))
        return torch.cat([t.reshape(len(self.v), -1) for t in products], 1)

    def double_backward(self) -> Callable[[], Tensor]:
        params = [p.clone().requires_grad_() for p in self.params]
        gradient = torch.autograd.grad(self.loss(params, self.x), params, create_graph=True)
        return lambda: self.stack(torch.autograd.grad(gradient, params, row, retain_graph=True) for row in self.rows)

    def linearized(self) -> Callable[[], Tensor]:
        gradient = torch.func.grad(lambda params: self.loss(params, self.x))
        _, product = torch.func.linearize(gradient, self.params)
        return lambda: self.stack(product(list(row)) for row in self.rows)

    def jax_product(self) -> Callable[[], object]:
        """Forward over reverse, linearised at the parameters inside one jitted function, as JAX's users write it."""
        x, y, params = (jnp.asarray(self.x.numpy()), jnp.asarray(self.y.numpy()), self.jax_arrays(self.params))
        act = {"relu": jax.nn.relu, "tanh": jnp.tanh}[self.activation]

        def loss(params):
            h = x
            for layer in range(0, len(params), 2):
                h = (act(h) if layer else h) @ params[layer].T + params[layer + 1]
            return -jnp.take_along_axis(jax.nn.log_softmax(h), y[:, None], 1).mean()

        def product(params, v):
            return jax.jvp(jax.grad(loss), (params,), (v,))[1]

        single, batch = jax.jit(product), jax.jit(jax.vmap(product, (None, 0)))
        if len(self.v) == 1:
            row = self.jax_arrays(self.rows[0])
            return lambda: jax.block_until_ready(single(params, row))
        rows = self.jax_arrays(self.operator.space.views(self.v))
        return lambda: jax.block_until_ready(batch(params, rows))

    @staticmethod
    def jax_arrays(tensors: list[Tensor]) -> list:
        return [jnp.asarray(t.numpy()) for t in tensors]

    @staticmethod
    def stack(products) -> Tensor:
        return torch.stack([torch.cat([t.reshape(-1) for t in product]) for product in products])


def repeat(product: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            product()

    return run


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("k", [1, 8, 32])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_mlp_hvp(problem, k, threads, benchmark, report, quick):
    _, sizes, n, activation = problem
    at = Problem(sizes, n, activation, k)
    if quick and at.flops() > 3e9:
        pytest.skip("--quick leaves out products that take long")
    truth, double_backward = at.exact(), at.double_backward()
    error, by_torch = (float((product() - truth).norm() / truth.norm()) for product in (at.fused, double_backward))
    assert error <= 2 * by_torch + 1e-7, f"{error:.2e} against torch's {by_torch:.2e}"
    products = {"fused": at.fused, "double backward": double_backward, "closed form in torch": at.in_torch}
    # Tracing a deep network takes longer than all of the measurement.
    if len(sizes) < 10:
        products["linearize"] = at.linearized()
        assert (products["linearize"]() - truth).norm() < 1e-4 * truth.norm()
    if jax is not None:
        products["jitted JAX"] = at.jax_product()
    variants = {name: repeat(product, at.products) for name, product in products.items()}
    with measure.threads(threads):
        floor = Floor(at.flops(), at.x, threads, at.products)
        timing = {"clock": measure.clock_for(threads), "budget": 0.5 if quick else BUDGET, "twice": TWICE}
        seconds = interleave(variants | floor.variants, 100, warmup=1, rested=floor.variants, **timing)
        benchmark.pedantic(variants["fused"], rounds=1)
    row = {"network": IDS[PROBLEMS.index(problem)], "k": k, "threads": threads, "rel. error": error}
    row["fused ms"] = median(seconds["fused"]) / at.products * 1e3
    row["% of floor"] = floor.percent(seconds, "fused")
    row["x double backward at the floor"] = floor.speedup(seconds, "double backward")
    for other in ("double backward", "closed form in torch", "linearize", "jitted JAX"):
        known = other in variants
        row[f"x {other}"] = spread(seconds, other, "fused") if known else "-"
    report("mlp_hvp", row)
