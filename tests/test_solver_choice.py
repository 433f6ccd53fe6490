"""What decides by itself: auto, step sizes, damping, sketches, states; and the solvers that it has for that."""

from __future__ import annotations

import copy
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hypergrad_ext as hg
from tests.cases import OUTLIERS, energy_error, products, spd, with_eigenvalues
from tests.compare import assert_close, relative_error

F64 = torch.float64


class TestBlockCG:
    def test_solves_with_fewer_products_than_separate_recurrences(self):
        a, b = with_eigenvalues(OUTLIERS), torch.randn(16, 200, dtype=F64)
        block, separate = (hg.solve(hg.DenseMatrix(a), b, make(tol=1e-8)) for make in (hg.BlockCG, hg.CG))
        assert block.converged and float(block.residual_norm.max()) <= 1e-8
        assert_close(block.value, torch.linalg.solve(a, b.T).T, 1e-4)
        assert block.hvps < separate.hvps / 2

    def test_dependent_and_zero_right_hand_sides_leave_the_block(self):
        a, b = spd(50, 20.0), torch.randn(8, 50, dtype=F64)
        b[3], b[4], b[5] = b[0] + b[1], 0, 1e6 * b[2]
        solution = hg.solve(hg.DenseMatrix(a), b, hg.BlockCG(tol=1e-10), residual=False)
        assert solution.converged and solution.statuses == ("converged",) * 8
        assert solution.hvps <= 5 * solution.steps
        for row, truth in zip(solution.value, torch.linalg.solve(a, b.T).T, strict=True):
            assert torch.linalg.vector_norm(row - truth) <= 1e-8 * torch.linalg.vector_norm(truth)

    def test_one_vector_is_cg(self):
        a, b = spd(60, 50.0), torch.randn(60, dtype=F64)
        block, cg = (hg.solve(hg.DenseMatrix(a), b, make(tol=1e-8)) for make in (hg.BlockCG, hg.CG))
        # The same iterates but for rounding, which makes one cross the tolerance a step before the other.
        assert abs(block.steps - cg.steps) <= 1
        assert_close(block.value, cg.value, 1e-7)

    def test_more_right_hand_sides_than_unknowns(self):
        a, b = spd(5, 4.0), torch.randn(9, 5, dtype=F64)
        solution = hg.solve(hg.DenseMatrix(a), b, hg.BlockCG(tol=1e-10))
        assert solution.steps == 1
        assert_close(solution.value, torch.linalg.solve(a, b.T).T, 1e-10)

    def test_damping_warm_start_and_limits(self):
        a, b = spd(30, 20.0), torch.randn(3, 30, dtype=F64)
        truth = torch.linalg.solve(a + 0.1 * torch.eye(30, dtype=F64), b.T).T
        solution = hg.solve(hg.DenseMatrix(a), b, hg.BlockCG(tol=1e-9), damping=0.1, x0=truth + 1e-3)
        assert_close(solution.value, truth, 1e-7)
        assert hg.solve(hg.DenseMatrix(a), b, hg.BlockCG(tol=1e-9, max_steps=2)).status == "max_steps"

    def test_negative_curvature_and_nan_are_reported(self):
        a, b = torch.diag(torch.tensor([1.0, -1.0, 2.0])), torch.ones(2, 3)
        assert hg.solve(hg.DenseMatrix(a), b, hg.BlockCG()).status == "negative_curvature"
        nan = hg.Callable(lambda v: v * math.nan, torch.zeros(3))
        assert hg.solve(nan, b, hg.BlockCG()).status == "non_finite_operator"


