"""A network that weighs training examples: its weights are the hyperparameters.

Half of the labels are redrawn. The network sees an example's loss (Meta-Weight-Net, Shu et al., NeurIPS 2019), or its
pixels and its label (the paper's code gives it the pixels only, which cannot tell a wrong label), and returns a weight
in (0, 1). It is tuned on clean validation examples, while the student trains on the weighted training loss.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import hypergrad_ext as hg
from bench.paper import cli, figures
from bench.paper.experiment import Claim, Experiment, Job, Record, Report, Settings, accuracy
from bench.paper.noisy import auc, corrupted, curves, ranks
from bench.paper.store import Results
from hypergrad_ext.demo.data import CLASSES, Examples

NETS = {"net of the loss": 1, "net of pixels and label": None}


@dataclass(frozen=True)
class Protocol:
    """Sizes and steps: a student with one hidden layer, full batches, one hyper-step every ``every`` steps."""

    train: int = 1000
    validation: int = 200
    hidden: int = 64
    net_hidden: int = 100
    steps: int = 400
    first: int = 20
    every: int = 4
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3
    outer_lr: float = 0.01
    terms: int = 3
    ratio: float = 0.5


def protocol(settings: Settings) -> Protocol:
    """The protocol for a data set."""
    return Protocol() if settings.data == "digits" or settings.quick else Protocol(train=5000, validation=1000)


def arms(protocol: Protocol) -> list[str]:
    """Equal weights, and two inputs of the network."""
    return ["equal weights", *NETS]


def run(job: Job) -> Record:
    """Train the student, and the network between."""
    p: Protocol = job.protocol
    noisy = corrupted(job, train=p.train, validation=p.validation, test=None, ratio=p.ratio)
    train, validation, test = noisy.split.train, noisy.split.validation, noisy.split.test
    d = train.x.shape[1]
    student = nn.Sequential(nn.Linear(d, p.hidden), nn.Tanh(), nn.Linear(p.hidden, CLASSES)).to(job.device)
    labelled = torch.cat([train.x, one_hot(train.y, CLASSES).float()], 1)
    net = None
    if job.arm in NETS:
        width = NETS[job.arm] or labelled.shape[1]
        net = nn.Sequential(nn.Linear(width, p.net_hidden), nn.ReLU(), nn.Linear(p.net_hidden, 1)).to(job.device)
        outer = torch.optim.Adam(net.parameters(), lr=p.outer_lr)
    inner = torch.optim.SGD(student.parameters(), lr=p.lr, momentum=p.momentum, weight_decay=p.weight_decay)
    solver = hg.Neumann(steps=p.terms, alpha=p.lr, adaptive=True)

    def weights(losses: Tensor) -> Tensor:
        if net is None:
            return torch.ones_like(losses)
        return net(losses.detach()[:, None] if width == 1 else labelled).sigmoid()[:, 0]

    errors, areas, refused = [], [], 0
    for step in job.steps(p.steps + 1):
        losses = cross_entropy(student(train.x), train.y, reduction="none")
        if step % 20 == 0:
            errors.append(1 - accuracy(student(test.x), test.y))
            areas.append(auc(weights(losses).detach(), noisy.right) if net else None)
        inner.zero_grad()
        (weights(losses).detach() * losses).mean().backward()
        inner.step()
        if net is not None and step >= p.first and step % p.every == 0:
            losses = cross_entropy(student(train.x), train.y, reduction="none")
            with warnings.catch_warnings(record=True) as caught:
                # A student in training has negative curvature, along which a series may grow: no step then.
                warnings.simplefilter("always", hg.SolveWarning)
                grads = hg.hypergradient(
                    _loss(student, validation),
                    (weights(losses) * losses).mean(),
                    student,
                    net,
                    solver,
                    damping=p.weight_decay,
                    throw=False,
                )
            refused += len(caught)
            for name, t in net.named_parameters():
                t.grad = grads[name]
            outer.step()
    record: Record = {"error": errors, "auc": areas if net else None, "cut short": refused}
    if net is not None:
        losses = cross_entropy(student(train.x), train.y, reduction="none")
        found = weights(losses).detach()
        record["hyperparameters"] = sum(t.numel() for t in net.parameters())
        record |= {key: float(found[mask].mean()) for key, mask in (("right", noisy.right), ("wrong", ~noisy.right))}
    return record


def _loss(student: nn.Module, data: Examples) -> Tensor:
    return cross_entropy(student(data.x), data.y)


def report(results: Results) -> Report:
    """Test error, and how the weights separate."""
    rows = []
    for arm in results.arms:
        row: dict[str, object] = {"arm": arm, "test error": f"{results.last(arm, 'error'):.4f}"}
        keys = ("AUC right/wrong", "mean weight, right", "mean weight, wrong", "hyperparameters")
        if arm in NETS:
            numbers = [results.last(arm, "auc"), *(results.mean(arm, key) for key in ("right", "wrong"))]
            row |= dict(zip(keys, [*(f"{x:.3f}" for x in numbers), f"{results.mean(arm, keys[3]):.0f}"], strict=True))
        else:
            row |= dict.fromkeys(keys, "-")
        rows.append(row)
    errors = {arm: results.last(arm, "error") for arm in results.arms}
    claims = [
        Claim(
            "a net of weights learns to reweight: better than equal weights at 50 % corrupted labels",
            f"test error {', '.join(f'{arm} {error:.3f}' for arm, error in errors.items())}",
            max(errors[arm] for arm in NETS) < errors["equal weights"],
        ),
        *(ranks(results, [arm]) for arm in NETS),
    ]
    legend = (
        "AUC right/wrong: how well the learnt weights tell right labels from wrong ones; 1 is perfectly, 0.5 not. "
        "Hyperparameters: weights of the net."
    )
    return Report(rows, claims, {"error": _figure(results)}, legend)


def _figure(results: Results) -> object:
    p: Protocol = results.protocol
    figure = figures.figure(
        2,
        f"{results.data}, {p.train} training examples, half of whose labels are redrawn, "
        f"{figures.seeds(results.settings.seeds)}. With equal weights the student learns the wrong labels by heart; a "
        "network that weighs examples, tuned on clean validation examples, keeps it from that.",
    )
    left, right = figure.subplots(1, 2)
    steps = range(0, p.steps + 1, 20)
    curves(left, right, results, list(NETS), lambda arm: steps)
    for axis in (left, right):
        axis.set(xlabel="training step")
    return figure


EXPERIMENT = Experiment(
    name="reweighting",
    about="The weights of a network that weighs training examples as hyperparameters, with half of the labels wrong.",
    protocol=protocol,
    arms=arms,
    run=run,
    report=report,
    seeds=3,
    quick_seeds=3,
)

if __name__ == "__main__":
    raise SystemExit(cli.main(only=EXPERIMENT))
