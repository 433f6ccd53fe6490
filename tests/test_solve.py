"""Solvers against torch.linalg.solve, their statuses, and where theory says they fail."""

from __future__ import annotations

import warnings

import pytest
import torch

import hypergrad_ext as hg
from hypergrad_ext import backends
from tests.cases import PROBLEMS, spd
from tests.compare import assert_close, assert_no_worse_than_torch, relative_error

BACKENDS = ["torch", *([] if backends.unavailable("cpp", "cpu") else ["cpp"])]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


class TestAgainstLinalg:
    @pytest.mark.parametrize("damping", [0.0, 0.3])
    @pytest.mark.parametrize("rows", [None, 1, 4])
    @pytest.mark.parametrize(
        ("solver", "tolerance"),
        [
            (hg.Direct(), 1e-12),
            (hg.CG(tol=1e-12), 1e-10),
            (hg.Neumann(steps=1000), 1e-10),
            (hg.Neumann(steps=5000, tol=1e-12), 1e-10),
            ("auto", 2e-3),
        ],
        ids=str,
    )
    def test_dense_matrix(self, solver, tolerance, rows, damping, backend):
        a, b = spd(37, 20.0), torch.randn(*(() if rows is None else (rows,)), 37, dtype=torch.float64)
        truth = torch.linalg.solve(a + damping * torch.eye(37, dtype=torch.float64), b[..., None])[..., 0]
        solution = hg.solve(hg.DenseMatrix(a), b, solver, damping=damping, backend=backend)
        assert_close(solution.value, truth, tolerance, str(solver))
        residual = torch.linalg.vector_norm(b - solution.value @ a - damping * solution.value, dim=-1) / b.norm(dim=-1)
        assert torch.as_tensor(solution.residual_norm).tolist() == pytest.approx(residual.tolist(), rel=1e-3, abs=1e-15)

    @pytest.mark.parametrize("name", PROBLEMS)
    @pytest.mark.parametrize("solver", [hg.Direct(), hg.CG(tol=1e-12), hg.Neumann(steps=3000)], ids=str)
    def test_hessian(self, name, solver, backend):
        problem = PROBLEMS[name]()
        v = [torch.randn_like(p) for p in problem.params]
        flat = torch.cat([t.reshape(-1) for t in v])
        truth = torch.linalg.solve(problem.hessian(), flat)
        x = hg.inverse_hvp(problem.train, problem.params, v, solver, backend=backend)
        assert [t.shape for t in x] == [p.shape for p in problem.params]
        assert_close(x, truth, 1e-8, f"{name} {solver}")

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_hessian_operator_is_the_hessian(self, name):
        problem = PROBLEMS[name]()
        operator = hg.Hessian(problem.train(problem.params), problem.params)
        assert_close(operator.dense(), problem.hessian(), 1e-12, name)
        v = [torch.randn(3, *p.shape, dtype=p.dtype) for p in problem.params]
        flat = torch.cat([t.reshape(3, -1) for t in v], 1)
        product = torch.cat([t.reshape(3, -1) for t in operator @ v], 1)
        assert_close(product, flat @ problem.hessian(), 1e-12, name)

    @pytest.mark.parametrize("solver", [hg.Direct(), hg.CG(tol=1e-6), hg.Neumann(steps=500)], ids=str)
    def test_float32(self, solver, backend):
        a, b = spd(53, 20.0), torch.randn(53, dtype=torch.float64)
        truth = torch.linalg.solve(a, b)
        value = hg.solve(hg.DenseMatrix(a.float()), b.float(), solver, backend=backend).value
        assert value.dtype == torch.float32
        assert_no_worse_than_torch(value, torch.linalg.solve(a.float(), b.float()), truth, 1e-5, str(solver))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("solver", [hg.CG(tol=1e-2), hg.Neumann(steps=60)], ids=str)
    def test_low_precision_parameters_keep_float32_state(self, dtype, solver, backend):
        scales = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
        w = torch.ones(3, dtype=dtype, requires_grad=True)
        x = hg.inverse_hvp((scales * w * w).sum(), w, torch.ones(3), solver, backend=backend)
        assert x.dtype == torch.float32
        assert_close(x, 0.5 / scales.double(), 2 * torch.finfo(dtype).eps)
        assert hg.inverse_hvp((scales * w * w).sum(), w, torch.ones(3, dtype=dtype), solver).dtype == dtype


