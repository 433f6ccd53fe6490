"""The CUDA graph engine: on a GPU, and on the CPU with graphs that `graph_stand_in` plays."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad_ext as hg
from hypergrad_ext import ops
from hypergrad_ext.engines import capture, choose, cuda_graph, traced
from tests import graph_stand_in
from tests.cases import mlp
from tests.compare import assert_close
from tests.models import MODELS, batch, loss_of

on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")]


pytestmark = pytest.mark.usefixtures("fresh_engines")


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=on_gpu)])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device with CUDA graphs."""
    if request.param == "cuda":
        return torch.device("cuda")
    graph_stand_in.install(monkeypatch)
    return torch.device("cpu")


def problem(name: str, device: torch.device, n: int = 9) -> tuple[nn.Module, hg.operators.hessian.Loss]:
    model = MODELS[name][0]().to(device, torch.float64)
    return model, new_loss(model, name, device, n)


def new_loss(model: nn.Module, name: str, device: torch.device, n: int = 9) -> hg.operators.hessian.Loss:
    return loss_of(model, *(t.to(device) for t in batch(name, n, torch.float64)))


def random_like(model: nn.Module, k: int | None = None) -> dict[str, Tensor]:
    return {name: torch.randn_like(p if k is None else p.expand(k, *p.shape)) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["mlp_gelu", "cnn_train", "lstm_cell", "transformer", "tied", "residual", "custom"])
def test_products(name, where):
    model, loss = problem(name, where)
    operator, eager = (hg.Hessian(loss, model, engine=e) for e in ("cuda_graph", "eager"))
    vectors = [random_like(model) for _ in range(3)]
    products = [operator @ v for v in vectors]
    assert operator.engine == "cuda_graph"
    # All of them only now: none was overwritten by the next.
    for v, product in zip(vectors, products, strict=True):
        assert_close(product, eager @ v, 1e-10)


SOLVERS = [
    *(hg.Neumann(30), hg.Neumann(30, alpha=0.2), hg.Neumann(400, tol=1e-3), hg.CG(tol=1e-8), hg.CG(max_steps=3)),
    *(hg.Chebyshev(20), hg.MINRES(tol=1e-8), hg.Neumann(20, form="richardson")),
]


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solves(solver, rows, where):
    model, loss = problem("mlp_tanh", where, 30)
    v = random_like(model, rows)
    ours, theirs = (
        hg.solve(hg.Hessian(loss, model, engine=e), v, solver, damping=0.5) for e in ("cuda_graph", "eager")
    )
    assert (ours.engine, ours.status) == ("cuda_graph", theirs.status)
    # It looks at the device now and then only, and may go on for a few steps.
    assert theirs.hvps <= ours.hvps <= theirs.hvps + 7
    assert_close(ours.value, theirs.value, 1e-8 if ours.hvps == theirs.hvps or isinstance(solver, hg.CG) else 2e-3)


def test_a_diverging_series_is_noticed(where):
    model, loss = problem("mlp_tanh", where)
    assert (
        hg.solve(hg.Hessian(loss, model, engine="cuda_graph"), random_like(model), hg.Neumann(40, alpha=1e4)).status
        == "diverged"
    )


def test_step_of_the_series_is_in_the_graph(where, monkeypatch):
    """After the capture the host makes no product and no step of its own."""
    model, loss = problem("mlp_tanh", where)
    operator, v = hg.Hessian(loss, model, engine="cuda_graph"), random_like(model)
    first = hg.solve(operator, v, hg.Neumann(20, alpha=0.1), damping=1.0, residual=False)
    launched = []
    replay = cuda_graph.Graphs.replay
    monkeypatch.setattr(cuda_graph.Graphs, "replay", lambda self, name: (launched.append(name), replay(self, name)))
    for op in (ops.neumann_step_, ops.cg_step_):
        monkeypatch.setattr(op, "kernel", lambda *_: pytest.fail("a step outside the graph"))
    second = hg.solve(operator, v, hg.Neumann(20, alpha=0.1), damping=1.0, residual=False)
    assert second.status == "max_steps" and launched == ["neumann step"] * 20
    assert_close(second.value, first.value, 1e-12)


