"""Which text, which model, how long: the protocols, and a run of any method under one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.paper.lstm import text
from bench.paper.lstm.graphs import Graphed
from bench.paper.lstm.stn import SelfTuning
from bench.paper.lstm.training import Run, Setting
from bench.paper.lstm.trials import SAMPLERS, Search

METHODS = ("none", "fixed", "seven", "many", "identity", "stn", *SAMPLERS)


@dataclass(frozen=True)
class Protocol(Setting):
    """A setting, and how long each method may take: seconds or inner steps, whichever is given.

    Args:
        methods: Those to compare, separated by commas.
        seconds: Of each method: CPU seconds of one thread where there is one, else by the clock on the wall.
        steps: Inner steps of each method.
        trials: Equal shares of it for each point of a search.
    """

    methods: str = ",".join(METHODS)
    seconds: float | None = None
    steps: int | None = None
    trials: int = 8

    def over(self, seconds: float, step: int, share: float = 1.0) -> bool:
        """Whether a share of the budget is spent."""
        return (self.seconds is not None and seconds >= share * self.seconds) or (
            self.steps is not None and step >= share * self.steps
        )


# 86 thousand weights on Python's help pages: two minutes a method. The embedding's start makes the model overfit: else
# there is little to tune.
SMALL = Protocol(
    units=48,
    embedding="normal",
    batch=20,
    eval_batch=20,
    bptt=12,
    optimiser="adam",
    rate=3e-3,
    clip=1.0,
    drop_after=None,
    stop_after=None,
    evaluate_every=100,
    dropout=0.2,
    many_penalties=True,
    hyper_rate=1e-2,
    hyper_every=4,
    hyper_after=50,
    steps=4900,
    trials=4,
)
# A text of millions of words on a CPU: 700 thousand weights for 10,000 words.
MEDIUM = Protocol(
    units=64,
    batch=20,
    eval_batch=40,
    bptt=20,
    optimiser="adam",
    rate=4e-3,
    clip=1.0,
    stop_after=None,
    evaluate_every=300,
    hyper_rate=0.1,
    hyper_every=10,
    hyper_after=50,
    seconds=600.0,
    methods="none,fixed,seven,many,identity,random",
    trials=3,
)
# The paper's 13 million weights, for a GPU; a call may stop in the middle and the next one goes on.
FULL = Protocol(seconds=1800.0, methods="none,fixed,seven,many,identity,random,bayesian,stn")


def make(corpus: text.Corpus, protocol: Protocol, method: str, seed: int) -> Run | Search:
    """A method that has not begun.

    Raises:
        ValueError: If there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {method!r}")
    if method in SAMPLERS:
        share = 1 / protocol.trials
        return Search(corpus, protocol, method, seed, lambda seconds, step: protocol.over(seconds, step, share))
    if method == "identity":
        protocol = replace(protocol, neumann_steps=0)
    kind = SelfTuning if method == "stn" else Graphed if protocol.cuda_graphs else Run
    return kind(corpus, protocol, method, seed)


def train(run: Run | Search, protocol: Protocol, each_step: Callable[[], object], say: Callable[[str], object]) -> None:
    """Advance until the budget is spent."""
    while not run.finished and not protocol.over(run.seconds, run.step):
        point = run.advance()
        if point:
            hyper = " ".join(f"{name} {value:.2g}" for name, value in point.hyper.items())
            say(
                f"{run.method}: {point.seconds:.0f} s, step {point.step}, perplexity of training {point.train:.1f}, "
                f"of validation {point.valid:.1f}, best {run.best_valid:.1f}; {hyper}"
            )
        each_step()


def record(run: Run | Search) -> dict[str, Any]:
    """What a run found: its curve, and the perplexities of the best weights."""
    names = run.curve[-1].hyper if run.curve else {}
    return {
        "seconds": [point.seconds for point in run.curve],
        "step": [point.step for point in run.curve],
        "train": [point.train for point in run.curve],
        "valid": [point.valid for point in run.curve],
        **{f"hyper_{name}": [point.hyper.get(name) for point in run.curve] for name in names},
        "best_valid": run.best_valid,
        "test": run.test(),
        "steps": run.step,
        "total_seconds": run.seconds,
        "failed_solves": run.failed_solves,
    }
