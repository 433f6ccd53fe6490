"""The fused iteration of conjugate gradients against its vector algebra written in torch.

Given H p as a list, both compute p.Hp, x, r, r.r and p. The torch forms leave out what the fused one
also does: damping, and the tests for curvature, convergence and NaN.
"""

from __future__ import annotations

import pytest
import torch

from bench.bench_step import LISTS
from bench.measure import interleave, median, spread
from hypergrad_ext import ops, reference


class Iteration:
    """x, r and p in flat buffers with views; H p in a list."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self.x, self.r = torch.zeros(sum(sizes)), torch.randn(sum(sizes), generator=generator)
        self.p = self.r.clone()
        split = [list(t.split(sizes)) for t in (self.x, self.r, self.p)]
        self.xs, self.rs, self.ps = [[v.view(s) for v, s in zip(part, shapes, strict=True)] for part in split]
        self.hp = [2 * v + torch.randn(v.shape, generator=generator) for v in self.ps]
        self.start = torch.tensor([float(self.r @ self.r), 0.0, 0.0, 0.0], dtype=torch.float64)
        self.first = self.r.clone()
        self.state = self.start.clone()
        self.rr = self.r @ self.r
        self.kernel = ops.cg_step_.kernel(torch.device("cpu"))

    def reset(self) -> None:
        """Back to the first iteration: repeated on its own result it would run into denormals."""
        self.x.zero_()
        self.r.copy_(self.first)
        self.p.copy_(self.first)
        self.state.copy_(self.start)

    def fused(self) -> None:
        self.kernel([self.x], [self.r], [self.p], self.hp, self.state, 0.0)

    def foreach(self) -> float:
        pairs = zip(self.ps, self.hp, strict=True)
        alpha = float(self.rr / sum(torch.dot(p.view(-1), h.view(-1)) for p, h in pairs))
        torch._foreach_add_(self.xs, self.ps, alpha=alpha)
        torch._foreach_add_(self.rs, self.hp, alpha=-alpha)
        rr = float(torch.stack(torch._foreach_norm(self.rs)).norm()) ** 2
        torch._foreach_mul_(self.ps, rr / float(self.rr))
        torch._foreach_add_(self.ps, self.rs)
        return rr

    def flat(self) -> float:
        """One concatenation, then flat operations."""
        hp = torch.cat([h.view(-1) for h in self.hp]) if len(self.hp) > 1 else self.hp[0]
        alpha = float(self.rr / torch.dot(self.p, hp))
        self.x.add_(self.p, alpha=alpha)
        self.r.sub_(hp, alpha=alpha)
        rr = float(torch.dot(self.r, self.r))
        torch.add(self.r, self.p, alpha=rr / float(self.rr), out=self.p)
        return rr


def check(shapes: list[tuple[int, ...]]) -> float:
    """Relative error of one fused iteration against float64; nothing is timed if it is wrong."""
    ours = Iteration(shapes)
    exact = [[t.double()] for t in (ours.x, ours.r, ours.p)]
    state = ours.start.clone()
    reference.cg_step_(*exact, [t.double() for t in ours.hp], state, 0.0)
    ours.fused()
    truth = torch.cat([t[0] for t in exact])
    error = float((torch.cat([ours.x, ours.r, ours.p]) - truth).norm() / truth.norm())
    assert error < 1e-5
    return error


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", LISTS)
def test_cg_step(name, threads, benchmark, report, quick):
    error = check(LISTS[name])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = Iteration(LISTS[name])
        large = step.p.numel() > 10**7
        variants = {"fused": step.fused, "foreach": step.foreach, "flat": step.flat}
        seconds = interleave(
            variants, rounds=(10 if quick else 30) if large else (100 if quick else 1000), setup=step.reset
        )
        benchmark.pedantic(step.fused, setup=step.reset, rounds=20)
    finally:
        torch.set_num_threads(before)
    row: dict[str, object] = {"list": name, "threads": threads, "fused us": median(seconds["fused"]) * 1e6}
    row["rel. error"] = error
    for other in [*variants][1:]:
        row[f"x {other}"] = spread(seconds, other, "fused")
    report("cg_step", row)
