"""Hessian-vector products of general models, by every engine, against backward passes and against jitted JAX.

What users run today is a backward pass through the retained gradient graph and an update of the vectors; the
baseline is that pass with our fused update, so ratios show what the engine alone gains. Three tables:

- a Neumann step: ten steps of a series, the product recorded before;
- compiled: the same by a native plan whose pointwise parts are compiled for the model's shapes;
- many vectors: one product with 8 and 32 vectors, against one backward pass after another, and against all at once.

One thread is timed by the process's own clock, on which other jobs do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hypergrad_ext as hg
from bench import measure
from bench.jax_series import STEPS, jax_series, neumann
from bench.measure import interleave, median, spread
from bench.models import COMPILED, MODELS, OVERHEAD_BOUND
from hypergrad_ext.engines import traced
from tests.models import loss_of

ENGINES = ("eager", "traced", "native")


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
