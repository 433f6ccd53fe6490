"""What users hand in to be called or gone through: functions that misbehave are named, iterators are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hypergrad_ext as hg
from tests.cases import spd
from tests.compare import assert_close

F64 = torch.float64
FUNCTIONS = {
    "complex": (lambda v: v * 1j, TypeError, "expected a real floating point tensor, got torch.complex64"),
    "integer": (lambda v: v.long(), TypeError, "expected a real floating point tensor, got torch.int64"),
    "nothing": (lambda v: None, TypeError, "expected a tensor, list, tuple, dict or nn.Module, got NoneType"),
    "another shape": (lambda v: v[:2], ValueError, r"expected the shapes of v, \[\(3,\)\], got \[\(2,\)\]"),
}
WRITES = (lambda v: v.mul_(2), ValueError, "expected a function that leaves its argument alone, got one that writes")
SOLVERS = [hg.CG(), hg.MINRES(), hg.BlockCG(), hg.Chebyshev(3), hg.Neumann(3), hg.Nystrom(2), hg.Direct(), "auto"]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", [*FUNCTIONS, "another precision", "writes"])
def test_products(name, solver):
    more = {"another precision": (lambda v: 2 * v.double(), TypeError, "expected torch.float32, got torch.float64")}
    function, error, message = {**FUNCTIONS, **more, "writes": WRITES}[name]
    argument = "matvec" if name == "writes" else r"matvec\(v\)"
    with pytest.raises(error, match=f"{argument}: {message}"):
        hg.solve(hg.Callable(function, torch.zeros(3)), torch.ones(3), solver)


@pytest.mark.parametrize("make", [hg.CG, hg.Chebyshev, hg.Neumann])
@pytest.mark.parametrize("name", [*FUNCTIONS, "writes"])
def test_preconditioners(name, make):
    function, error, message = {**FUNCTIONS, "writes": WRITES}[name]
    argument = "preconditioner" if name == "writes" else r"preconditioner\(v\)"
    with pytest.raises(error, match=f"{argument}: {message}"):
        hg.solve(hg.DenseMatrix(torch.eye(3)), torch.ones(3), make(preconditioner=function))


def test_a_function_works_in_inference_mode():
    with torch.inference_mode():
        value = hg.solve(hg.Callable(lambda v: 2 * v, torch.zeros(3)), torch.ones(3), hg.CG()).value
    assert torch.equal(value, torch.full((3,), 0.5))


class TestIterators:
    """``model.parameters()`` can be gone through once; what is kept for later calls has to last."""

    def problem(self):
        net = nn.Linear(3, 1).double()
        x, y = torch.randn(30, 3, dtype=F64), torch.randn(30, 1, dtype=F64)
        lam = torch.tensor(0.1, dtype=F64, requires_grad=True)

        def train(params):
            w, b = params
            return (x @ w.T + b - y).square().mean() + lam * (w.square().sum() + b.square().sum())

        return net, lam, train, lambda params: (x[:9] @ params[0].T + params[1] - y[:9]).square().mean()

    def test_outer_loop(self):
        net, lam, train, val = self.problem()
        outer = hg.HyperOptimizer(torch.optim.SGD([lam], lr=0.1), net.parameters())
        assert outer.step(val, train).taken and outer.step(val, train).taken
        outer.load_state_dict(outer.state_dict())
        assert outer.step(val, train).taken

    def test_implicit(self):
        net, lam, train, val = self.problem()
        val(hg.implicit(train, net.parameters(), lam, hg.Direct())).backward()
        assert_close(lam.grad, hg.hypergradient(val, train, list(net.parameters()), lam, hg.Direct()), 1e-10)

    @pytest.mark.parametrize("make", [hg.CG, hg.Chebyshev, hg.Neumann])
    def test_diagonals(self, make):
        net, _, train, _ = self.problem()
        solver = make(preconditioner=(torch.ones_like(p) for p in net.parameters()))
        v = [torch.ones_like(p) for p in net.parameters()]
        for _ in range(2):
            assert not hg.solve(hg.Hessian(train, list(net.parameters())), v, solver).useless


class TestSolversThatGainNothingFromAStart:
    def test_identity_and_direct_stay_what_they_are(self):
        a, b, state = spd(9, 4.0), torch.randn(9, dtype=F64), hg.SolverState()
        operator = hg.Callable(lambda v: a @ v, b)
        for _ in range(3):
            solution = hg.solve(operator, b, hg.Identity(0.5), state=state, residual=False)
            assert torch.equal(solution.value, 0.5 * b) and solution.hvps == 0
        assert hg.solve(operator, b, hg.Direct(), state=state, residual=False).hvps == 9

    def test_lissa_does_not_take_over_the_error_of_a_batch(self):
        x = torch.randn(64, 6, dtype=F64)
        w, b, state, values = torch.zeros(6, dtype=F64), torch.randn(6, dtype=F64), hg.SolverState(), []
        loss = lambda w, rows: ((rows @ w) ** 2).mean() / 2 + 0.25 * (w**2).sum()  # noqa: E731
        for _ in range(3):
            torch.manual_seed(0)
            operator = hg.Hessian(loss, w, batches=list(x.split(4)), stochastic=True)
            solution = hg.solve(operator, b, hg.LiSSA(20, 2, alpha=0.1), state=state, residual=False)
            values.append(solution.value)
            assert solution.hvps == 40
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
