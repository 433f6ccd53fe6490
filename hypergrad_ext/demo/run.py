"""The three parts in order: results on the terminal, figures in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

import hypergrad_ext as hg
from hypergrad_ext.demo import distil, figures, networks, penalties, timing
from hypergrad_ext.demo.data import digits


def run(out: Path, *, seed: int = 0, quick: bool = False) -> None:
    """Print three tables and write two figures.

    Args:
        out: Folder for the figures; it must exist.
        seed: Seed of the data splits, of the networks and of the random baselines.
        quick: Smaller settings, for tests.
    """
    # Models of a few hundred weights run several times faster on one thread than on two.
    torch.set_num_threads(1)
    print("(a) Regularisation: one L2 penalty per weight, tuned by hypergradients\n", flush=True)
    tuning = tuned_penalties(seed, quick)
    print(penalties.describe(tuning))
    print("\n(b) Dataset distillation: one image per class, learned through training\n", flush=True)
    distillation = distilled_digits(seed, quick)
    print(distil.describe(distillation))
    print("\n(c) What one hypergradient costs, and how exact it is\n", flush=True)
    print(timing.describe(timed_hypergradients(seed, quick)))
    print()
    for name, figure in (
        ("curves.png", figures.curves(tuning, distillation)),
        ("distilled.png", figures.distilled(distillation)),
    ):
        figure.savefig(out / name, dpi=150)
        print(f"wrote {out / name}")


def tuned_penalties(seed: int, quick: bool) -> penalties.Tuning:
    """Part (a)."""
    data = digits(seed, train=penalties.TRAIN, validation=penalties.VALIDATION)
    return penalties.tune(data, steps=8 if quick else 25)


def distilled_digits(seed: int, quick: bool) -> distil.Distillation:
    """Part (b)."""
    data = digits(seed, train=0, validation=distil.VALIDATION)
    return distil.distil(data, seed=seed, steps=40 if quick else 120, draws=5 if quick else 20)


def timed_hypergradients(seed: int, quick: bool) -> list[timing.Comparison]:
    """Part (c): a network whose Hessian can be inverted densely, and one of many small layers."""
    data = digits(seed, train=300, validation=300)
    width, depth, narrow = (16, 8, 16) if quick else (64, 20, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shallow, deep = networks.shallow(width), networks.deep(depth, narrow)
    rounds, deep_rounds = (3, 3) if quick else (25, 11)
    return [
        timing.compare(networks.trained(f"MLP 64-{width}-10", shallow, data), hg.Direct(), rounds=rounds),
        timing.compare(
            networks.trained(f"{depth} residual layers of {narrow}", deep, data),
            hg.CG(tol=1e-10, max_steps=2000),
            rounds=deep_rounds,
        ),
    ]
