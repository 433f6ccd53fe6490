"""A whole hypergradient by one L2 penalty per weight, in multiples of one gradient of the training loss.

Forward passes of both losses, the validation gradient, 20 terms of the series, the mixed derivative; from the loss
functions on, by backward passes and by the default engine, which has had calls to make up its mind in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hypergrad_ext as hg
from bench import measure
from bench.measure import interleave, median, spread
from bench.models import MODELS, OVERHEAD_BOUND
from tests.compare import relative_error
from tests.models import loss_of

SOLVER = hg.Neumann(20, alpha=1e-3)
Batch = tuple[Tensor, Tensor]


def hypergradient(model: nn.Module, train: Batch, val: Batch, engine: str) -> Callable[[], list[Tensor]]:
    """By the logarithms of penalties of ``e^-4``."""
    log_l2 = [torch.full_like(p, -4.0).requires_grad_() for p in model.parameters()]
    losses = [loss_of(model, *batch) for batch in (train, val)]

    def penalised(w: dict[str, Tensor]) -> Tensor:
        return losses[0](w) + sum((l2.exp() * t.square()).sum() for l2, t in zip(log_l2, w.values(), strict=True))

    return lambda: list(hg.hypergradient(losses[1], penalised, model, log_l2, SOLVER, engine=engine))


@pytest.mark.parametrize("name", MODELS)
def test_hypergradient(name, threads, benchmark, report, quick):
    if quick and name not in OVERHEAD_BOUND:
        pytest.skip("--quick: small models")
    model, *train = MODELS[name]()
    _, *val = MODELS[name]()
    variants: dict[str, Callable] = {e: hypergradient(model, train, val, e) for e in ("eager", "auto")}
    double = copy.deepcopy(model).double()
    truth = hypergradient(double, *([x.double(), y] for x, y in (train, val)), "eager")()
    errors = {}
    for engine, run in variants.items():
        for _ in range(4):
            found = run()
        errors[engine] = relative_error(found, truth)
    assert errors["auto"] <= 2 * errors["eager"] + 1e-6, errors
    leaves = list(model.parameters())
    loss = loss_of(model, *train)
    variants["gradient"] = lambda: torch.autograd.grad(loss(dict(model.named_parameters())), leaves)
    seconds = interleave(variants, 5 if quick else 11, warmup=1, clock=measure.clock_for(threads), budget=20)
    benchmark.pedantic(variants["auto"], rounds=1)
    unit = median(seconds["gradient"])
    report(
        f"hypergradient_threads{threads}",
        {
            "model": name,
            "rel. error": errors["auto"],
            "eager ms": median(seconds["eager"]) * 1e3,
            "auto ms": median(seconds["auto"]) * 1e3,
            "eager, gradients": median(seconds["eager"]) / unit,
            "auto, gradients": median(seconds["auto"]) / unit,
            "x auto": spread(seconds, "eager", "auto"),
        },
    )
