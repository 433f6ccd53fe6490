"""Every status of a solve, provoked one by one: its cause, its remedy, and what is left of the value."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hypergrad_ext as hg
from hypergrad_ext import Status
from hypergrad_ext.solvers import base
from tests.cases import spd

F64 = torch.float64


def diagonal(*values: float) -> hg.Callable:
    d = torch.tensor(values, dtype=F64)
    return hg.Callable(lambda v: d * v, torch.zeros(len(values), dtype=F64))


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=F64)


def stagnated(solver: hg.Solver, **options: object) -> hg.Solution:
    generator = torch.Generator().manual_seed(0)
    a = torch.diag(torch.logspace(0, -6, 40))
    q = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    a = q @ a @ q.T
    return hg.solve(hg.DenseMatrix((a + a.T) / 2), torch.randn(40, generator=generator), solver, **options)


nan = hg.Callable(lambda v: v * math.nan, torch.zeros(3, dtype=F64))
# Status, solve, and words of its message that name the cause, the remedy and the numbers.
CASES: dict[str, tuple[Status, Callable[[], hg.Solution], list[str]]] = {
    "converged": (Status.CONVERGED, lambda: hg.solve(diagonal(1, 2), ones(2), hg.CG()), ["within the tolerance"]),
    "converged, exact": (Status.CONVERGED, lambda: hg.solve(diagonal(1, 2), ones(2), hg.Direct()), ["is exact"]),
    "max_steps": (
        Status.MAX_STEPS,
        lambda: hg.solve(diagonal(1, 2, 3), ones(3), hg.CG(max_steps=1)),
        ["All steps were taken", "raise the number of steps", "damping", "loosen tol"],
    ),
    "max_steps, series": (
        Status.MAX_STEPS,
        lambda: hg.solve(diagonal(1, 2), ones(2), hg.Neumann(3, alpha=0.25)),
        ["alpha 0.25", "raise the number of steps"],
    ),
    "stagnated": (
        Status.STAGNATED,
        lambda: stagnated(hg.MINRES(tol=1e-6, max_steps=5000)),
        ["the true residual is larger", "precision of the dtype", "Use float64", "damping", "loosen tol"],
    ),
    "negative_curvature": (
        Status.NEGATIVE_CURVATURE,
        lambda: hg.solve(diagonal(3, 2, -1), torch.tensor([1, 1, 0.1], dtype=F64), hg.CG()),
        ["not positive definite", "curvature -", "Add damping", "Gauss-Newton", "MINRES"],
    ),
    "negative_curvature, at once": (
        Status.NEGATIVE_CURVATURE,
        lambda: hg.solve(diagonal(-1, -1), ones(2), hg.CG()),
        ["step 1, curvature -1", "Add damping"],
    ),
    "negative_curvature, bounds": (
        Status.NEGATIVE_CURVATURE,
        lambda: hg.solve(diagonal(1, -1), ones(2), hg.Chebyshev()),
        ["Ritz value -1", "Add damping"],
    ),
    "negative_curvature, block": (
        Status.NEGATIVE_CURVATURE,
        lambda: hg.solve(diagonal(1, -1, 2), ones(3), hg.BlockCG()),
        ["curvature -", "MINRES"],
    ),
    "singular": (
        Status.SINGULAR,
        lambda: hg.solve(diagonal(1, 0), ones(2), hg.MINRES()),
        ["singular to working precision", "Add damping"],
    ),
    "singular, factorised": (
        Status.SINGULAR,
        lambda: hg.solve(diagonal(1, 0), ones(2), hg.Direct()),
        ["singular to working precision", "Add damping"],
    ),
    "singular, zeros": (
        Status.SINGULAR,
        lambda: hg.solve(diagonal(0, 0), ones(2), hg.Neumann()),
        ["H v = 0", "Add damping"],
    ),
    "diverged, series": (
        Status.DIVERGED,
        lambda: hg.solve(diagonal(1, 2), ones(2), hg.Neumann(200, alpha=1.5)),
        ["alpha 1.5", "alpha is above 2 / lambda_max", "Decrease alpha", "None finds one", "CG or MINRES"],
    ),
    "diverged, late": (
        Status.DIVERGED,
        lambda: hg.solve(diagonal(1, 0.5, -0.2), torch.tensor([1, 1, 0.01], dtype=F64), hg.Neumann(200, alpha=0.9)),
        ["negative eigenvalues", "add damping"],
    ),
    "diverged, richardson": (
        Status.DIVERGED,
        lambda: hg.solve(diagonal(1, 2), ones(2), hg.Neumann(200, alpha=1.5, form="richardson")),
        ["alpha is above 2 / lambda_max", "Decrease alpha"],
    ),
    "diverged, bounds": (
        Status.DIVERGED,
        lambda: hg.solve(diagonal(1, 20), ones(2), hg.Chebyshev(200, bounds=(1, 2))),
        ["Chebyshev's upper bound is below lambda_max", "raise the bound"],
    ),
    "diverged, stochastic": (
        Status.DIVERGED,
        lambda: hg.solve(diagonal(1, 2), ones(2), hg.LiSSA(200, 2, alpha=5.0)),
        ["alpha 5", "Decrease alpha"],
    ),
    "non_finite_input": (
        Status.NON_FINITE_INPUT,
        lambda: hg.solve(diagonal(1, 2), ones(2) * math.nan, hg.CG()),
        ["right-hand side or x0 holds NaN", "validation loss and its gradient"],
    ),
    "non_finite_input, x0": (
        Status.NON_FINITE_INPUT,
        lambda: hg.solve(diagonal(1, 2), ones(2), hg.CG(), x0=ones(2) * math.inf),
        ["right-hand side or x0 holds NaN"],
    ),
    **{
        f"non_finite_operator, {type(solver).__name__}": (
            Status.NON_FINITE_OPERATOR,
            lambda solver=solver: hg.solve(nan, ones(3), solver),
            ["A product H v holds NaN", "training loss and the parameters", "second derivative"],
        )
        for solver in (
            *(hg.CG(), hg.MINRES(), hg.BlockCG(), hg.Neumann(), hg.Chebyshev(), hg.Nystrom(2), hg.Direct()),
            *(hg.LiSSA(), hg.Auto()),
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_status_names_cause_and_remedy(case):
    status, provoke, words = CASES[case]
    solution = provoke()
    assert solution.status is status, solution.message
    assert solution.converged == (status is Status.CONVERGED)
    assert type(solution.solver).__name__ in solution.message and f": {status}" in solution.message
    for word in words:
        assert word in solution.message


def test_every_status_is_provoked():
    assert {status for status, _, _ in CASES.values()} == set(Status)


@pytest.mark.parametrize("case", CASES)
def test_value_is_never_worse_than_the_start(case):
    """A failed solve ends with what it had if that is better than zero, else with zero; useless says which."""
    status, provoke, _ = CASES[case]
    solution = provoke()
    if status is Status.NON_FINITE_INPUT:
        assert bool(solution.value.isnan().all()) and solution.useless
        return
    assert bool(solution.value.isfinite().all())
    if status is not Status.NON_FINITE_OPERATOR:
        assert solution.residual_norm <= 1.0
    assert solution.useless or not status.failed


def test_best_of_a_series_that_diverges_late_is_kept():
    _, provoke, _ = CASES["diverged, late"]
    solution = provoke()
    assert solution.useless and solution.steps > 3 and solution.residual_norm < 0.05


class TestBestIterate:
    """Residuals that shrink by 5 or more, and then grow beyond bounds because of one direction that b hardly has."""

    def problem(self, whole: bool = False) -> tuple[hg.LinearOperator, Tensor, float]:
        x = torch.randn(400, 60, dtype=F64) / torch.arange(1, 61)
        operator = hg.GLMHessian(x, torch.zeros(60, dtype=F64), "logistic", l2=1e-2)
        a = operator.dense()
        values, vectors = torch.linalg.eigh(a)
        b = vectors @ torch.cat([torch.randn(59, dtype=F64), torch.tensor([1e-9], dtype=F64)])
        return operator if whole else hg.Callable(lambda v: v @ a, b), b, float(values[-1])

    SOLVERS = {
        "Chebyshev": lambda top, k: hg.Chebyshev(k, bounds=(0.01, 0.8 * top)),
        "series": lambda top, k: hg.Neumann(k, alpha=2.3 / top),
        "richardson": lambda top, k: hg.Neumann(k, alpha=2.3 / top, form="richardson"),
    }

    @pytest.mark.parametrize("name", [*SOLVERS, "whole series"])
    def test_is_given_back_by_a_solve_that_diverged(self, name):
        operator, b, top = self.problem(whole=name == "whole series")
        make = self.SOLVERS.get(name, self.SOLVERS["series"])
        solution = hg.solve(operator, b, make(top, 300))
        assert solution.status == "diverged" and solution.useless
        sizes = [row[0] for row in hg.solve(operator, b, make(top, 300), history=True).history]
        best = sizes.index(min(sizes))
        assert sizes[best] < 0.2 and sizes[-1] > 1.1 * sizes[best]
        # Of richardson's next iterate the residual is not known, only that of the one before.
        assert solution.residual_norm <= 1.01 * sizes[best + (2 if name == "richardson" else 1)]

    def test_is_given_back_where_the_steps_end_before_that_is_noticed(self):
        operator, b, top = self.problem()
        make = self.SOLVERS["Chebyshev"]
        sizes = [row[0] for row in hg.solve(operator, b, make(top, 300), history=True).history]
        best = sizes.index(min(sizes))
        solution = hg.solve(operator, b, make(top, best + 5), history=True)
        assert solution.status == "max_steps" and solution.history[-1][0] > 1.5 * sizes[best + 1]
        assert solution.residual_norm <= 1.01 * sizes[best + 1]

    @pytest.mark.parametrize("whole", [False, True])
    def test_rows_that_converge_go_on(self, whole):
        operator, b, top = self.problem(whole)
        alone = hg.solve(operator, b, hg.Neumann(300, alpha=2.3 / top))
        both = hg.solve(operator, torch.stack([b, 0 * b]), hg.Neumann(300, alpha=2.3 / top))
        assert both.statuses[0] == "diverged" and not bool(both.value[1].any())
        assert float(both.residual_norm[0]) == pytest.approx(alone.residual_norm, rel=1e-6)


class TestTheIterateThatConverged:
    """A step knows the residual of the iterate before it, and its own may be any worse."""

    @pytest.mark.parametrize("rows", [None, 3])
    @pytest.mark.parametrize(
        "solver",
        [
            hg.Chebyshev(200, bounds=(0.01, 1.0), tol=1e-3),
            hg.Neumann(999, alpha=1.0, tol=1e-3, form="series"),
            hg.Neumann(999, alpha=1.0, tol=1e-3, form="richardson"),
        ],
        ids=str,
    )
    def test_is_handed_back(self, solver, rows):
        a = torch.linspace(0.01, 1, 50, dtype=F64)
        for i in range(0, 50, 7):
            b = torch.eye(50, dtype=F64)[i] if rows is None else torch.eye(50, dtype=F64)[[i, 20, 49 - i]]
            solution = hg.solve(hg.Callable(lambda v: a * v, a), b, solver, residual=False)
            assert solution.converged
            assert float(torch.linalg.vector_norm(b - a * solution.value, dim=-1).max()) <= 1.0001e-3

    @pytest.mark.parametrize("form", ["series", "richardson"])
    @pytest.mark.parametrize("bystander", [False, True])
    @pytest.mark.parametrize("whole", [False, True])
    def test_a_step_size_out_of_range_is_no_success(self, form, bystander, whole):
        operator, b = diagonal(1, 1e6), torch.tensor([1.0, 1e-9], dtype=F64)
        operator = hg.DenseMatrix(operator.dense()) if whole else operator
        rows = torch.stack([b, torch.tensor([1.0, 0.0], dtype=F64)]) if bystander else b
        solution = hg.solve(operator, rows, hg.Neumann(50, alpha=1.0, tol=1e-2, form=form), residual=False)
        x = solution.value[0] if bystander else solution.value
        assert solution.converged or solution.status == "diverged" and not bool(x.any())
        assert float(torch.linalg.vector_norm(b - operator @ x)) <= (1e-2 if solution.converged else 1.0001)

    def test_in_one_call_that_goes_on_for_another_row(self):
        b = torch.tensor([[1.0, 1e-9], [1.0, 1.0]], dtype=F64)
        a = torch.diag(torch.tensor([1.0, 3.0], dtype=F64))
        solution = hg.solve(hg.DenseMatrix(a), b, hg.Neumann(100, alpha=1.0, tol=1e-3), residual=False)
        assert solution.statuses == ("converged", "diverged")
        assert float(torch.linalg.vector_norm(b[0] - a @ solution.value[0])) <= 1e-3


@pytest.mark.parametrize("solver", [hg.Neumann(50, alpha=3.0), hg.CG(), hg.Chebyshev(50, bounds=(0.1, 0.2))], ids=str)
def test_failure_gives_back_x0(solver):
    start = torch.tensor([0.9, 0.4], dtype=F64)
    operator = diagonal(1, 2) if not isinstance(solver, hg.CG) else diagonal(-1, -2)
    solution = hg.solve(operator, operator @ ones(2), solver, x0=start)
    assert solution.status in ("diverged", "negative_curvature")
    assert torch.equal(solution.value, start)


def test_rounding_that_left_nothing_is_found_out_unasked():
    """MINRES in float32 at a condition of 1e6: by its recurrence converged, in truth worse than zero."""
    solution = stagnated(hg.MINRES(tol=1e-6, max_steps=5000), residual=False)
    assert solution.status == "stagnated" and solution.useless and not bool(solution.value.any())
    again = stagnated(hg.MINRES(tol=1e-6, max_steps=5000), x0=torch.full((40,), 1e-3))
    assert again.status == "stagnated" and bool((again.value == 1e-3).all())


def test_terms_that_grow_from_zero_are_no_crash():
    b = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="operator: expected a symmetric operator for Neumann"):
        hg.solve(hg.Callable(lambda v: 2 * v + 1, b[0]), b, hg.Neumann())


def test_only_failed_rows_are_given_up():
    a = spd(6, 10.0)
    b = torch.randn(3, 6, dtype=F64)
    b[1] = 0
    solution = hg.solve(hg.DenseMatrix(-a), b, hg.CG())
    assert solution.statuses == ("negative_curvature", "converged", "negative_curvature")
    assert not bool(solution.value.any())


class TestRareLooks:
    """Where a look at the flags waits for the device there is one every 8 steps, and what is done stays as it is."""

    SOLVERS = [
        *(hg.CG(tol=1e-6), hg.MINRES(tol=1e-6), hg.Chebyshev(99, tol=1e-6), hg.Neumann(999, tol=1e-6)),
        hg.Neumann(999, tol=1e-6, form="richardson"),
        hg.CG(tol=1e-6, preconditioner=torch.linspace(1, 2, 40, dtype=torch.float64)),
        hg.Neumann(5, alpha=1.0),
    ]

    @pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
    @pytest.mark.parametrize("rows", [None, 3])
    def test_value_and_status_are_the_same(self, solver, rows, monkeypatch):
        a, b = spd(40, 20.0), torch.randn(*(() if rows is None else (rows,)), 40, dtype=torch.float64)
        each = hg.solve(hg.Callable(lambda v: a @ v, b.new_zeros(40)), b, solver)
        monkeypatch.setattr(base, "_look_every", lambda device: 8)
        rare = hg.solve(hg.Callable(lambda v: a @ v, b.new_zeros(40)), b, solver)
        assert rare.status == each.status
        assert rare.steps == min(-(-each.steps // 8) * 8, getattr(solver, "max_steps", None) or solver.steps)
        if isinstance(solver, (hg.CG, hg.MINRES)):  # frozen by their flags
            assert torch.equal(rare.value, each.value)
        else:
            assert float(torch.as_tensor(rare.residual_norm).max()) <= float(torch.as_tensor(each.residual_norm).max())

    def test_growth_is_still_found(self, monkeypatch):
        monkeypatch.setattr(base, "_look_every", lambda device: 8)
        a, b = spd(40, 20.0), torch.randn(40, dtype=torch.float64)
        operator = hg.Callable(lambda v: a @ v, b)
        assert hg.solve(operator, b, hg.Neumann(40, alpha=3.0)).status == "diverged"
        for form in ("series", "richardson"):
            solution = hg.solve(operator, b, hg.Neumann(400, alpha=3.0, adaptive=True, form=form))
            assert solution.status == "max_steps" and solution.residual_norm < 1e-2
