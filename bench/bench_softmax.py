"""Products with the Hessian of cross-entropy against torch, whose softmax backward is the same formula.

"precomputed" has the probabilities already, as much memory again as the logits; "recomputed" makes them for
every product, as our kernel does. Both write into buffers that exist (fresh ones of 32 MB and more cost page
faults, which would hide the arithmetic), and so does the in-place form, "fused". "fused, new result" and
"three ops" allocate. CPU times are of one thread, by its own clock: foreign load does not count.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from bench.measure import interleave, median, spread
from hypergrad_ext import ops, reference

PROBLEMS = [(100_000, 10), (1_000_000, 10), (40_000, 50), (1000, 1000), (20_000, 1000), (40, 50_304), (400, 50_304)]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Problem:
    """Random logits and k vectors, with the buffers that each variant may keep."""

    def __init__(self, rows: int, classes: int, k: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = (3 * torch.randn(rows, classes, generator=generator)).to(dtype)
        self.u = torch.randn(k, rows, classes, generator=generator).to(dtype)
        self.p = self.logits.softmax(-1)
        self.overwritten, self.p_buffer, self.out = self.u.clone(), self.p.clone(), torch.zeros_like(self.u)

    def fused(self) -> None:
        # Products of products: what is in there costs the same, and stays bounded.
        ops.softmax_hessian_(self.logits, self.overwritten, 1.0)

    def fused_new(self) -> Tensor:
        return ops.softmax_hessian(self.logits, self.u, 1.0)

    def precomputed(self, p: Tensor | None = None) -> Tensor:
        p = self.p if p is None else p
        for u, out in zip(self.u, self.out, strict=True):
            torch.ops.aten._softmax_backward_data.out(u, p, -1, p.dtype, grad_input=out)
        return self.out

    def recomputed(self) -> Tensor:
        return self.precomputed(torch.softmax(self.logits, -1, out=self.p_buffer))

    def three_ops(self) -> Tensor:
        p = self.logits.softmax(-1)
        z = p * self.u
        return z.sub_(p * z.sum(-1, keepdim=True))


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("shape", PROBLEMS, ids=lambda s: f"{s[0]}x{s[1]}")
def test_softmax_hessian(shape, k, dtype, benchmark, report, quick):
    rows, classes = shape
    if quick and k * rows * classes > 8 * 10**6:
        pytest.skip("--quick leaves out the largest problems")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        problem = Problem(rows, classes, k, DTYPES[dtype])
        truth = reference.softmax_hessian(problem.logits.double(), problem.u.double(), 1.0)
        errors = [error(f(), truth) for f in (problem.fused_new, problem.recomputed)]
        problem.fused()
        assert torch.equal(problem.overwritten, problem.fused_new())
        assert errors[0] <= 2 * errors[1] + 1e-7, errors
        del truth
        variants = {
            "fused": problem.fused,
            "fused, new result": problem.fused_new,
            "precomputed": problem.precomputed,
            "recomputed": problem.recomputed,
            "three ops": problem.three_ops,
        }
        rounds = max(5, min(100, 10**9 // (k * rows * classes) // (4 if quick else 1)))
        seconds = interleave(variants, rounds, warmup=1, clock=time.thread_time)
        benchmark.pedantic(problem.fused, rounds=3)
    finally:
        torch.set_num_threads(before)
    row = {"rows": rows, "classes": classes, "k": k, "dtype": dtype, "rel. error": errors[0], "torch's": errors[1]}
    row["fused ms"] = median(seconds["fused"]) * 1e3
    # Logits are read, vectors read and written; the lower bound, as if caches held the rest.
    row["GB/s"] = problem.logits.nbytes * (1 + 2 * k) / median(seconds["fused"]) / 1e9
    for other in [*variants][1:]:
        row[f"x {other}"] = spread(seconds, other, "fused")
    report("softmax_hessian", row)
