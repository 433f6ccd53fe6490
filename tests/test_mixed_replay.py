"""Mixed derivatives of later solves, replayed without a gradient's graph: those of a backward pass, or that itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad_ext as hg
from hypergrad_ext import _native
from hypergrad_ext.engines import RetainedGradient, traced
from tests.compare import assert_close
from tests.models import MODELS, batch, made

pytestmark = [
    pytest.mark.usefixtures("fresh_engines"),
    pytest.mark.skipif(_native._C is None, reason=f"links and native plans are C++: {_native.MISSING}"),
]
D = torch.float64
SOLVER = hg.Neumann(6, alpha=1e-2)


@pytest.fixture
def built(monkeypatch) -> list[int]:
    """Grows with every gradient that is built with a graph."""
    calls: list[int] = []
    fresh = RetainedGradient.fresh
    monkeypatch.setattr(RetainedGradient, "fresh", lambda *args: calls.append(1) or fresh(*args))
    return calls


def penalised(model, x: Tensor, y: Tensor, hparams: dict[str, Tensor]):
    """A loss whose weights of examples, penalties and, where they are numbers, inputs are hyperparameters."""

    def loss(params: dict[str, Tensor]) -> Tensor:
        inputs = x + hparams["shift"] if "shift" in hparams else x
        losses = F.cross_entropy(functional_call(model, params, (inputs,)), y, reduction="none")
        penalty = sum((hparams[n].exp() * p.square()).sum() for n, p in params.items())
        return (hparams["examples"].sigmoid() * losses).mean() + penalty

    return loss


def one_solve(name: str, engine: str, n: int = 7) -> tuple:
    """A hypergradient in a solve of its own, and that of backward passes with the same random numbers."""
    model, (x, y) = made(name), batch(name, n, D)
    hparams = {k: torch.randn_like(p) - 3 for k, p in model.named_parameters()} | {"examples": torch.randn(n, dtype=D)}
    if x.is_floating_point():
        hparams["shift"] = torch.randn(x.shape[1:], dtype=D)
    hparams = {k: t.requires_grad_() for k, t in hparams.items()}
    train, state = penalised(model, x, y, hparams), torch.get_rng_state()

    def by(engine: str):
        torch.set_rng_state(state)
        return hg.hypergradient(
            lambda p: F.cross_entropy(functional_call(model, p, (x,)), y),
            train, model, hparams, SOLVER, damping=1.0, engine=engine, throw=False,
        )  # fmt: skip

    return by("eager"), lambda: by(engine)


@pytest.mark.parametrize("engine", ["native", "traced"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, engine, built):
    for i in range(4):
        truth, ours = one_solve(name, engine)
        built.clear()
        value = ours()
        # Together: of a bias in front of a batch norm there is only rounding.
        assert value.keys() == truth.keys()
        assert_close(value, truth, 1e-10, f"solve {i}:")
        replayed = engine == "native" and i >= 2 and name != "custom"
        assert bool(built) != replayed


def quadratic(w: Tensor, hparam: Tensor) -> Tensor:
    return (w * (w * hparam).cos()).sum() + w.square().sum()


def solves(hparam, loss=quadratic, n: int = 4, dtype=D, engine: str = "native") -> None:
    """Solves with hyperparameters and losses of the solve's number, against those of backward passes."""
    for i in range(n):
        w, hparams = torch.randn(3, dtype=dtype), hparam(i)
        problem = (lambda w: w.sin().sum(), lambda w, hparams=hparams: loss(w, hparams[0]), w, hparams, SOLVER)
        ours, truth = (hg.hypergradient(*problem, damping=20.0, engine=e, unused="zeros") for e in (engine, "eager"))
        assert_close(ours, truth, 1e-10 if dtype == D else 1e-5, f"solve {i}:")


