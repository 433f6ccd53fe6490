"""nn.LSTM against torch's: a training gradient, and a product with the Hessian.

torch.nn.LSTM runs oneDNN's LSTM in float32 on the CPU, which has no double backward; "own cells" is the same module
with oneDNN switched off, and "loop" the explicit loop over the steps that users write, with one product for the
inputs of all steps. Every product is a backward pass through a gradient's graph that is built once and kept, as in
any solver. "GEMM floor" is a product's matrix products alone, those of the recurrence for all steps at once: no
fused product that keeps their number can take less. Times of one thread are by its own clock: foreign load does not
count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure import clock_for, interleave, median, ratio, spread
from hypergrad_ext import nn

# Steps, batch, units (of the input, too), layers.
PROBLEMS = [(35, 20, 200, 2), (20, 64, 64, 1), (50, 8, 16, 1)]
IDS = [f"T{t} B{b} H{n} x {layers}" for t, b, n, layers in PROBLEMS]


class Problem:
    """A regression on every output of an LSTM."""

    def __init__(self, steps: int, batch: int, units: int, layers: int) -> None:
        torch.manual_seed(0)
        self.theirs = torch.nn.LSTM(units, units, layers)
        self.ours = nn.LSTM(units, units, layers)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.x, self.y = torch.randn(2, steps, batch, units)
        self.v = [torch.randn_like(p) for p in self.theirs.parameters()]

    def fused(self, x: Tensor) -> Tensor:
        return self.ours(x)[0]

    def onednn(self, x: Tensor) -> Tensor:
        return self.theirs(x)[0]

    def own_cells(self, x: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return self.theirs(x)[0]

    def loop(self, x: Tensor) -> Tensor:
        for layer in range(self.theirs.num_layers):
            w_ih, w_hh, b_ih, b_hh = (getattr(self.theirs, f"{n}_l{layer}") for n in NAMES)
            h = c = x.new_zeros(x.shape[1], w_hh.shape[1])
            outputs = []
            for gates in F.linear(x, w_ih, b_ih + b_hh).unbind(0):
                i, f, g, o = torch.addmm(gates, h, w_hh.T).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            x = torch.stack(outputs)
        return x

    def gradient(self, forward: Callable[[Tensor], Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        params = (self.ours if forward == self.fused else self.theirs).parameters()
        loss = (forward(self.x) - self.y).square().mean()
        return torch.autograd.grad(loss, list(params), create_graph=create_graph)

    def product(self, forward: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        params = list((self.ours if forward == self.fused else self.theirs).parameters())
        gradient = self.gradient(forward, create_graph=True)
        return lambda: torch.autograd.grad(gradient, params, self.v, retain_graph=True)

    def matrix_products(self) -> Callable[[], None]:
        """As many as one product needs, of the same shapes: forward in time, backward, and by the weights."""
        steps, batch, units = self.x.shape
        rows, gates, weight = torch.randn(steps * batch, units), torch.randn(steps * batch, 4 * units), self.v[1]
        layers = self.theirs.num_layers
        # The second derivative: gates from v_ih, v_hh and the recurrence, sums by w_hh and h. The first: the recurrence
        # and sums by both weights. A layer above the first also passes tangents and gradients through its input.
        counts = {"forward": 4 * layers - 1, "backward": 4 * layers - 2, "weights": 4 * layers - 1}

        def run() -> None:
            for _ in range(counts["forward"]):
                torch.mm(rows, weight.T)
            for _ in range(counts["backward"]):
                torch.mm(gates, weight)
            for _ in range(counts["weights"]):
                torch.mm(gates.T, rows)

        return run

    def exact(self) -> Problem:
        """The same in float64."""
        other = copy.copy(self)
        other.theirs = copy.deepcopy(self.theirs).double()
        other.x, other.y, other.v = self.x.double(), self.y.double(), [t.double() for t in self.v]
        return other


NAMES = "weight_ih", "weight_hh", "bias_ih", "bias_hh"


def error(value: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    value, truth = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (value, truth))
    return float((value - truth).norm() / truth.norm())


def measured(variants: dict[str, Callable], truth: tuple[Tensor, ...], threads: int, rounds: int) -> dict[str, object]:
    errors = {name: error(f(), truth) for name, f in variants.items()}
    assert errors["fused"] <= 2 * errors["loop"] + 1e-7, errors
    seconds = interleave(variants, rounds, warmup=2, clock=clock_for(threads))
    row: dict[str, object] = {"rel. error": errors["fused"], "fused ms": median(seconds["fused"]) * 1e3}
    others = {name: spread(seconds, name, "fused") for name in [*variants][1:]}
    return row | {f"x {name}": others.get(name, "no double backward") for name in ("oneDNN", "own cells", "loop")}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_lstm(problem, threads, benchmark, report, quick):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        at = Problem(*problem)
        exact = at.exact()
        rounds = 7 if quick else 25
        forwards = {"fused": at.fused, "oneDNN": at.onednn, "own cells": at.own_cells, "loop": at.loop}
        row = {"problem": IDS[PROBLEMS.index(problem)], "threads": threads}
        gradients = {name: lambda f=f: at.gradient(f) for name, f in forwards.items()}
        report("lstm_gradient", row | measured(gradients, exact.gradient(exact.loop), threads, rounds))
        products = {name: at.product(f) for name, f in forwards.items() if name != "oneDNN"}
        row |= measured(products, exact.product(exact.loop)(), threads, rounds)
        pair = {"floor": at.matrix_products(), "fused": products["fused"]}
        share, *_ = ratio(interleave(pair, rounds, warmup=2, clock=clock_for(threads)), "floor", "fused")
        report("lstm_hvp", row | {"GEMM floor / fused": share})
        benchmark.pedantic(products["fused"], rounds=3)
    finally:
        torch.set_num_threads(before)
