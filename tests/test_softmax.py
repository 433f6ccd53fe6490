"""Products with the Hessian of cross-entropy: kernels against the reference, at every size, layout and dtype."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hypergrad_ext import backends, ops, reference
from tests.compare import assert_close, assert_no_worse_than_torch

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
CLASSES = [1, 2, 3, 10, 23, 24, 25, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 4099]


@pytest.fixture(params=["cpp", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.unavailable(request.param, "cpu"):
        pytest.skip(reason)
    return request.param


def problem(rows, classes, k=None, dtype=torch.float64, weighted=False):
    """Arguments of the op: slices of something larger, so that rows have a stride."""
    lead = () if k is None else (k,)
    logits = 3 * torch.randn(rows, classes + 3, dtype=torch.float64)
    u = torch.randn(*lead, rows, classes + 5, dtype=torch.float64)
    weights = torch.rand(rows).double() * (torch.rand(rows) < 0.7) if weighted else None
    return logits.to(dtype)[:, 1 : classes + 1], u.to(dtype)[..., 2 : classes + 2], 0.7, weights


def truth_of(logits, u, scale, weights=None):
    return reference.softmax_hessian(logits.double(), u.double(), scale, weights)


def in_place(backend, logits, u, *rest):
    """What the in-place form leaves in a copy of u that has u's strides."""
    copy = torch.empty_strided(u.shape, u.stride(), dtype=u.dtype).copy_(u)
    assert ops.softmax_hessian_.kernel(CPU, backend)(logits, copy, *rest) is None
    return copy


def test_reference_is_the_hessian_of_cross_entropy():
    logits, u = torch.randn(2, 5, 7, dtype=torch.float64)
    target = torch.randint(7, (5,))
    _, truth = torch.autograd.functional.hvp(lambda z: F.cross_entropy(z, target, reduction="sum"), logits, u)
    assert_close(reference.softmax_hessian(logits, u, 1.0), truth, 1e-14)


