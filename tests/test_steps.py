"""The steps of Richardson, Chebyshev, MINRES and preconditioned CG: every backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypergrad_ext import backends, ops, reference_minres
from tests.compare import assert_close, assert_no_worse_than_torch
from tests.steps import STEPS, arguments
from tests.test_ops import DTYPES, ROUNDING

OPS = {name: getattr(ops, name) for name in STEPS}
SIZES = [[1], [63], [64], [65], [1, 2, 3], [17, 0, 4099, 1], [16384, 1], [70001], [5] * 300, [1031] * 150]
COLUMN = reference_minres.COLUMNS.index


@pytest.fixture(params=["cpp", "torch", *(["cuda", "triton"] if torch.cuda.is_available() else [])])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if reason := backends.unavailable(request.param, device.type):
        pytest.skip(f"{request.param} on {device}: {reason}")
    return request.param


def copied(args: list, dtype: torch.dtype | None = None) -> list:
    """The same arguments in memory of their own, lists in another dtype if you like."""

    def copy(a):
        if isinstance(a, list):
            return [t.detach().to(dtype or t.dtype, copy=True) for t in a]
        return a.clone() if isinstance(a, Tensor) else a

    return [copy(a) for a in args]


def check(name: str, args: list, kernel, tolerance: float, context: str = "") -> None:
    """One step by ``kernel`` and by the reference in float64: all arguments must come out the same."""
    truth = copied(args, torch.float64)
    OPS[name].kernels["torch"](*truth)
    kernel(*args)
    for position, (ours, theirs) in enumerate(zip(args, truth, strict=True)):
        if isinstance(ours, list) and ours and sum(t.numel() for t in ours):
            assert_close(ours, theirs, tolerance, f"{context} {name} argument {position}")
        elif isinstance(ours, Tensor):
            assert_close(ours, theirs, tolerance, f"{context} {name} scalars")


@pytest.mark.parametrize("rows", [None, 1, 3], ids=lambda k: f"rows{k}")
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{len(s)}x{s[0]}")
@pytest.mark.parametrize("name", STEPS)
def test_against_reference(name, sizes, dtypes, rows, backend, device):
    args = arguments(name, sizes, rows, dtypes, device)
    check(name, args, OPS[name].kernel(device, backend), 8 * ROUNDING[dtypes[0]], f"{backend} rows={rows}")


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("rows", [2, 8, 33])
def test_many_rows(name, rows, backend, device):
    check(name, arguments(name, [17, 300, 1], rows, device=device), OPS[name].kernel(device, backend), 8e-14)


@pytest.mark.parametrize("name", ["richardson_step_", "chebyshev_step_"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
def test_without_preconditioner(name, dtypes, backend, device):
    args = arguments(name, [17, 0, 4099, 1], 2, dtypes, device, preconditioned=False)
    check(name, args, OPS[name].kernel(device, backend), 8 * ROUNDING[dtypes[0]])
    stats = next(a for a in args if isinstance(a, Tensor))
    assert stats[:, 0].tolist() == pytest.approx(stats[:, 2].tolist(), rel=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_lists_need_not_be_cut_at_the_same_places(name, backend, device):
    args = arguments(name, [3, 0, 70000, 1, 129], 2, device=device, cuts=[70133])
    check(name, args, OPS[name].kernel(device, backend), 8e-14)


@pytest.mark.parametrize("name", STEPS)
def test_what_is_only_read_may_have_any_strides(name, backend, device):
    args = arguments(name, [30], device=device)
    written = {"richardson_step_": (0,), "chebyshev_step_": (0,), "minres_step_": (0, 2, 4), "pcg_step_": (0, 1, 2)}
    for position, a in enumerate(args):
        if isinstance(a, list) and position not in written[name]:
            args[position] = [torch.stack([t, t + 9], dim=1)[:, 0] for t in a]
            assert not args[position][0].is_contiguous()
    check(name, args, OPS[name].kernel(device, backend), 8e-14)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("rows", [None, 2])
def test_empty_lists(name, rows, backend, device):
    args = arguments(name, [], rows, device=device)
    OPS[name].kernel(device, backend)(*args)
    if name in ("richardson_step_", "chebyshev_step_"):
        assert (next(a for a in args if isinstance(a, Tensor)) == 0).all()


@pytest.mark.parametrize("name", ["richardson_step_", "chebyshev_step_"])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 63, 64, 70000])
def test_non_finite_is_flagged_in_its_row_only(name, preconditioned, bad, place, backend, device):
    args = arguments(name, [70001], 3, (torch.float32,) * 2, device, preconditioned=preconditioned)
    hx = args[1 if name == "richardson_step_" else 2]
    hx[0][1, place] = bad
    OPS[name].kernel(device, backend)(*args)
    stats = next(a for a in args if isinstance(a, Tensor))
    assert stats[:, 1].tolist() == [0.0, 1.0, 0.0] and stats[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["richardson_step_", "chebyshev_step_"])
def test_solution_that_overflows_is_flagged(name, backend, device):
    """The residual is small then: its norm alone would not show it."""
    args = arguments(name, [100], None, (torch.float32,) * 2, device, preconditioned=False)
    for a in args:
        if isinstance(a, list) and a:
            a[0].zero_()
    args[0 if name == "richardson_step_" else 1][0][70] = 3e38
    args[2 if name == "richardson_step_" else 3][0].fill_(1e10)
    args[-1], args[-2 if name == "richardson_step_" else -3] = 0.0, 1e37
    OPS[name].kernel(device, backend)(*args)
    stats = next(a for a in args if isinstance(a, Tensor))
    assert stats[1] == 1


@pytest.mark.parametrize("name", STEPS)
def test_float32_is_no_less_accurate_than_torch(name, backend, device):
    args = arguments(name, [1031] * 7, None, (torch.float32,) * 2, device)
    truth, by_torch = copied(args, torch.float64), copied(args)
    OPS[name].kernels["torch"](*truth)
    OPS[name].kernels["torch"](*by_torch)
    OPS[name].kernel(device, backend)(*args)
    for ours, theirs, exact in zip(args, by_torch, truth, strict=True):
        if isinstance(ours, list):
            assert_no_worse_than_torch(ours, theirs, exact, 1e-8)


@pytest.mark.parametrize("name", STEPS)
def test_result_does_not_depend_on_the_number_of_threads(name):
    if reason := backends.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.manual_seed(0)
        args = arguments(name, [300_001, 7], None, (torch.float32,) * 2)
        torch.set_num_threads(threads)
        OPS[name].kernels["cpp"](*args)
        torch.set_num_threads(before)
        results.append([t for a in args if not isinstance(a, float) for t in (a if isinstance(a, list) else [a])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rows", [None, 2])
def test_iterates_of_richardson_are_the_partial_sums_of_the_series(rows, backend, device):
    a = torch.diag(torch.linspace(0.1, 1, 40, dtype=torch.float64)).to(device)
    b = torch.randn(*(() if rows is None else (rows,)), 40, dtype=torch.float64).to(device)
    x, term, total = 0.7 * b, b.clone(), b.clone()
    stats = torch.zeros(*b.shape[:-1], 3, dtype=torch.float64, device=device)
    for _ in range(9):
        ops.richardson_step_.kernel(device, backend)([x], [x @ a], [b], [], stats, 0.7, 0.2)
        term = term - 0.7 * (term @ a + 0.2 * term)
        total += term
        assert_close(x, 0.7 * total, 1e-14)
        # The residual of the sum before is the term that was added to it.
        assert_close(stats[..., 0], term.square().sum(-1), 1e-12)


class TestRowsOfKrylovSteps:
    def test_a_finished_row_is_left_alone(self, backend, device):
        for name, flag in (("minres_step_", COLUMN("flag")), ("pcg_step_", 3)):
            args = arguments(name, [70], 3, device=device)
            state = next(a for a in args if isinstance(a, Tensor))
            state[1, flag] = 1.0
            if name == "minres_step_":
                state[1, COLUMN("step")] = 0.0
            before = copied(args)
            check(name, args, OPS[name].kernel(device, backend), 8e-14)
            for ours, old in zip(args, before, strict=True):
                if isinstance(ours, list) and ours[0].dim() == 2:
                    assert torch.equal(ours[0][1], old[0][1])
            assert torch.equal(state[1], next(a for a in before if isinstance(a, Tensor))[1])

    def test_minres_row_that_stops_takes_its_last_step(self, backend, device):
        a = torch.diag(torch.tensor([2.0, -3.0, 2.0], dtype=torch.float64)).to(device)
        b = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64, device=device)
        v, x = b.clone(), torch.zeros_like(b)
        v_old, w, w_old = (torch.zeros_like(b) for _ in range(3))
        norm = b.norm(dim=1)
        state = reference_minres.start(norm, 1e-12 * norm, torch.ones_like(norm))
        seen = []
        for _ in range(2):
            ops.minres_step_.kernel(device, backend)([x], [v], [v_old], [w], [w_old], [v @ a], state, 0.0)
            (v, v_old), (w, w_old) = (v_old, v), (w_old, w)
            seen.append((x[0].clone(), state[:, COLUMN("flag")].tolist()))
        assert seen[0][1] == [1.0, 0.0] and seen[1][1] == [1.0, 1.0]
        assert torch.equal(seen[0][0], seen[1][0])
        assert_close(x, torch.linalg.solve(a, b.T).T, 1e-14)

    @pytest.mark.parametrize(("vector", "flag"), [([1.0, 1.0], 4.0), ([1.0, 0.0], 1.0)])
    def test_minres_on_a_singular_matrix(self, vector, flag, backend, device):
        a = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)).to(device)
        b = torch.tensor(vector, dtype=torch.float64, device=device)
        v, x = b.clone(), torch.zeros_like(b)
        v_old, w, w_old = (torch.zeros_like(b) for _ in range(3))
        state = reference_minres.start(b.norm(), 1e-12 * b.norm(), torch.ones_like(b.norm()))
        for _ in range(5):
            ops.minres_step_.kernel(device, backend)([x], [v], [v_old], [w], [w_old], [v @ a], state, 0.0)
            (v, v_old), (w, w_old) = (v_old, v), (w_old, w)
        assert state[COLUMN("flag")] == flag
        # No x has a smaller residual; which of them it is, MINRES does not say.
        assert_close(a @ x, torch.tensor([1.0, 0.0]), 1e-14)
        assert_close(state[COLUMN("residual")], torch.tensor(vector[1]), 1e-14)

    def test_minres_product_that_is_not_finite(self, backend, device):
        for bad, position in ((float("nan"), 3), (float("inf"), 69)):
            args = arguments("minres_step_", [70], device=device)
            args[5][0][position] = bad
            before = args[0][0].clone()
            OPS["minres_step_"].kernel(device, backend)(*args)
            assert args[6][COLUMN("flag")] == 3 and torch.equal(args[0][0], before)

    def test_indefinite_preconditioner_is_noticed(self, backend, device):
        args = arguments("pcg_step_", [70], device=device)
        args[4] = [-t for t in args[4]]
        OPS["pcg_step_"].kernel(device, backend)(*args)
        assert args[5][3] == 2


class TestGuards:
    """What the host functions refuse, so that no kernel sees a bad pointer."""

    @pytest.fixture(autouse=True)
    def needs_native(self):
        if backends.unavailable("cpp", "cpu"):
            pytest.skip(backends.unavailable("cpp", "cpu"))

    @pytest.mark.parametrize(
        ("name", "position", "value", "error", "message"),
        [
            (
                "richardson_step_",
                3,
                [torch.ones(2)],
                ValueError,
                "m must have as many elements as x: expected 3, got 2",
            ),
            ("richardson_step_", 3, [torch.ones(3).double()], TypeError, "m must have the dtype of x, got Double"),
            ("richardson_step_", 3, [torch.ones(3, device="meta")], ValueError, "m must be on cpu, got meta"),
            ("richardson_step_", 2, [torch.ones(3).bfloat16()], TypeError, "b must have the dtype of x"),
            ("richardson_step_", 2, [torch.ones(4)], ValueError, "b must have as many elements as x"),
            ("richardson_step_", 0, [torch.ones(6)[::2]], ValueError, "x must be contiguous"),
            ("richardson_step_", 4, torch.zeros(2).double(), ValueError, r"stats must be contiguous with shape \(3,\)"),
            ("chebyshev_step_", 1, [torch.ones(2)], ValueError, "x must have as many elements as x_old"),
            ("chebyshev_step_", 0, [torch.ones(3).half()], TypeError, "x_old must be float64 or float32"),
            ("chebyshev_step_", 4, torch.ones(3), TypeError, "m must be a list or tuple of tensors, got Tensor"),
            ("minres_step_", 2, [torch.ones(6)[::2]], ValueError, "v_old must be contiguous"),
            ("minres_step_", 4, [torch.ones(3).double()], TypeError, "w_old must have the dtype of x"),
            ("minres_step_", 6, torch.zeros(4).double(), ValueError, r"state must be contiguous with shape \(16,\)"),
            ("pcg_step_", 4, [], ValueError, "m must have as many elements as x: expected 3, got 0"),
            ("pcg_step_", 5, torch.zeros(4).double(), ValueError, r"state must be contiguous with shape \(5,\)"),
        ],
    )
    def test_refuses(self, name, position, value, error, message):
        args = arguments(name, [3], None, (torch.float32,) * 2)
        args[position] = value
        with pytest.raises(error, match=message):
            OPS[name].kernels["cpp"](*args)
