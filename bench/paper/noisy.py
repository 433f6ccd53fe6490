"""Training sets in which many labels are wrong, how well weights of examples tell which, and the figure of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from torch import Tensor

from bench.paper import figures
from bench.paper.experiment import Claim, Job
from bench.paper.store import Results
from hypergrad_ext.demo.data import CLASSES, Examples, Split


@dataclass(frozen=True)
class Noisy:
    """A split whose training labels are partly wrong, as standardised rows of pixels.

    Attributes:
        split: Training labels as given, validation and test labels right; pixels ``(n, d)`` standardised by the
            training set's mean and deviation.
        right: Whether a training label is right, ``(n,)``.
    """

    split: Split
    right: Tensor


def corrupted(job: Job, *, train: int, validation: int, test: int | None, ratio: float) -> Noisy:
    """Draw a split and replace a share of the training labels by random ones, of which a tenth is right by chance."""
    split = job.images().split(job.seed, train=train, validation=validation, test=test).map(lambda part: part.flat())
    generator = torch.Generator().manual_seed(job.seed)
    hit = torch.rand(train, generator=generator) < ratio
    y = torch.where(hit, torch.randint(CLASSES, (train,), generator=generator), split.train.y)
    right = y == split.train.y
    mean, deviation = split.train.x.mean(0), split.train.x.std(0, correction=0)
    deviation[deviation == 0] = 1
    split = Split(Examples(split.train.x, y), split.validation, split.test)
    split = split.map(lambda part: Examples((part.x - mean) / deviation, part.y).to(job.device))
    return Noisy(split, right.to(job.device))


def auc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive example has a larger score than a negative one; ties count one half."""
    _, rank, count = torch.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (count.cumsum(0) - (count - 1) / 2).double()[rank]
    p, n = int(positive.sum()), int((~positive).sum())
    return float((mean_rank[positive].sum() - p * (p + 1) / 2) / (p * n))


def ranks(results: Results, arms: Sequence[str]) -> Claim:
    """That the weights of these arms tell right from wrong labels."""
    areas = {arm: results.last(arm, "auc") for arm in arms}
    found = ", ".join(f"{arm} {area:.3f}" for arm, area in areas.items())
    return Claim("learnt weights tell right from wrong labels", f"AUC {found}", min(areas.values()) >= 0.8)


def curves(
    error: Axes, ranking: Axes, results: Results, weighing: Sequence[str], across: Callable[[str], Sequence[float]]
) -> None:
    """Draw the test error of all arms over what ``across`` gives for them, and the AUC of those that weigh examples."""
    greys = iter(("--", ":"))
    for i, arm in enumerate(results.arms):
        style = {"color": f"C{i}"} if arm in weighing else {"color": "C7", "linestyle": next(greys)}
        figures.band(error, across(arm), results.values(arm, "error"), arm, **style)
        if arm in weighing:
            figures.band(ranking, across(arm), results.values(arm, "auc"), arm, **style)
    error.set(title="test error", ylabel="share of test images misclassified", yscale="log")
    figures.plain_ticks(error.yaxis)
    ranking.set(title="ranking of the labels", ylabel="AUC, right against wrong labels")
    for axis in (error, ranking):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
