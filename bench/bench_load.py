"""Kernels and engines on a busy machine: a loop on every core that never sleeps, stopped and continued between rounds.

A kernel that waits for all of its threads waits for the slowest, which has lost its core to somebody else.
Half of the time is all that a fair scheduler can give, in slices of a few milliseconds: what shares its work once, and
takes about as long, loses a whole slice whenever either thread is interrupted, as "one operation of torch" does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import hypergrad_ext as hg
from bench.bench_glm import Problem as Glm
from bench.bench_mlp import IDS, PROBLEMS
from bench.bench_mlp import Problem as Mlp
from bench.bench_softmax import Problem as Softmax
from bench.jax_series import neumann
from bench.measure import median
from bench.models import MODELS
from hypergrad_ext import ops
from tests.models import loss_of


def step(n: int) -> Callable[[], object]:
    v, p, hv = (torch.randn(n) for _ in range(3))
    stats = torch.zeros(2, dtype=torch.float64)
    return lambda: ops.neumann_step_([v], [p], [hv], stats, 1e-9, 0.0)


def step_in_torch(n: int) -> Callable[[], object]:
    v, p, hv = (torch.randn(n) for _ in range(3))
    return lambda: (v.sub_(hv, alpha=1e-9), p.add_(v), v.norm())


def one_operation(ms: float) -> Callable[[], object]:
    """One operation of torch that takes so long: every thread has its part, and all wait once, at the end."""
    x = torch.linspace(1, 9, 1 << 16)
    torch.lgamma(x)
    seconds = min(timed(lambda: torch.lgamma(x)) for _ in range(20))
    x = torch.linspace(1, 9, int(len(x) * 1e-3 * ms / seconds))
    out = torch.empty_like(x)
    return lambda: torch.lgamma(x, out=out)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def glm(n: int, d: int, k: int) -> Callable[[], object]:
    problem = Glm(n, d, 1, k)
    return lambda: problem.fused(problem.b)


def glm_in_torch(n: int, d: int, k: int) -> Callable[[], object]:
    problem = Glm(n, d, 1, k)
    return lambda: problem.rows(problem.b)


def mlp(name: str, sizes: tuple[int, ...], n: int, activation: str) -> Callable[[], object]:
    return Mlp(sizes, n, activation, 1).fused


def series(name: str, engine: str) -> Callable[[], object]:
    """Ten steps of a series with a model's Hessian."""
    model, x, y = MODELS[name]()
    operator = hg.Hessian(loss_of(model, x, y), model, engine=engine)
    b = torch.randn(operator.space.numel)
    for _ in range(2):
        operator @ operator.space.views(b)
    assert operator.engine == engine
    return torch.no_grad()(neumann(operator, b))


KERNELS: dict[str, Callable[[], Callable[[], object]]] = {
    **{f"one operation of torch, {ms} ms": lambda ms=ms: one_operation(ms) for ms in (0.3, 2, 10)},
    "neumann_step_, 100k": lambda: step(100_000),
    "neumann_step_, 1M": lambda: step(1_000_000),
    "neumann_step_, 10M": lambda: step(10_000_000),
    "the same step in torch, 1M": lambda: step_in_torch(1_000_000),
    "glm_hvp, 1000x32, k=1": lambda: glm(1000, 32, 1),
    "glm_hvp, 4096x784, k=1": lambda: glm(4096, 784, 1),
    "glm_hvp, 4096x784, k=8": lambda: glm(4096, 784, 8),
    "the same product in torch, k=8": lambda: glm_in_torch(4096, 784, 8),
    "glm_neumann_solve, 4096x784, k=1": lambda: (lambda p: p.whole(p.operator))(Glm(4096, 784, 1, 1)),
    "softmax_hessian_, 20000x1000": lambda: Softmax(20_000, 1000, 1, torch.float32).fused,
    **{f"mlp_hvp, {name}": lambda p=p: mlp(*p) for name, p in zip(IDS, PROBLEMS, strict=True)},
    **{f"{e}, {name}": lambda name=name, e=e: series(name, e) for name in MODELS for e in ("eager", "native")},
}


@contextlib.contextmanager
def busy_cores() -> Iterator[Callable[[bool], None]]:
    """One endless loop per core; the function that it gives lets them run or stops them."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]

    def switch(on: bool) -> None:
        for loop in loops:
            loop.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
        time.sleep(0.01)

    try:
        switch(False)
        yield switch
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops and continues processes by POSIX signals")
@pytest.mark.parametrize("name", KERNELS)
def test_load(name, benchmark, report, quick):
    if quick and name.startswith("eager"):
        pytest.skip("--quick leaves out what ours is not")
    run = KERNELS[name]()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with busy_cores() as switch:
        for _ in range(4 if quick else 12):
            for busy in (False, True):
                switch(busy)
                end = time.perf_counter() + 0.2
                run()
                while not seconds[busy] or time.perf_counter() < end:
                    seconds[busy].append(timed(run))
    benchmark.pedantic(run, rounds=3)
    quiet, loaded = (sorted(seconds[busy]) for busy in (False, True))
    row = {
        "kernel": name,
        "threads": torch.get_num_threads(),
        "quiet ms": median(quiet) * 1e3,
        "busy ms": median(loaded) * 1e3,
        "median ratio": f"{median(loaded) / median(quiet):.2f}",
        "ratio of means": f"{sum(loaded) / len(loaded) / (sum(quiet) / len(quiet)):.2f}",
        "busy 90 %": loaded[len(loaded) * 9 // 10] * 1e3,
    }
    report("load", row)