def test_one_capture_for_new_batches_parameters_step_sizes_and_dampings(where):
    model, _ = problem("mlp_tanh", where)
    for i in range(12):
        loss, v = new_loss(model, "mlp_tanh", where), random_like(model)
        solver = hg.Neumann(5, alpha=0.01 * (i + 1)) if i % 2 else hg.CG(max_steps=4)
        ours, theirs = (
            hg.solve(hg.Hessian(loss, model, engine=e), v, solver, damping=0.1 * (i + 1))
            for e in ("cuda_graph", "eager")
        )
        assert ours.engine == "cuda_graph"
        assert_close(ours.value, theirs.value, 1e-9)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    assert (traced.counts.compiled, traced.counts.captured) == (1, 1)
    # On the CPU of the stand-in, later ones are known by their graphs.
    assert traced.counts.recorded + traced.counts.linked == 12


def test_numbers_in_the_loss_are_captured_anew(where):
    w = torch.randn(5, dtype=torch.float64, device=where, requires_grad=True)
    for factor in (0.1, 0.7, 0.7):
        loss = lambda w, factor=factor: F.leaky_relu(torch.sin(w), factor).pow(3).sum()  # noqa: E731
        operator = hg.Hessian(loss, w, engine="cuda_graph")
        for v in torch.randn(2, 5, dtype=torch.float64, device=where):
            assert_close(operator @ v, hg.Hessian(loss, w, engine="eager") @ v, 1e-12)
    assert (traced.counts.compiled, traced.counts.captured) == (1, 2)


def test_numbers_in_tensors_on_the_cpu_are_captured_anew(where):
    """The host hands them to kernels by value."""
    w = torch.randn(5, dtype=torch.float64, device=where, requires_grad=True)
    for value in (2.0, 3.0):
        factor = torch.tensor(value, dtype=torch.float64)
        loss = lambda w, factor=factor: (torch.sin(w) * factor).pow(2).sum()  # noqa: E731
        operator = hg.Hessian(loss, w, engine="cuda_graph")
        for v in torch.randn(2, 5, dtype=torch.float64, device=where):
            assert_close(operator @ v, hg.Hessian(loss, w, engine="eager") @ v, 1e-12)
        assert operator.engine == "cuda_graph"


def test_two_operators_in_turn(where):
    """They share a graph and its memory."""
    model, _ = problem("mlp_tanh", where)
    losses = [new_loss(model, "mlp_tanh", where) for _ in range(2)]
    ours, theirs = ([hg.Hessian(loss, model, engine=e) for loss in losses] for e in ("cuda_graph", "eager"))
    for _ in range(3):
        v = random_like(model)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a @ v, b @ v, 1e-12)
    assert traced.counts.captured == 1


def test_threads_share_an_operator(where):
    """And with it the memory of its graphs."""
    model, loss = problem("mlp_tanh", where, 3000)
    operator = hg.Hessian(loss, model, engine="cuda_graph")

    def work(v):
        return operator @ v, *(hg.solve(operator, v, s).value for s in (hg.Neumann(5, alpha=0.1), hg.CG(max_steps=3)))

    vectors = [random_like(model) for _ in range(8)]
    work(vectors[0])
    alone = list(map(work, vectors))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, vectors))
    for ours, theirs in zip(together, alone, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, 1e-10)


def test_parameters_changed_within_a_solve_raise_as_they_do_in_torch(where):
    model, loss = problem("mlp_tanh", where)
    operator, v = hg.Hessian(loss, model, engine="cuda_graph"), random_like(model)
    operator @ v
    with torch.no_grad():
        model[2].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        operator @ v


def test_one_graph_per_shape_in_a_bounded_cache(where, monkeypatch):
    monkeypatch.setattr(cuda_graph._kept, "size", 2)
    model, _ = problem("linear", where)
    for n in (5, 6, 5, 6, 7, 5):
        hg.Hessian(new_loss(model, "linear", where, n), model, engine="cuda_graph") @ random_like(model)
    assert traced.counts.captured == 4 and len(cuda_graph._kept) == 2


