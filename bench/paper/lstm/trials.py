"""Search without gradients: one training run after another, each with an equal share of the budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.paper.lstm import text
from bench.paper.lstm.model import NAMES, PENALTIES
from bench.paper.lstm.training import Point, Run, Setting

Values = dict[str, float]
# Where random search and Bayesian optimisation look: rates, and penalties on a logarithmic scale.
RATES, PENALTY = (0.02, 0.9), (1e-2, 10.0)
# The grid: all five rates the same, both penalties the same.
GRID_RATES, GRID_PENALTIES = (0.5, 0.25, 0.1, 0.65), (1e-2, 1.0)


def grid(trial: int, seed: int, history: list[tuple[Values, float]]) -> Values:
    """Point ``trial`` of the grid, round and round."""
    points = list(itertools.product(GRID_PENALTIES, GRID_RATES))
    penalty, rate = points[trial % len(points)]
    return {name: penalty if name in PENALTIES else rate for name in NAMES}


def random(trial: int, seed: int, history: list[tuple[Values, float]]) -> Values:
    """A point drawn evenly."""
    generator = torch.Generator().manual_seed(1000 * seed + trial)
    return {name: _between(name, float(torch.rand((), generator=generator))) for name in NAMES}


def bayesian(trial: int, seed: int, history: list[tuple[Values, float]]) -> Values:
    """Expected improvement under a tree of Parzen estimators, by Optuna; random for the first three.

    Raises:
        ImportError: If Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the Bayesian baseline needs Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {
        name: optuna.distributions.FloatDistribution(*(PENALTY if name in PENALTIES else RATES), log=name in PENALTIES)
        for name in NAMES
    }
    # A fresh study that is told everything gives the same point before and after a pause.
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=1000 * seed + trial, n_startup_trials=3, multivariate=True)
    )
    for values, loss in history:
        study.add_trial(optuna.trial.create_trial(params=values, distributions=space, value=min(loss, 1e6)))
    return study.ask(space).params


SAMPLERS: dict[str, Callable[[int, int, list[tuple[Values, float]]], Values]] = {
    "grid": grid,
    "random": random,
    "bayesian": bayesian,
}


class Search:
    """Trials one after another; looks like one long run.

    Args:
        corpus: The text.
        setting: How every trial trains.
        method: ``"grid"``, ``"random"`` or ``"bayesian"``.
        seed: Of the trials and of what they try.
        over: Whether a trial has had its share.
    """

    def __init__(
        self, corpus: text.Corpus, setting: Setting, method: str, seed: int, over: Callable[[float, int], bool]
    ) -> None:
        """See the class."""
        self.corpus, self.setting, self.method, self.seed, self.over = corpus, setting, method, seed, over
        self.history: list[tuple[Values, float]] = []
        self.curve: list[Point] = []
        self.seconds, self.step, self.failed_solves = 0.0, 0, 0
        self.best: dict[str, Tensor] = {}
        self.best_valid = math.inf
        self.finished = False
        self.begin()

    def begin(self) -> None:
        """The next trial."""
        self.values = SAMPLERS[self.method](len(self.history), self.seed, self.history)
        self.trial = Run(self.corpus, self.setting, "fixed", self.seed)
        assert self.trial.hyper is not None
        self.trial.hyper.assign(self.values)

    def advance(self) -> Point | None:
        """One inner step of the trial, and the next trial once this one has had its share."""
        before = self.trial.seconds
        point = self.trial.advance()
        self.seconds += self.trial.seconds - before
        self.step += 1
        if point:
            point = Point(self.seconds, self.step, point.train, point.valid, point.hyper)
            self.curve.append(point)
            if point.valid < self.best_valid:
                self.best_valid, self.best = point.valid, self.trial.best
        if self.trial.finished or self.over(self.trial.seconds, self.trial.step):
            self.history.append((self.values, self.trial.best_valid))
            self.begin()
        return point

    def test(self) -> float:
        """Perplexity of the test text with the best weights."""
        return self.trial.perplexity(self.corpus.test, 1, self.best) if self.best else math.nan

    def state_dict(self) -> dict[str, Any]:
        """See `Run`."""
        return {
            "history": self.history,
            "values": self.values,
            "curve": [vars(point) for point in self.curve],
            "seconds": self.seconds,
            "step": self.step,
            "best": self.best,
            "best_valid": self.best_valid,
            "trial": self.trial.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """See `Run`."""
        self.history = [(dict(values), loss) for values, loss in saved["history"]]
        self.curve = [Point(**point) for point in saved["curve"]]
        for name in ("values", "seconds", "step", "best", "best_valid"):
            setattr(self, name, saved[name])
        self.trial.load_state_dict(saved["trial"])


def _between(name: str, share: float) -> float:
    if name in PENALTIES:
        low, high = map(math.log, PENALTY)
        return math.exp(low + share * (high - low))
    low, high = RATES
    return low + share * (high - low)
