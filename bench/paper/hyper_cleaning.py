"""Hyper-cleaning: one weight per training example, learnt so that what is left trains well on a clean validation set.

Half of the training labels are replaced by random ones. The inner loss is mean(sigmoid(lam_i) CE_i) + l2 |w|^2, the
outer one the cross-entropy on clean validation examples. The full MNIST setting is that of benchopt's benchmark_bilevel
(20,000 training, 5,000 validation and 10,000 test images, standardised pixels, no intercept, penalty 0.2, half of the
labels redrawn). Differences: batches are the whole set and not 64 examples, inner steps are Nesterov's, the outer
optimiser is Adam, splits and corruption are drawn by another generator, and all examples start at lam = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import hypergrad_ext as hg
from bench.paper import cli, figures
from bench.paper.experiment import Claim, Experiment, Job, Record, Report, Settings, Stopwatch, accuracy
from bench.paper.noisy import auc, corrupted, curves, ranks
from bench.paper.store import Results
from hypergrad_ext.demo.data import CLASSES, Examples

# Neumann's alpha is found by itself; CG solves to one percent.
SOLVERS = {
    "identity": hg.Identity(),
    "Neumann 10": hg.Neumann(steps=10),
    "CG": hg.CG(tol=1e-2, max_steps=100),
}


@dataclass(frozen=True)
class Protocol:
    """Sizes and steps; the inner step size suits the largest eigenvalue of standardised pixels."""

    train: int
    validation: int
    test: int | None
    hyper_steps: int
    inner_steps: int = 5
    lr: float = 0.03
    momentum: float = 0.9
    outer_lr: float = 0.2
    ratio: float = 0.5
    l2: float = 0.2


def protocol(settings: Settings) -> Protocol:
    """The protocol for a data set."""
    if settings.data == "digits" or settings.quick:
        # So few pixels leave no room for cleaning under the penalty of 0.2: wrong labels then hardly cost accuracy.
        test = None if settings.data == "digits" else 2000
        return Protocol(train=1000, validation=200, test=test, hyper_steps=60, l2=0.01)
    return Protocol(train=20000, validation=5000, test=None, hyper_steps=30)


def arms(protocol: Protocol) -> list[str]:
    """Without cleaning, with what cannot be had, and by three inverses."""
    return ["no cleaning", "right labels only", *SOLVERS]


def run(job: Job) -> Record:
    """Train the weights, and the weights of the examples between."""
    p: Protocol = job.protocol
    noisy = corrupted(job, train=p.train, validation=p.validation, test=p.test, ratio=p.ratio)
    train, validation, test = noisy.split.train, noisy.split.validation, noisy.split.test
    # (classes, pixels): the gradient of the other layout takes MKL five times as long.
    w = torch.zeros(CLASSES, train.x.shape[1], device=job.device, requires_grad=True)
    lam = torch.zeros(p.train, device=job.device, requires_grad=True)
    solver = SOLVERS.get(job.arm)
    fixed = noisy.right.float() if job.arm == "right labels only" else torch.ones_like(lam)
    inner = torch.optim.SGD([w], lr=p.lr, momentum=p.momentum, nesterov=True)
    outer = torch.optim.Adam([lam], lr=p.outer_lr)
    seconds, errors, areas = [], [], []
    watch = Stopwatch(job.device)
    for step in job.steps(p.hyper_steps + 1):
        watch.stop()
        seconds.append(watch.seconds)
        errors.append(1 - accuracy(linear(test.x, w.detach()), test.y))
        areas.append(auc(lam.detach(), noisy.right) if solver else None)
        watch.start()
        for _ in range(p.inner_steps if step < p.hyper_steps else 0):
            (w.grad,) = torch.autograd.grad(_train_loss(w, train, lam.detach().sigmoid() if solver else fixed, p), w)
            inner.step()
        if solver and step < p.hyper_steps:
            lam.grad = hg.hypergradient(
                cross_entropy(linear(validation.x, w), validation.y),
                _train_loss(w, train, lam.sigmoid(), p),
                w,
                lam,
                solver,
            )
            outer.step()
    record: Record = {"seconds": seconds, "error": errors, "auc": areas if solver else None}
    if solver:
        weights = lam.detach().sigmoid()
        record |= {"right": _histogram(weights[noisy.right]), "wrong": _histogram(weights[~noisy.right])}
    return record


def _train_loss(w: Tensor, data: Examples, weights: Tensor, p: Protocol) -> Tensor:
    return (weights * cross_entropy(linear(data.x, w), data.y, reduction="none")).mean() + p.l2 * w.square().sum()


def _histogram(weights: Tensor) -> list[float]:
    """Shares of examples by weight, in 20 bins between 0 and 1."""
    return (torch.histc(weights.cpu(), 20, 0, 1) / len(weights)).tolist()


def report(results: Results) -> Report:
    """Test error over time, and how the weights separate."""
    rows = []
    for arm in results.arms:
        rows.append(
            {
                "arm": arm,
                "test error": f"{results.last(arm, 'error'):.4f}",
                "AUC right/wrong": f"{results.last(arm, 'auc'):.4f}" if arm in SOLVERS else "-",
                "seconds": f"{results.last(arm, 'seconds'):.1f}",
            }
        )
    legend = "AUC right/wrong: how well the learnt weights tell right labels from wrong ones; 1 is perfectly, 0.5 not."
    return Report(rows, _claims(results), {"error": _figure(results)}, legend)


def _claims(results: Results) -> list[Claim]:
    errors = {arm: results.last(arm, "error") for arm in results.arms}
    areas = {arm: results.last(arm, "auc") for arm in SOLVERS}
    cleaned = [errors[arm] for arm in SOLVERS]
    return [
        Claim(
            "one weight per example, 50 % corrupted labels: better than no cleaning",
            f"test error {', '.join(f'{arm} {errors[arm]:.3f}' for arm in SOLVERS)}; "
            f"without {errors['no cleaning']:.3f}, right labels only {errors['right labels only']:.3f}",
            max(cleaned) < errors["no cleaning"],
        ),
        ranks(results, list(SOLVERS)),
        Claim(
            "a better inverse gives a better hypergradient (CG against identity)",
            f"test error {errors['CG']:.3f} against {errors['identity']:.3f}, AUC {areas['CG']:.3f} against "
            f"{areas['identity']:.3f}",
            errors["CG"] < errors["identity"] and areas["CG"] > areas["identity"],
        ),
    ]


def _figure(results: Results) -> object:
    figure = figures.figure(
        3,
        f"{results.data}, {results.protocol.train} training examples, half of the labels redrawn, "
        f"{figures.seeds(results.settings.seeds)}. Grey: training on everything, and on the right labels alone; if "
        "wrong labels cost accuracy at all, cleaning ends between them. Middle: how well the weights rank right above "
        "wrong labels (0.5 is chance). Right: the weights at the end.",
    )
    left, middle, right = figure.subplots(1, 3)
    curves(left, middle, results, list(SOLVERS), lambda arm: results.values(arm, "seconds").mean(0))
    for key, colour in (("right", "C2"), ("wrong", "C3")):
        share = results.values("CG", key).mean(0)
        edges = torch.linspace(0, 1, len(share) + 1).tolist()
        right.stairs(share, edges, fill=True, alpha=0.5, color=colour, label=f"{key} label")
    first = min(results.values(arm, "seconds")[:, 1].mean() for arm in results.arms)
    for axis in (left, middle):
        axis.set(xlabel="seconds of training and tuning", xscale="log")
        axis.set_xlim(left=first / 2)
    right.set(title="learnt weights (CG)", xlabel="weight sigmoid(lam)", ylabel="share of examples per bin")
    right.grid(alpha=0.3)
    right.legend(fontsize="small")
    return figure


EXPERIMENT = Experiment(
    name="hyper_cleaning",
    about="One learnt weight per training example when half of the labels are wrong (as in benchmark_bilevel).",
    protocol=protocol,
    arms=arms,
    run=run,
    report=report,
    seeds=3,
    quick_seeds=3,
)

if __name__ == "__main__":
    raise SystemExit(cli.main(only=EXPERIMENT))