class TestNeumann:
    @pytest.mark.parametrize("steps", [0, 1, 3, 10])
    def test_sums_one_term_more_than_steps(self, steps, backend):
        a, b = spd(11, 5.0), torch.randn(11, dtype=torch.float64)
        term, total = b.clone(), b.clone()
        for _ in range(steps):
            term = term - 0.7 * a @ term
            total = total + term
        solution = hg.solve(hg.DenseMatrix(a), b, hg.Neumann(steps, alpha=0.7), residual=False, backend=backend)
        assert_close(solution.value, 0.7 * total, 1e-14)
        assert solution.steps == solution.hvps == steps

    def test_twenty_terms_are_not_enough_a_thousand_are(self):
        a, b = spd(30, 100.0), torch.randn(30, dtype=torch.float64)
        truth = torch.linalg.solve(a, b)
        errors = [relative_error(hg.solve(hg.DenseMatrix(a), b, hg.Neumann(k)).value, truth) for k in (20, 1000)]
        assert errors[0] > 0.1 and errors[1] < 1e-2

    def test_automatic_alpha_is_safe_and_not_timid(self):
        for seed in range(20):
            torch.manual_seed(seed)
            a = spd(40, 10.0 ** (1 + seed % 4))
            operator = hg.DenseMatrix(a)
            solution = hg.solve(operator, torch.randn(40, dtype=torch.float64), hg.Neumann(50))
            assert solution.status == "max_steps"
            assert 0.5 < solution.alpha < 2

    def test_step_size_is_found_once_per_operator(self):
        operator = hg.DenseMatrix(spd(10, 5.0))
        b = torch.randn(10, dtype=torch.float64)
        spent = [hg.solve(operator, b, hg.Neumann(7), residual=False).hvps for _ in range(2)]
        assert spent == [17, 7]

    def test_step_size_can_be_read_back_and_is_the_same_in_every_precision(self):
        a, b = spd(10, 5.0), torch.randn(10, dtype=torch.float64)
        found = [
            hg.solve(hg.DenseMatrix(a.to(t)), b.to(t), hg.Neumann(3)).alpha for t in (torch.float64, torch.float32)
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        assert hg.solve(hg.DenseMatrix(a), b, hg.Neumann(3, alpha=0.25)).alpha == 0.25

    def test_divergence_raises_with_cause_and_remedy(self, backend):
        w = torch.ones(4, requires_grad=True)
        with pytest.raises(hg.SolveError, match=r"diverged .*alpha is above 2 / lambda_max.*Decrease alpha") as error:
            hg.inverse_hvp(lambda w: (w**2).sum(), w, torch.ones(4), hg.Neumann(steps=50, alpha=1.5), backend=backend)
        assert error.value.solution.status is hg.Status.DIVERGED
        assert error.value.solution.steps < 50

    def test_alpha_just_below_the_bound_does_not_raise(self):
        a = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64))
        solution = hg.solve(hg.DenseMatrix(a), torch.ones(2, dtype=torch.float64), hg.Neumann(2000, alpha=1.98))
        assert solution.status == "max_steps" and solution.residual_norm < 1e-6

    def test_slow_divergence_from_negative_curvature_is_noticed(self):
        a = torch.diag(torch.tensor([1.0, 0.5, -0.01], dtype=torch.float64))
        b = torch.tensor([1.0, 1.0, 0.01], dtype=torch.float64)
        assert hg.solve(hg.DenseMatrix(a), b, hg.Neumann(1000, alpha=1.0)).status == "diverged"

    def test_tolerance_stops_early_and_is_met(self):
        a, b = spd(20, 10.0), torch.randn(20, dtype=torch.float64)
        solution = hg.solve(hg.DenseMatrix(a), b, hg.Neumann(10_000, tol=1e-5))
        assert solution.converged and solution.steps < 1000 and solution.residual_norm <= 1e-5

    def test_fixed_point_of_a_converged_x0(self):
        a, b = spd(20, 10.0), torch.randn(20, dtype=torch.float64)
        truth = torch.linalg.solve(a, b)
        assert_close(hg.solve(hg.DenseMatrix(a), b, hg.Neumann(5), x0=truth).value, truth, 1e-13)


