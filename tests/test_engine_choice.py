"""What engines keep from solve to solve: compiled programs, and the measurements by which one is chosen."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hypergrad_ext as hg
from hypergrad_ext import _native
from hypergrad_ext.engines import choose, traced
from tests.compare import assert_close
from tests.models import MODELS, batch, loss_of, made, random_like

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(_native._C is None, reason=f"native plans are C++: {_native.MISSING}")
)
REPLAYS = ["traced", NATIVE]


pytestmark = pytest.mark.usefixtures("fresh_engines")


class TestCache:
    @pytest.mark.parametrize("engine", REPLAYS)
    def test_500_hypergradients_compile_once(self, engine):
        w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        lam = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
        penalty = lambda w: (lam.exp() * w**2).sum()  # noqa: E731
        for i in range(500):
            x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
            val = lambda w, x=x, y=y: F.cross_entropy(x.flip(0) @ w, y)  # noqa: E731
            train = lambda w, x=x, y=y: F.cross_entropy(x @ w, y) + penalty(w)  # noqa: E731
            args = (val, train, w, lam, hg.Neumann(3, alpha=0.01))
            grad = hg.hypergradient(*args, engine=engine)
            if i % 100 == 0:
                assert_close(grad, hg.hypergradient(*args, engine="eager"), 1e-10)
            with torch.no_grad():
                w -= 0.01 * torch.randn_like(w)
                lam.add_(torch.randn_like(lam)).clamp_(-1, 1)
        # Recorded twice; the others are known by their graphs. The slow recorder of Python knows none.
        assert (traced.counts.compiled, traced.counts.recorded) == (1, 500 if _native._C is None else 2)

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_one_program_per_shape_in_a_bounded_cache(self, engine, monkeypatch):
        monkeypatch.setattr(traced._compiled, "size", 3)
        model = made("linear")
        v = random_like(model)
        for n in (5, 6, 7, 5, 6, 7):
            hg.Hessian(loss_of(model, *batch("linear", n, torch.float64)), model, engine=engine) @ v
        assert traced.counts.compiled == 3
        for n in (8, 9, 5):
            hg.Hessian(loss_of(model, *batch("linear", n, torch.float64)), model, engine=engine) @ v
        assert traced.counts.compiled == 6 and len(traced._compiled) == 3

    @pytest.mark.parametrize("engine", REPLAYS)
    @pytest.mark.parametrize("name", ["mlp_tanh", "cnn_train", "lstm_cell"])
    def test_memory_is_flat_and_no_cycle_holds_a_tensor(self, engine, name):
        model = made(name)
        v = random_like(model)

        def once() -> None:
            hg.inverse_hvp(loss_of(model, x, y), model, v, hg.Neumann(2, alpha=1e-3), engine=engine)

        x, y = batch(name, 7, torch.float64)
        once()
        gc.collect()
        gc.disable()
        try:
            before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
            for _ in range(200 if name == "mlp_tanh" else 20):
                once()
            assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) == before
        finally:
            gc.enable()


class TestAuto:
    def solve(self, model: nn.Module, n: int, solver: hg.Solver) -> hg.Solution:
        loss = loss_of(model, *batch("mlp_tanh", n, torch.float64))
        return hg.solve(hg.Hessian(loss, model), random_like(model), solver, damping=1.0, residual=False)

    def test_a_slow_function_is_left_alone_in_its_first_solve_unless_it_is_long(self, monkeypatch):
        monkeypatch.setattr(choose, "QUICK", 0.0)
        model = made("mlp_tanh")
        assert self.solve(model, 9, hg.Neumann(20)).engine == "eager"
        assert traced.counts.recorded == 0
        self.solve(model, 9, hg.Neumann(20))
        assert traced.counts.recorded == 2
        choose.clear_histories()
        self.solve(model, 9, hg.Neumann(2 * choose.LONG))
        assert traced.counts.recorded + traced.counts.linked == 4

    def test_a_quick_one_is_looked_into_at_once(self, monkeypatch):
        monkeypatch.setattr(choose, "QUICK", 1e9)
        self.solve(made("mlp_tanh"), 9, hg.Neumann(20))
        assert traced.counts.recorded == 2

    def test_short_solves_are_never_recorded(self):
        model = made("mlp_tanh")
        for _ in range(5):
            assert self.solve(model, 9, hg.Neumann(choose.EXPLORE - 1, alpha=0.1)).engine == "eager"
        assert traced.counts.recorded == 0

    def test_measures_once_and_remembers(self, monkeypatch, caplog):
        """With clocks that say so: replaying is chosen, then refused, and the log says why."""
        model = made("mlp_tanh")
        with caplog.at_level(logging.INFO, "hypergrad_ext"):
            monkeypatch.setattr(choose, "_pairs", lambda *_: ([1e6], [1e-9]))
            engines = [self.solve(model, 9, hg.Neumann(500, alpha=1e-4)).engine for _ in range(3)]
            assert engines[0] != "eager" and len(set(engines)) == 1
            choose.clear_histories()
            monkeypatch.setattr(choose, "_pairs", lambda *_: ([0.5], [1e9]))
            recorded = traced.counts.recorded
            engines = [self.solve(model, 9, hg.Neumann(500, alpha=1e-4)).engine for _ in range(3)]
        assert engines == ["eager"] * 3 and traced.counts.recorded <= recorded + 2
        assert [r.message.split()[1] for r in caplog.records if "times as fast" in r.message] == [
            "traced" if _native._C is None else "native",
            "eager",
        ]

    def test_what_is_not_worth_its_start_in_a_short_solve_is_in_a_long_one(self):
        model = made("mlp_tanh")
        self.solve(model, 9, hg.Neumann(20))
        (history,) = choose._histories._values.values()
        history.refusal, history.eager, history.replay = "", 1.0, 0.9
        for start, engine in ((2.5, "eager"), (1.2, "native" if _native._C else "traced")):
            history.start = start
            assert self.solve(model, 9, hg.Neumann(20)).engine == engine
        history.start = 2.5
        assert self.solve(model, 9, hg.Neumann(200)).engine != "eager"

    def test_a_start_that_speaks_against_it_is_believed_a_little_less_every_time(self):
        model = made("mlp_tanh")
        self.solve(model, 9, hg.Neumann(20))
        (history,) = choose._histories._values.values()
        history.refusal, history.eager, history.replay, history.start = "", 1e3, 1e-9, 1e6
        for n in (1, 2):
            assert self.solve(model, 9, hg.Neumann(20)).engine == "eager"
            assert history.start == pytest.approx(choose.FADE**n * 1e6)

    def test_a_solver_that_stops_early_is_expected_to_do_so_again(self):
        model = made("mlp_tanh")
        for _ in range(2):
            solution = self.solve(model, 9, hg.CG(max_steps=1000, tol=0.5))
        assert solution.hvps < choose.EXPLORE and traced.counts.recorded == 0

    def test_numbers_of_vectors_are_measured_apart(self):
        model = made("mlp_tanh")
        loss = loss_of(model, *batch("mlp_tanh", 9, torch.float64))
        for rows in (None, 3):
            hg.solve(hg.Hessian(loss, model), random_like(model, rows), hg.Neumann(20, alpha=1e-3), damping=1.0)
        assert len(choose._histories) == 2 and all(h.replay for h in choose._histories._values.values())

    def test_a_function_that_is_never_the_same_is_left_alone(self, monkeypatch):
        monkeypatch.setattr(choose, "_pairs", lambda *_: ([1e6], [1e-9]))
        model = made("mlp_tanh")
        for n in range(5, 25):
            self.solve(model, n, hg.Neumann(200, alpha=1e-4))
        # The first one is recorded twice, to see how long that takes.
        assert traced.counts.recorded == choose.PATIENCE + 2

    @pytest.mark.parametrize("name", MODELS)
    def test_is_right_whatever_it_chooses(self, name):
        model = made(name)
        loss = loss_of(model.eval(), *batch(name, 9, torch.float64))
        v = random_like(model)
        truth = hg.solve(hg.Hessian(loss, model, engine="eager"), v, hg.Neumann(80, alpha=1e-3)).value
        for _ in range(3):
            assert_close(hg.solve(hg.Hessian(loss, model), v, hg.Neumann(80, alpha=1e-3)).value, truth, 1e-9)
