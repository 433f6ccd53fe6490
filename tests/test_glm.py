"""Generalised linear models: kernels against the reference, the operator against autograd's Hessian."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import hypergrad_ext as hg
from hypergrad_ext import backends, ops, reference
from tests.compare import assert_close, assert_no_worse_than_torch, relative_error
from tests.threads import threads

FAMILIES = ["logistic", "softmax", "squared", "poisson"]
SHAPES = [(1, 1), (2, 3), (37, 13), (130, 64), (257, 129), (64, 785)]

MISSING = backends.unavailable("cpp", "cpu")
needs_cpp = pytest.mark.skipif(bool(MISSING), reason=MISSING or "the C++ kernels are there")


@pytest.fixture(params=["cpp", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.unavailable(request.param, "cpu"):
        pytest.skip(reason)
    return request.param


def model(n, d, classes, k, intercept, dtype=torch.float64, l2=True):
    """Arguments of glm_hvp: x is a slice of something larger, so that rows have a stride."""
    x = torch.randn(n, d + 3, dtype=torch.float64)[:, 1 : d + 1]
    weights = torch.rand(n, dtype=torch.float64) if classes == 1 else torch.randn(n, classes).double().softmax(1)
    size = classes * (d + intercept)
    penalty = torch.rand(size, dtype=torch.float64) if l2 else None
    v = torch.randn(k, size, dtype=torch.float64)
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    stored = torch.empty(n, d + 3, dtype=dtype)
    stored[:, 1 : d + 1] = x
    cast = [None if t is None else t.to(vectors) for t in (weights, v, penalty)]
    return stored[:, 1 : d + 1], *cast, 1 / max(n, 1), intercept


class TestProduct:
    @pytest.mark.parametrize("intercept", [False, True])
    @pytest.mark.parametrize("classes", [1, 2, 10])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_float64(self, shape, classes, intercept, backend):
        for k in (1, 2, 5):
            arguments = model(*shape, classes, k, intercept)
            value = ops.glm_hvp.kernel(torch.device("cpu"), backend)(*arguments)
            assert_close(value, reference.glm_hvp(*arguments), 1e-13, f"{shape} classes={classes} k={k}")

    @pytest.mark.parametrize("k", range(1, 34))
    def test_any_number_of_vectors(self, k, backend):
        arguments = model(61, 35, 1, k, True)
        assert_close(ops.glm_hvp.kernel(torch.device("cpu"), backend)(*arguments), reference.glm_hvp(*arguments), 1e-13)

    @pytest.mark.parametrize("classes", [1, 10])
    @pytest.mark.parametrize("shape", [(1000, 129), (20_000, 33)], ids=str)
    def test_float32_is_no_less_accurate_than_torch(self, shape, classes, backend):
        arguments = model(*shape, classes, 3, True, torch.float32)
        truth = reference.glm_hvp(*[t.double() if isinstance(t, torch.Tensor) else t for t in arguments])
        value = ops.glm_hvp.kernel(torch.device("cpu"), backend)(*arguments)
        assert_no_worse_than_torch(value, reference.glm_hvp(*arguments), truth, 1e-7)

    @pytest.mark.parametrize("classes", [1, 10])
    def test_bfloat16_data_are_read_exactly(self, classes, backend):
        arguments = model(500, 67, classes, 3, True, torch.bfloat16)
        truth = reference.glm_hvp(*[t.double() if isinstance(t, torch.Tensor) else t for t in arguments])
        value = ops.glm_hvp.kernel(torch.device("cpu"), backend)(*arguments)
        assert value.dtype == torch.float32
        assert_close(value, truth, 1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", [(500, 67), (33, 1), (9, 800)], ids=str)
    def test_half_the_bytes_for_one_vector_or_many(self, shape, dtype):
        if reason := backends.unavailable("cpp", "cpu"):
            pytest.skip(reason)
        for k in (1, 4):
            x, *rest = model(*shape, 1, k, True, torch.float32)
            x[:, 0] *= 1e-6  # subnormal in float16
            arguments = (x.to(dtype), *rest)
            truth = reference.glm_hvp(*[t.double() if isinstance(t, torch.Tensor) else t for t in arguments])
            assert_close(ops.glm_hvp.kernel(torch.device("cpu"), "cpp")(*arguments), truth, 1e-6, f"k={k}")

    @needs_cpp
    @settings(max_examples=200, deadline=None)
    @given(
        n=st.one_of(st.integers(1, 40), st.sampled_from([511, 1700, 9001])),
        d=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 358, 359, 716, 717, 895, 897, 1500])),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        intercept=st.booleans(),
        count=st.integers(1, 3),
    )
    def test_one_vector(self, n, d, dtype, intercept, count):
        """Lengths of rows that end within a register of any width, and are in turns of any number."""
        arguments = model(n, d, 1, 1, intercept, dtype)
        with threads(count):
            value = ops.glm_hvp.kernel(torch.device("cpu"), "cpp")(*arguments)
        x, weights, v, *rest = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
        error = value - reference.glm_hvp(x, weights, v, *rest)
        # Of what is added up: the sums themselves may cancel.
        magnitude = reference.glm_hvp(x.abs(), weights, v.abs(), *rest)
        assert float((error.abs() / magnitude).max()) <= (1e-14 if dtype == torch.float64 else 1e-6)

    @needs_cpp
    @pytest.mark.parametrize("d", [5, 50, 784, 1000])
    @pytest.mark.parametrize("row", [0, 3, 30])
    def test_rows_that_are_not_finite_are_seen(self, row, d):
        for bad in (torch.nan, torch.inf):
            x, *rest = model(31, d, 1, 1, False)
            x[row, d - 1] = bad
            assert not ops.glm_hvp.kernel(torch.device("cpu"), "cpp")(x, *rest)[0, d - 1].isfinite()

    def test_no_rows_leave_the_penalty(self, backend):
        arguments = model(0, 5, 1, 2, False)
        assert_close(ops.glm_hvp.kernel(torch.device("cpu"), backend)(*arguments), arguments[3] * arguments[2], 1e-15)

    @needs_cpp
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("intercept", [False, True])
    @pytest.mark.parametrize(
        ("n", "d", "classes", "k"), [(300, 700, 1, 400), (70, 1100, 250, 1), (2100, 600, 150, 3), (1, 9000, 40, 4)]
    )
    def test_many_columns(self, n, d, classes, k, intercept, dtype):
        """Columns and sums beyond the second cache; rows in several parts."""
        arguments = model(n, d, classes, k, intercept, dtype)
        truth = reference.glm_hvp(*[t.double() if isinstance(t, torch.Tensor) else t for t in arguments])
        value = ops.glm_hvp.kernels["cpp"](*arguments)
        if dtype == torch.float64:
            assert_close(value, truth, 1e-13)
        else:
            assert_no_worse_than_torch(value, reference.glm_hvp(*arguments), truth, 1e-7)

    @needs_cpp
    def test_solves_with_many_columns(self):
        x, weights, b, l2, scale, intercept = model(60, 900, 200, 1, True, torch.float32)
        rest = scale, intercept, 1e-2, 0.1, 20, torch.full((1,), -1.0, dtype=torch.float64)
        value, _ = ops.glm_neumann_solve.kernels["cpp"](x.requires_grad_(), weights, b, l2, *rest)
        x, weights, b, l2 = (t.detach().double() for t in (x, weights, b, l2))
        assert not value.requires_grad
        assert_close(value, reference.glm_neumann_solve(x, weights, b, l2, *rest)[0], 1e-6)

    def test_threads_change_nothing_but_rounding(self):
        arguments = model(50_000, 40, 1, 2, True)
        results = []
        for count in (1, 2):
            with threads(count):
                results.append(ops.glm_hvp(*arguments))
        assert_close(results[1], results[0], 1e-13)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "x must be float64, float32, bfloat16 or float16"),
            ({"x": torch.zeros(3, 4).T}, ValueError, r"x must have shape \(n, d\) with contiguous rows"),
            ({"weights": torch.zeros(5)}, ValueError, "weights must be contiguous with shape"),
            ({"weights": torch.zeros(4, 1)}, ValueError, "weights must have at least 2 classes, got 1"),
            ({"weights": torch.zeros(4, dtype=torch.float64)}, TypeError, "weights and v must be Float"),
            ({"v": torch.zeros(2, 4)}, ValueError, r"v must be contiguous with shape \(k, 3\)"),
            ({"v": torch.zeros(2, 3, requires_grad=True)}, ValueError, "v must not require grad"),
            ({"l2": torch.zeros(2)}, ValueError, "l2 must be like one row of v: 3 elements"),
            ({"v": None}, TypeError, "v must hold tensors, got NoneType"),
        ],
        ids=lambda x: x if isinstance(x, str) else None,
    )
    def test_guards(self, change, error, message):
        if reason := backends.unavailable("cpp", "cpu"):
            pytest.skip(reason)
        arguments = {"x": torch.zeros(4, 3), "weights": torch.zeros(4), "v": torch.zeros(2, 3), "l2": None}
        with pytest.raises(error, match=message):
            ops.glm_hvp.kernels["cpp"](**(arguments | change), scale=1.0, intercept=False)


class TestWholeSolves:
    def arguments(self, k=3, classes=1, dtype=torch.float64):
        x, weights, b, l2, scale, intercept = model(90, 17, classes, k, True, dtype)
        return x, weights, b, l2 + 0.5, scale, intercept

    @pytest.mark.parametrize("classes", [1, 4])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_neumann_series_equals_its_reference(self, classes, dtype, backend):
        arguments = self.arguments(classes=classes, dtype=dtype)
        never = torch.full((3,), -1.0, dtype=torch.float64)
        x, history = ops.glm_neumann_solve.kernel(torch.device("cpu"), backend)(*arguments, 0.3, 0.1, 25, never)
        exact = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
        true_x, true_history = reference.glm_neumann_solve(*exact, 0.3, 0.1, 25, never)
        assert_close(x, true_x, 1e-13 if dtype == torch.float64 else 1e-6)
        assert_close(history, true_history, 1e-12 if dtype == torch.float64 else 1e-4)

    def test_neumann_series_stops_when_all_rows_are_small(self, backend):
        arguments = self.arguments()
        stop = torch.full((3,), 1e-8, dtype=torch.float64)
        _, history = ops.glm_neumann_solve.kernel(torch.device("cpu"), backend)(*arguments, 0.3, 0.1, 500, stop)
        taken = int((history[:, 0, 0] >= 0).sum())
        assert 5 < taken < 500 and (history[taken - 1, :, 0] <= 1e-8).all() and (history[taken:] == -1).all()

    @pytest.mark.parametrize("classes", [1, 4])
    def test_conjugate_gradients_equal_their_reference(self, classes, backend):
        arguments = self.arguments(classes=classes)
        squares = arguments[2].square().sum(1)
        state = torch.stack([squares, 1e-16 * squares, 0 * squares, 0 * squares], 1)
        solve = ops.glm_cg_solve.kernel(torch.device("cpu"), backend)
        truth = reference.glm_cg_solve(*arguments, 0.1, 30, state)
        for ours, exact in zip(solve(*arguments, 0.1, 30, state), truth, strict=True):
            assert_close(ours, exact, 1e-6)


# n, d, classes, k. On a GPU, or its emulation with four multiprocessors: X in one block's shared memory, in several
# blocks', more than there is on the chip, and more columns than one pass is for.
SOLVES = [(90, 17, 1, 3), (90, 17, 4, 3), (700, 50, 3, 9), (6001, 40, 1, 2), (300, 31, 10, 3)]


@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "deterministic"])
@pytest.mark.parametrize("shape", SOLVES, ids=str)
class TestSolvesOfAnySize:
    def arguments(self, shape, dtype=torch.float64):
        n, d, classes, k = shape
        x, weights, b, l2, scale, intercept = model(n, d, classes, k, True, dtype)
        return x, weights, b, l2 + 0.5, scale, intercept

    @pytest.fixture(autouse=True)
    def mode(self, deterministic):
        torch.use_deterministic_algorithms(deterministic)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_neumann_series(self, shape, dtype, backend):
        arguments = self.arguments(shape, dtype)
        exact = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
        # Rows get small one after another; the solve goes on until the last one is.
        stop = torch.logspace(-3, -6, shape[3], dtype=torch.float64)
        solve = ops.glm_neumann_solve.kernel(torch.device("cpu"), backend)
        x, history = solve(*arguments, 0.2, 0.1, 60, stop)
        true_x, true_history = reference.glm_neumann_solve(*exact, 0.2, 0.1, 60, stop)
        assert torch.equal(history == -1, true_history == -1) and 3 < int((history[:, 0, 0] >= 0).sum()) < 60
        assert_close(x, true_x, 1e-13 if dtype == torch.float64 else 1e-6)
        assert_close(history, true_history, 1e-12 if dtype == torch.float64 else 1e-4)

    @pytest.mark.parametrize("steps", [0, 1])
    def test_few_steps(self, shape, steps, backend):
        arguments = self.arguments(shape)
        stop = torch.zeros(shape[3], dtype=torch.float64)
        x, history = ops.glm_neumann_solve.kernel(torch.device("cpu"), backend)(*arguments, 0.2, 0.1, steps, stop)
        assert_close(x, reference.glm_neumann_solve(*arguments, 0.2, 0.1, steps, stop)[0], 1e-14)
        assert history.shape == (steps, shape[3], 2)

    def test_non_finite_terms_end_the_series(self, shape, backend):
        x, weights, b, l2, scale, intercept = self.arguments(shape)
        x = x.clone()
        x[5, 3] = float("nan")
        never = torch.full((shape[3],), -1.0, dtype=torch.float64)
        solve = ops.glm_neumann_solve.kernel(torch.device("cpu"), backend)
        _, history = solve(x, weights, b, l2, scale, intercept, 0.2, 0.1, 20, never)
        assert history[0, :, 0].isnan().all() and (history[0, :, 1] == 1).all() and (history[1:] == -1).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_conjugate_gradients(self, shape, dtype, backend):
        arguments = self.arguments(shape, dtype)
        exact = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
        squares = exact[2].square().sum(1)
        # Rows stop one by one; the first is not to be started at all.
        stop = squares * torch.logspace(-4, -8, shape[3], dtype=torch.float64)
        state = torch.stack([squares, stop, 0 * squares, 0 * squares], 1)
        state[0, 3] = 1.0
        before = state.clone()
        x, scalars, steps = ops.glm_cg_solve.kernel(torch.device("cpu"), backend)(*arguments, 0.1, 30, state)
        true_x, true_scalars, true_steps = reference.glm_cg_solve(*exact, 0.1, 30, state)
        assert torch.equal(state, before) and torch.equal(x[0], torch.zeros_like(x[0]))
        assert int(steps) == int(true_steps) and 1 < int(steps) < 30
        assert torch.equal(scalars[:, 3], true_scalars[:, 3]) and torch.equal(scalars[0], state[0])
        assert_close(x, true_x, 1e-12 if dtype == torch.float64 else 1e-5)
        assert_close(scalars, true_scalars, 1e-6 if dtype == torch.float64 else 1e-2)

    def test_negative_curvature_and_nan_stop_their_rows_only(self, shape, backend):
        arguments = self.arguments(shape)
        b = arguments[2]
        b[1, 3] = float("nan")
        squares = b.nan_to_num().square().sum(1)
        state = torch.stack([squares, 1e-20 * squares, 0 * squares, 0 * squares], 1)
        solve = ops.glm_cg_solve.kernel(torch.device("cpu"), backend)
        x, scalars, steps = solve(*arguments, -100.0, 5, state)
        assert scalars[:, 3].tolist() == [2.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0][: shape[3]]
        assert int(steps) == 1 and torch.equal(x, torch.zeros_like(x))


def test_deterministic_solves_are_equal_to_the_last_bit():
    arguments = TestWholeSolves().arguments(dtype=torch.float32)
    never = torch.full((3,), -1.0, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    first, second = (ops.glm_neumann_solve(*arguments, 0.3, 0.1, 25, never) for _ in range(2))
    torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


LOSSES = {
    "logistic": F.binary_cross_entropy_with_logits,
    "softmax": F.cross_entropy,
    "squared": F.mse_loss,
    "poisson": F.poisson_nll_loss,
}


def problem(family, bias, dtype=torch.float64, n=80, d=7, classes=4):
    """Parameters, operator, and the same loss for autograd, with one penalty per weight."""
    x = torch.randn(n, d, dtype=dtype)
    shape = (classes, d) if family == "softmax" else (d,)
    params = [0.3 * torch.randn(shape, dtype=dtype)]
    if bias:
        params.append(0.3 * torch.randn((classes,) if family == "softmax" else (), dtype=dtype))
    params = [p.requires_grad_() for p in params]
    y = torch.randint(classes, (n,)) if family == "softmax" else torch.rand(n, dtype=dtype).round()
    l2 = torch.rand(shape, dtype=dtype) + 0.1

    def loss(params):
        eta = x @ params[0].T + (params[1] if bias else 0)
        return LOSSES[family](eta, y) + (l2 * params[0] ** 2).sum()

    return params, hg.GLMHessian(x, params, family, l2=l2), loss


class TestOperator:
    @pytest.mark.parametrize(("dtype", "k"), [(torch.bfloat16, 4), (torch.float32, 96)], ids=str)
    def test_small_vectors(self, dtype, k):
        # Matrix units take what is below 1e-38 for zero.
        operator = hg.GLMHessian(torch.randn(600, 256).to(dtype), torch.zeros(256), "logistic")
        v, lead = torch.randn(k, 256), torch.logspace(0, -120, k, base=2.0).log2().round().exp2()[:, None]
        assert_close((operator @ (lead * v)) / lead, operator @ v, 1e-6)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_the_hessian_of_the_torch_loss(self, family, bias):
        params, operator, loss = problem(family, bias)
        truth = hg.Hessian(loss, params).dense()
        assert_close(operator.dense(), truth, 1e-12, "Gram matrix")
        assert_close(super(hg.GLMHessian, operator).dense(), truth, 1e-12, "products")
        v = [torch.randn((3, *p.shape), dtype=p.dtype) for p in params]
        assert_close(operator @ v, hg.Hessian(loss, params) @ v, 1e-12)

    @pytest.mark.parametrize("solver", [hg.CG(tol=1e-12), hg.Neumann(3000), hg.Direct(), "auto"], ids=str)
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("rows", [None, 3])
    def test_solves_like_the_hessian(self, family, solver, rows):
        params, operator, loss = problem(family, bias=True)
        lead = () if rows is None else (rows,)
        b = [torch.randn((*lead, *p.shape), dtype=p.dtype) for p in params]
        # Softmax with a free bias is singular: the same constant may be added to every class.
        truth = hg.solve(hg.Hessian(loss, params), b, hg.Direct(), damping=0.05).value
        solution = hg.solve(operator, b, solver, damping=0.05)
        assert_close(solution.value, truth, 1e-3 if solver == "auto" else 1e-8)

    def test_whole_solve_equals_the_loop_in_every_respect(self, monkeypatch):
        params, operator, _ = problem("logistic", bias=True)
        monkeypatch.setattr(operator, "plan", lambda products, rows: ("products", "forced"))
        b = [torch.randn((2, *p.shape), dtype=p.dtype) for p in params]
        hg.solve(operator, b, hg.Neumann(0))  # finds and keeps the step size
        for solver in (hg.Neumann(30), hg.Neumann(500, tol=1e-6), hg.CG(tol=1e-8)):
            whole = hg.solve(operator, b, solver)
            with monkeypatch.context() as patch:
                patch.setattr(operator, "neumann_series", lambda *args: None)
                patch.setattr(operator, "conjugate_gradients", lambda *args: None)
                loop = hg.solve(operator, b, solver)
            assert_close(whole.value, loop.value, 1e-12)
            assert (whole.status, whole.steps, whole.hvps) == (loop.status, loop.steps, loop.hvps)

    def test_divergence_is_reported_from_the_whole_solve(self, monkeypatch):
        params, operator, _ = problem("squared", bias=False)
        monkeypatch.setattr(operator, "plan", lambda products, rows: ("products", "forced"))
        solution = hg.solve(operator, [torch.randn_like(params[0])], hg.Neumann(2000, alpha=50.0))
        assert solution.status == "diverged" and solution.steps < 10

    def test_plan_weighs_bytes_and_multiply_adds(self):
        tall = hg.GLMHessian(torch.randn(200_000, 10), torch.zeros(10), "logistic")
        wide = hg.GLMHessian(torch.randn(40, 300), torch.zeros(300), "logistic")
        small = hg.GLMHessian(torch.randn(1000, 32), torch.zeros(32), "logistic")
        assert tall.plan(100, 1)[0] == "gram"
        assert wide.plan(100, 1)[0] == small.plan(10, 1)[0] == "products"
        assert tall.plan(1, 1)[0] == "products"
        assert "million multiply-adds" in tall.plan(100, 1)[1]

    @pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
    def test_gram_matrix_is_formed_whatever_backend_is_asked_for(self, name, monkeypatch, caplog):
        params, operator, loss = problem("softmax", bias=True)
        monkeypatch.setenv("HYPERGRAD_EXT_BACKEND", name)
        gram = operator.dense()
        monkeypatch.delenv("HYPERGRAD_EXT_BACKEND")
        assert_close(gram, hg.Hessian(loss, params).dense(), 1e-12)
        assert not caplog.records

    @pytest.mark.parametrize("choice", ["gram", "products"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_prepared_operator_is_equal(self, family, choice, monkeypatch):
        params, operator, _ = problem(family, bias=True)
        monkeypatch.setattr(operator, "plan", lambda products, rows: (choice, "forced"))
        prepared = operator.prepare(100, 1)
        assert isinstance(prepared, hg.DenseMatrix) == (choice == "gram")
        for lead in ((), (2,)):
            v = [torch.randn((*lead, *p.shape), dtype=p.dtype) for p in params]
            assert_close(prepared @ v, operator @ v, 1e-13)
        b = [torch.randn(p.shape, dtype=p.dtype) for p in params]
        for solver in (hg.Neumann(50), hg.CG(tol=1e-10)):
            solution = hg.solve(operator, b, solver, damping=0.1)
            truth = hg.solve(hg.Callable(operator.__matmul__, params), b, solver, damping=0.1)
            assert_close(solution.value, truth.value, 1e-8)

    def test_linear_module_and_dict(self):
        layer = nn.Linear(5, 3).double()
        x, y = torch.randn(30, 5).double(), torch.randint(3, (30,))
        operator = hg.GLMHessian(x, layer, "softmax")
        v = {"bias": torch.randn(3).double(), "weight": torch.randn(3, 5).double()}
        assert_close(operator @ v, hg.Hessian(F.cross_entropy(layer(x), y), layer) @ v, 1e-12)

    def test_refuses_modules_of_which_it_would_be_another_hessian(self):
        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        frozen, pruned, computed, hooked = (nn.Linear(5, 3) for _ in range(4))
        hooked.register_forward_hook(lambda part, x, out: 2 * out)
        frozen.bias.requires_grad_(False)
        prune.l1_unstructured(pruned, "weight", 4)
        parametrizations.weight_norm(computed)
        cases = {"all of it trainable, got parameters that do not require grad": frozen}
        cases |= {"got Scaled with weight, bias": Scaled(5, 3), "got Linear with bias, weight_orig": pruned}
        cases |= {"got one with hooks": hooked}
        for message, layer in (cases | {"got ParametrizedLinear with bias": computed}).items():
            with pytest.raises(ValueError, match=f"params: expected .*{message}"):
                hg.GLMHessian(torch.randn(30, 5), layer, "softmax")

    def test_nothing_but_an_intercept(self):
        params = [torch.zeros(3, 0, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
        operator = hg.GLMHessian(torch.zeros(5, 0, dtype=torch.float64), params, "softmax")
        p = params[1].softmax(0)
        assert_close(operator.dense(), p.diag() - p.outer(p), 1e-14)
        assert_close((operator @ [params[0], p])[1], p * p - p * p.dot(p), 1e-14)

    def test_refuses_inputs_that_changed(self):
        x, w = torch.randn(30, 5), torch.zeros(5)
        x.mul_(2)  # before: does not count
        operator, v = hg.GLMHessian(x, w, "logistic"), torch.randn(5)
        copy_of_it, product = copy.deepcopy(operator), operator @ v
        operator.dense()  # keeps the Gram matrix
        x.mul_(2)
        for call in (lambda: operator @ v, operator.dense, lambda: hg.solve(operator, v), lambda: copy.copy(operator)):
            with pytest.raises(RuntimeError, match="inputs: changed in place .* make a new one"):
                call()
        assert_close(copy_of_it @ v, product, 0.0)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_autocast_changes_nothing(self, family):
        params, _, _ = problem(family, True, torch.float32)
        x, b = torch.randn(80, 7), [torch.randn_like(p) for p in params]

        def results():
            operator = hg.GLMHessian(x, params, family, l2=0.1)
            gram = hg.GLMHessian(x, params, family, l2=0.1).prepare(10**9, 1)
            solution = hg.solve(operator, b, hg.CG(tol=1e-6), damping=0.1).value
            return [operator @ b, gram @ b, operator.dense(), solution]

        expected = results()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = results()
        assert_close(value, expected, 0.0)

    @needs_cpp
    def test_autocast_leaves_products_by_torch_alone(self):
        # So many columns that the kernel makes two matrix products of torch.
        x, v = torch.randn(20, 7000), torch.randn(40, 7000)
        operator = hg.GLMHessian(x, torch.zeros(7000), "logistic")
        expected = operator @ v
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(operator @ v, expected, 0.0)

    def test_hypergradient_with_the_closed_form(self):
        params, operator, loss = problem("softmax", bias=True)
        lam = torch.zeros((), dtype=torch.float64, requires_grad=True)
        train = lambda p: loss(p) + (lam * p[0]).sum()  # noqa: E731
        val = lambda p: (p[0] ** 2).sum() + p[1].sum()  # noqa: E731
        expected = hg.hypergradient(val, train, params, lam, hg.Direct(), damping=0.1)
        value = hg.hypergradient(val, train, params, lam, hg.CG(tol=1e-12), damping=0.1, operator=operator)
        assert_close(value, expected, 1e-9)

    @pytest.mark.parametrize(("dtype", "moved"), [(torch.bfloat16, 2e-3), (torch.float16, 2.5e-4)], ids=str)
    def test_data_in_half_the_bytes_move_the_solution_little(self, dtype, moved):
        x, w = torch.randn(2000, 50), torch.zeros(50)
        b = torch.randn(50)
        full, half = (hg.GLMHessian(t, w, "logistic", l2=0.05) for t in (x, x.to(dtype)))
        solver = hg.Neumann(100)
        assert relative_error(hg.solve(half, b, solver).value, hg.solve(full, b, solver).value) < moved

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda x, w: hg.GLMHessian(x, w, "probit"), ValueError, "family: expected one of logistic.*got 'probit'"),
            (lambda x, w: hg.GLMHessian(x, w, "softmax"), ValueError, r"params: expected shape \(classes, d\)"),
            (lambda x, w: hg.GLMHessian(x, w[:3], "logistic"), ValueError, r"inputs: expected shape \(n, 3\)"),
            (lambda x, w: hg.GLMHessian(x[:0], w, "logistic"), ValueError, "inputs: .* with n > 0"),
            (lambda x, w: hg.GLMHessian(x.double(), w, "logistic"), TypeError, "inputs: expected torch.float32 or"),
            (lambda x, w: hg.GLMHessian([1.0], w, "logistic"), TypeError, "inputs: expected a tensor, got list"),
            (lambda x, w: hg.GLMHessian(x, w, "logistic", l2=-1.0), ValueError, "l2: expected values >= 0"),
            (lambda x, w: hg.GLMHessian(x, w, "logistic", l2=torch.ones(3)), ValueError, "l2: expected a number or"),
            (lambda x, w: hg.GLMHessian(x, [w, w[:2]], "logistic"), ValueError, r"params\[1\]: expected shape \(\) or"),
            (
                lambda x, w: hg.GLMHessian(x, [w, w[:1], w[1:2]], "logistic"),
                ValueError,
                "params: expected a weight, or",
            ),
            (lambda x, w: hg.GLMHessian(x, w.bfloat16(), "logistic"), ValueError, "params: expected a weight, or"),
            (
                lambda x, w: hg.GLMHessian(x[:, :1], {"bias": w[:1], "weight": w[None, :1]}, "logistic"),
                ValueError,
                "params: expected the weight before the bias",
            ),
            (lambda x, w: hg.GLMHessian(x.to_sparse(), w, "logistic"), TypeError, "inputs: expected a dense tensor"),
            (lambda x, w: hg.GLMHessian(x, w, "logistic", l2=None), TypeError, "l2: expected a real .*NoneType"),
            (lambda x, w: hg.GLMHessian(x, w, "logistic", l2=w + 0j), TypeError, "l2: expected a real .*complex64"),
            (lambda x, w: hg.GLMHessian(x, w, "logistic", l2=2e38), ValueError, "l2: expected values >= 0, .*infinite"),
        ],
        ids=range(16),
    )
    def test_refuses(self, make, error, message):
        with pytest.raises(error, match=message):
            make(torch.randn(6, 5), torch.zeros(5))