class TestCG:
    def test_exact_in_as_many_steps_as_distinct_eigenvalues(self):
        a = torch.diag(torch.tensor([1.0, 1.0, 2.0, 2.0, 5.0], dtype=torch.float64))
        solution = hg.solve(hg.DenseMatrix(a), torch.randn(5, dtype=torch.float64), hg.CG(tol=1e-12))
        assert solution.converged and solution.steps == 3

    def test_members_of_a_batch_stop_by_themselves(self):
        a = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        b = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1.0, 1.0, 1.0]], dtype=torch.float64)
        solution = hg.solve(hg.DenseMatrix(a), b, hg.CG(tol=1e-12))
        assert_close(solution.value, b @ torch.linalg.inv(a), 1e-12)
        assert solution.converged and solution.steps == 3 and solution.residual_norm[1] == 0

    def test_negative_curvature_is_a_status_with_the_curvature(self):
        a = torch.diag(torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64))
        solution = hg.solve(hg.DenseMatrix(a), torch.tensor([1.0, 1.0, 0.9], dtype=torch.float64), hg.CG())
        assert solution.status is hg.Status.NEGATIVE_CURVATURE and "curvature -" in solution.message
        assert not solution.value.isnan().any()

    def test_negative_curvature_warns_and_raises_where_nothing_is_left(self):
        w = torch.ones(2, requires_grad=True)
        signs = torch.tensor([1.0, -1.0])
        with pytest.raises(hg.SolveError, match="negative_curvature"):
            hg.inverse_hvp(-(w**2).sum(), w, torch.ones(2), hg.CG())
        with pytest.warns(hg.SolveWarning, match="negative_curvature.*Add damping"):
            u = torch.ones(3, requires_grad=True)
            hg.inverse_hvp((torch.tensor([3.0, 2.0, -1.0]) * u**2).sum(), u, torch.tensor([1.0, 1.0, 0.1]), hg.CG())
        damped = hg.inverse_hvp((signs * w**2).sum(), w, torch.ones(2), hg.CG(tol=1e-6), damping=3.0)
        assert_close(damped, torch.tensor([1 / 5, 1.0]), 1e-6)

    def test_iterate_worse_than_none_is_useless(self):
        """Negative curvature found late: by then the residual is above that of zero, which is what is handed back."""
        w = torch.ones(2, requires_grad=True)
        loss, v = (torch.tensor([1.0, -0.9]) * w**2).sum(), torch.tensor([1.0, 0.5])
        solution = hg.solve(hg.Hessian(loss, w), v, hg.CG())
        assert solution.status == "negative_curvature" and solution.steps == 2
        assert solution.useless and solution.residual_norm == 1 and not solution.value.any()  # zero, the start
        with pytest.raises(hg.SolveError, match="negative_curvature"):
            hg.inverse_hvp(loss, w, v, hg.CG())

    def test_missed_tolerance_warns(self):
        w = torch.ones(50, requires_grad=True)
        scales = torch.logspace(-4, 0, 50)
        with pytest.warns(hg.SolveWarning, match="max_steps"):
            hg.inverse_hvp((scales * w**2).sum(), w, torch.ones(50), hg.CG(tol=1e-8, max_steps=3))

    def test_rounding_that_hides_behind_the_recurrence_is_found_out(self):
        a = spd(60, 1e7)
        solution = hg.solve(hg.DenseMatrix(a.float()), torch.randn(60), hg.CG(tol=1e-6, max_steps=5000))
        assert solution.status in ("stagnated", "max_steps", "negative_curvature")
        assert solution.residual_norm > 1e-6

    def test_warm_start_at_the_solution_costs_no_step(self):
        a, b = spd(20, 10.0), torch.randn(3, 20, dtype=torch.float64)
        truth = torch.linalg.solve(a, b.T).T
        solution = hg.solve(hg.DenseMatrix(a), b, hg.CG(tol=1e-8), x0=truth, residual=False)
        assert solution.converged and solution.steps == 0 and solution.hvps == 3

    def test_warm_start_saves_steps(self):
        a, b = spd(50, 1e3), torch.randn(50, dtype=torch.float64)
        near = torch.linalg.solve(a, b) * (1 + 1e-4)
        cold, warm = (hg.solve(hg.DenseMatrix(a), b, hg.CG(tol=1e-5), x0=x0) for x0 in (None, near))
        assert warm.converged and warm.steps < cold.steps


