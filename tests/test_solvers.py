"""Chebyshev, MINRES and preconditioners: against dense solves, against scipy and theory, and where they must fail."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import hypergrad_ext as hg
from hypergrad_ext import backends
from hypergrad_ext.solvers.chebyshev import step_sizes
from tests.cases import mlp, spd
from tests.compare import assert_close, assert_no_worse_than_torch, relative_error

BACKENDS = ["torch", *([] if backends.unavailable("cpp", "cpu") else ["cpp"])]
F64 = torch.float64


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def with_eigenvalues(eigenvalues: Tensor) -> Tensor:
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64))
    a = (q * eigenvalues) @ q.T
    return (a + a.T) / 2


def indefinite(n: int, condition: float) -> Tensor:
    """A third of the eigenvalues negative, magnitudes log-spaced."""
    signs = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0).double()
    return with_eigenvalues(signs * torch.logspace(0, -math.log10(condition), n, dtype=F64))


def solve(a: Tensor, b: Tensor, solver: hg.Solver, **options) -> hg.Solution:
    return hg.solve(hg.DenseMatrix(a), b, solver, **options)


SPECTRA = {
    "log-spaced 1e2": torch.logspace(0, -2, 200, dtype=F64),
    "20 outliers": torch.cat([torch.logspace(0, -1, 20, dtype=F64), torch.logspace(-2, -2.5, 180, dtype=F64)]),
}
SIGNS = torch.where(torch.arange(200) % 3 == 0, -1.0, 1.0).double()
MORE_SPECTRA = {
    **SPECTRA,
    "log-spaced 1e4": torch.logspace(0, -4, 200, dtype=F64),
    "indefinite": SIGNS * torch.logspace(0, -1, 200, dtype=F64),
}
PRECONDITIONED = {
    "none": lambda a: None,
    "diagonal": lambda a: a.diagonal(),
    "function": lambda a: lambda v: v / a.diagonal(),
    "operator": lambda a: hg.DenseMatrix(torch.diag(1 / a.diagonal())),
}


class TestAgainstLinalg:
    @pytest.mark.parametrize("damping", [0.0, 0.3])
    @pytest.mark.parametrize("rows", [None, 1, 4])
    @pytest.mark.parametrize("kind", PRECONDITIONED)
    @pytest.mark.parametrize(
        "make",
        [
            lambda m: hg.CG(tol=1e-12, preconditioner=m),
            lambda m: hg.Neumann(steps=400, preconditioner=m),
            lambda m: hg.Neumann(steps=900, tol=1e-12, preconditioner=m),
            lambda m: hg.Chebyshev(steps=100, preconditioner=m),
            lambda m: hg.Chebyshev(steps=300, tol=1e-12, preconditioner=m),
        ],
        ids=["CG", "Neumann", "Neumann-tol", "Chebyshev", "Chebyshev-tol"],
    )
    def test_positive_definite(self, make, kind, rows, damping, backend):
        if kind in ("function", "operator") and backend != "torch":
            pytest.skip("a preconditioner that is a function runs on torch ops, whatever the backend")
        a, b = spd(37, 8.0), torch.randn(*(() if rows is None else (rows,)), 37, dtype=F64)
        eye = torch.eye(37, dtype=F64)
        solver = make(PRECONDITIONED[kind](a + damping * eye))
        solution = solve(a, b, solver, damping=damping, backend=backend)
        truth = torch.linalg.solve(a + damping * eye, b[..., None])[..., 0]
        # With bounds that were found, steps to spare go to a wider interval: a residual of 1e-6, times the condition.
        assert_close(solution.value, truth, 2e-5 if solver == hg.Chebyshev(100) else 1e-10)
        if getattr(solver, "tol", None):
            assert solution.converged
        residual = torch.linalg.vector_norm(b - solution.value @ a - damping * solution.value, dim=-1) / b.norm(dim=-1)
        assert torch.as_tensor(solution.residual_norm).tolist() == pytest.approx(residual.tolist(), rel=1e-3, abs=1e-15)

    @pytest.mark.parametrize("damping", [0.0, 0.05])
    @pytest.mark.parametrize("rows", [None, 1, 4])
    def test_indefinite(self, rows, damping, backend):
        a, b = indefinite(41, 20.0), torch.randn(*(() if rows is None else (rows,)), 41, dtype=F64)
        solution = solve(a, b, hg.MINRES(tol=1e-11), damping=damping, backend=backend)
        truth = torch.linalg.solve(a + damping * torch.eye(41, dtype=F64), b[..., None])[..., 0]
        assert solution.converged
        assert_close(solution.value, truth, 1e-8)

    @pytest.mark.parametrize(
        "solver",
        [hg.MINRES(tol=1e-6), hg.Chebyshev(150), hg.Neumann(600, preconditioner=torch.ones(53))],
        ids=lambda s: type(s).__name__,
    )
    def test_float32(self, solver, backend):
        a, b = spd(53, 20.0), torch.randn(53, dtype=F64)
        value = solve(a.float(), b.float(), solver, backend=backend).value
        by_torch = torch.linalg.solve(a.float(), b.float())
        assert_no_worse_than_torch(value, by_torch, torch.linalg.solve(a, b), 1e-5)

    @pytest.mark.parametrize("solver", [hg.MINRES(tol=1e-3), hg.Chebyshev(40), hg.Neumann(99)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_products(self, solver, dtype, backend):
        a, b = spd(41, 5.0).to(dtype), torch.randn(41).to(dtype)
        operator = hg.Callable(lambda v: a @ v, like=b)
        truth = torch.linalg.solve(a.double(), b.double())
        m = hg.Neumann(99, preconditioner=torch.ones(41)) if isinstance(solver, hg.Neumann) else solver
        value = hg.solve(operator, b, m, backend=backend).value
        # A product is off by half an eps of its dtype, the inverse by up to the condition number 5 times that.
        assert value.dtype == dtype
        assert_close(value, truth, 5 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize(
        "solver",
        [hg.MINRES(tol=1e-12), hg.Chebyshev(90, bounds=(0.1, 1)), hg.CG(tol=1e-12)],
        ids=lambda s: type(s).__name__,
    )
    def test_list_of_parameters_and_warm_start(self, solver, backend):
        a, b = spd(23, 10.0), torch.randn(23, dtype=F64)
        cut = lambda t: {"w": t[:15].view(3, 5), "b": t[15:]}  # noqa: E731
        operator = hg.Callable(lambda v: cut(a @ torch.cat([v["w"].reshape(-1), v["b"]])), cut(b))
        truth = torch.linalg.solve(a, b)
        for x0 in (None, cut(torch.randn(23, dtype=F64)), cut(truth)):
            solution = hg.solve(operator, cut(b), solver, x0=x0, backend=backend)
            assert_close([solution.value["w"], solution.value["b"]], truth, 1e-7)


def count(make, error: float, a: Tensor, b: Tensor, limit: int) -> int:
    """Fewest products after which the solution has that relative error, by bisection: it never comes back."""
    truth = torch.linalg.solve(a, b)
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        solution = solve(a, b, make(middle), residual=False)
        low, high = (low, middle) if relative_error(solution.value, truth) <= error else (middle, high)
    return high


def network() -> Tensor:
    """The Hessian of a small network, lifted to a condition of 100."""
    h = mlp().hessian().double()
    values = torch.linalg.eigvalsh(h)
    lift = (float(values[-1]) - 100 * float(values[0])) / 99
    return (h + h.T) / 2 + lift * torch.eye(len(h), dtype=F64)


class TestCounts:
    """Products to a relative error, against scipy and against the polynomials of theory."""

    @pytest.mark.parametrize(
        ("name", "spectrum"),
        [
            *itertools.product(["cg", "minres"], [*SPECTRA, "log-spaced 1e4", "network"]),
            ("minres", "indefinite"),
        ],
    )
    @pytest.mark.parametrize("error", [1e-2, 1e-3])
    def test_scipy(self, name, error, spectrum):
        sparse = pytest.importorskip("scipy.sparse.linalg")
        a = with_eigenvalues(MORE_SPECTRA[spectrum]) if spectrum in MORE_SPECTRA else network()
        b = torch.randn(len(a), dtype=F64)
        truth, theirs = torch.linalg.solve(a, b), []

        def look(x):
            theirs.append(relative_error(torch.from_numpy(x.copy()), truth))

        getattr(sparse, name)(a.numpy(), b.numpy(), rtol=1e-14, maxiter=400, callback=look)
        expected = next(step for step, e in enumerate(theirs, 1) if e <= error)
        make = hg.CG if name == "cg" else hg.MINRES
        ours = count(lambda k: make(tol=1e-14, max_steps=k), error, a, b, 400)
        assert abs(ours - expected) <= 0.1 * expected + 1

    @pytest.mark.parametrize("spectrum", SPECTRA)
    @pytest.mark.parametrize("error", [1e-2, 1e-3])
    def test_theory(self, error, spectrum):
        eigenvalues = SPECTRA[spectrum]
        low, high = float(eigenvalues.min()), float(eigenvalues.max())
        a, b = with_eigenvalues(eigenvalues), torch.randn(200, dtype=F64)
        values, q = torch.linalg.eigh(a)
        weights = (q.T @ b) / values
        alpha = 1 / high

        def polynomials(sizes):
            """The error left of every eigenvector after 0, 1, ... products."""
            old, new = torch.ones_like(values), 1 - next(sizes)[0] * values
            while True:
                yield float((new * weights).norm() / weights.norm())
                size, momentum = next(sizes)
                old, new = new, new + momentum * (new - old) - size * values * new

        def expected(sizes):
            return next(k for k, e in enumerate(polynomials(sizes)) if e <= error)

        neumann = expected(iter(lambda: (alpha, 0.0), None))
        ours = count(lambda k: hg.Neumann(k, alpha=alpha), error, a, b, 4000)
        assert abs(ours - neumann) <= 0.1 * neumann + 1
        with_m = count(
            lambda k: hg.Neumann(k, alpha=alpha, preconditioner=torch.ones(200, dtype=F64)), error, a, b, 4000
        )
        assert abs(with_m - ours) <= 1
        chebyshev = expected(step_sizes((low, high)))
        ours = count(lambda k: hg.Chebyshev(k, bounds=(low, high)), error, a, b, 400)
        assert abs(ours - chebyshev) <= 0.1 * chebyshev + 1

    def test_chebyshev_needs_a_quarter_of_the_products_of_neumann(self):
        """With bounds and step size both found, and paid for."""
        a, b = with_eigenvalues(SPECTRA["log-spaced 1e2"]), torch.randn(200, dtype=F64)
        chebyshev = count(hg.Chebyshev, 1e-3, a, b, 400) + 10
        neumann = count(hg.Neumann, 1e-3, a, b, 4000) + 10
        assert chebyshev <= neumann / 4


class TestPerWeightPenalties:
    """One L2 penalty per weight raises the largest eigenvalue by orders of magnitude; its diagonal undoes that."""

    def problem(self, spread: float) -> tuple[Tensor, Tensor, Tensor]:
        n = 60
        penalties = torch.logspace(0, math.log10(spread), n, dtype=F64)[torch.randperm(n)]
        return spd(n, 3.0) / 3 + torch.diag(penalties), penalties, torch.randn(n, dtype=F64)

    @pytest.mark.parametrize("spread", [1e2, 1e4, 1e6])
    def test_jacobi_keeps_three_neumann_steps_useful(self, spread, backend):
        a, penalties, b = self.problem(spread)
        truth = torch.linalg.solve(a, b)
        jacobi = hg.Neumann(3, preconditioner=a.diagonal())
        assert relative_error(solve(a, b, jacobi, backend=backend).value, truth) < 0.02
        assert relative_error(solve(a, b, hg.Neumann(3), backend=backend).value, truth) > 0.5
        # Also with the penalties alone, which a user knows.
        known = hg.Neumann(3, preconditioner=penalties)
        assert relative_error(solve(a, b, known, backend=backend).value, truth) < 0.05

    @pytest.mark.parametrize("make", [hg.CG, hg.Chebyshev], ids=lambda m: m.__name__)
    def test_jacobi_in_other_solvers(self, make, backend):
        a, penalties, b = self.problem(1e6)
        truth = torch.linalg.solve(a, b)
        options = {"max_steps": 8} if make is hg.CG else {"steps": 8}
        with_m = solve(a, b, make(preconditioner=penalties, **options), backend=backend)
        without = solve(a, b, make(**options), backend=backend)
        assert relative_error(with_m.value, truth) < 1e-3 < 0.1 < relative_error(without.value, truth)

    def test_in_the_structure_of_the_parameters(self):
        w = {"a": torch.ones(2, 3, requires_grad=True), "b": torch.ones(3, requires_grad=True)}
        scales = {"b": torch.tensor([1.0, 1e3, 1e6]), "a": torch.full((2, 3), 2.0)}
        loss = lambda w: sum((scales[k] * w[k] ** 2).sum() / 2 for k in w)  # noqa: E731
        v = {k: torch.ones_like(t) for k, t in w.items()}
        for solver in (hg.Neumann(3, preconditioner=scales), hg.CG(preconditioner=scales)):
            x = hg.inverse_hvp(loss, w, v, solver)
            assert_close([x["a"], x["b"]], [1 / scales["a"], 1 / scales["b"]], 0.02)

    @pytest.mark.parametrize("units", [1e-20, 1.0, 1e20])
    def test_units_of_the_loss_are_no_curvature(self, units, backend):
        a = torch.tensor([[1.0, 0.3, 0], [0.3, 2, 0], [0, 0, 5]]) * units
        for m in (hg.Jacobi(), a.diagonal()):
            assert solve(a, torch.ones(3), hg.CG(preconditioner=m), backend=backend).converged

    def test_operator_of_another_precision(self):
        a, b = torch.diag(torch.arange(1.0, 7, dtype=F64)), torch.ones(6, dtype=F64)
        solution = solve(a, b, hg.CG(tol=1e-12, preconditioner=hg.DenseMatrix(torch.diag(1 / a.diagonal()).float())))
        assert solution.converged and solution.steps <= 3

    def test_exact_preconditioner_is_exact_at_once(self, backend):
        scales = torch.logspace(-3, 6, 30, dtype=F64)
        a, b = torch.diag(scales), torch.randn(30, dtype=F64)
        solution = solve(a, b, hg.CG(tol=1e-12, preconditioner=scales), backend=backend)
        assert solution.converged and solution.steps == 1


class TestChebyshev:
    def test_no_step_is_the_scaled_right_hand_side(self):
        b = torch.randn(5, dtype=F64)
        solution = solve(spd(5, 3.0), b, hg.Chebyshev(0, bounds=(1.0, 3.0)), residual=False)
        assert_close(solution.value, b / 2, 1e-15)
        assert solution.hvps == 0

    def test_equal_bounds_are_neumann(self, backend):
        a, b = spd(11, 5.0), torch.randn(11, dtype=F64)
        chebyshev = solve(a, b, hg.Chebyshev(7, bounds=(2.0, 2.0)), backend=backend).value
        assert_close(chebyshev, solve(a, b, hg.Neumann(7, alpha=0.5), backend=backend).value, 1e-13)

    def test_bounds_are_found_once_per_operator(self):
        operator, b = hg.DenseMatrix(spd(30, 5.0)), torch.randn(30, dtype=F64)
        assert [hg.solve(operator, b, hg.Chebyshev(7), residual=False).hvps for _ in range(2)] == [17, 7]

    def test_found_bounds_hold_the_largest_eigenvalue(self):
        for seed in range(20):
            torch.manual_seed(seed)
            a = spd(60, 10.0 ** (1 + seed % 4))
            solution = solve(a, torch.randn(60, dtype=F64), hg.Chebyshev(60))
            low, high = (float(word) for word in solution.detail.split() if word[0].isdigit())
            assert 1 <= high < 1.3 and 0 < low < 0.2
            assert solution.status == "max_steps" and solution.residual_norm < 0.5

    def test_damping_is_a_lower_bound(self):
        a = with_eigenvalues(torch.cat([torch.zeros(30, dtype=F64), torch.linspace(0, 1, 30, dtype=F64)]))
        b = torch.randn(60, dtype=F64)
        truth = torch.linalg.solve(a + 0.05 * torch.eye(60, dtype=F64), b)
        assert_close(solve(a, b, hg.Chebyshev(40), damping=0.05).value, truth, 1e-5)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_damping_makes_up_for_negative_eigenvalues(self, sign):
        a = sign * with_eigenvalues(torch.linspace(-0.4, 1, 50, dtype=F64))
        b = torch.randn(50, dtype=F64)
        for damping in (1.5, 4.0):
            truth = torch.linalg.solve(a + damping * torch.eye(50, dtype=F64), b)
            assert_close(solve(a, b, hg.Chebyshev(60), damping=damping).value, truth, 1e-6)

    def test_upper_bound_that_is_too_low_is_noticed(self, backend):
        a, b = spd(30, 10.0), torch.randn(30, dtype=F64)
        solution = solve(a, b, hg.Chebyshev(200, bounds=(0.05, 0.5)), backend=backend)
        assert solution.status == "diverged" and solution.steps < 200 and solution.useless

    def test_negative_eigenvalues_are_found_before_or_while_they_do_harm(self, backend):
        a, b = indefinite(50, 10.0), torch.randn(50, dtype=F64)
        solution = solve(a, b, hg.Chebyshev(50), backend=backend)
        assert solution.status == "negative_curvature" and "Ritz value -" in solution.message
        assert "MINRES" in solution.message and solution.useless
        assert solve(a, b, hg.Chebyshev(50, bounds=(0.1, 1.0)), backend=backend).status == "diverged"

    def test_tolerance_stops_early_and_is_met(self):
        a, b = spd(20, 10.0), torch.randn(3, 20, dtype=F64)
        solution = solve(a, b, hg.Chebyshev(10_000, tol=1e-5))
        assert solution.converged and solution.steps < 100 and (solution.residual_norm <= 1e-5).all()

    def test_an_operator_of_zeros(self):
        assert solve(torch.zeros(3, 3), torch.ones(3), hg.Chebyshev()).status == "singular"


class TestMINRES:
    def test_residual_never_grows_and_is_the_one_reported(self, backend):
        a, b = indefinite(60, 50.0), torch.randn(60, dtype=F64)
        norms = []
        for steps in range(1, 60, 4):
            solution = solve(a, b, hg.MINRES(tol=1e-14, max_steps=steps), backend=backend)
            norms.append(solution.residual_norm)
        assert all(late <= early * (1 + 1e-9) for early, late in zip(norms, norms[1:], strict=False))

    def test_goes_on_where_cg_stops(self):
        w = torch.ones(3, requires_grad=True)
        loss, v = (torch.tensor([3.0, 2.0, -1.0]) * w**2).sum(), torch.tensor([1.0, 1.0, 0.1])
        with pytest.warns(hg.SolveWarning, match="negative_curvature.*MINRES"):
            hg.inverse_hvp(loss, w, v, hg.CG())
        x = hg.inverse_hvp(loss, w, v, hg.MINRES(tol=1e-6))
        assert_close(x, v / torch.tensor([6.0, 4.0, -2.0]), 1e-5)

    def test_rows_stop_by_themselves(self, backend):
        a = torch.diag(torch.tensor([1.0, -2.0, 3.0, 5.0], dtype=F64))
        b = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1.0, 1.0, 0, 0], [1.0, 1.0, 1.0, 1.0]], dtype=F64)
        solution = solve(a, b, hg.MINRES(tol=1e-12), backend=backend)
        assert_close(solution.value, b @ torch.linalg.inv(a), 1e-11)
        assert solution.converged and solution.steps == 4 and solution.residual_norm[1] == 0

    def test_singular_operator_is_a_status(self, backend):
        a = torch.diag(torch.tensor([2.0, -1.0, 0.0], dtype=F64))
        solution = solve(a, torch.ones(3, dtype=F64), hg.MINRES(tol=1e-8), backend=backend)
        assert solution.status == "singular" and solution.useless
        assert solution.residual_norm == pytest.approx(1 / math.sqrt(3))
        inside = solve(a, torch.tensor([2.0, 1.0, 0.0], dtype=F64), hg.MINRES(tol=1e-8), backend=backend)
        assert inside.converged
        assert_close(inside.value, torch.tensor([1.0, -1.0, 0.0]), 1e-12)
        assert solve(torch.zeros(2, 2), torch.ones(2), hg.MINRES(), backend=backend).status == "singular"

    @pytest.mark.parametrize("dtype", [F64, torch.float32])
    @pytest.mark.parametrize("solver", ["auto", hg.MINRES(tol=1e-2), hg.MINRES(tol=1e-6)], ids=str)
    def test_singular_operator_that_rounding_hides_is_a_status_too(self, solver, dtype):
        """Lost orthogonality lets x grow along the null space, while the recurrence's residual shrinks to the end."""
        for seed in range(10):
            torch.manual_seed(seed)
            x, b = torch.randn(10, 30, dtype=dtype), torch.randn(30, dtype=dtype)
            operator = hg.Callable(lambda v, x=x: x.T @ (x @ v), b)
            solution = hg.solve(operator, b, solver, residual=False)
            assert solution.status == "singular" or solution.status == "stagnated" and solution.useless
            assert float(torch.linalg.vector_norm(b - operator @ solution.value)) <= 1.01 * torch.linalg.vector_norm(b)
            both = hg.solve(operator, torch.stack([b, operator @ b]), solver, residual=False)
            assert both.useless and both.statuses[1] in ("converged", "max_steps")

    def test_all_steps_taken(self):
        solution = solve(indefinite(60, 1e3), torch.randn(60, dtype=F64), hg.MINRES(tol=1e-10, max_steps=5))
        assert solution.status == "max_steps" and solution.steps == 5 and solution.residual_norm < 1

    @pytest.mark.parametrize("rows", [None, 2])
    def test_no_product_for_what_is_solved_already(self, rows):
        a, b = spd(20, 10.0), torch.randn(*(() if rows is None else (rows,)), 20, dtype=F64)
        truth = torch.linalg.solve(a, b[..., None])[..., 0]
        solution = solve(a, b, hg.MINRES(tol=1e-8), x0=truth, residual=False)
        assert solution.converged and solution.steps == 0 and solution.hvps == (rows or 1)


