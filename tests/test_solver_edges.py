"""What solves report beside the value, whatever the units, and at the edges of what may be asked."""

from __future__ import annotations

import math

import pytest
import torch

import hypergrad_ext as hg
from tests.cases import products, spd, with_eigenvalues
from tests.compare import assert_close

F64 = torch.float64


class TestReport:
    def test_error_bound_holds_and_is_tight_for_the_worst_direction(self):
        a = with_eigenvalues(torch.logspace(0, -2, 30, dtype=F64))
        operator = hg.DenseMatrix(a)
        b = torch.randn(3, 30, dtype=F64)
        truth = torch.linalg.solve(a + 0.1 * torch.eye(30, dtype=F64), b.T).T
        for steps in (1, 5, 20):
            solution = hg.solve(operator, b, hg.CG(max_steps=steps), damping=0.1, lower=1e-2)
            errors = torch.linalg.vector_norm(solution.value - truth, dim=1)
            assert bool((errors <= solution.error_bound * (1 + 1e-9)).all())
        worst = torch.linalg.eigh(a).eigenvectors[:, 0]
        operator.lower = 1e-2
        solution = hg.solve(operator, worst, hg.Neumann(0, alpha=1.0))
        error = float(torch.linalg.vector_norm(solution.value - worst / 1e-2))
        assert solution.error_bound == pytest.approx(error, rel=1e-6)

    def test_rows_that_are_not_finite_have_no_residual_and_no_bound(self):
        b = torch.tensor([[1.0, 2.0], [math.nan, 1.0]])
        solution = hg.solve(hg.DenseMatrix(torch.diag(torch.tensor([2.0, 3.0]))), b, hg.CG(), lower=1.0)
        assert solution.residual_norm.isnan().tolist() == solution.error_bound.isnan().tolist() == [False, True]

    def test_error_bound_is_none_where_nothing_is_known(self):
        assert hg.solve(hg.DenseMatrix(torch.eye(2)), torch.ones(2)).error_bound is None

    def test_lower_bound_that_is_wrong_is_refused(self):
        a = torch.diag(torch.tensor([2.0, 0.5], dtype=F64))
        with pytest.raises(
            ValueError, match=r"lower: expected a number that no eigenvalue .* got 1, but v.H v .* 0\.\d"
        ):
            hg.solve(hg.DenseMatrix(a), torch.ones(2, dtype=F64), lower=1.0, damping=0.3)
        assert hg.solve(hg.DenseMatrix(-a), torch.ones(2, dtype=F64), hg.MINRES(), lower=-2.0).error_bound is None
        exact = hg.solve(hg.DenseMatrix(a), torch.tensor([0.0, 1.0], dtype=F64), hg.Direct(), lower=0.5)
        assert exact.error_bound == 0

    @pytest.mark.parametrize(
        ("lower", "error", "message"),
        [
            ("0", TypeError, "lower: expected a number or None, got '0'"),
            (True, TypeError, "lower: expected a number or None, got True"),
            (math.nan, ValueError, "lower: expected a finite number, got nan"),
        ],
    )
    def test_lower_bound_is_checked(self, lower, error, message):
        with pytest.raises(error, match=message):
            hg.solve(hg.DenseMatrix(torch.eye(2)), torch.ones(2), lower=lower)

    @pytest.mark.parametrize("loss_scale", [1.0, 256.0])
    def test_bound_of_the_hypergradient_holds(self, loss_scale):
        x, y = torch.randn(60, 8, dtype=F64), torch.rand(60, dtype=F64).round()
        xv, yv = torch.randn(30, 8, dtype=F64), torch.rand(30, dtype=F64).round()
        log_l2 = torch.linspace(-3, -1, 8, dtype=F64).requires_grad_()
        shift = torch.zeros((), dtype=F64, requires_grad=True)
        w = torch.randn(8, dtype=F64)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        train = lambda w: entropy(x @ w + shift, y) + (log_l2.exp() * w * w).sum()  # noqa: E731
        val = lambda w: entropy(xv @ w + shift, yv)  # noqa: E731

        def run(solver):
            return hg.hypergradient(
                *(val, train, w, [log_l2, shift], solver),
                lower=2 * math.exp(-3),
                loss_scale=loss_scale,
                return_solution=True,
            )

        truth, exact = run(hg.Direct())
        assert all(float(t.max()) < 1e-12 for t in exact.hypergradient_bound)
        for steps in (1, 3):
            grads, solution = run(hg.Neumann(steps))
            assert isinstance(solution.hypergradient_bound, tuple)
            for grad, true, bound in zip(grads, truth, solution.hypergradient_bound, strict=True):
                error = (grad - true).abs()
                assert bound.shape == grad.shape and bool((error <= bound).all())
                assert float(bound.max()) < 1e3 * float(error.max())

    def test_no_bound_of_the_hypergradient_where_it_costs_too_much(self):
        w, lam = torch.ones(65), torch.ones(65, requires_grad=True)
        train, val = (lambda w: (lam * (w - 1) ** 2).sum() + (w * lam).sum()), (lambda w: (w**2).sum())
        _, solution = hg.hypergradient(val, train, w, lam, lower=2.0, return_solution=True)
        assert solution.error_bound is not None and solution.hypergradient_bound is None

    def test_penalised_glm_knows_its_lower_bound(self):
        x, w = torch.randn(20, 3, dtype=F64), torch.zeros(3, dtype=F64)
        assert hg.GLMHessian(x, w, "logistic", l2=0.5).lower == pytest.approx(
            float(torch.linalg.eigvalsh(hg.GLMHessian(x, w, "logistic", l2=0.5).dense())[0])
            - float(torch.linalg.eigvalsh(hg.GLMHessian(x, w, "logistic").dense())[0])
        )

    @pytest.mark.parametrize(
        "solver",
        [
            hg.CG(tol=1e-9, max_steps=9),
            hg.CG(tol=1e-9, max_steps=9, preconditioner=torch.ones(25, dtype=F64)),
            hg.MINRES(tol=1e-9, max_steps=9),
            hg.BlockCG(tol=1e-9, max_steps=9),
            hg.Chebyshev(9, bounds=(0.1, 1.0)),
            hg.Neumann(9, alpha=1.0),
            hg.Neumann(9, alpha=1.0, form="richardson"),
        ],
        ids=lambda s: type(s).__name__,
    )
    @pytest.mark.parametrize("rows", [None, 3])
    def test_history_is_the_residual_of_every_step(self, solver, rows):
        a, b = spd(25, 10.0), torch.randn(*(() if rows is None else (rows,)), 25, dtype=F64)
        solution = hg.solve(hg.DenseMatrix(a), b, solver, history=True)
        assert hg.solve(hg.DenseMatrix(a), b, solver).history is None
        norms = torch.tensor(solution.history[-1], dtype=F64)
        assert solution.steps <= len(solution.history) <= solution.steps + 1
        assert len(norms) == (rows or 1)
        if isinstance(solver, hg.BlockCG):  # without what it has dropped
            assert bool(((norms - torch.as_tensor(solution.residual_norm).reshape(-1)).abs() <= solver.tol).all())
        elif isinstance(solver, (hg.CG, hg.MINRES)):
            assert_close(norms, torch.as_tensor(solution.residual_norm).reshape(-1), 1e-6)
        else:  # the step knows the residual that it started from
            last = torch.as_tensor(solution.residual_norm).reshape(-1)
            assert bool((norms >= last).all() and (norms <= 2 * last).all())

    @pytest.mark.parametrize("rows", [[0, 1], [1, 0, 0]])
    def test_history_of_rows_that_go_on_with_minres(self, rows):
        a, b = torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=F64)), torch.tensor([[1.0, 1, 0], [0, 0, 1]], dtype=F64)
        solution = hg.solve(products(a), b[rows], history=True)
        assert solution.converged and solution.indefinite
        assert {len(norms) for norms in solution.history} == {len(rows)} and max(solution.history[-1]) < 1e-6


