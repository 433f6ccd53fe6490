"""Hypergradients against unrolling and against search, at equal time and at equal inner steps.

Softmax regression on few examples with L2 penalties between e^-9 and 1. Search tries values, each by training from
zero. Hypergradients move the penalties between steps of one training. Whatever was found is judged by training from
zero with it, for longer than any of them did. The clock counts all work, the inner steps only steps of training: an
unrolled step is one, a Hessian-vector product is none; the Neumann series runs on the fused product of this model.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypergrad_ext as hg
from bench.paper import figures, models, search
from bench.paper.cli import main
from bench.paper.experiment import Claim, Experiment, Job, Record, Report, Settings, Stopwatch, accuracy, peak_bytes
from bench.paper.store import Results
from hypergrad_ext.demo.data import CLASSES, Examples, Split

MEMORY = "memory"
_UNROLLED = (1, 3, 10)


@dataclass(frozen=True)
class Protocol:
    """The numbers; an arm is a method and how many penalties it tunes: 1, one per class, or one per weight (many)."""

    arms: tuple[str, ...]
    max_steps: int
    max_seconds: float
    train: int = 100
    validation: int = 400
    bounds: tuple[float, float] = (-9.0, 0.0)
    start: float = -4.0
    lr: float = 0.5
    inner_steps: int = 5
    cold_steps: int = 200
    judged_by: int = 1000
    outer_lr: float = 0.05
    terms: int = 20
    per_axis: int = 10


def protocol(settings: Settings) -> Protocol:
    arms = ["Neumann, many", "identity, many", "truncated unrolling, many", "unrolling, many", "Neumann, 1"]
    arms += ["grid, 1", "random, 1", "random, 10"]
    # An optional dependency.
    arms += ["Bayesian, 1", "Bayesian, 10"] if search.bayesian_available() else []
    arms.append(MEMORY)
    if settings.quick:
        return Protocol(tuple(arms), max_steps=2000, max_seconds=1.5)
    return Protocol(tuple(arms), max_steps=20_000, max_seconds=20.0)


class Inner:
    """The inner problem: weights and a bias per class, and penalties ``lam`` that broadcast over the weights."""

    def __init__(self, p: Protocol, parts: Split) -> None:
        self.p, self.parts = p, parts

    def zeros(self) -> list[Tensor]:
        """Weights to start from."""
        x = self.parts.train.x
        return [x.new_zeros(*shape).requires_grad_() for shape in ((CLASSES, x.shape[1]), (CLASSES,))]

    def penalties(self, count: str) -> Tensor:
        """Their logarithms: ``1`` for all weights, ``10`` by classes, or ``many``."""
        x = self.parts.train.x
        shape = {"1": (1, 1), "10": (CLASSES, 1), "many": (CLASSES, x.shape[1])}[count]
        return x.new_full(shape, self.p.start).requires_grad_()

    def loss(self, w: list[Tensor], part: Examples) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(torch.addmm(w[1], part.x, w[0].T), part.y)

    def train_loss(self, w: list[Tensor], lam: Tensor) -> Tensor:
        """Cross-entropy on the training set and penalties."""
        return self.loss(w, self.parts.train) + (lam.exp() * w[0].square()).sum()

    def descend(self, w: list[Tensor], lam: Tensor, steps: int) -> None:
        """Steps of gradient descent, in place."""
        optimizer = torch.optim.SGD(w, lr=self.p.lr)
        for _ in range(steps):
            grads = torch.autograd.grad(self.train_loss(w, lam.detach()), w)
            for t, grad in zip(w, grads, strict=True):
                t.grad = grad
            optimizer.step()

    def judged(self, lam: Tensor) -> tuple[float, float]:
        """Validation loss and test accuracy of weights trained from zero for long."""
        w = self.zeros()
        self.descend(w, lam, self.p.judged_by)
        with torch.no_grad():
            test = self.parts.test
            return float(self.loss(w, self.parts.validation)), accuracy(torch.addmm(w[1], test.x, w[0].T), test.y)


class Trace:
    """The best that a method has found, over inner steps and seconds, and its penalties at either limit."""

    def __init__(self, p: Protocol, watch: Stopwatch) -> None:
        self.p, self.watch = p, watch
        self.steps, self.best = 0, float("inf")
        self.points: list[list[float]] = []
        self.at: dict[str, Tensor] = {}

    def add(self, steps: int, loss: float, lam: Tensor) -> None:
        """Count inner steps, after which the penalties ``lam`` have this validation loss."""
        self.steps += steps
        seconds = self.watch.seconds
        if loss < self.best:
            self.best, self.lam = loss, lam.detach().clone()
        self.points.append([self.steps, seconds, self.best])
        for key, used, limit in (("steps", self.steps, self.p.max_steps), ("seconds", seconds, self.p.max_seconds)):
            if used <= limit or key not in self.at:
                self.at[key] = self.lam

    @property
    def over(self) -> bool:
        """Whether both limits are reached."""
        return self.steps >= self.p.max_steps and self.points[-1][1] >= self.p.max_seconds


def tune(inner: Inner, method: str, lam: Tensor, trace: Trace) -> None:
    """Move ``lam`` by hypergradients, and the weights between."""
    p = inner.p
    outer, w = torch.optim.Adam([lam], lr=p.outer_lr), inner.zeros()
    solver = hg.Identity(alpha=p.lr) if method == "identity" else hg.Neumann(steps=p.terms, alpha=p.lr)
    steps = {"unrolling": p.cold_steps, "truncated unrolling": p.terms + 1}.get(method, p.inner_steps)
    while not trace.over:
        if method.endswith("unrolling"):
            start = inner.zeros() if method == "unrolling" else w
            w = hg.unroll(lambda w: inner.train_loss(w, lam), start, lam, steps=steps, lr=p.lr)
            loss = inner.loss(w, inner.parts.validation)
            (lam.grad,) = torch.autograd.grad(loss, lam)
            w = [t.detach().requires_grad_() for t in w]
        else:
            inner.descend(w, lam, steps)
            loss = inner.loss(w, inner.parts.validation)
            fused = hg.GLMHessian(inner.parts.train.x, w, "softmax", l2=lam.detach().exp().expand_as(w[0]))
            lam.grad = hg.hypergradient(loss, inner.train_loss(w, lam), w, lam, solver, operator=fused)
        trace.add(steps, float(loss.detach()), lam)
        outer.step()
        lam.data.clamp_(*p.bounds)


def try_out(inner: Inner, method: str, lam: Tensor, trace: Trace, seed: int) -> None:
    """Train from zero with penalties that a search proposes."""
    p = inner.p

    def evaluate(point: search.Point) -> tuple[float, int]:
        tried, w = torch.tensor(list(point.values())).to(lam).view_as(lam), inner.zeros()
        inner.descend(w, tried, p.cold_steps)
        with torch.no_grad():
            loss = float(inner.loss(w, inner.parts.validation))
        trace.add(p.cold_steps, loss, tried)
        return loss, p.cold_steps

    space = {f"penalty {i}": p.bounds for i in range(lam.numel())}
    budget = search.Budget(seconds=p.max_seconds, steps=p.max_steps)
    if method == "grid":
        search.grid_search(evaluate, space, budget, per_axis=p.per_axis)
    else:
        {"random": search.random_search, "Bayesian": search.bayesian_search}[method](evaluate, space, budget, seed=seed)


def run(job: Job) -> Record:
    """One method with both budgets, or the memory that hypergradients take."""
    p = job.protocol
    parts = job.images().split(job.seed, train=p.train, validation=p.validation).map(lambda part: part.to(job.device))
    if job.arm == MEMORY:
        return memory(job, parts)
    inner = Inner(p, parts.map(lambda part: part.flat()))
    method, count = job.arm.split(", ")
    search_for = partial(try_out, seed=job.seed) if method in ("grid", "random", "Bayesian") else tune
    # What is imported or measured at the first call of all is not the method's time.
    once = dataclasses.replace(p, max_steps=1, max_seconds=0.0)
    search_for(Inner(once, inner.parts), method, inner.penalties(count), Trace(once, Stopwatch(job.device)))
    lam, trace = inner.penalties(count), Trace(p, Stopwatch(job.device))
    search_for(inner, method, lam, trace)
    return {
        "points": trace.points[:: max(1, len(trace.points) // 200)],
        "hyperparameters": lam.numel(),
        **{key: inner.judged(found) for key, found in trace.at.items()},
    }


def memory(job: Job, parts: Split) -> Record:
    """Peak bytes of a hypergradient of a CNN with one penalty per weight: i unrolled steps, and i terms of a series."""
    # The forward pass on many validation images would be all that is seen.
    train, validation = parts.train[:50], parts.validation[:50]
    model = models.cnn(job.images().shape).to(job.device)
    lam = models.penalties(model, job.protocol.start)

    def train_loss(params: dict[str, Tensor]) -> Tensor:
        return _cnn_loss(model, params, train) + models.penalty(params.values(), lam)

    def unrolled(steps: int) -> object:
        trained = hg.unroll(train_loss, model, lam, steps=steps, lr=0.01)
        return torch.autograd.grad(_cnn_loss(model, trained, validation), lam)

    def implicit(steps: int) -> object:
        losses = lambda params: _cnn_loss(model, params, validation), train_loss
        # What `auto` may choose keeps a program and its buffers: more, and as constant.
        return hg.hypergradient(*losses, model, lam, hg.Neumann(steps=steps - 1, alpha=0.01), engine="eager")

    def peak(work: Callable[[int], object], steps: int) -> int:
        # The least of three: what is allocated once and kept does not count.
        return min(peak_bytes(job.device, lambda: work(steps)) for _ in range(3))

    works = {"unrolling": unrolled, "Neumann": implicit}
    found = {name: [peak(work, steps) for steps in _UNROLLED] for name, work in works.items()}
    return {**found, "hyperparameters": models.size(model)}


def _cnn_loss(model: torch.nn.Module, params: dict[str, Tensor], part: Examples) -> Tensor:
    return cross_entropy(torch.func.functional_call(model, params, part.x), part.y)


def report(results: Results) -> Report:
    p = results.protocol
    methods = [arm for arm in results.arms if arm != MEMORY]
    rows = []
    for arm in methods:
        steps, seconds = (results.values(arm, key).mean(0) for key in ("steps", "seconds"))
        last = np.mean([record["points"][-1][:2] for record in results.of(arm)], axis=0)
        rows.append(
            {
                "method": arm,
                "hyperparameters": results.of(arm)[0]["hyperparameters"],
                f"validation loss, {p.max_steps} steps": float(steps[0]),
                "test %": float(100 * steps[1]),
                f"validation loss, {p.max_seconds:g} s": float(seconds[0]),
                "test %, then": float(100 * seconds[1]),
                "steps per second": float(last[0] / last[1]),
            }
        )
    searches = [arm for arm in methods if arm.split(",")[0] in ("grid", "random", "Bayesian")]
    claims = [_against_search(results, searches, key) for key in ("steps", "seconds")]
    means = {arm: results.values(arm, "seconds")[:, 0].mean() for arm in methods}
    unrolled = {arm: means[arm] for arm in methods if "unrolling" in arm}
    claims.append(
        Claim(
            "implicit differentiation is no worse than unrolling in equal time",
            f"validation loss {means['Neumann, many']:.3f}; "
            + ", ".join(f"{arm} {value:.3f}" for arm, value in unrolled.items()),
            means["Neumann, many"] <= min(unrolled.values()) + 0.01,
        )
    )
    claims.append(
        Claim(
            "and no worse than the identity (T1-T2)",
            f"validation loss {means['Neumann, many']:.3f} against {means['identity, many']:.3f}",
            means["Neumann, many"] <= means["identity, many"] + 0.01,
        )
    )
    peaks = {name: results.values(MEMORY, name).mean(0) for name in ("unrolling", "Neumann")}
    claims.append(
        Claim(
            f"memory does not grow with the terms (CNN, {results.of(MEMORY)[0]['hyperparameters']:,} penalties)",
            "; ".join(f"{name} {' / '.join(f'{b / 2**20:.1f}' for b in peak)} MiB" for name, peak in peaks.items())
            + f" at {' / '.join(map(str, _UNROLLED))} terms",
            bool(
                peaks["unrolling"][-1] >= 3 * peaks["Neumann"][-1] and peaks["Neumann"][-1] <= 1.1 * peaks["Neumann"][1]
            ),
        )
    )
    legend = (
        "Means of the seeds. Hyperparameters: how many are tuned. Validation loss after so many inner steps, or so "
        "much time; the test accuracy after it is of the same moment."
    )
    return Report(rows, claims, {"losses": loss_figure(results, methods)}, legend)


def _against_search(results: Results, searches: list[str], key: str) -> Claim:
    ours = results.values("Neumann, many", key).mean(0)
    found = {arm: results.values(arm, key).mean(0) for arm in searches}
    best = min(found, key=lambda arm: found[arm][0])
    return Claim(
        f"hypergradients find better penalties than search in equal {'inner steps' if key == 'steps' else 'time'}",
        f"validation loss {ours[0]:.3f}, test {ours[1]:.1%} (one per weight); best search: {best}, "
        f"{found[best][0]:.3f}, test {found[best][1]:.1%}",
        bool(ours[0] < found[best][0] and ours[1] >= found[best][1] - 0.01),
    )


def loss_figure(results: Results, methods: list[str]) -> figures.Figure:
    p = results.protocol
    figure = figures.figure(
        2,
        f"{results.data}, {p.train} training and {p.validation} validation images, "
        f"{figures.seeds(results.settings.seeds)}. Least validation loss so far, against steps of training and against "
        "seconds, all work included. Search (dashed) tries one penalty for all weights, or one per class; "
        "hypergradients (solid) move one per weight (many), or one for all, along with the weights. To see: with many "
        "penalties hypergradients end lowest at the budget at which all are compared (dotted).",
        width=6.0,
        height=4.4,
    )
    axes = figure.subplots(1, 2, sharey=True)
    panels = ((axes[0], 0, p.max_steps, "inner steps"), (axes[1], 1, p.max_seconds, "seconds"))
    for axis, index, limit, title in panels:
        grid = np.geomspace(limit / 300, limit * 1.2, 80)
        for i, arm in enumerate(methods):
            lines = [_held(record["points"], index, grid) for record in results.of(arm)]
            style = "-" if arm.endswith("many") or arm.startswith("Neumann") else "--"
            figures.band(axis, grid, lines, arm, color=f"C{i}", linestyle=style)
        axis.axvline(limit, color="black", linestyle=":")
        axis.set(xlabel=title, xscale="log", yscale="log")
    axes[0].set_ylabel("validation loss (cross-entropy)")
    figures.plain_ticks(axes[0].yaxis)
    axes[1].legend(fontsize=8)
    return figure


def _held(points: list[list[float]], index: int, grid: np.ndarray) -> np.ndarray:
    """The last value at or before every place of ``grid``; NaN before the first."""
    where, values = np.array([p[index] for p in points]), np.array([p[2] for p in points])
    at = np.searchsorted(where, grid, side="right") - 1
    return np.where(at >= 0, values[at.clip(0)], np.nan)


EXPERIMENT = Experiment(
    name="baselines",
    about="hypergradients against unrolling, grid, random and Bayesian search, at equal time and equal steps",
    protocol=protocol,
    arms=lambda p: p.arms,
    run=run,
    report=report,
    seeds=3,
    quick_seeds=2,
)

if __name__ == "__main__":
    sys.exit(main(only=EXPERIMENT))