class TestNystrom:
    def test_is_exact_on_a_matrix_of_its_rank(self):
        a = with_eigenvalues(torch.cat([torch.logspace(1, 0, 6, dtype=F64), torch.zeros(34, dtype=F64)]))
        b = torch.randn(4, 40, dtype=F64)
        solution = hg.solve(hg.DenseMatrix(a), b, hg.Nystrom(rank=10), damping=0.1)
        assert_close(solution.value, torch.linalg.solve(a + 0.1 * torch.eye(40, dtype=F64), b.T).T, 1e-9)
        assert solution.hvps == 10 + 4

    def test_what_the_sketch_leaves_out_is_seen_in_the_residual(self):
        a, b = with_eigenvalues(torch.linspace(1, 2, 40, dtype=F64)), torch.randn(40, dtype=F64)
        solution = hg.solve(hg.DenseMatrix(a), b, hg.Nystrom(rank=5), damping=0.1)
        assert solution.status == "max_steps" and solution.residual_norm > 0.5

    @pytest.mark.parametrize("dtype", [F64, torch.float32])
    @pytest.mark.parametrize("damping", [0.0, 1e-2, 1e-6, 1e-10, 1e-15])
    def test_full_rank_is_exact_at_any_damping(self, dtype, damping):
        a, b = spd(20, 6.0, dtype), torch.randn(20, dtype=dtype)
        solution = hg.solve(hg.DenseMatrix(a), b, hg.Nystrom(20), damping=damping)
        truth = torch.linalg.solve(a.double() + damping * torch.eye(20, dtype=F64), b.double())
        assert_close(solution.value.double(), truth, 100 * torch.finfo(dtype).eps)

    def test_little_damping_divides_no_rounding(self):
        q = torch.linalg.qr(torch.randn(40, 10, dtype=F64)).Q
        b = q @ torch.randn(10, dtype=F64)
        x = hg.solve(hg.DenseMatrix(q @ q.T), b, hg.Nystrom(10), damping=1e-12).value
        assert_close(q.T @ x, q.T @ b, 1e-9)  # across it the rounding of b itself is divided by the damping

    def products_to(self, a: Tensor, b: Tensor, preconditioner: hg.Nystrom | None = None) -> tuple[int, int]:
        """Steps, and products with the sketch, to a relative error of 1e-3."""
        truth = torch.linalg.solve(a, b)
        matrix = hg.DenseMatrix(a.to(b.dtype))
        for steps in range(1, 200):
            solver = hg.CG(tol=1e-14, max_steps=steps, preconditioner=preconditioner)
            solution = hg.solve(matrix, b.to(a.dtype), solver, residual=False)
            if relative_error(solution.value.double(), truth.double()) <= 1e-3:
                return solution.steps, solution.hvps
        raise AssertionError("not reached")

    def test_cg_needs_half_of_the_steps_with_it(self):
        a, b = with_eigenvalues(OUTLIERS), torch.randn(200, dtype=F64)
        plain, _ = self.products_to(a, b)
        steps, spent = self.products_to(a, b, hg.Nystrom(30))
        assert steps <= plain / 2
        assert spent == steps + 30 and spent < plain

    def test_in_float32_half_of_the_products_with_the_sketch_counted(self):
        """Rounding makes CG find the outliers again and again."""
        a = with_eigenvalues(OUTLIERS).float()
        a, b = (a + a.T) / 2, torch.randn(200)
        plain, _ = self.products_to(a, b)
        _, spent = self.products_to(a, b, hg.Nystrom(23))
        assert spent <= plain / 2

    def test_in_float64_no_krylov_method_can_do_that(self):
        """The best vectors of the spaces, with the eigenvectors of all outliers had for a product each, or found."""
        a, b = with_eigenvalues(OUTLIERS), torch.randn(200, dtype=F64)
        plain, _ = self.products_to(a, b)
        truth, outliers = torch.linalg.solve(a, b), torch.linalg.eigh(a).eigenvectors[:, -20:]
        for known in (outliers, outliers[:, :0]):
            space, w = known, b
            while torch.linalg.vector_norm(truth - space @ (space.T @ truth)) > 1e-3 * torch.linalg.vector_norm(truth):
                for _ in range(2):
                    w = w - space @ (space.T @ w)
                w = w / torch.linalg.vector_norm(w)
                space, w = torch.cat([space, w[:, None]], 1), a @ w
            # The first vector is b itself.
            assert space.shape[1] - 1 > plain / 2