class TestScales:
    SOLVERS = {
        "CG": hg.CG(tol=1e-6),
        "MINRES": hg.MINRES(tol=1e-6),
        "BlockCG": hg.BlockCG(tol=1e-6),
        "Chebyshev": hg.Chebyshev(30),
        "Neumann": hg.Neumann(30),
        "Nystrom": hg.Nystrom(10),
        "CG with Nystrom": hg.CG(tol=1e-6, preconditioner=hg.Nystrom(10)),
        "CG with Jacobi": hg.CG(tol=1e-6, preconditioner=hg.Jacobi()),
        "auto": "auto",
        "Direct": hg.Direct(),
    }

    @pytest.mark.parametrize("name", SOLVERS)
    @pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    def test_of_operator_and_right_hand_side(self, name, scale, dtype):
        a, b = spd(40, 20.0).to(dtype), torch.randn(2, 40, dtype=F64).to(dtype)
        solve = lambda h, g: hg.solve(products(a * h), b * g, self.SOLVERS[name], damping=0.01 * h)  # noqa: E731
        plain = solve(1.0, 1.0)
        for h, g in ((scale, 1.0), (1.0, scale), (scale, scale)):
            scaled = solve(h, g)
            assert scaled.status == plain.status and abs(scaled.steps - plain.steps) <= 1
            assert_close(scaled.value.double() * (h / g), plain.value.double(), 1e-4 if dtype != F64 else 1e-8)


