"""A whole inverse HVP: what `hg.solve` takes with 20 steps, from the loss function on, by every engine.

With the forward pass, the gradient's graph and the recording, or what of these a later solve still needs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import hypergrad_ext as hg
from bench import measure
from bench.measure import interleave, median, spread
from bench.models import MODELS
from tests.models import loss_of

SOLVER = hg.Neumann(20, alpha=1e-3)


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