class TestLiSSA:
    def problem(self) -> tuple[hg.Hessian, Tensor, Tensor]:
        x = torch.randn(64, 6, dtype=F64)
        w = torch.zeros(6, dtype=F64, requires_grad=True)
        batches = list(x.split(8))
        operator = hg.Hessian(
            lambda w, rows: ((rows @ w) ** 2).mean() / 2 + 0.25 * (w**2).sum(), w, batches=batches, stochastic=True
        )
        b = torch.randn(6, dtype=F64)
        return operator, b, torch.linalg.solve(x.T @ x / 64 + 0.5 * torch.eye(6, dtype=F64), b)

    def test_more_repeats_come_nearer_and_the_standard_error_says_how_near(self):
        """Also with as many products in a run as twice the batches, of which each run would be the same in turn."""
        operator, b, truth = self.problem()
        solutions = [hg.solve(operator, b, hg.LiSSA(64, repeats, alpha=0.1)) for repeats in (2, 24)]
        errors = [relative_error(s.value, truth) for s in solutions]
        claims = [float(s.detail.split()[-1]) for s in solutions]
        assert all(claim / 4 < error < 4 * claim for claim, error in zip(claims, errors, strict=True))
        assert claims[1] < claims[0] / 2 and errors[1] < 0.1
        assert solutions[1].residual_norm is None
        assert solutions[1].hvps == solutions[1].steps == 64 * 24

    def test_runs_that_are_all_equal_claim_no_error(self):
        solution = hg.solve(hg.DenseMatrix(spd(4, 4.0)), torch.ones(4, dtype=F64), hg.LiSSA(5, 3, alpha=0.5))
        assert solution.detail == "alpha 0.5, all runs are equal"

    def test_on_a_fixed_matrix_it_is_neumann(self):
        a, b = spd(9, 4.0), torch.randn(9, dtype=F64)
        lissa, neumann = hg.LiSSA(20, 2, alpha=0.7), hg.Neumann(20, alpha=0.7)
        assert_close(*(hg.solve(hg.DenseMatrix(a), b, s).value for s in (lissa, neumann)), 1e-12)

    def test_too_large_a_step_is_reported(self):
        operator, b, _ = self.problem()
        assert hg.solve(operator, b, hg.LiSSA(200, 2, alpha=5.0)).status == "diverged"


class TestStepSize:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 10**6),
        n=st.integers(1, 50),
        exponent=st.floats(0, 4),
        scale=st.integers(-12, 12),
        negative=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    )
    def test_never_diverges(self, seed, n, exponent, scale, negative):
        """Also on indefinite problems, with automatic damping."""
        torch.manual_seed(seed)
        values = torch.logspace(0, -exponent, n, dtype=F64)
        values = torch.where(torch.rand(n) < 0.3, -negative * values, values) if negative else values
        a, b = 10.0**scale * with_eigenvalues(values), torch.randn(n, dtype=F64)
        solution = hg.solve(hg.DenseMatrix(a), b, hg.Neumann(40), damping="auto" if negative else 0.0)
        assert not solution.useless and solution.residual_norm <= 1.01
        assert solution.damping == 0 or negative

    @pytest.mark.parametrize("steps", [3, 20, 100])
    @pytest.mark.parametrize("condition", [10.0, 1e3])
    def test_error_is_near_that_of_the_best_fixed_one(self, condition, steps):
        worst = 0.0
        for seed in range(6):
            torch.manual_seed(seed)
            a, b = with_eigenvalues(torch.logspace(0, -math.log10(condition), 60)), torch.randn(60, dtype=F64)
            truth = torch.linalg.solve(a, b)
            error = lambda alpha: relative_error(  # noqa: E731
                hg.solve(hg.DenseMatrix(a), b, hg.Neumann(steps, alpha), residual=False).value,  # noqa: B023
                truth,  # noqa: B023
            )
            best = min(error(float(alpha)) for alpha in torch.linspace(0.4, 1.999, 60))
            worst = max(worst, error(None) / best)
        assert worst <= 1.3

    @pytest.mark.parametrize("form", ["series", "richardson"])
    def test_too_large_a_step_is_reported_or_decreased(self, form):
        a, b = spd(40, 10.0), torch.randn(40, dtype=F64)
        given = hg.solve(hg.DenseMatrix(a), b, hg.Neumann(200, alpha=5.0, form=form))
        assert given.status == "diverged" and given.steps <= 12
        mended = hg.solve(hg.DenseMatrix(a), b, hg.Neumann(200, alpha=5.0, form=form, adaptive=True))
        assert mended.status == "max_steps" and mended.alpha <= 2.5 and mended.residual_norm < 1e-6
        assert "decreased from 5" in mended.detail


