"""The fused Neumann step against every way to write it in torch, on the lists a model gives.

Every variant updates v and p from a list of products. "+norm" variants also compute the norm of v,
from which a solver sees convergence, divergence and NaN: that is what the fused step returns, so
they are its equals; the bare ones do less.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.measure import interleave, median, spread
from hypergrad_ext import ops, reference

ALPHA = 0.01


LISTS: dict[str, list[tuple[int, ...]]] = {
    "150 tensors, 63k": [(20, 21)] * 150,
    "150 tensors, 800k": [(72, 216), (72,), (372,)] * 50,
    "1 tensor, 20M": [(20_000_000,)],
}


class Step:
    """State of one step: v and p in flat buffers with views, products in a list, as the solver holds them."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hv = [torch.randn(shape, generator=generator) for shape in shapes]
        sizes = [t.numel() for t in self.hv]
        self.v, self.p = torch.randn(sum(sizes), generator=generator), torch.zeros(sum(sizes))
        self.vs = [part.view(shape) for part, shape in zip(self.v.split(sizes), shapes, strict=True)]
        self.ps = [part.view(shape) for part, shape in zip(self.p.split(sizes), shapes, strict=True)]
        self.stats = torch.zeros(2, dtype=torch.float64)
        self.kernel = ops.neumann_step_.kernel(torch.device("cpu"))

    def fused(self) -> None:
        self.kernel([self.v], [self.p], self.hv, self.stats, ALPHA, 0.0)

    def loop(self) -> None:
        for v, p, hv in zip(self.vs, self.ps, self.hv, strict=True):
            v.sub_(hv, alpha=ALPHA)
            p.add_(v)

    def loop_norm(self) -> Tensor:
        total = torch.zeros(())
        for v, p, hv in zip(self.vs, self.ps, self.hv, strict=True):
            v.sub_(hv, alpha=ALPHA)
            p.add_(v)
            total += v.pow(2).sum()
        return total

    def foreach(self) -> None:
        torch._foreach_sub_(self.vs, self.hv, alpha=ALPHA)
        torch._foreach_add_(self.ps, self.vs)

    def foreach_norm(self) -> Tensor:
        self.foreach()
        return torch.stack(torch._foreach_norm(self.vs)).norm()

    def cat_norm(self) -> Tensor:
        self.cat()
        return self.v.norm()

    def compiled(self, norm: bool) -> Callable[[], Tensor | None]:
        def step(v: Tensor, p: Tensor, hv: Tensor) -> Tensor | None:
            v.sub_(hv, alpha=ALPHA)
            p.add_(v)
            return v.pow(2).sum() if norm else None

        compiled = torch.compile(step)
        return lambda: compiled(self.v, self.p, self.hv[0])

    def cat(self) -> None:
        """One concatenation, then two passes over the flat buffers."""
        self.v.sub_(torch.cat([t.view(-1) for t in self.hv]), alpha=ALPHA)
        self.p.add_(self.v)


def check(shapes: list[tuple[int, ...]]) -> float:
    """Relative error of one fused step against float64; nothing is timed if it is wrong."""
    ours = Step(shapes)
    v, p, hv = ours.v.double(), ours.p.double(), [t.double() for t in ours.hv]
    ours.fused()
    stats = torch.zeros(2, dtype=torch.float64)
    reference.neumann_step_([v], [p], hv, stats, ALPHA, 0.0)
    error = float(torch.cat([ours.v - v, ours.p - p]).norm() / torch.cat([v, p]).norm())
    assert error < 1e-6 and abs(float(ours.stats[0] / stats[0]) - 1) < 1e-5
    return error


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", LISTS)
def test_neumann_step(name, threads, benchmark, report, quick):
    error = check(LISTS[name])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = Step(LISTS[name])
        variants = {
            "fused": step.fused,
            "loop": step.loop,
            "loop+norm": step.loop_norm,
            "foreach": step.foreach,
            "foreach+norm": step.foreach_norm,
        }
        large = step.v.numel() > 10**7
        # The third way: a compiled step on the one buffer; on a list, one concatenation and flat passes.
        variants["flat"] = step.compiled(norm=False) if large else step.cat
        variants["flat+norm"] = step.compiled(norm=True) if large else step.cat_norm
        seconds = interleave(variants, rounds=(10 if quick else 40) if large else (100 if quick else 1000))
        benchmark.pedantic(step.fused, rounds=20, iterations=1 if large else 50, warmup_rounds=1)
    finally:
        torch.set_num_threads(before)
    fused = median(seconds["fused"])
    row: dict[str, object] = {
        "list": name,
        "threads": threads,
        "fused us": fused * 1e6,
        "GB/s": 20 * step.v.numel() / fused / 1e9,
        "rel. error": error,
    }
    for other in [*variants][1:]:
        row[f"x {other}"] = spread(seconds, other, "fused")
    report("neumann_step", row)
