"""How large should the validation set be, with one penalty and with one per weight, and is re-training worth it?

Softmax regression on N examples, a share of which is held out to tune the L2 penalty while the weights are trained on
the rest; afterwards weights may be trained anew on all N with the penalties found. All shares run as one batch: the
losses are summed, so Hessian and hypergradient fall apart into those of every share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

import hypergrad_ext as hg
from bench.paper import cli, figures
from bench.paper.experiment import Claim, Experiment, Job, Record, Report, Settings
from bench.paper.store import Results
from hypergrad_ext.demo.data import CLASSES


@dataclass(frozen=True)
class Protocol:
    """The paper's settings: full-batch SGD with Nesterov momentum, RMSprop outside, identity with alpha = lr."""

    sizes: tuple[int, ...]
    shares: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
    steps: int = 250
    lr: float = 0.1
    momentum: float = 0.9
    outer_lr: float = 0.01
    log_penalty: float = -7.0


def protocol(settings: Settings) -> Protocol:
    """The protocol for a data set."""
    return Protocol(sizes=(300,) if settings.data == "digits" or settings.quick else (100, 300, 1000))


def arms(protocol: Protocol) -> list[str]:
    """One or many penalties, for every N."""
    return [f"{kind}, N={n}" for n in protocol.sizes for kind in ("global", "per weight")]


def run(job: Job) -> Record:
    """Tune at every share at once, and train anew with what was found."""
    p: Protocol = job.protocol
    kind, n = job.arm.split(", N=")
    size = int(n)
    split = job.images().split(job.seed, train=size, validation=0).map(lambda part: part.flat().to(job.device))
    x, y = with_bias(split.train.x), one_hot(split.train.y, CLASSES).float()
    held_out = torch.tensor([round(share * size) for share in p.shares], device=job.device)[:, None]
    validation = (torch.arange(size, device=job.device) < held_out).float()
    start = torch.empty(len(p.shares), x.shape[1], CLASSES, device=job.device)
    start[:] = torch.nn.Linear(x.shape[1], CLASSES, bias=False).weight.detach().T.to(job.device)
    shape = start.shape if kind == "per weight" else (len(p.shares), 1, 1)
    lam = torch.full(shape, p.log_penalty, device=job.device, requires_grad=True)

    w = _train(job, start, x, y, 1 - validation, lam, validation)
    again = _train(job, start, x, y, torch.ones_like(validation), lam.detach())

    def accuracies(w: Tensor) -> list[float]:
        right = _logits(w, with_bias(split.test.x)).argmax(2) == split.test.y
        return right.double().mean(1).tolist()

    return {"before": accuracies(w), "after": accuracies(again), "log_penalty": lam.detach().mean((1, 2)).tolist()}


