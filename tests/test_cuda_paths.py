"""Which of several CUDA paths an op takes, and that it is right on each: on a GPU, or emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypergrad_ext import _native, reference
from tests.compare import assert_close
from tests.test_glm import model

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


def on_device(arguments: tuple) -> tuple[list, list]:
    """Arguments of glm_hvp on the device, x not moved within its memory, and the same in float64."""
    there = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in arguments]
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
    (6001, 40, 1, 2, torch.float64, False, 0),
    (6001, 40, 1, 2, torch.float64, True, 0),
    (9003, 40, 3, 1, torch.float32, False, 8),
    (9003, 36, 1, 9, torch.float32, True, 0),
    (14_002, 48, 1, 1, torch.bfloat16, False, 0),
    (14_002, 40, 2, 2, torch.bfloat16, True, 24),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "deterministic"])
@pytest.mark.parametrize("problem", STREAMED, ids=str)
class TestBulkCopies:
    @pytest.fixture(autouse=True)
    def mode(self, deterministic):
        torch.use_deterministic_algorithms(deterministic)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("without", ["", "bulk"])
    def test_neumann_series(self, problem, without, deterministic, counted, monkeypatch):
        monkeypatch.setenv("HYPERGRAD_EXT_CUDA_WITHOUT", without)
        (n, *shape), dtype, k = problem, problem[4], problem[3]
        arguments, exact = on_device(regression(TALL * n, *shape))
        path, reason = _native._C.glm_neumann_plan(*arguments)
        if without:
            assert (path, reason) == ("stream", "HYPERGRAD_EXT_CUDA_WITHOUT names bulk")
        else:
            assert (path, reason) == ("bulk", "x does not fit in shared memory")
        stop = torch.logspace(-3, -6, k, dtype=torch.float64, device=DEVICE)
        counted()
        x, history = _native._C.glm_neumann_solve(*arguments, 0.2, 0.1, 60, stop)
        if _native.EMULATED:
            count = counted()
            assert count["launches"] == 1
            assert (count["bulk_copies"] > 0) == (not without)
        true_x, true_history = reference.glm_neumann_solve(*exact, 0.2, 0.1, 60, stop)
        assert torch.equal(history == -1, true_history == -1) and 3 < int((history[:, 0, 0] >= 0).sum()) < 60
        assert_close(x, true_x, 1e-13 if dtype == torch.float64 else 1e-6)
        assert_close(history, true_history, 1e-12 if dtype == torch.float64 else 1e-4)
        if deterministic:
            again = _native._C.glm_neumann_solve(*arguments, 0.2, 0.1, 60, stop)
            assert torch.equal(again[0], x) and torch.equal(again[1], history)

    def test_paths_agree_to_the_last_bit(self, problem, deterministic, monkeypatch):
        if not deterministic:
            pytest.skip("sums in any order differ by rounding")
        (n, *shape), k = problem, problem[3]
        arguments, _ = on_device(regression(TALL * n, *shape))
        never = torch.full((k,), -1.0, dtype=torch.float64, device=DEVICE)
        by_bulk = _native._C.glm_neumann_solve(*arguments, 0.2, 0.1, 3, never)
        monkeypatch.setenv("HYPERGRAD_EXT_CUDA_WITHOUT", "bulk")
        by_threads = _native._C.glm_neumann_solve(*arguments, 0.2, 0.1, 3, never)
        assert all(map(torch.equal, by_bulk, by_threads))

    def test_conjugate_gradients(self, problem, deterministic, counted):
        (n, *shape), dtype = problem, problem[4]
        arguments, exact = on_device(regression(TALL * n, *shape))
        squares = exact[2].square().sum(1)
        state = torch.stack([squares, 1e-6 * squares, 0 * squares, 0 * squares], 1)
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


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps_leave_no_copy_behind(steps):
    arguments, exact = on_device(regression(TALL * 6001, 40, 1, 1, torch.float64, False))
    never = torch.full((1,), -1.0, dtype=torch.float64, device=DEVICE)
    assert _native._C.glm_neumann_plan(*arguments)[0] == "bulk"
    x, _ = _native._C.glm_neumann_solve(*arguments, 0.2, 0.1, steps, never)
    assert_close(x, reference.glm_neumann_solve(*exact, 0.2, 0.1, steps, never)[0], 1e-14)


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

    @pytest.mark.skipif(not _native.EMULATED, reason="a copy to the device starts at a multiple of 16 bytes")
    def test_memory_that_starts_anywhere(self):
        x, weights = torch.zeros(10_000, 44), torch.zeros(10_001)
        assert self.plan(x[:, 1:41]) == ("stream", "x does not start at a multiple of 16 bytes")
        assert self.plan(x[:, 4:44])[0] == "bulk"
        reason = "weights do not start at a multiple of 16 bytes"
        assert self.plan(x[:, :40], weights[1:]) == ("stream", reason)

    def test_what_is_no_launch_of_its_own(self):
        path, reason = self.plan(torch.zeros(100, 20), k=25)
        assert path == "steps" and "too many columns" in reason
        path, reason = self.plan(torch.zeros(100, 10_000))
        assert path == "steps" and "too long for every block" in reason