def test_expanded_constants(where):
    w = torch.randn(5, dtype=torch.float64, device=where, requires_grad=True)
    for _ in range(2):
        x = torch.randn(3, 1, dtype=torch.float64, device=where).expand(3, 5)
        loss = lambda w, x=x: torch.exp(x * w).sum()  # noqa: E731
        operator = hg.Hessian(loss, w, engine="cuda_graph")
        for v in torch.randn(2, 5, dtype=torch.float64, device=where):
            assert_close(operator @ v, hg.Hessian(loss, w, engine="eager") @ v, 1e-12)
        assert operator.engine == "cuda_graph"


def test_what_cannot_be_captured_is_replayed_without_a_graph(where, caplog, monkeypatch):
    """An index by a mask waits for the device, which no graph can."""
    w = torch.randn(6, dtype=torch.float64, device=where, requires_grad=True)
    mask = torch.arange(6, device=where) % 2 == 0
    loss = lambda w: torch.sin(w)[mask].pow(3).sum()  # noqa: E731
    attempts = []
    captured = cuda_graph.captured
    monkeypatch.setattr(cuda_graph, "captured", lambda *args: (attempts.append(1), captured(*args))[1])
    with caplog.at_level(logging.WARNING, "hypergrad_ext"):
        for _ in range(3):
            operator = hg.Hessian(loss, w, engine="cuda_graph")
            for v in torch.randn(2, 6, dtype=torch.float64, device=where):
                assert_close(operator @ v, hg.Hessian(loss, w, engine="eager") @ v, 1e-12)
            assert operator.engine == "traced"
    assert len(attempts) == 1
    assert len([r for r in caplog.records if "without a CUDA graph" in r.message]) == 1


def waits_for_the_device(what: str, w: Tensor) -> object:
    return {"mask": lambda: w[w > 0], "number": lambda: w.sum().item(), "count": lambda: w.nonzero()}[what]()


@pytest.mark.parametrize("what", ["mask", "number", "count"])
def test_what_waits_is_refused_before_a_capture(what, where, monkeypatch):
    """After one that failed, torch's allocator would go on as if it did not end."""
    w = torch.ones(3, device=where)
    monkeypatch.setattr(torch.cuda, "graph", None)
    with pytest.raises(RuntimeError, match="waits for the device"):
        capture.captured(lambda: waits_for_the_device(what, w), w.device)
    w[torch.tensor([0, 2], device=where)] = 2


def test_a_capture_that_fails_leaves_stream_and_generator(monkeypatch):
    """Not on a GPU, where torch's allocator would go on as if it did not end, for the tests to come."""
    graph_stand_in.install(monkeypatch)
    w, calls = torch.ones(3), []

    def run() -> None:
        calls.append(1)
        # Not in the run that is watched: not all that fails can be known beforehand.
        if len(calls) > 3:
            waits_for_the_device("mask", w)

    stream = torch.cuda.current_stream(w.device)
    with pytest.raises(RuntimeError, match="stream is capturing"):
        capture.captured(run, w.device)
    assert len(calls) == 4 and torch.cuda.current_stream(w.device) == stream
    assert not torch.cuda.default_generators[None].state


def test_a_step_that_cannot_be_captured_follows_the_graph_of_the_product(where, caplog, monkeypatch):
    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, loss = problem("mlp_tanh", where)
    v = random_like(model)
    truth = hg.solve(hg.Hessian(loss, model, engine="eager"), v, hg.CG(max_steps=4), damping=1.0)
    monkeypatch.setattr(type(ops.cg_step_), "__call__", refuse)
    with caplog.at_level(logging.WARNING, "hypergrad_ext"):
        for _ in range(3):
            solution = hg.solve(hg.Hessian(loss, model, engine="cuda_graph"), v, hg.CG(max_steps=4), damping=1.0)
            assert solution.engine == "cuda_graph"
            assert_close(solution.value, truth.value, 1e-10)
    assert len([r for r in caplog.records if "no CUDA graph of the cg step" in r.message]) == 1


def test_no_graph_without_a_gpu(caplog):
    losses = mlp()
    v = [torch.randn_like(p) for p in losses.params]
    with caplog.at_level(logging.WARNING, "hypergrad_ext"):
        for _ in range(2):
            solution = hg.solve(hg.Hessian(losses.train, losses.params, engine="cuda_graph"), v, hg.Neumann(5))
            assert solution.engine == "traced"
    assert len([r for r in caplog.records if "need parameters on a CUDA device, got cpu" in r.message]) == 1