def with_bias(x: Tensor) -> Tensor:
    """Rows of pixels and a one."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _logits(w: Tensor, x: Tensor) -> Tensor:
    """``(shares, n, classes)`` from ``w``, ``(shares, d, classes)``, by one product."""
    shares, d, classes = w.shape
    return (x @ w.transpose(0, 1).reshape(d, -1)).view(len(x), shares, classes).transpose(0, 1)


def _loss(w: Tensor, x: Tensor, y: Tensor, used: Tensor) -> Tensor:
    """Mean cross-entropy over the examples that a share uses, summed over the shares."""
    logits = _logits(w, x)
    each = logits.logsumexp(2) - (logits * y).sum(2)
    return ((used * each).sum(1) / used.sum(1).clamp(min=1)).sum()


def _train(
    job: Job, start: Tensor, x: Tensor, y: Tensor, used: Tensor, lam: Tensor, validation: Tensor | None = None
) -> Tensor:
    """Weights trained from ``start`` on the examples used; with ``validation``, ``lam`` is tuned on the way."""
    p: Protocol = job.protocol
    w = start.clone().requires_grad_()
    inner = torch.optim.SGD([w], lr=p.lr, momentum=p.momentum, nesterov=True)
    outer = torch.optim.RMSprop([lam], lr=p.outer_lr)
    for _ in range(p.steps):
        penalised = _loss(w, x, y, used) + (lam.exp() * w.square()).sum()
        (w.grad,) = torch.autograd.grad(penalised, w)
        inner.step()
        if validation is not None:
            train_loss = _loss(w, x, y, used) + (lam.exp() * w.square()).sum()
            lam.grad = hg.hypergradient(_loss(w, x, y, validation), train_loss, w, lam, hg.Identity(alpha=p.lr))
            outer.step()
    return w.detach()


def report(results: Results) -> Report:
    """Accuracy over the share, and where it is best."""
    p: Protocol = results.protocol
    rows, best = [], {}
    for arm in results.arms:
        for key in ("before", "after"):
            means = results.values(arm, key).mean(0)
            row: dict[str, object] = {"arm": arm, "re-training": key}
            row |= {f"{share:.0%}": f"{mean:.3f}" for share, mean in zip(p.shares, means, strict=True)}
            best[arm, key] = _best_share(p.shares, means)
            rows.append({**row, "best share > 0": f"{best[arm, key]:.0%}"})
    legend = (
        "Test accuracy by the share of N examples that is held out; 0% tunes nothing. Re-training: before or after "
        "training anew on all N with the penalties found."
    )
    return Report(rows, _claims(results, best), {"shares": _figure(results)}, legend)


def _best_share(shares: Sequence[float], means: np.ndarray) -> float:
    held = [i for i, share in enumerate(shares) if share > 0]
    return shares[max(held, key=lambda i: means[i])]


def _claims(results: Results, best: dict[tuple[str, str], float]) -> list[Claim]:
    p: Protocol = results.protocol
    one = {n: best[f"global, N={n}", "before"] for n in p.sizes}
    many = {n: best[f"per weight, N={n}", "before"] for n in p.sizes}
    kinds = ("global", "per weight")
    at_most = [float(results.values(f"{kind}, N={p.sizes[-1]}", "before")[:, -1].mean()) for kind in kinds]
    both = ("before", "after")
    change = {kind: [tuple(best[f"{kind}, N={n}", key] for key in both) for n in p.sizes] for kind in kinds}

    least = min(share for share in p.shares if share > 0)
    means = {n: results.values(f"global, N={n}", "before").mean(0) for n in p.sizes}
    gains = {n: found[p.shares.index(one[n])] - found[p.shares.index(0.0)] for n, found in means.items()}

    def shares(found: dict[int, float]) -> str:
        return ", ".join(f"{share:.0%} (N={n})" for n, share in found.items())

    return [
        Claim(
            "one hyperparameter: a validation share of about 10 % is best",
            f"{shares(one)} of those above 0, of which {least:.0%} is the least tried; against 0%, untuned, "
            + ", ".join(f"{gain:+.3f}" for gain in gains.values()),
            all(one[n] <= 0.1 and gains[n] > 0 for n in p.sizes),
        ),
        Claim(
            "one per weight: 25-50 % is best, and more than for one",
            shares(many),
            all(0.25 <= many[n] <= 0.5 and many[n] > one[n] for n in p.sizes),
        ),
        Claim(
            f"one per weight uses a large validation set better (N={p.sizes[-1]}, share {p.shares[-1]:.0%})",
            f"accuracy {at_most[1]:.3f} against {at_most[0]:.3f}",
            at_most[1] >= at_most[0] + 0.08,
        ),
        Claim(
            "re-training on all data moves the best share only with many",
            "; ".join(f"{kind}: {', '.join(f'{a:.0%} -> {b:.0%}' for a, b in change[kind])}" for kind in kinds),
            all(a == b for a, b in change["global"]) and any(a != b for a, b in change["per weight"]),
        ),
    ]


def _figure(results: Results) -> object:
    p: Protocol = results.protocol
    figure = figures.figure(
        len(p.sizes),
        f"{figures.seeds(results.settings.seeds)}. Solid: weights as tuned; dashed: trained anew on all N "
        "examples with the penalties found. One penalty gains nothing from a larger validation share and loses "
        "training examples; one per weight makes up for part of them. After training anew the share matters little.",
        width=5.6 if len(p.sizes) == 1 else 4.6,
        height=4.2,
    )
    for axis, n in zip(figure.subplots(1, len(p.sizes), squeeze=False)[0], p.sizes, strict=True):
        for colour, kind in zip(("C0", "C1"), ("global", "per weight"), strict=True):
            for key, style, title in (("before", "-", "as tuned"), ("after", "--", "re-trained")):
                seeds = results.values(f"{kind}, N={n}", key)
                penalties = "one penalty" if kind == "global" else "one per weight"
                figures.band(axis, p.shares, seeds, f"{penalties}, {title}", color=colour, linestyle=style, marker="o")
        axis.set(title=f"{results.data}, N = {n}", xlabel="share of the N examples held out", ylabel="test accuracy")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower left")
    return figure


EXPERIMENT = Experiment(
    name="split_study",
    about="How large should the validation share be, with one and with many hyperparameters (Fig. 9)?",
    protocol=protocol,
    arms=arms,
    run=run,
    report=report,
    seeds=6,
    quick_seeds=6,
)

if __name__ == "__main__":
    raise SystemExit(cli.main(only=EXPERIMENT))