class TestScales:
    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
    @pytest.mark.parametrize("solver", [hg.CG(tol=1e-5), hg.Neumann(400), hg.Direct()], ids=str)
    @pytest.mark.parametrize("what", ["operator", "right-hand side"])
    def test_units_do_not_matter_in_float32(self, what, solver, scale, backend):
        a, b = spd(15, 10.0, torch.float32), torch.randn(15)
        truth = torch.linalg.solve(a.double(), b.double())
        if what == "operator":
            value = hg.solve(hg.DenseMatrix(a * scale), b, solver, backend=backend).value.double() * scale
        else:
            value = hg.solve(hg.DenseMatrix(a), b * scale, solver, backend=backend).value.double() / scale
        assert_close(value, truth, 1e-4, f"{solver} {what} * {scale}")

    @pytest.mark.parametrize("solver", [hg.CG(), hg.Neumann(10), hg.Direct(), hg.Identity()], ids=str)
    def test_zero_right_hand_side_gives_zero(self, solver):
        solution = hg.solve(hg.DenseMatrix(spd(5, 3.0)), torch.zeros(5, dtype=torch.float64), solver)
        assert (solution.value == 0).all() and solution.residual_norm == 0

    @pytest.mark.parametrize("solver", ["auto", hg.CG(), hg.Neumann(200), hg.Direct()], ids=str)
    def test_scalar_unknown(self, solver):
        w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        x = hg.inverse_hvp(w**3, w, torch.tensor(6.0, dtype=torch.float64), solver)
        assert x.shape == () and float(x) == pytest.approx(0.5)


class TestNotFinite:
    @pytest.mark.parametrize("solver", [hg.CG(), hg.Neumann(), hg.Direct()], ids=str)
    def test_input_is_told_apart_from_operator(self, solver):
        good, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
        a = torch.eye(3)
        assert hg.solve(hg.DenseMatrix(a), nan, solver).status == "non_finite_input"
        assert hg.solve(hg.DenseMatrix(a), good, solver, x0=nan).status == "non_finite_input"
        assert hg.solve(hg.DenseMatrix(a * nan), good, solver).status == "non_finite_operator"

    @pytest.mark.parametrize("solver", [hg.CG(), hg.Neumann(), hg.Direct()], ids=str)
    def test_inverse_hvp_raises_naming_the_cause(self, solver):
        w = torch.zeros(3, requires_grad=True)
        with pytest.raises(hg.SolveError, match="right-hand side or x0 holds NaN"):
            hg.inverse_hvp((w**2).sum(), w, torch.full((3,), float("inf")), solver)
        with pytest.raises(hg.SolveError, match="A product H v holds NaN or infinity although v is finite"):
            hg.inverse_hvp((w**2).sum().sqrt() + (w**2).sum(), w, torch.ones(3), solver)

    @pytest.mark.parametrize("solver", [hg.CG(tol=1e-6), hg.Neumann(200)], ids=str)
    def test_one_bad_member_does_not_spoil_the_batch(self, solver):
        b = torch.ones(3, 4)
        b[1, 2] = float("nan")
        solution = hg.solve(hg.DenseMatrix(2 * torch.eye(4)), b, solver)
        assert solution.status == "non_finite_input"
        assert [s == "non_finite_input" for s in solution.statuses] == [False, True, False]
        assert_close(solution.value[[0, 2]], torch.full((2, 4), 0.5), 1e-6)
        assert solution.value[1].isnan().all()

    def test_throw_false_warns_and_returns(self):
        w = torch.ones(3, requires_grad=True)
        with pytest.warns(hg.SolveWarning, match="non_finite_input"):
            x = hg.inverse_hvp((w**2).sum(), w, torch.full((3,), float("nan")), throw=False)
        assert x.isnan().all()


