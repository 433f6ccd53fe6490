"""The outer loop: what a step does, and that a step that fails does nothing."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad_ext as hg
from tests.cases import logistic, mlp, quadratic
from tests.compare import assert_close
from tests.test_memory import live_tensors


def snapshot(outer: hg.HyperOptimizer) -> dict:
    return copy.deepcopy(outer.state_dict())


def assert_unchanged(outer: hg.HyperOptimizer, before: dict) -> None:
    after = outer.state_dict()
    torch.testing.assert_close(after["hparams"], before["hparams"], rtol=0, atol=0)
    torch.testing.assert_close(after["optimizer"], before["optimizer"], rtol=0, atol=0)
    assert after["steps"] == before["steps"]


def make(problem, solver="auto", *, lr=0.1, kind=torch.optim.Adam, **options) -> hg.HyperOptimizer:
    return hg.HyperOptimizer(kind(problem.hparams, lr=lr), problem.params, solver, **options)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.AdamW])
def test_is_the_loop_written_by_hand(kind):
    problem = mlp()
    torch.manual_seed(0)
    other = mlp()
    outer, by_hand = make(problem, hg.CG(tol=1e-12), kind=kind, lr=0.01), kind(other.hparams, lr=0.01)
    for _ in range(4):
        result = outer.step(problem.val, problem.train)
        grads = hg.hypergradient(other.val, other.train, other.params, other.hparams, hg.CG(tol=1e-12))
        for t, g in zip(other.hparams, grads, strict=True):
            t.grad = g
        by_hand.step()
        assert result.taken and not result.clipped and result.message == "" and result.solution.converged
        assert result.norm == pytest.approx(float(torch.cat([g.reshape(-1) for g in grads]).norm()), rel=1e-8)
    assert_close(problem.hparams, other.hparams, 1e-9)
    assert outer.steps == 4 and outer.skipped == 0


def test_what_training_left_in_grad_does_not_count():
    problem = quadratic()
    problem.train(problem.params).backward()
    assert problem.hparams[0].grad is not None
    outer = make(problem, hg.Direct())
    outer.step(problem.val, problem.train)
    first = problem.hparams[0].grad.clone()
    assert_close(first, _fresh(quadratic), 1e-12)
    outer.zero_grad()
    assert problem.hparams[0].grad is None


def _fresh(make_problem):
    torch.manual_seed(0)
    problem = make_problem()
    return hg.hypergradient(problem.val, problem.train, problem.params, problem.hparams, hg.Direct())


def test_a_scaler_unscales_again_after_a_step_that_was_interrupted():
    class Flaky(torch.optim.SGD):
        broken = True

        def step(self, closure=None):
            if self.broken:
                raise KeyboardInterrupt
            return super().step(closure)

    w, lam = torch.tensor([1.0, 2.0]), torch.zeros(2, requires_grad=True)
    optimizer = Flaky([lam], lr=0.1)
    outer = hg.HyperOptimizer(optimizer, w, hg.Direct(), scaler=torch.amp.GradScaler("cpu"))
    val = lambda w: ((w - 1) ** 2).sum()  # noqa: E731
    train = lambda w: ((w - 3) ** 2).sum() + (lam.exp() * w**2).sum()  # noqa: E731
    expected = hg.hypergradient(val, train, w, lam, hg.Direct())
    with pytest.raises(KeyboardInterrupt):
        outer.step(val, train)
    optimizer.broken = False
    scale = outer.scaler.get_scale()
    assert outer.step(val, train).taken and outer.scaler.get_scale() == scale
    torch.testing.assert_close(lam.detach(), -0.1 * expected)


def test_clips_the_norm_of_all_hyperparameters_together():
    problem = mlp()
    before = [t.detach().clone() for t in problem.hparams]
    outer = make(problem, kind=torch.optim.SGD, lr=1.0, max_norm=1e-3)
    result = outer.step(problem.val, problem.train)
    moved = torch.cat([(t - b).reshape(-1) for t, b in zip(problem.hparams, before, strict=True)])
    assert result.clipped and result.norm > 1e-3
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("scale", [1e155, 1e307])
def test_clips_gradients_whose_squares_overflow(scale):
    w, lam = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.3, 0.2]).double().requires_grad_()
    outer = hg.HyperOptimizer(torch.optim.SGD([lam], lr=1.0), w, hg.Direct(), max_norm=1.0)
    train = lambda w: ((w - 3) ** 2).sum() + (lam.exp() * w**2).sum()  # noqa: E731
    plain = hg.hypergradient(lambda w: (w**2).sum(), train, w, lam, hg.Direct())
    result = outer.step(lambda w: scale * (w**2).sum(), train)
    assert result.taken and result.clipped and result.norm == pytest.approx(scale * float(plain.norm()))
    torch.testing.assert_close(lam.grad, plain / plain.norm())


def test_schedulers_take_the_optimiser():
    problem = quadratic()
    outer = make(problem, kind=torch.optim.SGD, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(outer.optimizer, 1, gamma=0.5)
    rates = []
    for _ in range(3):
        rates.append(outer.optimizer.param_groups[0]["lr"])
        outer.step(problem.val, problem.train)
        schedule.step()
    assert rates == [1.0, 0.5, 0.25]


def test_warm_start_saves_products_and_the_switch_turns_it_off():
    spent = {}
    for warm in (True, False):
        torch.manual_seed(0)
        problem = mlp()
        outer = make(problem, hg.CG(tol=1e-8), lr=1e-4, warm_start=warm)
        spent[warm] = [outer.step(problem.val, problem.train).solution.hvps for _ in range(3)]
    assert spent[True][0] == spent[False][0]
    assert sum(spent[True][1:]) < 0.8 * sum(spent[False][1:])
    assert outer.state.x is None


FAILURES = {
    "diverged": (hg.Neumann(60, alpha=100.0), lambda p: p.val, lambda p: p.train, "diverged"),
    "nan in val_loss": (hg.CG(), lambda p: lambda w: p.val(w) * math.nan, lambda p: p.train, "non_finite_input"),
    "nan in train_loss": (hg.CG(), lambda p: p.val, lambda p: lambda w: p.train(w) * math.nan, "non_finite_operator"),
    "infinite mixed derivative": (
        hg.CG(),
        lambda p: p.val,
        lambda p: lambda w: p.train(w) + (p.hparams[0] - p.hparams[0].detach()).sum().sqrt() * w[0].sum(),
        "mixed derivative of train_loss by hparams",
    ),
    "nan in the direct gradient": (
        hg.CG(),
        lambda p: lambda w: p.val(w) + (p.hparams[0] * math.nan).sum(),
        lambda p: p.train,
        "gradient of val_loss by hparams",
    ),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_raised_or_skipped_and_changes_nothing(name, warm):
    solver, val, train, message = FAILURES[name]
    problem = mlp()
    outer = make(problem, hg.CG())
    if warm:
        outer.step(problem.val, problem.train)
    before = snapshot(outer)
    outer.solver = solver
    with pytest.raises(hg.SolveError, match=message):
        outer.step(val(problem), train(problem))
    assert_unchanged(outer, before)
    outer.on_failure = "skip"
    with pytest.warns(hg.SolveWarning, match="outer step skipped"):
        result = outer.step(val(problem), train(problem))
    assert not result.taken and message in result.message and result.solution.useless
    assert_unchanged(outer, before)
    assert outer.skipped >= 1
    # And it goes on, as if nothing had been.
    outer.solver = hg.CG(tol=1e-10)
    assert outer.step(problem.val, problem.train).taken
    assert all(t.isfinite().all() for t in problem.hparams)


def test_a_step_too_long_for_the_dtype_is_taken_back():
    problem = quadratic(torch.float32)
    outer = make(problem, kind=torch.optim.SGD, lr=1e38)
    before = snapshot(outer)
    with pytest.raises(FloatingPointError, match="lower its learning rate"):
        outer.step(lambda w: 1e6 * problem.val(w), problem.train)
    assert_unchanged(outer, before)
    outer.on_failure = "skip"
    with pytest.warns(hg.SolveWarning, match="learning rate"):
        assert not outer.step(lambda w: 1e6 * problem.val(w), problem.train).taken
    assert_unchanged(outer, before)


def test_an_optimiser_that_raises_half_way_is_taken_back():
    problem = mlp()

    class Broken(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            raise KeyboardInterrupt

    outer = make(problem, kind=Broken)
    before = snapshot(outer)
    with pytest.raises(KeyboardInterrupt):
        outer.step(problem.val, problem.train)
    assert_unchanged(outer, before)


class TestMixedPrecision:
    def make(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        x, y = torch.randn(64, 8), torch.randint(4, (64,))
        log_l2 = {n: torch.full_like(p, 0.0).requires_grad_() for n, p in net.named_parameters()}

        def cross_entropy(params, rows):
            return F.cross_entropy(torch.func.functional_call(net, params, (x[rows],)).float(), y[rows])

        def train(params):
            penalty = sum((log_l2[n].exp() * p.square()).sum() for n, p in params.items())
            return cross_entropy(params, slice(32)) + penalty

        return net, log_l2, train, lambda params: cross_entropy(params, slice(32, None))

    def test_bfloat16_autocast(self):
        net, log_l2, train, val = self.make()
        exact = hg.hypergradient(val, train, net, log_l2, hg.CG(tol=1e-6))
        outer = hg.HyperOptimizer(torch.optim.SGD(log_l2.values(), lr=0.1), net, hg.CG(tol=1e-2))
        with torch.autocast("cpu", torch.bfloat16):
            assert outer.step(val, train).taken
        grads = [t.grad for t in log_l2.values()]
        assert all(g.dtype == torch.float32 for g in grads)
        assert_close(grads, list(exact.values()), 0.05)

    def test_loss_scale_does_not_change_the_result(self):
        """And the optimiser sees gradients without it."""
        results = []
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
            net, log_l2, train, val = self.make()
            adam = torch.optim.Adam(log_l2.values(), lr=0.1)
            outer = hg.HyperOptimizer(adam, net, hg.CG(tol=1e-6), scaler=scaler)
            for _ in range(3):
                assert outer.step(val, train).taken
            results.append(list(log_l2.values()))
        assert_close(results[1], results[0], 1e-4)

    def test_overflow_lowers_the_scale_and_skips(self):
        net, log_l2, train, val = self.make()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        outer = hg.HyperOptimizer(torch.optim.Adam(log_l2.values(), lr=0.1), net, hg.CG(), scaler=scaler)
        before, taken = snapshot(outer), []
        with pytest.warns(hg.SolveWarning, match="outer step skipped") as caught:
            while not any(taken) and len(taken) < 40:
                taken.append(outer.step(lambda w: 1e3 * val(w), lambda w: 1e3 * train(w)).taken)
                if not taken[-1]:
                    assert_unchanged(outer, before)
        assert not taken[0] and taken[-1]
        assert outer.skipped == taken.count(False) == len([w for w in caught if "skipped" in str(w.message)])
        assert scaler.get_scale() < 2.0**127
        assert all(t.isfinite().all() for t in log_l2.values())

    def test_the_scaler_is_part_of_the_state(self):
        net, log_l2, train, val = self.make()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        adam = torch.optim.Adam(log_l2.values(), lr=0.1)
        outer = hg.HyperOptimizer(adam, net, hg.CG(), scaler=scaler)
        outer.step(val, train)
        state = snapshot(outer)
        assert scaler.get_scale() == 16.0
        outer.step(val, train)
        outer.load_state_dict(state)
        assert scaler.get_scale() == 16.0


def of_sgd(state: dict) -> None:
    (group,) = state["optimizer"]["param_groups"]
    (other,) = torch.optim.SGD([torch.ones(1)]).state_dict()["param_groups"]
    state["optimizer"]["param_groups"] = [{**other, "params": group["params"]}]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("solver"), "expected one of a HyperOptimizer, got one without solver"),
        (lambda s: s.update(hparams=[torch.ones(2)]), r"state_dict\['hparams'\]: expected tensors of shapes"),
        (lambda s: s.update(scaler=None), "scaler's state if and only if there is a scaler"),
        (lambda s: s["solver"].update(x=torch.ones(3, dtype=torch.float64)), "state: expected one of 125 weights"),
        (lambda s: s["optimizer"]["param_groups"].append({"params": [9]}), "different number of parameter groups"),
        (lambda s: s["optimizer"]["param_groups"][0].pop("lr"), r"\['param_groups'\]: expected .* got one without lr"),
        (lambda s: s["optimizer"]["param_groups"][0].pop("params"), "got one without params"),
        (lambda s: s["optimizer"].pop("state"), r"state_dict\['optimizer'\]: expected .* got one without state"),
        (of_sgd, "got one without betas, eps"),
        (
            lambda s: s["scaler"].pop("growth_factor"),
            r"state_dict\['scaler'\]: expected .* got one without growth_factor",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(change, message):
    problem = mlp()
    outer = make(problem, scaler=torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1))
    outer.step(problem.val, problem.train)
    state, before = snapshot(outer), None
    change(state)
    outer.step(problem.val, problem.train)
    before, x = snapshot(outer), outer.state.x.clone()
    with pytest.raises(ValueError, match=message):
        outer.load_state_dict(state)
    assert_unchanged(outer, before)
    assert torch.equal(outer.state.x, x) and outer.scaler.state_dict() == before["scaler"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"optimizer": 3}, TypeError, "optimizer: expected a torch optimiser, got int"),
        ({"optimizer": "lbfgs"}, TypeError, "optimizer: expected one that steps without a closure, got LBFGS"),
        ({"on_failure": "ignore"}, ValueError, "on_failure: expected 'raise' or 'skip', got 'ignore'"),
        ({"max_norm": 0.0}, ValueError, "max_norm: expected a finite number > 0"),
        ({"damping": -1.0}, ValueError, "damping: expected a finite number >= 0"),
        ({"params": 3}, TypeError, "params: expected a tensor"),
    ],
)
def test_what_is_wrong_is_named(options, error, message):
    lam = torch.tensor(1.0, requires_grad=True)
    arguments = {"optimizer": torch.optim.SGD([lam], lr=1.0), "params": torch.tensor(1.0), **options}
    if arguments["optimizer"] == "lbfgs":
        arguments["optimizer"] = torch.optim.LBFGS([lam])
    with pytest.raises(error, match=message):
        hg.HyperOptimizer(**arguments)


def test_hyperparameters_cannot_be_weights():
    w = torch.tensor(1.0, requires_grad=True)
    outer = hg.HyperOptimizer(torch.optim.SGD([w], lr=1.0), w)
    with pytest.raises(ValueError, match="expected a tensor that is not among params"):
        outer.step(lambda w: w**2, lambda w: w**2)


def test_memory_is_flat_over_200_steps():
    """With the collector off, a single reference cycle per step would show."""
    problem = mlp()
    outer = make(problem, hg.Auto(tol=1e-6, rank=8, long=2), lr=1e-3)

    def once() -> None:
        outer.step(problem.val, problem.train)

    for _ in range(12):  # the sketch is there after two solves, and made anew after ten
        once()
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(200):
            once()
        after = live_tensors()
    finally:
        gc.enable()
    assert outer.state.sketch is not None
    assert after == before


class TestHypergradientOptions:
    def test_direct_gradient_off(self):
        w, lam = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.5, 1.0))
        losses = w**2 + 5 * lam, (w - 3) ** 2 + lam * w**2
        assert float(hg.hypergradient(*losses, w, lam)) == pytest.approx(5 - 2.25)
        assert float(hg.hypergradient(*losses, w, lam, direct=False)) == pytest.approx(-2.25)

    def test_several_training_batches_are_one(self):
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(30, 4, generator=generator).double(), torch.randn(30, generator=generator).double()
        w = torch.randn(4, dtype=torch.float64, requires_grad=True)
        lam = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)

        def train(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return (batch[0] @ w - batch[1]).square().mean() + (lam * w * w).sum()

        val = lambda w: w.square().sum()  # noqa: E731
        whole = hg.hypergradient(val, lambda w: train(w, (x, y)), w, lam, hg.Direct())
        batches = list(zip(x.split(10), y.split(10), strict=True))
        for solver in (hg.Direct(), hg.CG(tol=1e-10)):
            assert_close(hg.hypergradient(val, train, w, lam, solver, batches=batches), whole, 1e-8)
        outer = hg.HyperOptimizer(torch.optim.SGD([lam], lr=0.1), w, hg.CG(tol=1e-10))
        assert outer.step(val, train, batches=batches).taken
        assert_close(lam.grad, whole, 1e-8)

    def test_loss_scale_keeps_what_would_underflow(self):
        """Losses in float16: the mixed derivative is below the least half of all."""
        w = torch.tensor([0.5], dtype=torch.float16, requires_grad=True)
        lam = torch.tensor([1.0], requires_grad=True)
        val = lambda w: (1e-5 * w.square()).sum() * 1e-3  # noqa: E731
        train = lambda w: (lam.half() * w.square()).sum()  # noqa: E731
        plain = hg.hypergradient(val, train, w, lam, hg.Direct())
        scaled = hg.hypergradient(val, train, w, lam, hg.Direct(), loss_scale=2.0**10)
        truth = -(2e-8 * 0.5) / 2 * (2 * 0.5)  # dL_V/dw / H, times the mixed derivative
        assert float(plain) == 0 and float(scaled) == pytest.approx(truth, rel=0.05)

    def test_unused_hyperparameters_are_named_in_a_warning(self):
        w, lam, idle = (torch.tensor(x, requires_grad=True) for x in (1.5, 1.0, 2.0))
        train, val = (w - 3) ** 2 + lam * w**2, w**2
        with pytest.warns(UserWarning, match=r"no loss depends on hparams\['idle'\]"):
            assert hg.hypergradient(val, train, w, {"lam": lam, "idle": idle})["idle"] == 0

    def test_state_is_a_warm_start(self):
        problem, state = logistic(), hg.SolverState()
        arguments = (problem.val, problem.train, problem.params, problem.hparams, hg.CG(tol=1e-10))
        cold, warm = (hg.hypergradient(*arguments, state=state, return_solution=True) for _ in range(2))
        assert warm[1].steps < cold[1].steps
        assert_close(warm[0], cold[0], 1e-8)
        w = hg.implicit(problem.train, problem.params, problem.hparams, hg.CG(tol=1e-10), state=state)
        problem.val(w).backward()
        assert state.solves == 3 and state.steps < cold[1].steps
        assert_close(problem.hparams[0].grad, cold[0], 1e-8)


@pytest.mark.parametrize("growth", [1.2, 5.0])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_bounds_are_looked_for_again_where_curvature_has_grown(growth, preconditioned):
    curvature, c = torch.logspace(0, -1.5, 40), torch.randn(40)
    w, log_l2 = torch.randn(40), torch.zeros(40, requires_grad=True)
    solver = hg.Chebyshev(400, tol=1e-4, preconditioner=torch.ones(40) if preconditioned else None)
    outer = hg.HyperOptimizer(torch.optim.SGD([log_l2], lr=0.0), w, solver)
    for factor in (1.0, growth):
        scale = torch.where(curvature > 0.9, factor, 1.0)

        def train(w, scale=scale):
            return (curvature * scale * (w - c) ** 2).sum() / 2 + 1e-3 * (log_l2.exp() * w**2).sum()

        def val(w, factor=factor):
            return ((w - 1) ** 2 * torch.linspace(1, 2 * factor, 40)).sum()

        assert outer.step(val, train).solution.status == "converged"
