"""The fused steps of Richardson, Chebyshev, MINRES and preconditioned CG against the same algebra in torch.

Given H x as a list, all variants compute the new vectors and the norms that a solver looks at. The torch forms leave
out what the fused ones also do: damping, and the tests for convergence, curvature and NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.bench_step import LISTS
from bench.measure import interleave, median, spread
from hypergrad_ext import ops, reference_minres

ALPHA, MOMENTUM = 0.01, 0.5
# Bytes per float32 weight that a step has to move.
BYTES = {"richardson_step_": 16, "chebyshev_step_": 20, "minres_step_": 44, "pcg_step_": 52}


class Step:
    """Flat vectors a, b, ... and views of them in the shapes of the list; the product is a list."""

    def __init__(self, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        draw = lambda: torch.randn(sum(sizes), generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        self.vectors = [draw() for _ in range(5)]
        self.m = draw().abs() + 0.1
        self.first = [t.clone() for t in self.vectors]
        self.views = [
            [part.view(shape) for part, shape in zip(t.split(sizes), shapes, strict=True)]
            for t in (*self.vectors, self.m)
        ]
        # Positive curvature for CG, whose direction is the third vector.
        flat = 2 * self.vectors[2] + 0.1 * draw()
        self.product = [part.view(shape).clone() for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        square = float(self.vectors[1].double().square().sum())
        self.start = {
            "minres_step_": reference_minres.start(*torch.tensor([square**0.5, 0.0, 1.0], dtype=torch.float64)),
            "pcg_step_": torch.tensor([square, 0.0, 0.0, 0.0, square], dtype=torch.float64),
        }.get(name, torch.zeros(3, dtype=torch.float64))
        self.state, self.name = self.start.clone(), name

    def reset(self) -> None:
        """Back to the first step: repeated on its own result it would run into denormals."""
        for t, first in zip(self.vectors, self.first, strict=True):
            t.copy_(first)
        self.state.copy_(self.start)

    def fused(self, kernel: Callable) -> None:
        a, b, c, d, e = ([t] for t in self.vectors)
        if self.name == "richardson_step_":
            kernel(a, self.product, b, [], self.state, ALPHA, 0.0)
        elif self.name == "chebyshev_step_":
            kernel(a, b, self.product, c, [], self.state, ALPHA, MOMENTUM, 0.0)
        elif self.name == "minres_step_":
            kernel(a, b, c, d, e, self.product, self.state, 0.0)
        else:
            kernel(a, b, c, self.product, [self.m], self.state, 0.0)

    def foreach(self) -> None:
        IN_TORCH[self.name](self.views, self.product)

    def flat(self) -> None:
        """One concatenation, then the same on flat vectors."""
        product = torch.cat([t.view(-1) for t in self.product]) if len(self.product) > 1 else self.product[0]
        IN_TORCH[self.name]([[t] for t in (*self.vectors, self.m)], [product.view(-1)])


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum(torch.dot(x.view(-1), y.view(-1)) for x, y in zip(a, b, strict=True)))


def norm(a: list[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(a)).norm())


def richardson(v: list[list[Tensor]], hx: list[Tensor]) -> float:
    r = torch._foreach_sub(v[1], hx)
    torch._foreach_add_(v[0], r, alpha=ALPHA)
    return norm(r)


def chebyshev(v: list[list[Tensor]], hx: list[Tensor]) -> float:
    x_old, x, b, *_ = v
    r = torch._foreach_sub(b, hx)
    torch._foreach_mul_(x_old, -MOMENTUM)
    torch._foreach_add_(x_old, x, alpha=1 + MOMENTUM)
    torch._foreach_add_(x_old, r, alpha=ALPHA)
    return norm(r)


def minres(v: list[list[Tensor]], hv: list[Tensor]) -> float:
    x, u, u_old, w, w_old, _ = v
    alpha = dot(u, hv)
    torch._foreach_add_(x, w, alpha=0.1)
    torch._foreach_mul_(w_old, 0.2)
    torch._foreach_add_(w_old, w, alpha=0.3)
    torch._foreach_add_(w_old, u)
    torch._foreach_mul_(u_old, 0.4)
    torch._foreach_add_(u_old, u, alpha=-1e-9 * alpha)
    torch._foreach_add_(u_old, hv)
    return norm(u_old)


def pcg(v: list[list[Tensor]], hp: list[Tensor]) -> float:
    x, r, p, _, _, m = v
    alpha = 1 / dot(p, hp)
    torch._foreach_add_(x, p, alpha=alpha)
    torch._foreach_add_(r, hp, alpha=-alpha)
    z = torch._foreach_mul(m, r)
    rz, rr = dot(r, z), norm(r)
    torch._foreach_mul_(p, 1e-9 * rz)
    torch._foreach_add_(p, z)
    return rr


IN_TORCH = {"richardson_step_": richardson, "chebyshev_step_": chebyshev, "minres_step_": minres, "pcg_step_": pcg}


def check(name: str, shapes: list[tuple[int, ...]]) -> float:
    """Relative error of one fused step against float64; nothing is timed if it is wrong."""
    ours, truth = Step(name, shapes), Step(name, shapes, torch.float64)
    for mine, exact in zip(
        (*ours.vectors, ours.m, *ours.product), (*truth.vectors, truth.m, *truth.product), strict=True
    ):
        exact.copy_(mine)
    ours.fused(getattr(ops, name).kernel(torch.device("cpu")))
    truth.fused(getattr(ops, name).kernels["torch"])
    a, b = torch.cat(ours.vectors), torch.cat(truth.vectors)
    error = float((a - b).norm() / b.norm())
    assert error < 1e-5
    return error


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("list_name", LISTS)
@pytest.mark.parametrize("name", BYTES)
def test_step(name, list_name, threads, benchmark, report, quick):
    if quick and "20M" in list_name:
        pytest.skip("--quick: lists that fit a cache; bench_step has the large one")
    error = check(name, LISTS[list_name])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step, kernel = Step(name, LISTS[list_name]), getattr(ops, name).kernel(torch.device("cpu"))
        large = step.m.numel() > 10**7
        variants = {"fused": lambda: step.fused(kernel), "foreach": step.foreach, "flat": step.flat}
        rounds = (5 if quick else 20) if large else (50 if quick else 500)
        seconds = interleave(variants, rounds=rounds, setup=step.reset)
        benchmark.pedantic(lambda: step.fused(kernel), setup=step.reset, rounds=10)
    finally:
        torch.set_num_threads(before)
    fused = median(seconds["fused"])
    row: dict[str, object] = {"list": list_name, "threads": threads, "fused us": fused * 1e6}
    row |= {"GB/s": BYTES[name] * step.m.numel() / fused / 1e9, "rel. error": error}
    for other in [*variants][1:]:
        row[f"x {other}"] = spread(seconds, other, "fused")
    report(name.rstrip("_"), row)
