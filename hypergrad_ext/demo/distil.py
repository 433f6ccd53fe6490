"""Dataset distillation: ten images, one per class, that are a whole training set."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import hypergrad_ext as hg
from hypergrad_ext.demo import classifier
from hypergrad_ext.demo.data import CLASSES, PIXELS, Examples, Split
from hypergrad_ext.demo.tables import table

VALIDATION = 1400
PENALTY = 0.0183
WEAK_PENALTY = 1e-4


@dataclass(frozen=True)
class Distillation:
    """What distillation made of the digits; all accuracies are on the test set, after training from scratch.

    Attributes:
        images: The ten distilled images, ``(10, 64)``; pixels may be negative.
        means: The mean image of every class, for comparison.
        validation: Validation loss at every outer step.
        retrained: Accuracy of the images at every outer step.
        random: Of ten random real images, one per class, for every draw.
        mean: Of the class means.
        full: Of all real images, with the same penalty.
        full_weak: Of all real images, with a penalty that suits so many.
        sizes: Number of real images to distil, and of test images.
        hvps: Hessian-vector products of all outer steps.
        seconds: Time of the outer steps, training from scratch included.
    """

    images: Tensor
    means: Tensor
    validation: list[float]
    retrained: list[float]
    random: list[float]
    mean: float
    full: float
    full_weak: float
    sizes: tuple[int, int]
    hvps: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Accuracy of the final images."""
        return self.retrained[-1]


def penalised(w: Tensor, data: Examples, penalty: float = PENALTY) -> Tensor:
    """Training loss: cross-entropy plus a fixed L2 penalty, which keeps the inner minimum unique."""
    return classifier.loss(w, data) + penalty * w.square().sum()


def one_per_class(images: Tensor) -> Examples:
    """Ten images with their labels 0 to 9."""
    return Examples(images, torch.arange(CLASSES))


def retrained_accuracy(data: Examples, test: Examples, penalty: float = PENALTY) -> float:
    """Test accuracy of a model that starts at zero and has seen ``data`` only."""
    w = classifier.zero_weights()
    classifier.fit(lambda: penalised(w, data, penalty), [w])
    return classifier.score(w, test).accuracy


def random_images(data: Examples, generator: torch.Generator) -> Tensor:
    """One real image per class, drawn at random."""
    members = [data.x[data.y == label] for label in range(CLASSES)]
    return torch.stack([x[torch.randint(len(x), (), generator=generator)] for x in members])


def class_means(data: Examples) -> Tensor:
    """The mean image of every class."""
    return torch.stack([data.x[data.y == label].mean(0) for label in range(CLASSES)])


def distil(data: Split, *, seed: int = 0, steps: int = 120, lr: float = 0.02, draws: int = 20) -> Distillation:
    """Learn ten images, from black, such that training on them alone does well on all real ones.

    Args:
        data: The validation set holds the real images to distil; the training set is not used.
        seed: Seed of the random real images.
        steps: Outer steps.
        lr: Step size of Adam on the pixels.
        draws: Number of random choices of ten real images to compare with.

    Returns:
        The images and what they are worth.
    """
    images = torch.zeros(CLASSES, PIXELS, dtype=torch.float64, requires_grad=True)
    w = classifier.zero_weights()
    outer = hg.HyperOptimizer(torch.optim.Adam([images], lr=lr), w, hg.CG(tol=1e-3))
    validation, retrained, hvps, start = [], [], 0, time.perf_counter()
    for step in tqdm(range(steps + 1), desc="distillation", unit="step", disable=None):
        classifier.fit(lambda: penalised(w, one_per_class(images.detach())), [w])
        retrained.append(retrained_accuracy(one_per_class(images.detach()), data.test))
        val_loss = classifier.loss(w, data.validation)
        validation.append(float(val_loss.detach()))
        if step == steps:
            break
        hvps += outer.step(val_loss, penalised(w, one_per_class(images))).solution.hvps
    seconds = time.perf_counter() - start

    generator, means = torch.Generator().manual_seed(seed), class_means(data.validation)
    return Distillation(
        images=images.detach(),
        means=means,
        validation=validation,
        retrained=retrained,
        random=[
            retrained_accuracy(one_per_class(random_images(data.validation, generator)), data.test)
            for _ in range(draws)
        ],
        mean=retrained_accuracy(one_per_class(means), data.test),
        full=retrained_accuracy(data.validation, data.test),
        full_weak=retrained_accuracy(data.validation, data.test, WEAK_PENALTY),
        sizes=(len(data.validation), len(data.test)),
        hvps=hvps,
        seconds=seconds,
    )


def describe(result: Distillation) -> str:
    """The result as a table with its settings."""
    real, test = result.sizes
    draws = torch.tensor(result.random)
    rows = [
        [
            f"ten random real images (mean of {len(draws)} draws, sd {float(draws.std()):.1%})",
            f"{float(draws.mean()):.1%}",
        ],
        ["ten class means", f"{result.mean:.1%}"],
        ["ten distilled images", f"{result.accuracy:.1%}"],
        [f"all {real} real images", f"{result.full:.1%}"],
        [f"all {real} real images, L2 penalty {WEAK_PENALTY:g}", f"{result.full_weak:.1%}"],
    ]
    return "\n".join(
        [
            f"  Softmax regression with L2 penalty {PENALTY}; {CLASSES} x {PIXELS} = {CLASSES * PIXELS} pixels are the "
            "hyperparameters,",
            f"  {len(result.validation) - 1} outer steps against {real} real images, {result.hvps} Hessian-vector "
            f"products, {result.seconds:.1f} s.",
            f"  Every row is a model trained from scratch on nothing but the images named; {test} test images.",
            "",
            table(["training set", "test accuracy"], rows),
        ]
    )