class TestDirect:
    def test_indefinite(self):
        a = spd(9, 5.0) - 0.5 * torch.eye(9, dtype=torch.float64)
        b = torch.randn(9, dtype=torch.float64)
        assert_close(hg.solve(hg.DenseMatrix(a), b, hg.Direct()).value, torch.linalg.solve(a, b), 1e-10)

    def test_not_symmetric(self):
        a, b = torch.randn(9, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
        assert_close(hg.solve(hg.DenseMatrix(a), b, hg.Direct()).value, torch.linalg.solve(a, b), 1e-8)

    def test_singular_is_a_status(self):
        solution = hg.solve(hg.DenseMatrix(torch.zeros(2, 2)), torch.ones(2), hg.Direct())
        assert solution.status == "singular" and "Add damping" in solution.message

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_pivots_that_are_rounding_are_singular_for_the_rows_that_see_them(self, dtype):
        for seed in range(10):
            torch.manual_seed(seed)
            x = torch.randn(6, 12, dtype=dtype)
            v, w = torch.randn(12, dtype=dtype), torch.zeros(12, dtype=dtype, requires_grad=True)
            with pytest.raises(hg.SolveError, match="Direct: singular"):
                hg.inverse_hvp(lambda w, x=x: (x @ w).square().sum() / 2, w, v, hg.Direct())
        a = torch.diag(torch.tensor([1.0, 1e-30], dtype=dtype))
        both = hg.solve(hg.DenseMatrix(a), torch.tensor([[1.0, 1e-32], [1.0, 1.0]], dtype=dtype), hg.Direct())
        assert both.converged  # as exact as it is with a diagonal

    def test_leaves_the_matrix_alone(self):
        a = torch.eye(3)
        hg.solve(hg.DenseMatrix(a), torch.ones(3), hg.Direct(), damping=2.0)
        assert torch.equal(a, torch.eye(3))


class TestOperators:
    def test_callable_in_a_structure(self):
        like = {"a": torch.zeros(2), "b": torch.zeros(3)}
        operator = hg.Callable(lambda v: {"a": 2 * v["a"], "b": 4 * v["b"]}, like)
        x = hg.solve(operator, {"a": torch.ones(2), "b": torch.ones(3)}, hg.CG(tol=1e-6)).value
        assert_close(x["a"], torch.full((2,), 0.5), 1e-6)
        assert_close(x["b"], torch.full((3,), 0.25), 1e-6)

    def test_callable_that_returns_its_argument(self):
        operator = hg.Callable(lambda v: v, torch.zeros(5))
        assert_close(hg.solve(operator, torch.ones(5), hg.Neumann(50, alpha=0.5)).value, torch.ones(5), 1e-6)

    @pytest.mark.parametrize("tol", [None, 1e-12])
    def test_callable_that_returns_parts_of_its_argument_elsewhere(self, tol):
        b = [torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
        solver = hg.Neumann(200, alpha=0.3, tol=tol)
        views, copies = (
            hg.solve(hg.Callable(matvec, b), b, solver, damping=2.0).value
            for matvec in (lambda v: [v[1], v[0]], lambda v: [v[1].clone(), v[0].clone()])
        )
        assert_close(views, copies, 1e-15)
        square = torch.randn(4, 4, dtype=torch.float64)
        turned = hg.solve(hg.Callable(lambda v: v.T, square), square, solver, damping=2.0).value
        assert_close(turned, (2 * square - square.T) / 3, 1e-9)

    @pytest.mark.parametrize("nested", [False, True])
    def test_keys_in_another_order(self, nested):
        def packed(a, b, turned=False):
            tree = {"b": b, "a": a} if turned else {"a": a, "b": b}
            return [tree] if nested else tree

        def matvec(v, turned=True):
            v = v[0] if nested else v
            return packed(2 * v["a"] + v["b"], v["a"] + 10 * v["b"], turned)

        a, b = torch.randn(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
        truth = torch.linalg.solve(torch.tensor([[2.0, 1.0], [1.0, 10.0]], dtype=a.dtype), torch.stack([a, b]))
        operator = hg.Callable(matvec, packed(a, b))
        inverse = hg.Callable(lambda v: packed(v["a"] / 2, v["b"] / 10, True), {"a": a, "b": b})
        for solver in (hg.Direct(), hg.CG(tol=1e-12)):
            for turned in (False, True):
                x = hg.solve(operator, packed(a, b, turned), solver).value
                x = x[0] if nested else x
                assert list(x) == (["b", "a"] if turned else ["a", "b"])
                assert_close(torch.stack([x["a"], x["b"]]), truth, 1e-11)
        if not nested:
            m = hg.CG(tol=1e-12, preconditioner=lambda v: {"b": v["b"] / 10, "a": v["a"] / 2})
            assert hg.solve(inverse, {"a": a, "b": b}, m).converged
            once = hg.CG(max_steps=1, preconditioner=lambda v: {"b": v["b"] / 10, "a": v["a"] / 2})
            diagonal = hg.Callable(lambda v: {"a": 2 * v["a"], "b": 10 * v["b"]}, {"a": a, "b": b})
            assert hg.solve(diagonal, {"a": a, "b": b}, once).converged

    def test_other_keys_are_refused(self):
        like = [{"a": torch.ones(2)}]
        with pytest.raises(ValueError, match=r"matvec\(v\): expected the keys of params, got none for \[0\]\['a'\]"):
            hg.solve(hg.Callable(lambda v: [{"c": v[0]["a"]}], like), like, hg.CG())

    def test_products_in_one_buffer(self):
        a, out = spd(3, 3.0), torch.empty(3, dtype=torch.float64)
        operator, b = hg.Callable(lambda v: torch.mv(a, v, out=out), out), torch.eye(3, dtype=torch.float64)[:2]
        assert torch.equal(operator @ b, hg.Callable(lambda v: a @ v, out) @ b)
        assert_close(hg.solve(operator, b, hg.CG(tol=1e-12)).value, torch.linalg.inv(a)[:2], 1e-11)

    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
    def test_dtypes_of_products(self, low):
        like = [torch.ones(2), torch.ones(2)]
        mixed = hg.Callable(lambda v: [2 * v[0], (2 * v[1]).to(low)], like)
        assert_close(hg.solve(mixed, like, hg.CG()).value, [torch.full((2,), 0.5)] * 2, 1e-6)
        with pytest.raises(TypeError, match=rf"matvec\(v\): expected torch.float64, got {low}"):
            hg.solve(hg.Callable(lambda v: v.to(low), like[0].double()), like[0].double(), hg.CG())

    def test_callable_that_changes_shape_is_refused(self):
        with pytest.raises(ValueError, match=r"matvec\(v\): expected the shapes of v"):
            hg.solve(hg.Callable(lambda v: v[:2], torch.zeros(5)), torch.ones(5), hg.CG())

    @pytest.mark.parametrize("solver", [hg.CG(), hg.Neumann()], ids=str)
    def test_operators_that_are_not_symmetric_are_refused(self, solver):
        for operator in (
            hg.DenseMatrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]])),
            hg.Callable(lambda v: v, torch.zeros(2), symmetric=False),
        ):
            with pytest.raises(ValueError, match="expected a symmetric operator"):
                hg.solve(operator, torch.ones(2), solver)