class TestPenaltiesThatGrow:
    """One penalty per weight, from 0.02 to 1e4 in 25 outer steps, beside a loss whose own curvature is up to 100."""

    def problems(self):
        n = 60
        loss, b = 100 * spd(n, 1e4), torch.randn(n, dtype=F64)
        grow = torch.rand(n, dtype=F64)
        for step in range(25):
            penalties = 2 * torch.exp(-4 + grow * 13 * step / 24)
            yield loss + torch.diag(penalties), penalties + 1, b + 0.1 * torch.randn(n, dtype=F64)

    @pytest.mark.parametrize("options", [{}, {"alpha": 1.0, "adaptive": True}], ids=["found", "adaptive"])
    @pytest.mark.parametrize("held", [False, True], ids=["", "state"])
    def test_three_preconditioned_steps_go_on(self, options, held):
        state, hvps = hg.SolverState(), 0
        for a, p, b in self.problems():
            solver = hg.Neumann(3, preconditioner=p, **options)
            solution = hg.solve(products(a), b, solver, state=state if held else None, residual=False)
            assert solution.status == "max_steps"
            hvps += solution.hvps
            r = b - a @ solution.value
            assert r @ (r / p) < 0.8 * b @ (b / p)
            error = energy_error(a, b, solution.value)
            assert error < 0.98
        assert error < 0.6
        assert hvps <= 25 * 8 if options else hvps == (25 * 4 - 1 + 3 * 10 if held else 25 * 13)

    def test_a_step_size_that_forgets_the_loss_is_reported(self):
        a, p, b = next(self.problems())
        solution = hg.solve(products(a), b, hg.Neumann(3, alpha=1.0, preconditioner=p))
        assert solution.status == "diverged" and solution.useless and solution.residual_norm == 1

    def test_without_the_preconditioner_hardly_anything_is_solved(self):
        *_, (a, _, b) = self.problems()
        assert energy_error(a, b, hg.solve(products(a), b, hg.Neumann(3)).value) > 0.95


class TestAutomaticDamping:
    def test_none_is_taken_where_none_is_needed(self):
        a, b = spd(30, 100.0), torch.randn(30, dtype=F64)
        assert hg.solve(hg.DenseMatrix(a), b, hg.CG(), damping="auto").damping == 0

    @pytest.mark.parametrize(
        "solver", [hg.CG(), hg.Chebyshev(40, tol=1e-2), hg.Neumann(40), hg.BlockCG(), "auto"], ids=str
    )
    def test_lifts_the_most_negative_eigenvalue(self, solver):
        a, b = with_eigenvalues(torch.linspace(-0.4, 1, 50, dtype=F64)), torch.randn(50, dtype=F64)
        solution = hg.solve(products(a), b, solver, damping="auto")
        assert 0.4 < solution.damping < 1 and not solution.useless and not solution.indefinite
        assert torch.linalg.vector_norm(b - a @ solution.value - solution.damping * solution.value) < b.norm() / 10

    def test_is_increased_where_lanczos_saw_too_little(self):
        a = torch.diag(torch.cat([torch.tensor([-1e-4], dtype=F64), torch.linspace(1, 2, 400, dtype=F64)]))
        b = torch.zeros(401, dtype=F64)
        b[0] = 1.0
        solution = hg.solve(products(a), b, hg.CG(), damping="auto")
        assert solution.converged and solution.damping > 1e-4

    def test_says_what_was_tried_before(self):
        a = torch.diag(torch.cat([torch.tensor([-1e-4], dtype=F64), torch.logspace(-3, 0, 400, dtype=F64)]))
        solution = hg.solve(products(a), torch.ones(401, dtype=F64), hg.CG(), damping="auto", residual=False)
        assert solution.converged and solution.damping > 1e-4
        spent = re.fullmatch(r"with damping 0 negative_curvature, (\d+) products", solution.detail)
        assert solution.hvps == 20 + int(spent[1]) + solution.steps

    def test_other_words_are_refused(self):
        with pytest.raises(ValueError, match="damping: expected a number or 'auto', got 'much'"):
            hg.solve(hg.DenseMatrix(torch.eye(2)), torch.ones(2), damping="much")