class TestAgainstReference:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("k", [None, 1, 3])
    @pytest.mark.parametrize("classes", CLASSES)
    def test_float64(self, classes, k, weighted, backend):
        for rows in (1, 15, 37):
            arguments = problem(rows, classes, k, weighted=weighted)
            value, truth = ops.softmax_hessian.kernel(CPU, backend)(*arguments), truth_of(*arguments)
            assert value.shape == arguments[1].shape and value.is_contiguous()
            # One class has no curvature: 0, or the rounding error of 1 - 1.
            assert value.abs().max() < 1e-15 if classes == 1 else True
            # With few classes u - <p, u> cancels where p is near 1.
            assert_close(value, truth, 1e-14 if classes > 9 else 1e-13 if classes > 1 else 1.0, f"{rows} rows")
            assert torch.equal(in_place(backend, *arguments), value)

    @pytest.mark.parametrize("classes", [2, 10, 24, 64, 65, 1000, 50_304])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
    def test_no_less_accurate_than_torch(self, dtype, classes, backend):
        arguments = problem(3 if classes > 1000 else 40, classes, 2, dtype, weighted=True)
        value = ops.softmax_hessian.kernel(CPU, backend)(*arguments)
        assert value.dtype == dtype
        by_torch = reference.softmax_hessian(*arguments)
        assert_no_worse_than_torch(value, by_torch, truth_of(*arguments), 1e-7 if dtype == torch.float32 else 1e-4)
        assert torch.equal(in_place(backend, *arguments), value)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("classes", [10, 100])
    def test_half_results_are_rounded_to_nearest(self, dtype, classes, backend):
        # Small enough that many results are denormal in float16.
        logits, u, _, _ = problem(64, classes, None, dtype)
        value = ops.softmax_hessian.kernel(CPU, backend)(logits, u, 1e-3)
        exact = truth_of(logits, u, 1e-3)
        spacing = 2.0 ** (exact.abs().log2().floor() - (7 if dtype == torch.bfloat16 else 10))
        if dtype == torch.float16:
            spacing = spacing.clamp_min(2.0**-24)
        # Half a unit, and what float32 loses before the rounding.
        assert ((value.double() - exact).abs() <= 0.5 * spacing + 1e-6 * exact.abs().max()).all()

    def test_float16_overflows_to_infinity(self, backend):
        logits, u = torch.zeros(2, 40).half(), torch.eye(2, 40).half() * 60_000
        value = ops.softmax_hessian.kernel(CPU, backend)(logits, u, 1000.0)
        assert torch.equal(value, truth_of(logits, u, 1000.0).half()) and value.isinf().any()

    @pytest.mark.parametrize("classes", [10, 100])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
    def test_masked_classes_are_exactly_zero(self, dtype, classes, backend):
        logits, u, scale, _ = problem(33, classes, 2, dtype)
        logits = logits.clone()
        masked = torch.rand(33, classes) < 0.5
        masked[:, 1] = False
        masked[0] = torch.arange(classes) != 1
        logits[masked] = -float("inf")
        value = ops.softmax_hessian.kernel(CPU, backend)(logits, u, scale)
        assert (value[masked.expand_as(value)] == 0).all()
        assert_no_worse_than_torch(value, reference.softmax_hessian(logits, u, scale), truth_of(logits, u, scale), 1e-4)

    @pytest.mark.parametrize("classes", [10, 100])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
    def test_extreme_logits(self, dtype, classes, backend):
        _, u, scale, _ = problem(33, classes, 2, dtype)
        logits = (1e4 * (torch.randint(3, (33, classes)) - 1) + torch.randn(33, classes)).to(dtype)
        value = ops.softmax_hessian.kernel(CPU, backend)(logits, u, scale)
        assert value.isfinite().all()
        assert_no_worse_than_torch(value, reference.softmax_hessian(logits, u, scale), truth_of(logits, u, scale), 1e-4)

    @pytest.mark.parametrize("classes", [10, 100])
    def test_ignored_rows_are_zero_whatever_they_hold(self, classes, backend):
        logits, u, scale, _ = problem(20, classes, 2)
        logits, u = logits.clone(), u.clone()
        logits[3], u[1, 3] = float("nan"), float("inf")
        weights = torch.ones(20)
        weights[[3, 7]] = 0
        value = ops.softmax_hessian.kernel(CPU, backend)(logits, u, scale, weights)
        assert (value[:, [3, 7]] == 0).all() and value.isfinite().all()

    @pytest.mark.parametrize("classes", [10, 100])
    def test_nan_stays_in_its_row(self, classes, backend):
        logits, u, scale, _ = problem(20, classes)
        logits = logits.clone()
        logits[3, 1], logits[5], logits[6, 0] = float("nan"), -float("inf"), float("inf")
        value = ops.softmax_hessian.kernel(CPU, backend)(logits, u, scale)
        assert value.isnan().any(1).nonzero().flatten().tolist() == [3, 5, 6]

    @pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
    @pytest.mark.parametrize("k", [None, 0, 2])
    def test_empty(self, shape, k, backend):
        u = torch.randn(*(() if k is None else (k,)), *shape)
        assert ops.softmax_hessian.kernel(CPU, backend)(torch.randn(shape), u, 1.0).shape == u.shape

    @pytest.mark.parametrize("classes", [10, 100])
    def test_vectors_in_the_middle(self, classes, backend):
        logits, u, scale, _ = problem(9, classes, 4)
        u = u.transpose(0, 1).contiguous().transpose(0, 1)
        value = ops.softmax_hessian.kernel(CPU, backend)(logits, u, scale)
        assert value.is_contiguous()
        assert_close(value, truth_of(logits, u, scale), 1e-14)
        assert_close(in_place(backend, logits, u, scale), value, 1e-15)

    @pytest.mark.parametrize("classes", [10, 1000])
    def test_threads_change_nothing(self, classes):
        arguments = problem(200_000 // classes, classes, 2)
        results = []
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            results.append(ops.softmax_hessian(*arguments))
            torch.set_num_threads(before)
        assert torch.equal(*results)


class TestInPlace:
    def test_no_tensor_is_allocated(self, backend):
        if backend == "torch":
            pytest.skip("the reference makes probabilities")
        logits, u = torch.randn(2, 8, 5000)
        pointer, truth = u.data_ptr(), truth_of(logits, u, 1.0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            ops.softmax_hessian_.kernel(CPU, backend)(logits, u, 1.0)
        assert sum(max(0, event.cpu_memory_usage) for event in profile.events()) == 0
        assert u.data_ptr() == pointer
        assert_close(u, truth, 1e-6)

    def test_out_of_place_allocates_the_result_and_nothing_else(self, backend):
        if backend == "torch":
            pytest.skip("the reference makes probabilities")
        logits, u = torch.randn(2, 8, 5000)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            ops.softmax_hessian.kernel(CPU, backend)(logits, u, 1.0)
        # The allocation event and the call that made it.
        assert {e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0} == {u.nbytes}

    def test_refuses_overlap(self):
        if reason := backends.unavailable("cpp", "cpu"):
            pytest.skip(reason)
        t = torch.randn(4, 6)
        with pytest.raises(RuntimeError, match="single memory location"):
            ops.softmax_hessian_.kernels["cpp"](t, t[:1].expand(4, 6), 1.0)
        with pytest.raises(RuntimeError, match="single memory location"):
            ops.softmax_hessian_.kernels["cpp"](t, t, 1.0)


@pytest.mark.parametrize("name", ["softmax_hessian", "softmax_hessian_"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "logits must be float64, float32, bfloat16 or"),
        ({"logits": torch.zeros(12)}, ValueError, r"logits must have shape \(rows, classes\)"),
        ({"logits": torch.zeros(3, 4).T}, ValueError, "logits must have a contiguous last dimension"),
        ({"u": torch.zeros(3, 4).T}, ValueError, "u must have a contiguous last dimension"),
        ({"u": torch.zeros(4, 4)}, ValueError, r"u must have shape \(4, 3\) or \(k, 4, 3\), got \[4, 4\]"),
        ({"u": torch.zeros(4, 3).double()}, TypeError, "u must be Float like logits, got Double"),
        ({"u": torch.zeros(4, 3, requires_grad=True)}, ValueError, "u must not require grad"),
        ({"logits": torch.zeros(4, 3, requires_grad=True)}, ValueError, "logits must not require grad"),
        ({"u": torch.zeros(4, 3, device="meta")}, ValueError, "logits and u must be on one device"),
        ({"weights": torch.zeros(3)}, ValueError, r"weights must have shape \(4,\), got \[3\]"),
        ({"weights": torch.zeros(4, dtype=torch.bool)}, TypeError, "weights must be floating point"),
        ({"u": None}, TypeError, "u must hold tensors, got NoneType"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_guards(name, change, error, message):
    if reason := backends.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    arguments = {"logits": torch.zeros(4, 3), "u": torch.zeros(4, 3), "scale": 1.0, "weights": None}
    with pytest.raises(error, match=message):
        getattr(ops, name).kernels["cpp"](**(arguments | change))
