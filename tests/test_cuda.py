"""What only CUDA kernels can show, on a GPU or emulated: alignment, long lists, streams, graphs, 64-bit addresses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import hypergrad_ext as hg
from hypergrad_ext import _native, backends, nn, ops, reference, reference_lstm, reference_mlp
from tests.cases import spd
from tests.compare import assert_close, assert_no_worse_than_torch
from tests.steps import STEPS, arguments
from tests.test_lstm import DTYPES as LSTM_DTYPES
from tests.test_lstm import FLOOR, arguments_of, wide
from tests.test_lstm import NAMES as LSTM_NAMES
from tests.test_mlp import cast
from tests.test_mlp import problem as mlp_problem
from tests.test_ops import DTYPES, ROUNDING, copies, random_list
from tests.test_steps import OPS, check

# The emulator's device memory is the CPU's.
DEVICE = torch.device("cpu" if _native.EMULATED else "cuda")

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
pytestmark = [pytest.mark.cuda, *([] if _native.EMULATED else [no_gpu])]

dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.unavailable(request.param, DEVICE.type):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def shifted(tensors: list[Tensor], offset: int) -> list[Tensor]:
    """The same tensors in memory that starts ``offset`` elements after an aligned address."""
    result = []
    for t in tensors:
        base = torch.full((t.numel() + offset + 8,), float("nan"), dtype=t.dtype, device=t.device)
        result.append(base[offset : offset + t.numel()].view(t.shape).copy_(t))
    return result


def check_neumann(v, p, hv, backend, rows=None, context=""):
    stats = torch.full((2,) if rows is None else (rows, 2), float("nan"), dtype=torch.float64, device=DEVICE)
    truth, true_stats = copies([v, p, hv], torch.float64), stats.clone()
    reference.neumann_step_(*truth, true_stats, 0.3, 0.7)
    ops.neumann_step_.kernel(DEVICE, backend)(v, p, hv, stats, 0.3, 0.7)
    assert_close([v, p], truth[:2], ROUNDING[v[0].dtype], context)
    assert_close(stats, true_stats, ROUNDING[v[0].dtype], context)


def check_cg(x, r, p, hp, backend, rows=None, context=""):
    state = torch.tensor([3.0, 1e-9, 0.0, 0.0], dtype=torch.float64, device=DEVICE)
    state = state if rows is None else state.repeat(rows, 1)
    truth, true_state = copies([x, r, p, hp], torch.float64), state.clone()
    reference.cg_step_(*truth, true_state, 0.5)
    ops.cg_step_.kernel(DEVICE, backend)(x, r, p, hp, state, 0.5)
    assert_close([x, r, p], truth[:3], 4 * ROUNDING[x[0].dtype], context)
    assert_close(state, true_state, 4 * ROUNDING[x[0].dtype], context)


@dtypes
@pytest.mark.parametrize("rows", [None, 3], ids=lambda k: f"rows{k}")
@pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 1, 1), (3, 3, 3), (0, 0, 1), (1, 2, 3)], ids=str)
class TestAlignment:
    """Packs of 16 bytes where all lists allow them, single elements elsewhere, and nothing beyond the ends."""

    SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 31, 2047, 2048, 2049, 5003]

    def test_neumann_step(self, offsets, rows, dtypes, backend):
        lists = [random_list(self.SIZES, rows, d, DEVICE) for d in (dtypes[0], dtypes[0], dtypes[1])]
        v, p, hv = (shifted(tensors, offset) for tensors, offset in zip(lists, offsets, strict=True))
        check_neumann(v, p, hv, backend, rows, f"offsets {offsets}")
        for t in [*v, *p]:
            base = t._base
            begin = t.storage_offset()
            assert base[:begin].isnan().all() and base[begin + t.numel() :].isnan().all()

    def test_cg_step(self, offsets, rows, dtypes, backend):
        x, r, p = (random_list(self.SIZES, rows, dtypes[0], DEVICE) for _ in range(3))
        hp = shifted([(2 * t).to(dtypes[1]) for t in p], offsets[2])
        check_cg(shifted(x, offsets[0]), shifted(r, offsets[1]), shifted(p, offsets[0]), hp, backend, rows)

    @pytest.mark.parametrize("name", STEPS)
    def test_other_steps(self, name, offsets, rows, dtypes, backend):
        args = arguments(name, self.SIZES, rows, dtypes, DEVICE)
        turn = iter([offsets[0], offsets[1], offsets[2]] * 3)
        args = [shifted(a, next(turn)) if isinstance(a, list) else a for a in args]
        check(name, args, OPS[name].kernel(DEVICE, backend), 8 * ROUNDING[dtypes[0]], f"offsets {offsets}")


@pytest.mark.parametrize("name", STEPS)
def test_other_steps_on_long_lists(name, backend):
    sizes = torch.randint(0, 40, (300 if _native.EMULATED else 3000,)).tolist()
    args = arguments(name, sizes, 2, (torch.float32,) * 2, DEVICE, cuts=[sum(sizes)])
    check(name, args, OPS[name].kernel(DEVICE, backend), 8e-6)


@no_gpu
@pytest.mark.parametrize("name", STEPS)
def test_other_steps_neither_wait_nor_allocate_outside_a_graph(name, backend):
    args, again = (arguments(name, [1000, 3], 3, device=DEVICE) for _ in range(2))
    kernel = OPS[name].kernel(DEVICE, backend)
    kernel(*args)  # Triton compiles, and may wait, in its first call.
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(args, again, strict=True):
        if isinstance(a, list):
            torch._foreach_copy_(a, b)
        elif isinstance(a, Tensor):
            a.copy_(b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(*args)
    graph.replay()
    kernel(*again)
    for a, b in zip(args, again, strict=True):
        if not isinstance(a, float):
            assert_close(a, b, 1e-14)


@pytest.mark.parametrize("rows", [None, 2], ids=lambda k: f"rows{k}")
def test_long_lists(rows, backend):
    # Emulated, a few hundred: more than one launch takes.
    sizes = torch.randint(0, 40, (300 if _native.EMULATED else 3000,)).tolist()
    hv = random_list(sizes, rows, torch.float32, DEVICE)
    v, p, x, r = (random_list([sum(sizes)], rows, torch.float32, DEVICE) for _ in range(4))
    check_neumann(v, p, hv, backend, rows)
    hp = [2 * part for part in p[0].split(sizes, dim=-1)]
    check_cg(x, r, p, hp, backend, rows)


@no_gpu
def test_more_rows_than_a_grid_dimension_holds(backend):
    rows = 65535 + 70
    v, p, hv = (random_list([3, 2], rows, torch.float32, DEVICE) for _ in range(3))
    check_neumann(v, p, hv, backend, rows)


def test_rows_of_cg_stop_one_by_one(backend):
    n, rows = 40, 5
    a = spd(n, 30.0).to(DEVICE)
    b = torch.randn(rows, n, dtype=torch.float64, device=DEVICE)
    b[2] *= 1e-3
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    squares = b.square().sum(1)
    stop = squares * torch.tensor([1e-2, 1e-6, 1e-20, 1e-4, 1e-20], dtype=torch.float64, device=DEVICE)
    state = torch.stack([squares, stop, torch.zeros_like(stop), torch.zeros_like(stop)], 1)
    seen = {}
    for _ in range(2 * n):
        hp = p @ a
        hp[4] = -hp[4]
        ops.cg_step_.kernel(DEVICE, backend)([x], [r], [p], [hp], state, 0.0)
        for row in (state[:, 3] != 0).nonzero().flatten().tolist():
            seen.setdefault(row, (x[row].clone(), state[row].clone()))
    assert state[:, 3].tolist() == [1, 1, 1, 1, 2]
    for row, (x_then, state_then) in seen.items():
        assert torch.equal(x[row], x_then) and torch.equal(state[row], state_then)
    assert_close(x[2], torch.linalg.solve(a, b[2]), 1e-9)
    assert x[4].norm() == 0


@pytest.mark.parametrize("n", [777, pytest.param(3_000_001, marks=no_gpu)])
def test_sums_are_the_same_in_every_run(n, backend):
    v, p, hv = (torch.randn(n, device=DEVICE) for _ in range(3))
    results = []
    for _ in range(5):
        stats = torch.zeros(2, dtype=torch.float64, device=DEVICE)
        ops.neumann_step_.kernel(DEVICE, backend)([v.clone()], [p.clone()], [hv], stats, 0.3, 0.1)
        results.append(stats)
    assert all(torch.equal(stats, results[0]) for stats in results)


@no_gpu
def test_no_step_waits_for_the_device(backend):
    v, p, hv = (torch.randn(3, 1000, device=DEVICE) for _ in range(3))
    stats = torch.zeros(3, 2, dtype=torch.float64, device=DEVICE)
    state = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3, dtype=torch.float64, device=DEVICE)
    neumann, cg = (op.kernel(DEVICE, backend) for op in (ops.neumann_step_, ops.cg_step_))

    def steps():
        neumann([v], [p], [hv], stats, 0.3, 0.1)
        cg([v.clone()], [v], [p], [hv], state, 0.1)

    steps()  # Triton compiles, and may wait, in its first call.
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@no_gpu
def test_runs_on_the_current_stream(backend):
    stream = torch.cuda.Stream()
    n = 1_000_003
    v, p = torch.zeros(n, device=DEVICE), torch.zeros(n, device=DEVICE)
    stats = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    step = ops.neumann_step_.kernel(DEVICE, backend)
    step([v.clone()], [p.clone()], [v], stats, 0.5, 0.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        hv = torch.ones(n, device=DEVICE)  # Not there yet for a kernel on any other stream.
        step([v], [p], [hv], stats, 0.5, 0.0)
        doubled = 2 * v
    stream.synchronize()
    assert (doubled == -1).all() and float(stats[0]) == 0.25 * n


@no_gpu
def test_can_be_captured_in_a_graph(backend):
    n = 301
    a = spd(n, 10.0).to(DEVICE)
    b = torch.randn(n, dtype=torch.float64, device=DEVICE)
    v, p, stats = b.clone(), b.clone(), torch.zeros(2, dtype=torch.float64, device=DEVICE)
    step = ops.neumann_step_.kernel(DEVICE, backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # Warm up: Triton compiles, libraries load.
        step([v], [p], [a @ v], stats, 1.0, 0.0)
    torch.cuda.synchronize()
    v.copy_(b), p.copy_(b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step([v], [p], [a @ v], stats, 1.0, 0.0)
    for _ in range(200):
        graph.replay()
    assert_close(p, torch.linalg.solve(a, b), 1e-8)
    assert float(stats[0]) == pytest.approx(float(v.square().sum()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device is not two")
def test_runs_on_the_device_of_its_tensors(backend):
    other = torch.device("cuda", 1)
    v, p, hv = (torch.ones(1000, device=other) for _ in range(3))
    stats = torch.zeros(2, dtype=torch.float64, device=other)
    with torch.cuda.device(0):
        ops.neumann_step_.kernel(other, backend)([v], [p], [hv], stats, 0.5, 0.0)
    assert (v == 0.5).all() and (p == 1.5).all() and float(stats[0]) == 250


@no_gpu
@pytest.mark.slow
def test_more_elements_than_32_bits_count(backend):
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 11 * n:
        pytest.skip(f"needs {11 * n / 2**30:.0f} GiB of device memory")
    v, p = torch.ones(n, device=DEVICE), torch.zeros(n, device=DEVICE)
    hv = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    hv[-1] = 2
    stats = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    ops.neumann_step_.kernel(DEVICE, backend)([v], [p], [hv], stats, 0.5, 0.0)
    assert stats.tolist() == [0.25 * (n - 1), 0.0]
    assert v[-2:].tolist() == [0.5, 0.0] and bool((p[:-1] == 0.5).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, 4], ids=lambda k: f"rows{k}")
@pytest.mark.parametrize(
    "solver",
    [hg.CG(tol=1e-6), hg.Neumann(steps=150), hg.Chebyshev(60, bounds=(0.1, 1.1)), hg.MINRES(tol=1e-6)],
    ids=lambda s: type(s).__name__,
)
def test_whole_solve(solver, rows, dtype, backend):
    a = spd(37, 8.0).to(DEVICE)
    b = torch.randn(*(() if rows is None else (rows,)), 37, dtype=torch.float64, device=DEVICE)
    matrix, b = a.to(dtype), b.to(dtype)
    operator = hg.Callable(lambda v: matrix @ v, like=torch.empty(37, dtype=dtype, device=DEVICE))
    solution = hg.solve(operator, b, solver, backend=backend)
    truth = b.double() @ torch.linalg.inv(matrix.double())
    assert_close(solution.value, truth, {torch.bfloat16: 3e-2}.get(dtype, 1e-4))


class TestSoftmaxHessian:
    """Rows for 8 threads, for a warp, for a block, and longer than shared memory, wherever they start."""

    CLASSES = [1, 7, 64, 65, 1000, 2048, 2049, 50_257, 130_000]

    def arguments(self, rows, classes, k, dtype, offsets=(0, 0), weighted=True):
        lead = () if k is None else (k,)
        logits = (3 * torch.randn(rows, classes, dtype=torch.float64)).to(DEVICE, dtype)
        u = torch.randn(*lead, rows, classes, dtype=torch.float64).to(DEVICE, dtype)
        logits, u = (shifted([t], offset)[0] for t, offset in zip((logits, u), offsets, strict=True))
        weights = (torch.rand(rows) + 0.1).to(DEVICE) if weighted else None
        return logits, u, 0.7, weights

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("offsets", [(0, 0), (1, 1), (1, 2)], ids=str)
    @pytest.mark.parametrize("classes", CLASSES)
    def test_against_reference(self, classes, offsets, dtype, backend):
        logits, u, scale, weights = self.arguments(2 if classes > 3000 else 35, classes, 2, dtype, offsets)
        if weights is not None:
            weights[0] = 0
        truth = reference.softmax_hessian(logits.double(), u.double(), scale, weights)
        by_torch = reference.softmax_hessian(logits, u, scale, weights)
        floor = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1e-4)
        value = ops.softmax_hessian.kernel(DEVICE, backend)(logits, u, scale, weights)
        assert (value[:, 0] == 0).all()
        if classes > 1:
            assert_no_worse_than_torch(value, by_torch, truth, floor, f"{classes} classes, offsets {offsets}")
        ops.softmax_hessian_.kernel(DEVICE, backend)(logits, u, scale, weights)
        assert torch.equal(u, value)
        base, begin = u._base, u.storage_offset()
        assert base[:begin].isnan().all() and base[begin + u.numel() :].isnan().all()

    def test_many_vectors_of_few_rows(self, backend):
        logits, u, scale, weights = self.arguments(1, 3000, 33, torch.float64)
        truth = reference.softmax_hessian(logits, u, scale, weights)
        assert_close(ops.softmax_hessian.kernel(DEVICE, backend)(logits, u, scale, weights), truth, 1e-13)

    @no_gpu
    def test_can_be_captured_in_a_graph(self, backend):
        logits, u, scale, _ = self.arguments(64, 50_304, None, torch.bfloat16)
        kernel = ops.softmax_hessian.kernel(DEVICE, backend)
        with torch.cuda.stream(torch.cuda.Stream()):
            expected = kernel(logits, u, scale)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = kernel(logits, u, scale)
        value.zero_()
        graph.replay()
        assert torch.equal(value, expected)


@pytest.mark.parametrize("dtype", LSTM_DTYPES, ids=str)
@pytest.mark.parametrize("name", LSTM_NAMES)
def test_lstm(name, dtype, backend):
    """Widths that 16 bytes divide and widths that they do not, and rows that start in the middle of 16 bytes."""
    for rows, units in ((1, 1), (3, 33), (20, 200), (7, 1024)):
        arguments = arguments_of(name, rows, units, dtype)
        truth, by_torch = (getattr(reference_lstm, name)(*a) for a in (wide(arguments), arguments))
        for offset in (0, 1):
            on_device = [shifted([t.to(DEVICE)], offset)[0] for t in arguments]
            value = getattr(ops, name).kernel(DEVICE, backend)(*on_device)
            for ours, theirs, exact in zip(value, by_torch, truth, strict=True):
                # TF32 is off; a layer's products are added up in another order.
                assert_no_worse_than_torch(ours.cpu(), theirs, exact, 4 * FLOOR[dtype], f"{rows} x {units}")


def test_lstm_module_and_its_hessian():
    torch.manual_seed(0)
    on_cpu = nn.LSTM(7, 33, num_layers=2, dtype=torch.float64)
    on_device = copy.deepcopy(on_cpu).to(DEVICE)
    x = torch.randn(5, 3, 7, dtype=torch.float64)
    v = [torch.randn_like(p) for p in on_cpu.parameters()]

    def product(module, x, v):
        return hg.Hessian(module(x)[0].square().sum(), list(module.parameters())).matvec(v)

    truth = product(on_cpu, x, v)
    value = product(on_device, x.to(DEVICE), [t.to(DEVICE) for t in v])
    assert_close([t.cpu() for t in value], list(truth), 1e-12)


def on_device(arguments):
    """The arguments of mlp_hvp there, rows still padded."""
    move = lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x  # noqa: E731
    return [[move(t) for t in x] if isinstance(x, list) else move(x) for x in arguments]


class TestMLPProduct:
    @pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    @pytest.mark.parametrize("sizes", [(5, 3), (16, 1), (33, 17, 48, 10), (64, 256, 256, 300)], ids=str)
    def test_against_reference(self, sizes, activation, loss, backend):
        kernel = ops.mlp_hvp.kernel(DEVICE, backend)
        for biases, n, k, l2 in [(True, 63, 1, 0.0), (False, 130, 5, 0.1), (True, 1, 2, 0.1), (True, 9, 0, 0.0)]:
            _, operator, _ = mlp_problem(sizes, n, activation, loss, biases, l2=l2)
            arguments = on_device(operator._model(torch.randn(k, operator.space.numel, dtype=torch.float64)))
            truth = reference_mlp.mlp_hvp(*arguments)
            assert_close(kernel(*arguments), truth, 1e-12, f"biases={biases} n={n} k={k}")
            single = cast(arguments, torch.float32)
            by_torch = reference_mlp.mlp_hvp(*single)
            assert_no_worse_than_torch(kernel(*single), by_torch, truth, 1e-6, f"biases={biases} n={n} k={k}")

    def test_no_padding_and_rows_anywhere(self, backend):
        _, operator, _ = mlp_problem((32, 16, 8, 4), 40)
        arguments = cast(operator._model(torch.randn(2, operator.space.numel, dtype=torch.float64)), torch.float32)
        arguments = on_device(arguments)
        truth = reference_mlp.mlp_hvp(*cast(arguments, torch.float64))
        moved = [shifted(x, 1) if isinstance(x, list) else x for x in arguments]
        assert_close(ops.mlp_hvp.kernel(DEVICE, backend)(*moved), truth, 1e-5)

    @no_gpu
    def test_captured_in_a_graph_without_waiting(self, backend):
        _, operator, _ = mlp_problem((33, 17, 48, 10), 60)
        arguments = on_device(operator._model(torch.randn(2, operator.space.numel, dtype=torch.float64)))
        kernel, v = ops.mlp_hvp.kernel(DEVICE, backend), arguments[6]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # Warm up: Triton compiles, cuBLAS gets its workspace.
            kernel(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = kernel(*arguments)
        v.copy_(torch.randn_like(v))
        graph.replay()
        assert_close(value, reference_mlp.mlp_hvp(*arguments), 1e-12)
        torch.cuda.set_sync_debug_mode("error")
        try:
            kernel(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_operator_and_solve(self, backend):
        params, _, _ = mlp_problem((6, 9, 4), l2=0.3)
        params = [p.detach().to(DEVICE) for p in params]
        x, y = torch.randn(50, 6, dtype=torch.float64, device=DEVICE), torch.randint(4, (50,), device=DEVICE)
        operator = hg.MLPHessian(x, params, y, activation="tanh", l2=0.3)
        b = [torch.randn_like(p) for p in params]
        truth = hg.solve(operator, b, hg.Direct(), damping=0.4).value
        assert_close(hg.solve(operator, b, hg.CG(tol=1e-12), damping=0.4, backend=backend).value, truth, 1e-8)