NEW = [
    hg.MINRES(tol=1e-5),
    hg.Chebyshev(120),
    hg.CG(tol=1e-5, preconditioner=lambda v: 2 * v),
    hg.Neumann(180, preconditioner=lambda v: 2 * v),
]


def named(solver: hg.Solver) -> str:
    return type(solver).__name__ + ("-M" if getattr(solver, "preconditioner", None) else "")


class TestAllOfThem:
    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
    @pytest.mark.parametrize("what", ["operator", "right-hand side"])
    @pytest.mark.parametrize("solver", NEW, ids=named)
    def test_units_do_not_matter_in_float32(self, what, solver, scale, backend):
        a, b = spd(15, 10.0, torch.float32), torch.randn(15)
        if what == "operator":
            value = solve(a * scale, b, solver, backend=backend).value.double() * scale
        else:
            value = solve(a, b * scale, solver, backend=backend).value.double() / scale
        assert_close(value, solve(a, b, solver, backend=backend).value, 2e-5)
        assert_close(value, torch.linalg.solve(a.double(), b.double()), 1e-4)

    @pytest.mark.parametrize("solver", NEW, ids=named)
    def test_zero_right_hand_side_gives_zero(self, solver):
        for b in (torch.zeros(5, dtype=F64), torch.zeros(2, 5, dtype=F64)):
            solution = solve(spd(5, 3.0), b, solver)
            assert (solution.value == 0).all()

    @pytest.mark.parametrize("solver", NEW, ids=named)
    def test_one_bad_member_does_not_spoil_the_batch(self, solver):
        b = torch.ones(3, 4)
        b[1, 2] = float("nan")
        solution = solve(2 * torch.eye(4), b, solver)
        assert [s == "non_finite_input" for s in solution.statuses] == [False, True, False]
        assert_close(solution.value[[0, 2]], torch.full((2, 4), 0.5), 1e-5)
        assert solution.value[1].isnan().all()

    @pytest.mark.parametrize("solver", NEW, ids=named)
    def test_input_is_told_apart_from_operator(self, solver, backend):
        nan = torch.tensor([1.0, float("nan"), 1.0])
        assert solve(torch.eye(3), nan, solver, backend=backend).status == "non_finite_input"
        assert solve(torch.eye(3) * nan, torch.ones(3), solver, backend=backend).status == "non_finite_operator"

    @pytest.mark.parametrize("solver", NEW, ids=named)
    def test_operators_that_are_not_symmetric_are_refused(self, solver):
        with pytest.raises(ValueError, match="expected a symmetric operator"):
            solve(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2), solver)

    @pytest.mark.parametrize("solver", NEW, ids=named)
    def test_scalar_unknown(self, solver):
        w = torch.tensor(2.0, dtype=F64, requires_grad=True)
        x = hg.inverse_hvp(w**3, w, torch.tensor(6.0, dtype=F64), solver)
        assert x.shape == () and float(x) == pytest.approx(0.5)

    @pytest.mark.parametrize("solver", NEW, ids=named)
    def test_batch_is_a_loop(self, solver):
        a, b = spd(17, 6.0), torch.randn(3, 17, dtype=F64)
        single = torch.stack([solve(a, row, solver).value for row in b])
        assert_close(solve(a, b, solver).value, single, 1e-5)