class TestApproxInverseHvp:
    @pytest.mark.parametrize("iterations", [0, 1, 3, 20])
    @pytest.mark.parametrize("alpha", [1.0, 0.1, 5.0])
    def test_equals_a_plain_loop_also_where_it_diverges(self, iterations, alpha):
        problem = PROBLEMS["mlp"]()
        f = torch.autograd.grad(problem.train(problem.params), problem.params, create_graph=True)
        v = [torch.randn_like(p) for p in problem.params]
        term, total = [t.clone() for t in v], [t.clone() for t in v]
        for _ in range(iterations):
            hv = torch.autograd.grad(f, problem.params, grad_outputs=term, retain_graph=True)
            term = [t - alpha * h for t, h in zip(term, hv, strict=True)]
            total = [s + t for s, t in zip(total, term, strict=True)]
        result = hg.approx_inverse_hvp(v, f, problem.params, iterations, alpha)
        assert isinstance(result, list)
        assert_close(result, [alpha * t for t in total], 1e-12)

    def test_defaults(self):
        w = torch.ones(3, requires_grad=True)
        f = torch.autograd.grad((w**2).sum() / 8, [w], create_graph=True)
        expected = sum(0.75**j for j in range(4)) * torch.ones(3)
        assert_close(hg.approx_inverse_hvp([torch.ones(3)], f, [w]), expected, 1e-6)