class TestEdges:
    @pytest.mark.parametrize("size", [1e-200, 1e200])
    @pytest.mark.parametrize(
        "solver",
        ["auto", hg.CG(), hg.MINRES(), hg.BlockCG(), hg.Neumann(60, tol=1e-4), hg.Chebyshev(60, tol=1e-4), hg.Direct()],
        ids=lambda s: str(s).split("(")[0],
    )
    def test_right_hand_sides_that_have_no_squares(self, solver, size):
        a, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=F64), torch.tensor([1.0, -2.0], dtype=F64)
        plain, scaled = (
            hg.solve(hg.Callable(lambda v: a @ v, b), rhs, solver, lower=1.0) for rhs in (b, torch.stack([b, b * size]))
        )
        assert plain.converged and scaled.converged
        assert_close(scaled.value[1] / size, plain.value, 1e-3)
        assert float(scaled.residual_norm[1]) < 1e-4 and float(scaled.error_bound[1]) <= 1e-4 * size * 3

    @pytest.mark.parametrize("rows", [None, 2])
    @pytest.mark.parametrize("residual", [False, True])
    def test_solutions_that_do_not_fit_are_no_success(self, rows, residual):
        b = torch.full((3,), 1e25)
        b = b if rows is None else torch.stack([torch.ones(3), b])
        for solver in ("auto", hg.CG(), hg.MINRES(), hg.Neumann(50, alpha=4e19), hg.Identity(1e39)):
            solution = hg.solve(hg.Callable(lambda v: 2e-20 * v, torch.ones(3)), b, solver, residual=residual)
            assert solution.status.failed and bool(torch.isfinite(solution.value).all())
            if rows and not isinstance(solver, hg.Identity):
                assert not solution.statuses[0].failed

    @pytest.mark.parametrize(
        "solver",
        [hg.CG(), hg.MINRES(), hg.BlockCG(), hg.Neumann(50), hg.Chebyshev(50), hg.Direct(), hg.LiSSA(20, 2)],
        ids=lambda s: type(s).__name__,
    )
    def test_one_product_with_x0_that_overflows(self, solver):
        operator, x0 = hg.Callable(lambda v: 1e20 * v, torch.ones(2)), torch.tensor([[1e30, 1e30], [0.0, 0.0]])
        solution = hg.solve(operator, torch.ones(2, 2), solver, x0=x0)
        assert solution.statuses[0] == "non_finite_operator" and not solution.statuses[1].failed
        assert torch.equal(solution.value[0], x0[0]) and math.isinf(solution.residual_norm[0])
        assert_close(solution.value[1], torch.full((2,), 1e-20), 1e-5)
        assert hg.solve(operator, torch.ones(2), solver, x0=x0[0]).status == "non_finite_operator"

    ALL = [hg.CG(), hg.MINRES(), hg.BlockCG(), hg.Chebyshev(9), hg.Neumann(9), hg.Nystrom(3), hg.Direct(), "auto"]

    @pytest.mark.parametrize("solver", ALL, ids=str)
    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_one_unknown(self, solver, shape):
        operator = hg.Callable(lambda v: 4 * v, torch.zeros(shape))
        value = hg.solve(operator, torch.full(shape, 2.0), solver).value
        assert value.shape == shape
        assert_close(value, torch.full(shape, 0.5), 1e-5)

    @pytest.mark.parametrize("solver", [*ALL, hg.LiSSA(5, 2, alpha=0.1)], ids=str)
    @pytest.mark.parametrize("rows", [None, 2])
    def test_zero_right_hand_side(self, solver, rows):
        b = torch.zeros(*(() if rows is None else (rows,)), 7, dtype=F64)
        solution = hg.solve(products(spd(7, 3.0)), b, solver)
        assert not solution.useless and torch.equal(solution.value, b)

    @pytest.mark.parametrize("solver", [*ALL, hg.LiSSA(5, 2, alpha=0.1)], ids=str)
    def test_nan_in_one_right_hand_side_stays_there(self, solver):
        a, b = spd(7, 3.0), torch.randn(2, 7, dtype=F64)
        alone = hg.solve(products(a), b[:1], solver)
        b[1, 3] = math.nan
        solution = hg.solve(products(a), b, solver)
        assert solution.statuses[1] == "non_finite_input" and solution.useless
        assert bool(solution.value[1].isnan().all())
        tolerance = 1e-3 if isinstance(solver, (hg.Neumann, hg.Chebyshev)) else 1e-4
        if not isinstance(solver, (hg.Neumann, hg.Chebyshev)):  # whose spectrum is seen from all right-hand sides
            assert_close(solution.value[0], alone.value[0], tolerance)

    @pytest.mark.parametrize("solver", [hg.CG(tol=1e-8), hg.BlockCG(tol=1e-8), hg.Chebyshev(60), "auto"], ids=str)
    def test_singular_with_damping(self, solver):
        a = with_eigenvalues(torch.cat([torch.zeros(20, dtype=F64), torch.linspace(0.5, 1, 20, dtype=F64)]))
        b = torch.randn(40, dtype=F64)
        truth = torch.linalg.solve(a + 0.1 * torch.eye(40, dtype=F64), b)
        assert_close(hg.solve(products(a), b, solver, damping=0.1).value, truth, 1e-3)


