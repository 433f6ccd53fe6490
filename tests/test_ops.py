"""Every backend of every op against the float64 reference: sizes, cuts, strides, dtypes, rows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hypergrad_ext import backends, ops, reference
from tests.compare import assert_close, assert_no_worse_than_torch

SIZES = [[1], [63], [64], [65], [1, 2, 3], [17, 0, 4099, 1], [16384, 1], [70001], [5] * 300, [1031] * 150]
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6}


@pytest.fixture(params=["cpp", "torch", *(["cuda"] if torch.cuda.is_available() else [])])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if reason := backends.unavailable(request.param, device.type):
        pytest.skip(f"{request.param} on {device}: {reason}")
    return request.param


def random_list(sizes: list[int], rows: int | None, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    lead = () if rows is None else (rows,)
    return [torch.randn(*lead, n, dtype=torch.float64).to(device, dtype) for n in sizes]


def copies(lists: list[list[Tensor]], dtype: torch.dtype | None = None) -> list[list[Tensor]]:
    return [[t.detach().to(dtype or t.dtype, copy=True) for t in tensors] for tensors in lists]


@pytest.mark.parametrize("rows", [None, 1, 3], ids=lambda k: f"rows{k}")
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{len(s)}x{s[0]}")
class TestAgainstReference:
    def test_neumann_step(self, sizes, dtypes, rows, backend, device):
        state, product = dtypes
        v, p, hv = (random_list(sizes, rows, d, device) for d in (state, state, product))
        stats = torch.full((2,) if rows is None else (rows, 2), float("nan"), dtype=torch.float64, device=device)
        truth = copies([v, p, hv], torch.float64)
        true_stats = stats.clone()
        reference.neumann_step_(*truth, true_stats, 0.3, 0.7)
        ops.neumann_step_.kernel(device, backend)(v, p, hv, stats, 0.3, 0.7)
        context = f"neumann_step_ {backend} {dtypes} {sizes[:3]} rows={rows}"
        assert_close([v, p], truth[:2], ROUNDING[state], context)
        assert_close(stats, true_stats, ROUNDING[state], context)
        assert (stats.view(-1, 2)[:, 1] == 0).all()

    def test_cg_step(self, sizes, dtypes, rows, backend, device):
        state_dtype, product = dtypes
        x, r, p = (random_list(sizes, rows, state_dtype, device) for _ in range(3))
        # Positive curvature: hp = 2 p plus noise.
        hp = [(2 * t + 0.1 * torch.randn_like(t)).to(product) for t in p]
        state = torch.tensor([3.0, 1e-9, 0.0, 0.0], dtype=torch.float64, device=device)
        state = state if rows is None else state.repeat(rows, 1)
        truth = copies([x, r, p, hp], torch.float64)
        true_state = state.clone()
        reference.cg_step_(*truth, true_state, 0.5)
        ops.cg_step_.kernel(device, backend)(x, r, p, hp, state, 0.5)
        context = f"cg_step_ {backend} {dtypes} {sizes[:3]} rows={rows}"
        # beta = r.r / 3 multiplies p, so rounding is relative to values of size |r|^2.
        assert_close([x, r, p], truth[:3], 4 * ROUNDING[state_dtype], context)
        assert_close(state, true_state, 4 * ROUNDING[state_dtype], context)


def test_lists_need_not_be_cut_at_the_same_places(backend, device):
    sizes = [3, 0, 70000, 1, 129]
    v, p, hv = (random_list(sizes, 2, torch.float64, device) for _ in range(3))
    flat_v, flat_p = torch.cat(v, 1), torch.cat(p, 1)
    stats, flat_stats = torch.zeros(2, 2, 2, dtype=torch.float64, device=device)
    step = ops.neumann_step_.kernel(device, backend)
    step(v, p, hv, stats, 0.3, 0.1)
    step([flat_v], [flat_p], hv, flat_stats, 0.3, 0.1)
    assert_close(flat_v, torch.cat(v, 1), 1e-15)
    assert_close(flat_p, torch.cat(p, 1), 1e-15)
    assert_close(flat_stats, stats, 1e-14)


def test_product_may_have_any_strides(backend, device):
    v, p = torch.randn(2, 6, 5, dtype=torch.float64, device=device)
    base = torch.randn(5, 12, dtype=torch.float64, device=device)
    expected = v - 0.5 * base.T[::2]
    stats = torch.zeros(2, dtype=torch.float64, device=device)
    ops.neumann_step_.kernel(device, backend)([v], [p], [base.T[::2]], stats, 0.5, 0.0)
    assert_close(v, expected, 1e-15)


def test_product_may_be_the_vector_itself(backend, device):
    v, p = torch.ones(1000, device=device), torch.zeros(1000, device=device)
    stats = torch.zeros(2, dtype=torch.float64, device=device)
    ops.neumann_step_.kernel(device, backend)([v], [p], [v], stats, 0.25, 0.0)
    assert (v == 0.75).all() and (p == 0.75).all()


def test_empty_lists(backend, device):
    stats = torch.full((2,), float("nan"), dtype=torch.float64, device=device)
    ops.neumann_step_.kernel(device, backend)([], [], [], stats, 0.5, 0.0)
    assert stats.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 63, 64, 70000])
def test_non_finite_is_flagged_in_its_row_only(bad, place, backend, device):
    v, p, hv = (torch.ones(3, 70001, device=device) for _ in range(3))
    hv[1, place] = bad
    stats = torch.zeros(3, 2, dtype=torch.float64, device=device)
    ops.neumann_step_.kernel(device, backend)([v], [p], [hv], stats, 0.5, 0.0)
    assert stats[:, 1].tolist() == [0.0, 1.0, 0.0]


def test_overflow_of_a_square_is_not_a_non_finite_element(backend, device):
    v, p, hv = torch.full((100,), 1e30, device=device), torch.zeros(100, device=device), torch.zeros(100, device=device)
    stats = torch.zeros(2, dtype=torch.float64, device=device)
    ops.neumann_step_.kernel(device, backend)([v], [p], [hv], stats, 0.5, 0.0)
    assert stats[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_are_widened_exactly(dtype, backend, device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    hv = bits.view(dtype)
    hv = torch.where(hv.isfinite(), hv, torch.zeros((), dtype=dtype, device=device))
    v, p = torch.zeros(hv.shape, device=device), torch.zeros(hv.shape, device=device)
    stats = torch.zeros(2, dtype=torch.float64, device=device)
    ops.neumann_step_.kernel(device, backend)([v], [p], [hv], stats, -1.0, 0.0)
    assert torch.equal(v, hv.float())


def test_float32_is_no_less_accurate_than_torch(backend, device):
    sizes = [1031] * 7
    v, p, hv = (random_list(sizes, None, torch.float32, device) for _ in range(3))
    truth, by_torch = copies([v, p, hv], torch.float64), copies([v, p, hv])
    stats, true_stats = torch.zeros(2, 2, dtype=torch.float64, device=device)
    for _ in range(50):
        reference.neumann_step_(*truth, true_stats, 0.01, 0.5)
        torch._foreach_add_(by_torch[0], torch._foreach_add(by_torch[2], by_torch[0], alpha=0.5), alpha=-0.01)
        torch._foreach_add_(by_torch[1], by_torch[0])
        ops.neumann_step_.kernel(device, backend)(v, p, hv, stats, 0.01, 0.5)
    assert_no_worse_than_torch([v, p], by_torch[:2], truth[:2], 1e-8)


def test_result_does_not_depend_on_the_number_of_threads():
    if reason := backends.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    step = ops.neumann_step_.kernels["cpp"]
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        v, p, hv = (random_list([300001, 7], None, torch.float32, torch.device("cpu")) for _ in range(3))
        stats = torch.zeros(2, dtype=torch.float64)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        step(v, p, hv, stats, 0.3, 0.1)
        torch.set_num_threads(before)
        results.append([*v, *p, stats])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestCgScalars:
    """The exits of CG, one by one."""

    def run(self, p: Tensor, hp: Tensor, backend: str, stop: float = 0.0, damping: float = 0.0):
        x, r = torch.zeros_like(p), p.clone()
        state = torch.tensor([float(r @ r), stop, 0.0, 0.0], dtype=torch.float64, device=p.device)
        ops.cg_step_.kernel(p.device, backend)([x], [r], [p], [hp], state, damping)
        return x, r, state

    def test_converges_on_the_identity(self, backend, device):
        p = torch.ones(5, dtype=torch.float64, device=device)
        x, r, state = self.run(p, p.clone(), backend)
        assert torch.equal(x, torch.ones_like(x)) and r.norm() == 0 and state[3] == 1

    @pytest.mark.parametrize("curvature", [-1.0, 0.0, -1e-30])
    def test_stops_at_non_positive_curvature(self, curvature, backend, device):
        p = torch.ones(5, dtype=torch.float64, device=device)
        x, r, state = self.run(p, curvature * p, backend)
        assert state[3] == 2 and x.norm() == 0 and torch.equal(r, torch.ones_like(r))
        assert float(state[2]) == pytest.approx(curvature)

    def test_damping_makes_curvature_positive(self, backend, device):
        p = torch.ones(5, dtype=torch.float64, device=device)
        x, _, state = self.run(p, -p, backend, damping=1.5)
        assert state[3] == 1 and torch.allclose(x, torch.full_like(x, 2.0))

    @pytest.mark.parametrize("scale", [1e-150, 1e-12, 1e12, 1e150])
    def test_no_threshold_depends_on_the_scale(self, scale, backend, device):
        p = torch.ones(5, dtype=torch.float64, device=device)
        x, _, state = self.run(p, scale * p, backend, stop=1e-20)
        assert state[3] == 1 and torch.allclose(x * scale, torch.ones_like(x))

    def test_large_float32_products_do_not_overflow_the_test(self, backend, device):
        p = torch.ones(5, device=device)
        x, _, state = self.run(p, 1e30 * p, backend, stop=1e-10)
        assert state[3] == 1 and torch.allclose(x * 1e30, torch.ones_like(x))

    def test_non_finite_product_leaves_x_alone(self, backend, device):
        p = torch.ones(5, dtype=torch.float64, device=device)
        x, _, state = self.run(p, torch.full_like(p, float("nan")), backend)
        assert state[3] == 3 and x.norm() == 0

    def test_a_finished_row_is_left_alone(self, backend, device):
        x, r, p = (torch.randn(2, 70, device=device) for _ in range(3))
        hp = p.clone()
        before = [t[0].clone() for t in (x, r, p)]
        state = torch.tensor([[1.0, 0, 0, 1], [1.0, 0, 0, 0]], dtype=torch.float64, device=device)
        ops.cg_step_.kernel(device, backend)([x], [r], [p], [hp], state, 0.0)
        assert all(torch.equal(t[0], b) for t, b in zip((x, r, p), before, strict=True))
        assert state[0].tolist() == [1.0, 0, 0, 1] and state[1, 0] != 1


class TestGuards:
    """What the host function refuses, so that no kernel sees a bad pointer."""

    def call(self, **changes):
        arguments = {
            "v": [torch.zeros(3)],
            "p": [torch.zeros(3)],
            "hv": [torch.zeros(3)],
            "stats": torch.zeros(2, dtype=torch.float64),
            "alpha": 0.5,
            "damping": 0.0,
        } | changes
        ops.neumann_step_.kernel(torch.device("cpu"), "cpp")(**arguments)

    @pytest.fixture(autouse=True)
    def needs_native(self):
        if backends.unavailable("cpp", "cpu"):
            pytest.skip(backends.unavailable("cpp", "cpu"))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"p": [torch.zeros(4)]}, ValueError, "p must have as many elements as v: expected 3, got 4"),
            ({"p": [torch.zeros(3, dtype=torch.float64)]}, TypeError, "p must have the dtype of v"),
            ({"v": [torch.zeros(3, dtype=torch.int64)]}, TypeError, "v must be float64 or float32"),
            ({"v": [torch.zeros(3, dtype=torch.bfloat16)]}, TypeError, "v must be float64 or float32"),
            ({"hv": [torch.zeros(3, dtype=torch.float64)]}, TypeError, "hv must have the dtype of v"),
            ({"hv": [torch.zeros(2), torch.zeros(1, dtype=torch.bfloat16)]}, TypeError, "hv must have one dtype"),
            ({"v": [torch.zeros(6)[::2]]}, ValueError, "v must be contiguous"),
            ({"stats": torch.zeros(2)}, TypeError, "stats must be float64"),
            ({"stats": torch.zeros(3, dtype=torch.float64)}, ValueError, r"stats must be contiguous with shape \(2,\)"),
            ({"stats": torch.zeros(2, 2, dtype=torch.float64)}, ValueError, "v must have 2 rows"),
            ({"v": torch.zeros(3)}, TypeError, "v must be a list or tuple of tensors, got Tensor"),
            ({"v": [1.0]}, TypeError, "v must hold tensors, got float"),
            ({"hv": [torch.zeros(3, device="meta")]}, ValueError, "hv must be on cpu, got meta"),
            ({"v": [torch.zeros(3, requires_grad=True)]}, ValueError, "v must not require grad"),
        ],
        ids=lambda x: str(x)[:30] if isinstance(x, str) else None,
    )
    def test_refuses(self, changes, error, message):
        with pytest.raises(error, match=message):
            self.call(**changes)


AFTER_FORK = """
import os, torch
from hypergrad_ext import ops

def step():
    # torch's own operations wait for ever for threads that a fork has not copied: one thread for them.
    torch.set_num_threads(1)
    v, p, hv = torch.ones(3, 10**6), torch.zeros(3, 10**6), torch.ones(3, 10**6)
    stats, x = torch.zeros(3, 2, dtype=torch.float64), torch.ones(60_000, 50)
    weights, u = torch.ones(60_000), torch.ones(1, 50)
    torch.set_num_threads(2)
    ops.neumann_step_([v], [p], [hv], stats, 0.5, 0.0)
    product = ops.glm_hvp(x, weights, u, None, 1.0, False)
    torch.set_num_threads(1)
    assert (v == 0.5).all() and stats[:, 0].tolist() == [0.25e6] * 3
    assert torch.allclose(product, torch.tensor(3e6))

step()
child = os.fork()
if child == 0:
    step()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_kernels_work_in_a_forked_child():
    """A data loader's worker has none of its parent's threads; a kernel must not wait for them."""
    if reason := backends.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    result = subprocess.run([sys.executable, "-c", AFTER_FORK], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