class TestAuto:
    def test_small_matrices_are_factorised(self):
        a, b = spd(20, 1e6), torch.randn(20, dtype=F64)
        solution = hg.solve(hg.DenseMatrix(a), b)
        assert isinstance(solution.solver, hg.Direct) and "Cholesky" in solution.detail
        assert_close(solution.value, torch.linalg.solve(a, b), 1e-9)

    def test_indefinite_systems_go_to_minres_and_are_warned_of(self):
        a, b = with_eigenvalues(torch.linspace(-0.5, 1, 30, dtype=F64)), torch.randn(30, dtype=F64)
        solution = hg.solve(products(a), b)
        assert solution.indefinite and isinstance(solution.solver, hg.MINRES) and "so MINRES" in solution.detail
        assert solution.converged
        w = torch.zeros(30, dtype=F64, requires_grad=True)
        with pytest.warns(hg.SolveWarning):
            hg.inverse_hvp(w @ a @ w / 2, w, b)
        stopped = hg.solve(products(a), b, hg.Auto(on_negative_curvature="stop"))
        assert stopped.status == "negative_curvature"

    def test_nothing_is_warned_of_on_a_good_problem(self):
        a, b = spd(30, 10.0), torch.randn(30, dtype=F64)
        w = torch.zeros(30, dtype=F64, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_close(hg.inverse_hvp(w @ a @ w / 2, w, b), torch.linalg.solve(a, b), 1e-3)


class TestState:
    """30 drifting outer steps of a logistic regression whose penalty is small: condition 2e4."""

    def problem(self, step: int, decay: float = 1.0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        n, d = 512, 200
        x = 6 * torch.randn(n, d, generator=generator, dtype=F64) / torch.arange(1, d + 1) ** decay
        w = 0.3 * torch.randn(d, generator=generator, dtype=F64)
        drift = torch.randn(d, generator=generator, dtype=F64)
        b = torch.randn(d, generator=generator, dtype=F64)
        b_drift = torch.randn(d, generator=generator, dtype=F64)
        p = torch.sigmoid(x @ (w + 0.01 * step * drift))
        a = x.T @ ((p * (1 - p))[:, None] * x) / n + 1e-4 * torch.eye(d, dtype=F64)
        return a, b + 0.01 * step * b_drift

    @pytest.mark.parametrize("decay", [1.0, 0.75])
    def test_a_quarter_of_the_products_of_cold_cg(self, decay):
        state, cold = hg.SolverState(), 0
        for step in range(30):
            a, b = self.problem(step, decay)
            solution = hg.solve(products(a), b, hg.Auto(tol=1e-2), state=state, residual=False)
            assert solution.converged
            assert torch.linalg.vector_norm(b - a @ solution.value) <= 1.1e-2 * torch.linalg.vector_norm(b)
            cold += hg.solve(products(a), b, hg.CG(tol=1e-2), residual=False).hvps
        assert state.solves == 30
        assert state.hvps <= cold / 4

    @pytest.mark.parametrize("rows", [None, 2])
    def test_a_steady_drift_is_followed(self, rows):
        a, b = spd(40, 50.0), torch.randn(*(() if rows is None else (rows,)), 40, dtype=F64)
        drift, state = torch.randn_like(b), hg.SolverState()
        steps = [
            hg.solve(products(a), b + t * drift, hg.CG(tol=1e-6), state=state, residual=False).steps for t in range(4)
        ]
        assert min(steps[:2]) > 20 and max(steps[2:]) <= 3  # what the tolerance left of the first solutions

    def test_a_change_of_negative_curvature_is_not_followed(self):
        a, state = torch.diag(torch.tensor([3.0, -1.0], dtype=F64)), hg.SolverState()
        for b in (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])):
            solution = hg.solve(products(a), b.double(), hg.MINRES(tol=1e-9), state=state)
            assert solution.converged and solution.steps == (2 if b[1] == 1 else 1)
            assert_close(solution.value, b.double() / a.diagonal(), 1e-8)

    @pytest.mark.parametrize("solver", ["auto", hg.CG(), hg.MINRES(), hg.BlockCG(), hg.Neumann(30)], ids=str)
    def test_nothing_is_left_of_parameters_that_the_loss_has_lost(self, solver):
        w, u = (torch.ones(2, dtype=F64, requires_grad=True) for _ in range(2))
        v, state = [torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([3.0, 4.0], dtype=F64)], hg.SolverState()
        for damping in (0.4, 0.5):
            hg.inverse_hvp(lambda p: p[0].square().sum(), [w, u], v, solver, damping=damping, state=state)
        assert not bool(hg.inverse_hvp(lambda p: p[0].square().sum(), [w, u], v, solver, state=state)[1].any())

    def test_a_preconditioned_spectrum_is_that_of_its_damping_and_preconditioner(self):
        a, v = torch.linspace(1, 3, 20, dtype=F64), torch.ones(20, dtype=F64)
        operator, state = hg.Callable(lambda w: a * w, a), hg.SolverState()

        def spent(p, damping=0.0):
            solver = hg.Neumann(20, preconditioner=p)
            solution = hg.solve(operator, v, solver, damping=damping, state=state)
            assert_close(solution.value, v / (a + damping), 1e-6)
            state.x = state.change = None  # one product to start from it
            return solution.hvps

        assert spent(a, 1e4) > 25 and spent(a, 1e4) == 21 == spent(1.01 * a, 1e4)
        assert spent(a) > 21 and spent(1e6 * a) > 21 and spent(lambda w: w / a) > 21

    def test_a_spectrum_that_failed_does_not_stay_with_the_operator(self):
        a, b, state = torch.tensor([1.0, 2.0, 3.0], dtype=F64), torch.ones(3, dtype=F64), hg.SolverState()
        hg.solve(hg.Callable(lambda v: a * v, b), b, hg.Chebyshev(20), state=state)
        operator = hg.Callable(lambda v: 100 * a * v, b)
        # With the old spectrum it would diverge.
        statuses = [str(hg.solve(operator, b, hg.Chebyshev(20), state=state).status) for _ in range(2)]
        assert statuses == ["max_steps", "max_steps"]

    def test_the_solution_is_its_owners(self):
        a, b, state = spd(50, 100.0), torch.ones(50, dtype=F64), hg.SolverState()
        hg.solve(products(a), b, hg.CG(), state=state).value.neg_()
        assert hg.solve(products(a), b, hg.CG(), state=state).steps == 0

    def test_attempts_with_more_damping_are_one_solve(self):
        b, state = torch.ones(3, dtype=F64), hg.SolverState()
        solution = hg.solve(hg.Callable(lambda v: 0 * v, b), b, hg.CG(), damping="auto", state=state)
        assert state.solves == 1 and state.hvps == solution.hvps

    def test_goes_on_bit_for_bit_from_a_state_dict(self):
        state = hg.SolverState(refresh=3)
        for step in range(4):
            hg.solve(products(self.problem(step)[0]), self.problem(step)[1], hg.Auto(tol=1e-6), state=state)
        assert state.sketch is not None
        other = hg.SolverState()
        other.load_state_dict(copy.deepcopy(state.state_dict()))
        for step in range(4, 9):
            a, b = self.problem(step)
            values = [hg.solve(products(a), b, hg.Auto(tol=1e-6), state=s).value for s in (state, other)]
            assert torch.equal(*values)

    def test_other_parameters_and_unknown_keys_are_refused(self):
        state = hg.SolverState()
        hg.solve(products(spd(4, 2.0)), torch.ones(4, dtype=F64), hg.CG(), state=state)
        with pytest.raises(ValueError, match="state: expected one of 5 weights"):
            hg.solve(products(spd(5, 2.0)), torch.ones(5, dtype=F64), hg.CG(), state=state)
        with pytest.raises(ValueError, match="state: expected the keys"):
            state.load_state_dict({"x": None})
        with pytest.raises(TypeError, match="state: expected a SolverState, got dict"):
            hg.solve(products(spd(4, 2.0)), torch.ones(4, dtype=F64), hg.CG(), state={})
