"""Nothing grows: graphs, buffers and reference cycles are gone when a solve is."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path

import pytest
import torch

import hypergrad_ext as hg
from hypergrad_ext import _native
from tests.cases import mlp

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(_native._C is None, reason=f"native plans are C++: {_native.MISSING}")
)


def live_tensors() -> tuple[int, int]:
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return len(tensors), sum(t.numel() * t.element_size() for t in tensors)


SOLVERS = [
    *(hg.Neumann(5), hg.CG(tol=1e-6), hg.Direct(), hg.Identity(), hg.Chebyshev(5), hg.MINRES(tol=1e-6)),
    hg.CG(tol=1e-6, preconditioner=lambda v: [2 * t for t in v]),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("losses", ["tensors", "functions"])
def test_flat_over_solves_without_the_garbage_collector(solver, losses):
    """With the collector off, a single reference cycle per solve would show."""
    problem = mlp()

    def once() -> None:
        as_tensor = losses == "tensors"
        val = problem.val(problem.params) if as_tensor else problem.val
        train = problem.train(problem.params) if as_tensor else problem.train
        hg.hypergradient(val, train, problem.params, problem.hparams, solver)

    # One that is kept shows after a few solves as well as after 200; the solvers share what builds graphs.
    count = 200 if isinstance(solver, hg.Neumann) else 20
    # The engine is chosen, and its program compiled, in the second solve.
    for _ in range(3):
        once()
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(count):
            once()
        after = live_tensors()
    finally:
        gc.enable()
    assert after == before


def test_implicit_node_frees_its_graph():
    problem = mlp()
    w = hg.implicit(problem.train, problem.params, problem.hparams, hg.CG(tol=1e-6))
    loss = problem.val(w)
    loss.backward()
    ref = weakref.ref(w[0])
    gc.disable()
    try:
        del w, loss
        assert ref() is None
    finally:
        gc.enable()


def resident() -> int:
    """Resident memory of this process in kB."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("resident memory is read from /proc")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1])


@pytest.mark.parametrize("engine", ["auto", "eager", "traced", NATIVE])
def test_process_memory_is_flat_over_200_outer_steps(engine):
    """Native memory too: torch's own allocations do not show among Python's objects."""
    w, weight = torch.ones(500_000, requires_grad=True), torch.ones((), requires_grad=True)
    solver = hg.Neumann(3, alpha=0.1)

    def once() -> None:
        hg.hypergradient(lambda w: w.sum(), lambda w: weight * (w**3).sum(), w, weight, solver, engine=engine)
        with torch.no_grad():
            w.mul_(0.999)

    for _ in range(5):
        once()
    before = resident()
    for _ in range(200):
        once()
    grown = resident() - before
    assert grown < 20_000, f"resident memory grew by {grown} kB; one solve's vectors take 2000 kB each"


VECTORS = {
    "Neumann": (hg.Neumann(4, alpha=0.5), 3),
    "Richardson": (hg.Neumann(4, alpha=0.5, form="richardson"), 3),
    "Chebyshev": (hg.Chebyshev(4, bounds=(1.0, 2.0)), 4),
    "CG": (hg.CG(max_steps=4), 4),
    "MINRES": (hg.MINRES(max_steps=4), 7),
    "auto": ("auto", 5),
}


def place_and_bytes(t: torch.Tensor) -> tuple[int, int]:
    if t.device.type != "cpu" or t.layout is not torch.strided:
        return 0, 0
    try:
        storage = t.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (
        RuntimeError,
        NotImplementedError,
    ) as error:  # what other tests' transforms or compilations left has no memory
        assert "invalid python storage" in str(error) or "Cannot access storage" in str(error)
        return 0, 0


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_that_a_solve_holds(name):
    """At the time of a product, beside what the operator and its user hold: what tells whether n = 1e8 fits."""
    n, most = 1 << 16, 0
    d, b = torch.linspace(1, 2, n), torch.ones(n)

    def multiply(v: torch.Tensor) -> torch.Tensor:
        nonlocal most
        plain = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        sizes = dict(map(place_and_bytes, plain))
        most = max(most, sum(sizes.values()) - outside)
        return d * v

    operator = hg.Callable(multiply, torch.zeros(n))
    gc.collect()
    outside, most = 0, 0
    multiply(b)
    outside, most = most, 0
    solver, count = VECTORS[name]
    solution = hg.solve(operator, b, solver)
    assert not solution.useless
    assert round(most / (4 * n)) == count


@pytest.mark.slow
@pytest.mark.parametrize("solver", [hg.Neumann(4, alpha=0.5), hg.CG(tol=1e-3)], ids=lambda s: type(s).__name__)
def test_a_hundred_million_unknowns(solver):
    if memory_available() < 8 << 30:
        pytest.skip("needs 8 GiB of free memory")
    d, b = torch.linspace(1, 2, 10**8), torch.ones(10**8)
    solution = hg.solve(hg.Callable(lambda v: d * v, b), b, solver)
    assert not solution.useless and solution.residual_norm < 1e-2
    assert float((solution.value * d - 1).abs().max()) < 0.05


def memory_available() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) << 10
