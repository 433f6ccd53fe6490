"""One L2 penalty per weight, tuned by hypergradients: as many hyperparameters as weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import hypergrad_ext as hg
from hypergrad_ext.demo import classifier
from hypergrad_ext.demo.classifier import Score
from hypergrad_ext.demo.data import Examples, Split
from hypergrad_ext.demo.tables import table

TRAIN, VALIDATION = 200, 600
GRID = [float(log_penalty) for log_penalty in range(-14, 0)]


@dataclass(frozen=True)
class Tuning:
    """What tuning did.

    Attributes:
        sizes: Number of training, validation and test examples.
        log_penalty: The best single penalty of the grid, where tuning starts.
        validation: Score after every outer step; the first is that of the best single penalty.
        test: The same on the test set, which nothing was chosen by.
        pooled: Test score of the best single penalty, trained on training and validation set together.
        weights: Number of weights, and of hyperparameters.
        hvps: Hessian-vector products of all outer steps.
        gradient: Largest entry of the inner gradient at any hypergradient: how far from a minimum it was.
        seconds: Time of the outer steps.
    """

    sizes: tuple[int, int, int]
    log_penalty: float
    validation: list[Score]
    test: list[Score]
    pooled: Score
    weights: int
    hvps: int
    gradient: float
    seconds: float


def penalised(w: Tensor, data: Examples, log_penalty: Tensor) -> Tensor:
    r"""Training loss: cross-entropy plus :math:`\sum_i e^{\lambda_i} w_i^2`."""
    return classifier.loss(w, data) + (log_penalty.exp() * w.square()).sum()


def best_single(data: Split) -> tuple[float, Tensor]:
    """The single penalty of the grid with the least validation loss, and its weights."""
    tried = []
    for log_penalty in GRID:
        w = classifier.zero_weights()
        classifier.fit(partial(penalised, w, data.train, torch.full_like(w, log_penalty)), [w])
        tried.append((classifier.score(w, data.validation).loss, log_penalty, w))
    _, log_penalty, best = min(tried, key=lambda entry: entry[0])
    return log_penalty, best


def tune(data: Split, *, steps: int = 25, lr: float = 0.1) -> Tuning:
    """Start from the best single penalty and give every weight its own.

    Args:
        data: Training, validation and test set.
        steps: Outer steps. The validation loss keeps falling with more of them, but after 20 to 40 the
            penalties overfit the validation set and the test loss rises again.
        lr: Step size of Adam on the logarithms of the penalties.

    Returns:
        Scores before, on the way, and after.
    """
    log_penalty, w = best_single(data)
    lam = torch.full_like(w, log_penalty, requires_grad=True)
    outer = hg.HyperOptimizer(torch.optim.Adam([lam], lr=lr), w, hg.CG(tol=1e-3))
    validation, test = [classifier.score(w, data.validation)], [classifier.score(w, data.test)]
    hvps, worst, start = 0, 0.0, time.perf_counter()
    for _ in tqdm(range(steps), desc="penalties", unit="step", disable=None):
        worst = max(worst, classifier.fit(lambda: penalised(w, data.train, lam.detach()), [w]))
        hvps += outer.step(classifier.loss(w, data.validation), penalised(w, data.train, lam)).solution.hvps
        classifier.fit(lambda: penalised(w, data.train, lam.detach()), [w])
        validation.append(classifier.score(w, data.validation))
        test.append(classifier.score(w, data.test))
    seconds = time.perf_counter() - start

    both, pooled = data.train + data.validation, classifier.zero_weights()
    classifier.fit(lambda: penalised(pooled, both, torch.full_like(pooled, log_penalty)), [pooled])
    return Tuning(
        sizes=(len(data.train), len(data.validation), len(data.test)),
        log_penalty=log_penalty,
        validation=validation,
        test=test,
        pooled=classifier.score(pooled, data.test),
        weights=w.numel(),
        hvps=hvps,
        gradient=worst,
        seconds=seconds,
    )


def describe(result: Tuning) -> str:
    """The result as a table with its settings."""
    train, validation, test = result.sizes
    steps = len(result.test) - 1

    def cells(score: Score | None) -> list[str]:
        return ["-", "-"] if score is None else [f"{score.loss:.3f}", f"{score.accuracy:.1%}"]

    rows = [
        ["before: best single penalty", *cells(result.validation[0]), *cells(result.test[0])],
        [f"after: one penalty per weight, {steps} steps", *cells(result.validation[-1]), *cells(result.test[-1])],
        ["for scale: single penalty, trained on both sets", *cells(None), *cells(result.pooled)],
    ]
    header = ["", "val. loss", "val. acc.", "test loss", "test acc."]
    return "\n".join(
        [
            f"  Softmax regression, {train} training, {validation} validation and {test} test images.",
            f"  {result.weights} weights = {result.weights} hyperparameters, {steps} outer steps, {result.hvps} "
            f"Hessian-vector products, {result.seconds:.1f} s.",
            f"  Single penalty: best of {len(GRID)} on the validation set, e^{result.log_penalty:g}. "
            f"Inner gradient: at most {result.gradient:.0e}.",
            "",
            table(header, rows),
            "",
            "  The penalties were tuned on the validation set, so judge by the test set. The last row uses the",
            "  validation images as training data instead.",
        ]
    )
