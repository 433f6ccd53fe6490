"""Search without gradients: grid, random and Bayesian optimisation, at equal time or equal inner steps."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from bench import measure

Point = dict[str, float]
Space = dict[str, tuple[float, float]]
"""Name, least and largest value; give logarithms where the scale is logarithmic."""
Evaluate = Callable[[Point], tuple[float, int]]
"""From a point to the validation loss and the inner steps that it took."""


class SearchError(RuntimeError):
    """A search that cannot run; the message says what to do."""


@dataclass(frozen=True)
class Budget:
    """When to stop: once all limits that are given are reached; steps also before they would be exceeded."""

    seconds: float | None = None
    steps: int | None = None


@dataclass
class History:
    """What was tried.

    Attributes:
        points: The points.
        values: Their validation losses.
        seconds: Seconds until each was known.
        steps: Inner steps until then.
    """

    points: list[Point] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def best(self) -> Point:
        """The point of the least loss."""
        return self.points[min(range(len(self.values)), key=self.values.__getitem__)]


def grid_search(evaluate: Evaluate, space: Space, budget: Budget, *, per_axis: int) -> History:
    """All points of a grid, coarse to fine in no particular order but a fixed one."""
    axes = [torch.linspace(low, high, per_axis).tolist() for low, high in space.values()]
    points = [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tolist()
    return _try(evaluate, (points[i] for i in order), budget)


def random_search(evaluate: Evaluate, space: Space, budget: Budget, *, seed: int) -> History:
    """Points drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Iterator[Point]:
        while True:
            yield {
                k: low + (high - low) * float(torch.rand((), generator=generator)) for k, (low, high) in space.items()
            }

    return _try(evaluate, draw(), budget)


def bayesian_available() -> bool:
    """Whether Optuna is installed."""
    return importlib.util.find_spec("optuna") is not None


def bayesian_search(evaluate: Evaluate, space: Space, budget: Budget, *, seed: int) -> History:
    """A Gaussian process with expected improvement, by Optuna.

    Raises:
        SearchError: If Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise SearchError("Bayesian optimisation needs Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=5))
    trials = []

    def ask() -> Iterator[Point]:
        while True:
            trial = study.ask()
            trials.append(trial)
            yield {name: trial.suggest_float(name, low, high) for name, (low, high) in space.items()}

    def tell(point: Point) -> tuple[float, int]:
        value, steps = evaluate(point)
        study.tell(trials[-1], value)
        return value, steps

    return _try(tell, ask(), budget)


def _try(evaluate: Evaluate, points: Iterator[Point], budget: Budget) -> History:
    if budget.seconds is None and budget.steps is None:
        raise ValueError("budget: expected seconds or steps, got neither")
    clock = measure.clock_for(torch.get_num_threads())
    history, start, taken = History(), clock(), 0
    for point in points:
        value, steps = evaluate(point)
        taken += steps
        history.points.append(point)
        history.values.append(value)
        history.seconds.append(clock() - start)
        history.steps.append(taken)
        late = budget.seconds is None or history.seconds[-1] >= budget.seconds
        if late and (budget.steps is None or taken + steps > budget.steps):
            break
    return history
