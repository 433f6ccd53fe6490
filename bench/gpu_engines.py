"""Neumann steps of general models on a GPU: ``python -m bench.gpu_engines [FOLDER]``.

A CUDA graph of product and step against a backward pass through the retained graph and our step, and against the
recorded operations launched one by one. Seconds from the first launch to the last result, over a whole series: where
launching is what takes long, time on the device alone says nothing. Every engine is checked against float64 first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import hypergrad_ext as hg
from bench.jax_series import neumann
from bench.measure import interleave, median, spread, write_in_turn
from bench.models import MODELS
from hypergrad_ext.engines import cuda_graph, traced
from tests.models import loss_of

DEVICE = torch.device("cuda")
ENGINES = ("eager", "traced", "cuda_graph")
STEPS = 10


def rows_of(name: str) -> list[dict[str, object]]:
    """One row, of one model."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    model, x, y = model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)
    double = MODELS[name]()[0].to(DEVICE, torch.float64)
    double.load_state_dict(model.state_dict())
    exact = hg.Hessian(loss_of(double, x.double(), y), double, engine="eager")
    operators = {engine: hg.Hessian(loss_of(model, x, y), model, engine=engine) for engine in ENGINES}
    b = torch.randn(exact.space.numel, device=DEVICE)
    row: dict[str, object] = {"model": name}
    variants: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        truth = torch.cat([t.reshape(-1) for t in exact.matvec(exact.space.views(b.double()))])
        errors = {}
        for engine, operator in operators.items():
            for _ in range(2):
                product = torch.cat([t.reshape(-1) for t in operator.matvec(operator.space.views(b))])
            errors[engine] = float((product - truth).norm() / truth.norm())
            assert errors[engine] <= 2 * errors["eager"] + 1e-6, f"{name}: {engine} {errors}"
            variants[engine] = waited_for(neumann(operator, b))
        bound, _ = cuda_graph.launch_bound(variants["eager"], DEVICE)
        # Recording and loading; what is captured is found again.
        gradient, first = operators["eager"].gradient, operators["eager"].space.views(b)
        variants["start"] = waited_for(lambda: traced.TracedGradient(gradient, "cuda_graph").start(first))
        seconds_of = interleave(variants, 15, budget=3.0)
    eager = median(seconds_of["eager"]) / STEPS
    row |= {
        "rel. error": errors["cuda_graph"],
        "runs on": operators["cuda_graph"].engine,
        "launch-bound": bound,
        "eager us": eager * 1e6,
        "graph us": median(seconds_of["cuda_graph"]) / STEPS * 1e6,
        "x traced": spread(seconds_of, "eager", "traced"),
        "x graph": spread(seconds_of, "eager", "cuda_graph"),
        "start, products": median(seconds_of["start"]) / eager,
    }
    return [row]


def waited_for(run: Callable[[], object]) -> Callable[[], None]:
    """The same, until the device is done."""

    def wrapped() -> None:
        run()
        torch.cuda.synchronize()

    return wrapped


def main() -> None:
    """Measure, print, save."""
    write_in_turn("gpu_engines", {"rows": [partial(rows_of, name) for name in MODELS]})


if __name__ == "__main__":
    main()