class Transport(hg.LinearOperator):
    """An operator of a user's own: a matrix that need not be symmetric, which counts its products."""

    def __init__(self, matrix, *, symmetric=True):
        self.space = hg.Callable(lambda v: v, matrix[0]).space
        self.matrix, self.symmetric, self.count = matrix, symmetric, 0

    def matvec(self, v):
        self.count += 1
        return [self.matrix @ v[0]]


class TestOperatorsThatAreNotSymmetric:
    TOLERANT = [hg.CG(), hg.MINRES(), hg.BlockCG(), hg.Chebyshev(99, tol=1e-5), hg.Neumann(999, tol=1e-5), "auto"]
    ALL = [
        *TOLERANT,
        hg.Chebyshev(9),
        hg.Neumann(9),
        hg.Nystrom(3),
        hg.LiSSA(9, 2),
        hg.Auto(on_negative_curvature="stop"),
    ]

    def rotation(self, n: int = 12) -> torch.Tensor:
        """Positive definite, though not symmetric: conjugate gradients find nothing odd but the residual."""
        skew = torch.randn(n, n, dtype=F64)
        return torch.eye(n, dtype=F64) + 0.3 * (skew - skew.T)

    @pytest.mark.parametrize("solver", ALL, ids=str)
    def test_declared_ones_are_refused_before_any_product(self, solver):
        operator = Transport(self.rotation(), symmetric=False)
        with pytest.raises(ValueError, match=r"operator: expected a symmetric operator for \w+, got one .* Direct, or"):
            hg.solve(operator, torch.ones(12, dtype=F64), solver)
        assert operator.count == 0

    @pytest.mark.parametrize("solver", TOLERANT, ids=str)
    @pytest.mark.parametrize("rows", [None, 3])
    def test_undeclared_ones_are_found_out(self, solver, rows):
        a, b = self.rotation(), torch.randn(*(() if rows is None else (rows,)), 12, dtype=F64)
        if isinstance(solver, hg.Neumann):  # which does not need symmetry to be right, only to find alpha
            truth = torch.linalg.solve(a, b[..., None])[..., 0]
            assert_close(hg.solve(Transport(a), b, solver).value, truth, 1e-4)
            solver = hg.Neumann(999, alpha=1.0, tol=1e-5)
        with pytest.raises(ValueError, match=r"operator: expected a symmetric .*u.Hv = -?\d.* but v.Hu = -?\d.*Direct"):
            hg.solve(Transport(a), b, solver)

    def test_hypergradient_looks_at_the_residual_of_an_operator_of_your_own(self):
        w, lam = torch.ones(12, dtype=F64), torch.ones(12, dtype=F64, requires_grad=True)
        val, train = (lambda w: w.sum() ** 2), (lambda w: (lam * (w - 1) ** 2).sum())
        operator = Transport(self.rotation())
        with pytest.raises(ValueError, match="operator: expected a symmetric operator for CG"):
            hg.hypergradient(val, train, w, lam, hg.CG(), operator=operator)
        outer = hg.HyperOptimizer(torch.optim.SGD([lam], lr=0.1), w, hg.CG())
        with pytest.raises(ValueError, match="operator: expected a symmetric operator for CG"):
            outer.step(val, train, operator=operator)
        with pytest.raises(TypeError, match="operator: expected a LinearOperator .*, got Tensor"):
            hg.hypergradient(val, train, w, lam, operator=torch.eye(12))

    @pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
    def test_symmetric_ones_are_not_and_pay_twice_once(self, dtype):
        """Whatever the reason for which a solve goes wrong."""
        wrong = {
            "negative_curvature": (-spd(30, 10.0), hg.CG()),
            "diverged": (spd(30, 10.0), hg.Neumann(99, alpha=9.0)),
        }
        for status, (a, solver) in wrong.items():
            operator = Transport(a.to(dtype))
            b = torch.randn(30, dtype=F64).to(dtype)
            first = hg.solve(operator, b, solver)
            assert first.status == status and first.hvps == operator.count
            assert hg.solve(operator, b, solver).hvps == first.hvps - 2

    def test_the_way_out_works(self):
        a, b = self.rotation(), torch.randn(12, dtype=F64)
        truth = torch.linalg.solve(a, b)
        assert_close(hg.solve(Transport(a, symmetric=False), b, hg.Direct()).value, truth, 1e-10)
        normal = hg.Callable(lambda v: a.T @ (a @ v), like=b)
        assert_close(hg.solve(normal, a.T @ b, hg.CG(tol=1e-12)).value, truth, 1e-8)

    def test_preconditioners_are_refused_likewise(self):
        solver = hg.CG(preconditioner=Transport(self.rotation(), symmetric=False))
        with pytest.raises(ValueError, match="preconditioner: expected a symmetric operator, got one that is not"):
            hg.solve(products(spd(12, 3.0)), torch.ones(12, dtype=F64), solver)