class TestHyperparameters:
    def test_their_values_are_those_of_the_solve(self, built):
        solves(lambda i: [torch.randn(3, dtype=D, requires_grad=True)])
        # By backward passes four, and in each of the first two solves two.
        assert len(built) == 8

    def test_some_are_unused(self):
        solves(lambda i: [torch.randn(3, dtype=D, requires_grad=True), torch.ones(2, dtype=D, requires_grad=True)])
        assert traced.counts.linked == 2

    def test_they_are_used_in_other_solves(self):
        """Two solves do not depend on the second; the others do."""
        pairs = [[torch.randn(3, dtype=D, requires_grad=True) for _ in range(2)] for _ in range(6)]
        for i, (a, b) in enumerate(pairs):
            solves(lambda _, a=a, b=b: [a, b], lambda w, a, i=i, b=b: quadratic(w, a + b if i > 1 else a), 1)

    def test_they_are_results(self):
        """Gradients by what was computed, as by leaves."""
        solves(lambda i: [torch.randn(3, dtype=D, requires_grad=True).exp()])
        assert traced.counts.linked == 2

    def test_they_have_another_dtype(self):
        solves(lambda i: [torch.randn(3, requires_grad=True)])
        solves(lambda i: [torch.randn(3, dtype=D, requires_grad=True)], dtype=torch.float32, n=5)

    def test_they_have_no_elements(self):
        def loss(w: Tensor, empty: Tensor) -> Tensor:
            return quadratic(w, torch.zeros_like(w)) + (empty.sum() * w).sum()

        for _ in range(4):
            w, empty = torch.randn(3, dtype=D), torch.zeros(0, dtype=D, requires_grad=True)
            (value,) = hg.hypergradient(
                lambda w: w.sin().sum(), lambda w, e=empty: loss(w, e), w, [empty], SOLVER, engine="native"
            )
            assert value.shape == (0,)

    def test_others_than_announced(self):
        """`mixed` by something else than was recorded is a backward pass."""
        for _ in range(4):
            w, a, b = (torch.randn(3, dtype=D, requires_grad=True) for _ in range(3))
            operator = hg.Hessian(lambda w, a=a, b=b: quadratic(w, a * b), w, engine="native")
            operator.expect_mixed([a, b])
            v = torch.randn(3, dtype=D)
            operator @ v
            whole, (alone,), swapped = (operator.mixed([v], hparams) for hparams in ([a, b], [b], [b, a]))
            assert_close(alone, whole[1], 1e-12)
            assert_close(swapped, whole[::-1], 1e-12)

    def test_a_change_in_place_is_noticed(self):
        for i in range(4):
            w, a = (torch.randn(3, dtype=D, requires_grad=True) for _ in range(2))
            operator = hg.Hessian(lambda w, a=a: quadratic(w, a), w, engine="native")
            operator.expect_mixed([a])
            v = torch.randn(3, dtype=D)
            operator @ v
            assert operator.mixed([v], [a])[0] is not None
            with torch.no_grad():
                w.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                operator.mixed([v], [a])
            assert traced.counts.linked == max(0, i - 1)


def test_a_wrong_plan_is_found(monkeypatch, caplog):
    """A recording whose mixed part does not follow its vector is not replayed."""
    honest = RetainedGradient.hvp_and_mixed

    def wrong(self, v):
        whole, parts = honest(self, v)
        return whole, [None if part is None else 2 * part for part in parts]

    monkeypatch.setattr(RetainedGradient, "hvp_and_mixed", wrong)
    solves(lambda i: [torch.randn(3, dtype=D, requires_grad=True)])
    assert "part 0 of the product is wrong" in caplog.text and traced.counts.linked == 2


def test_a_plan_of_other_results_solves_nothing():
    """What gives three numbers for a vector of two is no matrix of a system."""
    plan = _native._C.Plan(True, 0, [2], [3], 0, 0, 0, [], [])
    b = torch.ones(1, 2, dtype=D)
    with pytest.raises(ValueError, match="products of the shapes of its vectors"):
        plan.bind([], []).neumann_series(b, 0.1, 0.0, 3, torch.zeros(1, dtype=D))