def test_status_messages_say_what_to_do():
    for status in hg.Status:
        assert status == status.value and str(status) == status.value
        assert len(status.message) > 40 and status.message.endswith(".")


def test_no_warning_without_cause():
    w = torch.ones(3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in ("auto", hg.CG(), hg.Neumann(3), hg.Identity(), hg.Direct()):
            hg.inverse_hvp((w**2).sum(), w, torch.ones(3), solver)


@pytest.mark.parametrize("shape", [(40,), (3, 40)])
@pytest.mark.parametrize(
    "solver", ["auto", hg.CG(), hg.Neumann(3), hg.Identity(), hg.Direct(), hg.Chebyshev(4), hg.MINRES()]
)
def test_the_right_hand_side_stays_as_it_is(solver, shape):
    a, b = spd(40, 20.0), 1e-6 * torch.randn(shape, dtype=torch.float64)
    before = b.clone()
    for _ in range(2):
        solutions = [hg.solve(hg.DenseMatrix(a), b, solver, residual=residual).value for residual in (False, True)]
        assert torch.equal(b, before)
        assert_close(solutions[0], solutions[1], 1e-12)


def test_a_solution_prints_in_a_line():
    solution = hg.solve(hg.DenseMatrix(torch.eye(500)), torch.ones(500), hg.CG(), history=True)
    assert "converged" in repr(solution)
    assert len(repr(solution)) < 500


OTHER_SOLVERS = [
    hg.Neumann(500),
    hg.Chebyshev(300),
    hg.CG(1e-6),
    hg.BlockCG(1e-6),
    hg.MINRES(1e-6),
    hg.Direct(),
    "auto",
]


@pytest.mark.parametrize("solver", OTHER_SOLVERS, ids=str)
@pytest.mark.parametrize("kind", ["matrix", "tensor", "function"])
def test_autocast_is_for_losses_alone(solver, kind):
    torch.manual_seed(0)
    a, b = spd(12, 10.0).float(), torch.randn(3, 12)
    w = torch.ones(12, requires_grad=True)
    truth = torch.linalg.solve(a.double(), b.double().T).T

    def loss(w):
        assert torch.is_autocast_enabled("cpu") == (kind == "function")
        with torch.autocast("cpu", enabled=False):
            return w @ (a @ w) / 2

    value = loss(w) if kind == "tensor" else loss
    with torch.autocast("cpu", torch.bfloat16):
        operator = hg.DenseMatrix(a) if kind == "matrix" else hg.Hessian(value, w)
        solution = hg.solve(operator, b, solver)
        product = operator @ b
    assert_close(product, b @ a, 1e-6)
    assert_close(solution.value, truth, 1e-4)
    assert float(solution.residual_norm.max()) < 1e-4


@pytest.mark.parametrize("solver", [*OTHER_SOLVERS, hg.CG(preconditioner=hg.Jacobi())], ids=str)
def test_a_default_device_changes_nothing(solver):
    a, b = spd(6, 10.0), torch.randn(3, 6, dtype=torch.float64)
    operator = hg.Callable(lambda v: a @ v, b[0])
    truth = hg.solve(operator, b, solver, damping="auto").value
    torch.set_default_device("meta")
    try:
        value = hg.solve(hg.Callable(lambda v: a @ v, b[0]), b, solver, damping="auto").value
    finally:
        torch.set_default_device(None)  # any device would have torch look at every call of every later test
    assert_close(value, truth, 1e-12)
