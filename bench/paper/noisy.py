"""Training sets in which many labels are wrong, and how well weights tell which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.paper.data import CLASSES, Split
from bench.paper.experiment import Job


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
    split = split.map(lambda part: type(part)((part.x - mean) / deviation, part.y).to(job.device))
    return Noisy(Split(type(split.train)(split.train.x, y.to(job.device)), *_rest(split)), right.to(job.device))


def _rest(split: Split) -> tuple:
    return split.validation, split.test


def auc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive example has a larger score than a negative one; ties count one half."""
    _, rank, count = torch.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (count.cumsum(0) - (count - 1) / 2).double()[rank]
    p, n = int(positive.sum()), int((~positive).sum())
    return float((mean_rank[positive].sum() - p * (p + 1) / 2) / (p * n))
