"""What only a GPU can show of the GLM kernels: every path at full size, repeated runs, graphs, streams, no waiting."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import hypergrad_ext as hg
from hypergrad_ext import backends, ops, reference
from tests.compare import assert_close
from tests.test_glm import model

DEVICE = torch.device("cuda")

# torch's matrix products refuse to run in deterministic mode without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.unavailable(request.param, DEVICE.type):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


# n, d, classes, k: resident in shared memory, streamed from L2, streamed from memory, and by two matrix products.
GLM_SHAPES = [
    (1, 1, 1, 1),
    (4096, 784, 1, 1),
    (1000, 33, 10, 2),
    (20_000, 513, 1, 3),
    (70_000, 784, 1, 1),
    (500, 90, 10, 8),
]
glm_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def glm_arguments(shape, dtype=torch.float32):
    """Arguments of glm_hvp on the GPU, and the same in float64; x keeps its odd offset and stride."""
    n, d, classes, k = shape
    arguments = model(n, d, classes, k, True, dtype)
    on_device = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in arguments]
    on_device[0] = arguments[0]._base.to(DEVICE)[:, 1 : d + 1]
    on_device[3] = on_device[3] + 0.5
    return on_device, [t.double() if isinstance(t, Tensor) else t for t in on_device]


@pytest.fixture(params=[False, True], ids=["any-order", "deterministic"])
def deterministic(request: pytest.FixtureRequest):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@glm_dtypes
@pytest.mark.parametrize("shape", GLM_SHAPES, ids=str)
class TestGlm:
    def test_product(self, shape, dtype, backend):
        arguments, exact = glm_arguments(shape, dtype)
        value = ops.glm_hvp.kernel(DEVICE, backend)(*arguments)
        assert_close(value, reference.glm_hvp(*exact), 1e-12 if dtype == torch.float64 else 2e-6)
        assert torch.equal(ops.glm_hvp.kernel(DEVICE, backend)(*arguments), value)

    def test_aligned_rows(self, shape, dtype, backend):
        arguments, exact = glm_arguments(shape, dtype)
        rows = torch.zeros(shape[0], -(-shape[1] // 8) * 8, dtype=dtype, device=DEVICE)[:, : shape[1]]
        arguments[0] = rows.copy_(arguments[0])
        value = ops.glm_hvp.kernel(DEVICE, backend)(*arguments)
        assert_close(value, reference.glm_hvp(*exact), 1e-12 if dtype == torch.float64 else 2e-6)

    def test_neumann_series(self, shape, dtype, deterministic):
        arguments, exact = glm_arguments(shape, dtype)
        stop = torch.full((shape[3],), 1e-6, dtype=torch.float64, device=DEVICE)
        solve = ops.glm_neumann_solve.kernel(DEVICE, "cuda")
        x, history = solve(*arguments, 0.2, 0.1, 100, stop)
        true_x, true_history = reference.glm_neumann_solve(*exact, 0.2, 0.1, 100, stop)
        assert torch.equal(history == -1, true_history == -1)
        assert_close(x, true_x, 1e-12 if dtype == torch.float64 else 1e-5)
        assert_close(history, true_history, 1e-11 if dtype == torch.float64 else 1e-4)
        if deterministic:
            again = solve(*arguments, 0.2, 0.1, 100, stop)
            assert torch.equal(again[0], x) and torch.equal(again[1], history)

    def test_conjugate_gradients(self, shape, dtype, deterministic):
        arguments, exact = glm_arguments(shape, dtype)
        squares = exact[2].square().sum(1)
        state = torch.stack([squares, 1e-8 * squares, 0 * squares, 0 * squares], 1)
        solve = ops.glm_cg_solve.kernel(DEVICE, "cuda")
        x, scalars, _ = solve(*arguments, 0.1, 50, state)
        true_x, true_scalars, _ = reference.glm_cg_solve(*exact, 0.1, 50, state)
        assert torch.equal(scalars[:, 3], true_scalars[:, 3])
        # Near the tolerance a solve may take one step more or less.
        assert_close(x, true_x, 1e-10 if dtype == torch.float64 else 1e-3)
        if deterministic:
            again = solve(*arguments, 0.1, 50, state)
            assert torch.equal(again[0], x) and torch.equal(again[1], scalars)


@pytest.mark.parametrize("shape", GLM_SHAPES, ids=str)
def test_glm_in_a_cuda_graph(shape, deterministic):
    (x, weights, v, *rest), _ = glm_arguments(shape)
    never = torch.full((shape[3],), -1.0, dtype=torch.float64, device=DEVICE)
    squares = v.double().square().sum(1)
    state = torch.stack([squares, 1e-8 * squares, 0 * squares, 0 * squares], 1)

    def run():
        product = ops.glm_hvp.kernel(DEVICE, "cuda")(x, weights, v, *rest)
        series, history = ops.glm_neumann_solve.kernel(DEVICE, "cuda")(x, weights, v, *rest, 0.2, 0.1, 10, never)
        solution, scalars, steps = ops.glm_cg_solve.kernel(DEVICE, "cuda")(x, weights, v, *rest, 0.1, 10, state)
        return product, series, history, solution, scalars, steps

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    v.copy_(torch.randn_like(v))
    squares = v.double().square().sum(1)
    state[:, 0], state[:, 1] = squares, 1e-8 * squares
    graph.replay()
    eager = run()
    if deterministic:
        assert all(map(torch.equal, captured, eager))
    else:
        # The state of conjugate gradients near its tolerance is rounding.
        assert_close(captured[:4], eager[:4], 1e-3)


def test_glm_solves_do_not_wait_for_the_device():
    arguments, _ = glm_arguments((4096, 784, 1, 1))
    never = torch.full((1,), -1.0, dtype=torch.float64, device=DEVICE)
    squares = arguments[2].double().square().sum(1)
    state = torch.stack([squares, 1e-8 * squares, 0 * squares, 0 * squares], 1)
    ops.glm_neumann_solve.kernel(DEVICE, "cuda")(*arguments, 0.2, 0.1, 3, never)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.glm_neumann_solve.kernel(DEVICE, "cuda")(*arguments, 0.2, 0.1, 3, never)
        ops.glm_cg_solve.kernel(DEVICE, "cuda")(*arguments, 0.1, 3, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_glm_solves_on_two_streams_at_once():
    arguments, exact = glm_arguments((4096, 784, 1, 1))
    never = torch.full((1,), -1.0, dtype=torch.float64, device=DEVICE)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(ops.glm_neumann_solve.kernel(DEVICE, "cuda")(*arguments, 0.2, 0.1, 40, never)[0])
    torch.cuda.synchronize()
    truth, _ = reference.glm_neumann_solve(*exact, 0.2, 0.1, 40, never)
    for value in results:
        assert_close(value, truth, 1e-5)


@pytest.mark.parametrize("classes", [1, 4])
def test_glm_operator_solves_like_the_cpu(classes):
    x, w = torch.randn(2000, 60), torch.zeros((classes, 60) if classes > 1 else (60,))
    b = torch.randn_like(w)
    family = "softmax" if classes > 1 else "logistic"
    for solver in (hg.CG(tol=1e-6), hg.Neumann(30), "auto"):
        there = hg.solve(hg.GLMHessian(x.to(DEVICE), w.to(DEVICE), family, l2=0.05), b.to(DEVICE), solver)
        here = hg.solve(hg.GLMHessian(x, w, family, l2=0.05), b, solver)
        assert there.value.is_cuda and there.status == here.status
        assert_close(there.value.cpu(), here.value, 1e-4)
