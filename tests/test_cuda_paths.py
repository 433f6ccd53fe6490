"""Which of several CUDA paths an op takes, and that it is right on each: on a GPU, or emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypergrad_ext import _native, reference, reference_mlp
from tests.compare import assert_close, assert_no_worse_than_torch
from tests.test_glm import model
from tests.test_mlp import cast
from tests.test_mlp import problem as mlp_problem

# The emulator's device memory is the CPU's; its device has four multiprocessors, and so little shared memory.
DEVICE = torch.device("cpu" if _native.EMULATED else "cuda")
TALL = 1 if _native.EMULATED else 40

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        _native._C is None or not (_native.EMULATED or torch.cuda.is_available()),
        reason="no CUDA device is visible, and CUDA is not emulated",
    ),
]


@pytest.fixture
def counted():
    """Launches and bulk copies since the last call; empty on a GPU, where nobody counts."""
    last: dict[str, int] = {}

    def since() -> dict[str, int]:
        info = _native.build_info()
        now = {key: int(str(info[key])) for key in ("launches", "bulk_copies") if key in info}
        change = {key: now[key] - last.get(key, 0) for key in now}
        last.update(now)
        return change

    since()
    return since


def moved(t: Tensor) -> Tensor:
    """The tensor on the device, at the same place of its memory there."""
    base = t if t._base is None else t._base
    return base.to(DEVICE).as_strided(t.shape, t.stride(), t.storage_offset())


def on_device(arguments: tuple) -> tuple[list, list]:
    """Arguments of glm_hvp on the device, and the same in float64."""
    there = [moved(t) if isinstance(t, Tensor) else t for t in arguments]
    return there, [t.double() if isinstance(t, Tensor) else t for t in there]


def regression(n: int, d: int, classes: int, k: int, dtype: torch.dtype, intercept: bool, spare: int = 0) -> tuple:
    """Arguments of glm_hvp with rows that are whole multiples of 16 bytes, ``spare`` unused elements after each."""
    x, *rest = model(n, d, classes, k, intercept, dtype)
    weights, v, l2, scale, _ = rest
    rows = torch.full((n, d + spare), float("nan"), dtype=dtype)
    rows[:, :d] = x
    return rows[:, :d], weights, v, l2 + 0.5, scale, intercept


# n, d, classes, k, dtype, intercept, spare: a tile as one copy, or one per row, for rows that have one element more in
# shared memory, or more room between them in global memory. The last tile ends within 16 bytes of weights.
STREAMED = [
    (601, 400, 1, 2, torch.float64, False, 0),
    (601, 400, 1, 2, torch.float64, True, 0),
    (903, 300, 3, 1, torch.float32, False, 8),
    (903, 300, 1, 9, torch.float32, True, 0),
    (1402, 400, 1, 1, torch.bfloat16, False, 0),
    (1402, 400, 2, 2, torch.bfloat16, True, 24),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "deterministic"])
@pytest.mark.parametrize("problem", STREAMED, ids=str)
class TestBulkCopies:
    @pytest.fixture(autouse=True)
    def mode(self, deterministic):
        torch.use_deterministic_algorithms(deterministic)
        yield
        torch.use_deterministic_algorithms(False)

    def test_neumann_series(self, problem, deterministic, counted):
        (n, *shape), dtype, k = problem, problem[4], problem[3]
        arguments, exact = on_device(regression(TALL * n, *shape))
        assert _native._C.glm_neumann_plan(*arguments) == ("bulk", "x does not fit in shared memory")
        stop = torch.logspace(0, -1, k, dtype=torch.float64, device=DEVICE)
        counted()
        x, history = _native._C.glm_neumann_solve(*arguments, 0.4, 0.1, 40, stop)
        count = counted()
        assert not count or count["launches"] == 1 and count["bulk_copies"] > 0
        true_x, true_history = reference.glm_neumann_solve(*exact, 0.4, 0.1, 40, stop)
        assert torch.equal(history == -1, true_history == -1) and 3 < int((history[:, 0, 0] >= 0).sum()) < 40
        assert_close(x, true_x, 1e-13 if dtype == torch.float64 else 1e-6)
        assert_close(history, true_history, 1e-12 if dtype == torch.float64 else 1e-4)

    def test_conjugate_gradients(self, problem, deterministic, counted):
        (n, *shape), dtype = problem, problem[4]
        arguments, exact = on_device(regression(TALL * n, *shape))
        squares = exact[2].square().sum(1)
        state = torch.stack([squares, 1e-4 * squares, 0 * squares, 0 * squares], 1)
        counted()
        x, scalars, steps = _native._C.glm_cg_solve(*arguments, 0.1, 30, state)
        count = counted()
        assert not count or count["launches"] == 1 and count["bulk_copies"] > 0
        true_x, true_scalars, true_steps = reference.glm_cg_solve(*exact, 0.1, 30, state)
        assert int(steps) == int(true_steps) and torch.equal(scalars[:, 3], true_scalars[:, 3])
        assert_close(x, true_x, 1e-12 if dtype == torch.float64 else 1e-5)

    def test_product(self, problem, deterministic, counted):
        (n, *shape), dtype = problem, problem[4]
        arguments, exact = on_device(regression(TALL * n, *shape))
        counted()
        value = _native._C.glm_hvp(*arguments)
        count = counted()
        assert not count or count["bulk_copies"] > 0
        assert_close(value, reference.glm_hvp(*exact), 1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("problem", STREAMED, ids=str)
def test_streams_agree_to_the_last_bit(problem, counted, monkeypatch):
    """With bulk copies, again, and without: the same tiles in the same order."""
    (n, *shape), k = problem, problem[3]
    arguments, _ = on_device(regression(TALL * n, *shape))
    never = torch.full((k,), -1.0, dtype=torch.float64, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        by_bulk, again = (_native._C.glm_neumann_solve(*arguments, 0.4, 0.1, 3, never) for _ in range(2))
        monkeypatch.setenv("HYPERGRAD_EXT_CUDA_WITHOUT", "bulk")
        assert _native._C.glm_neumann_plan(*arguments) == ("stream", "HYPERGRAD_EXT_CUDA_WITHOUT names bulk")
        counted()
        by_threads = _native._C.glm_neumann_solve(*arguments, 0.4, 0.1, 3, never)
        assert counted().get("bulk_copies", 0) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, by_bulk, again)) and all(map(torch.equal, by_bulk, by_threads))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps_leave_no_copy_behind(steps):
    arguments, exact = on_device(regression(TALL * 601, 400, 1, 1, torch.float64, False))
    never = torch.full((1,), -1.0, dtype=torch.float64, device=DEVICE)
    assert _native._C.glm_neumann_plan(*arguments)[0] == "bulk"
    x, _ = _native._C.glm_neumann_solve(*arguments, 0.4, 0.1, steps, never)
    assert_close(x, reference.glm_neumann_solve(*exact, 0.4, 0.1, steps, never)[0], 1e-14)


class TestGlmPlan:
    """The reasons for another path."""

    def plan(self, x: Tensor, weights: Tensor | None = None, k: int = 1) -> tuple[str, str]:
        vectors = torch.float64 if x.dtype == torch.float64 else torch.float32
        weights = torch.ones(len(x), dtype=vectors) if weights is None else weights
        v = torch.zeros(k, x.shape[1] * (1 if weights.dim() == 1 else weights.shape[1]), dtype=vectors)
        arguments, _ = on_device((x, weights, v, None, 1.0, False))
        return _native._C.glm_neumann_plan(*arguments)

    def test_small_problems_stay_on_the_chip(self):
        assert self.plan(torch.zeros(90, 17)) == ("resident", "x fits in shared memory")
        assert self.plan(torch.zeros(0, 17)) == ("resident", "x fits in shared memory")

    def test_rows_that_are_not_whole_units(self):
        n = TALL * 10_000
        assert self.plan(torch.zeros(n, 40))[0] == "bulk"
        assert self.plan(torch.zeros(n, 41)) == ("stream", "the bytes of a row of x are not a multiple of 16")
        assert self.plan(torch.zeros(n, 41)[:, :40]) == ("stream", "rows of x do not lie a multiple of 16 bytes apart")

    def test_memory_that_starts_anywhere(self):
        x, weights = torch.zeros(TALL * 10_000, 44), torch.zeros(TALL * 10_000 + 1)
        assert self.plan(x[:, 1:41]) == ("stream", "x does not start at a multiple of 16 bytes")
        assert self.plan(x[:, 4:44])[0] == "bulk"
        reason = "weights do not start at a multiple of 16 bytes"
        assert self.plan(x[:, :40], weights[1:]) == ("stream", reason)

    def test_what_is_no_launch_of_its_own(self):
        path, reason = self.plan(torch.zeros(100, 20), k=25)
        assert path == "steps" and "too many columns" in reason
        path, reason = self.plan(torch.zeros(100, 10_000))
        assert path == "steps" and "too long for every block" in reason


def network(sizes, n, k, activation="tanh", loss="cross_entropy", biases=True, l2=0.1) -> tuple[list, tuple[str, str]]:
    """Arguments of mlp_hvp on the device, and how they run."""
    _, operator, _ = mlp_problem(sizes, n, activation, loss, biases, l2=l2)
    arguments = operator._model(torch.randn(k, operator.space.numel, dtype=torch.float64))
    there = [[t.to(DEVICE) for t in a] if isinstance(a, list) else a for a in arguments]
    there = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in there]
    return there, _native._C.mlp_hvp_plan(sizes, n, k, 8, activation != "relu")


class TestOneLaunch:
    """Whole products of deep and narrow networks. Emulated, 8 blocks run at once."""

    # One block, several, a batch that ends within a block's rows, odd widths, and more vectors than there is room for.
    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    @pytest.mark.parametrize("biases", [False, True])
    @pytest.mark.parametrize(
        ("sizes", "n", "k"),
        [
            ((5, 3), 3, 1),
            ((1, 1), 30, 2),
            ((20, 64, 2), 100, 1),
            ((33, 17, 48, 10), 61, 3),
            ((7, 8, 7, 16, 5, 32, 3), 31, 5),
            ((12,) * 20 + (4,), 29, 9),
        ],
        ids=str,
    )
    def test_against_reference(self, sizes, n, k, activation, biases, counted):
        for loss in ("cross_entropy", "squared"):
            arguments, (path, reason) = network(sizes, n, k, activation, loss, biases)
            assert path == "one_launch" and "layer by layer" in reason
            truth = reference_mlp.mlp_hvp(*arguments)
            counted()
            value = _native._C.mlp_hvp(*arguments)
            assert counted().get("launches", 1) == 1
            assert_close(value, truth, 1e-13, loss)
            assert torch.equal(_native._C.mlp_hvp(*arguments), value)
            single = cast(arguments, torch.float32)
            value, by_torch = _native._C.mlp_hvp(*single), reference_mlp.mlp_hvp(*single)
            assert_no_worse_than_torch(value, by_torch, truth, 1e-6, loss)

    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    def test_sixty_layers(self, activation, counted):
        sizes, n = (32,) * 60 + (10,), 30
        arguments, _ = network(sizes, n, 1, activation)
        assert _native._C.mlp_hvp_plan(sizes, n, 1, 4, activation != "relu")[0] == "one_launch"
        single, truth = cast(arguments, torch.float32), reference_mlp.mlp_hvp(*arguments)
        counted()
        value = _native._C.mlp_hvp(*single)
        assert counted().get("launches", 1) == 1
        assert_no_worse_than_torch(value, reference_mlp.mlp_hvp(*single), truth, 1e-6)

    @pytest.mark.parametrize("sizes", [(20, 64, 2), (33, 17, 48, 10)], ids=str)
    def test_layer_by_layer_when_told_to(self, sizes, counted, monkeypatch):
        monkeypatch.setenv("HYPERGRAD_EXT_CUDA_WITHOUT", "bulk,one_launch")
        arguments, (path, reason) = network(sizes, 40, 3)
        assert (path, reason) == ("launches", "HYPERGRAD_EXT_CUDA_WITHOUT names one_launch")
        counted()
        value = _native._C.mlp_hvp(*arguments)
        assert counted().get("launches", 2) > 1
        assert_close(value, reference_mlp.mlp_hvp(*arguments), 1e-13)

    def test_rows_anywhere_in_memory(self, counted):
        arguments, (path, _) = network((8, 16, 12, 4), 30, 2)
        assert path == "one_launch"
        truth = reference_mlp.mlp_hvp(*arguments)

        def shifted(t: Tensor) -> Tensor:
            base = torch.full((len(t), t.shape[1] + 3), float("nan"), dtype=t.dtype, device=t.device)
            return base[:, 1 : t.shape[1] + 1].copy_(t)

        elsewhere = [[shifted(t) for t in a] if isinstance(a, list) else a for a in arguments]
        counted()
        value = _native._C.mlp_hvp(*elsewhere)
        assert counted().get("launches", 1) == 1
        assert_close(value, truth, 1e-13)

    def test_no_rows_and_no_vectors(self):
        arguments, _ = network((5, 7, 3), 4, 2, biases=False)
        weights, *saved, probabilities, v, scale, biases, l2 = arguments
        empty = [[t[:0] for t in a] for a in saved]
        value = _native._C.mlp_hvp(weights, *empty, probabilities[:0], v, scale, biases, l2)
        assert_close(value, 2 * l2 * v, 1e-15)
        value = _native._C.mlp_hvp(weights, *saved, probabilities, v[:0], scale, biases, l2)
        assert value.shape == (0, v.shape[1])

    def test_not_finite_stays_in_its_vector(self):
        arguments, (path, _) = network((5, 7, 3), 9, 2)
        assert path == "one_launch"
        arguments[6][0, 3] = float("nan")
        value = _native._C.mlp_hvp(*arguments)
        assert value[0].isnan().any() and value[1].isfinite().all()