class TestAuto:
    def engines(self, where: torch.device, monkeypatch: pytest.MonkeyPatch, eager: float, graph: float) -> list[str]:
        """What five solves run on, with a clock that shows these seconds per product."""
        model, loss = problem("mlp_tanh", where)
        clock = iter([(eager > 0, abs(eager))])
        monkeypatch.setattr(cuda_graph, "launch_bound", lambda run, device: next(clock, (True, graph)))
        monkeypatch.setattr(choose, "_pairs", lambda *_: ([abs(eager) / graph], [graph]))
        solver = hg.Neumann(200, alpha=1e-4)
        return [hg.solve(hg.Hessian(loss, model), random_like(model), solver).engine for _ in range(5)]

    def test_takes_a_graph_where_launching_is_what_takes_long(self, where, monkeypatch):
        assert self.engines(where, monkeypatch, 1e3, 1e-9)[2:] == ["cuda_graph"] * 3

    def test_tries_none_where_the_gpu_is_busy(self, where, monkeypatch):
        assert self.engines(where, monkeypatch, -1e3, 1e-9) == ["eager"] * 5
        assert traced.counts.captured == 0

    def test_leaves_a_graph_that_is_no_faster(self, where, monkeypatch):
        assert self.engines(where, monkeypatch, 1e-9, 1e3) == ["eager"] * 5
        assert traced.counts.captured == 1


@pytest.mark.parametrize("solver", [hg.Neumann(40, alpha=0.1), hg.CG(max_steps=8)], ids=str)
@pytest.mark.parametrize("where", [pytest.param("cuda", marks=on_gpu)], indirect=True)
def test_iterations_do_not_wait_for_the_device(solver, where, monkeypatch):
    model, loss = problem("mlp_tanh", where)
    operator, v = hg.Hessian(loss, model, engine="cuda_graph"), random_like(model)
    truth = hg.solve(operator, v, solver, damping=1.0)
    replays = []
    replay = cuda_graph.Graphs.replay

    def watched(self, name):
        # From the first iteration to the last.
        torch.cuda.set_sync_debug_mode("error" if len(replays) < solver_steps - 1 else "default")
        replays.append(name)
        replay(self, name)

    solver_steps = truth.steps
    monkeypatch.setattr(cuda_graph.Graphs, "replay", watched)
    try:
        again = hg.solve(operator, v, solver, damping=1.0, residual=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replays) == solver_steps
    assert_close(again.value, truth.value, 1e-10)


@pytest.mark.parametrize("where", [pytest.param("cuda", marks=on_gpu)], indirect=True)
def test_streams_have_graphs_of_their_own(where):
    model, _ = problem("mlp_tanh", where)
    streams = [torch.cuda.Stream() for _ in range(2)]
    losses = [new_loss(model, "mlp_tanh", where) for _ in streams]
    v = random_like(model)
    torch.cuda.synchronize()
    values = []
    for stream, loss in zip(streams, losses, strict=True):
        with torch.cuda.stream(stream):
            values.append(hg.solve(hg.Hessian(loss, model, engine="cuda_graph"), v, hg.Neumann(20, alpha=0.1)).value)
    torch.cuda.synchronize()
    assert traced.counts.captured == 2
    for loss, value in zip(losses, values, strict=True):
        assert_close(value, hg.solve(hg.Hessian(loss, model, engine="eager"), v, hg.Neumann(20, alpha=0.1)).value, 1e-9)


@pytest.mark.parametrize("where", [pytest.param("cuda", marks=on_gpu)], indirect=True)
def test_memory_is_flat(where):
    model, _ = problem("mlp_tanh", where)
    v = random_like(model)

    def once() -> None:
        hg.solve(
            hg.Hessian(new_loss(model, "mlp_tanh", where), model, engine="cuda_graph"), v, hg.Neumann(3, alpha=0.1)
        )

    for _ in range(3):
        once()
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        once()
    assert torch.cuda.memory_allocated() == before
