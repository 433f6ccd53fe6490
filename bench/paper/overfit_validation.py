"""Overfitting the validation set: one L2 penalty per weight, 50 training and 50 validation images (Figure 5)."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import hypergrad_ext as hg
from bench.paper import figures, models
from bench.paper.cli import main
from bench.paper.experiment import Claim, Experiment, Job, Record, Report, Settings, Stopwatch, accuracy
from bench.paper.store import Results
from hypergrad_ext.demo.data import Examples, Split

# Hyper-steps between two looks at the clock and, on long runs, two saved states.
_LOOK_EVERY = 100


@dataclass(frozen=True)
class Protocol:
    """The numbers. An arm is a model and K of a preconditioned Neumann series, ``unrolled`` or ``none``."""

    arms: tuple[str, ...]
    max_steps: int
    # Five times so many steps of Adam without tuning: the tuned ones that get there take fewer.
    untuned_steps: int = 150
    train: int = 50
    validation: int = 50
    log_penalty: float = -4.0
    inner_lr: float = 1e-3
    inner_steps: int = 5
    outer_lr: float = 0.05
    alpha: float = 1.0
    target: float = 1.0


def protocol(settings: Settings) -> Protocol:
    if settings.data == "digits":
        arms = ["mlp K=5", "mlp none", "cnn K=3", "cnn K=0", "cnn none"]
        if not settings.quick:
            arms += ["mlp K=0", "mlp unrolled", "cnn unrolled", "linear K=5", "linear K=0", "linear none"]
        return Protocol(tuple(arms), max_steps=400)
    if settings.data == "cifar10" and settings.device.type == "cuda":
        # The paper's step sizes.
        arms = ["alexnet K=3", "alexnet K=0", "alexnet none"]
        return Protocol(tuple(arms), max_steps=100 if settings.quick else 10_000, inner_lr=1e-4, outer_lr=0.01)
    if settings.data == "cifar10":
        arms = ["linear K=5", "linear none", "cnn K=3", "cnn K=0", "cnn none"]
        return Protocol(tuple(arms), max_steps=50 if settings.quick else 400)
    arms = ["linear K=5", "linear K=0", "linear none", "mlp K=5", "mlp K=0", "mlp none"]
    if settings.device.type == "cuda":
        arms += ["alexnet K=3", "alexnet none"]
    return Protocol(tuple(arms), max_steps=400 if settings.quick else 1000)


def data(job: Job) -> Split:
    p = job.protocol
    parts = job.images().split(job.seed, train=p.train, validation=p.validation)
    return parts.map(lambda part: part.to(job.device))


def jacobi(log_penalties: list[Tensor]) -> list[Tensor]:
    """The diagonal of the penalty's Hessian, which grows to thousands, plus 1."""
    return [2 * lam.detach().exp() + 1 for lam in log_penalties]


def implicit_step(model: nn.Module, lam: list[Tensor], parts: Split, solver: hg.Neumann) -> bool:
    """Put the hypergradient of the validation loss into ``lam[i].grad``; say whether the series was shrinking.

    K = 0 is alpha M b alone, the identity of the preconditioned system. P knows the penalties, not the loss, whose
    Hessian has eigenvalues of up to a hundred while the penalties are small: with alpha = 1 each term would be many
    times the one before, so alpha is adaptive. Five inner steps do not reach a minimum either, and on negative
    eigenvalues a series may grow in any step size: such hyper-steps are counted, and change nothing.
    """
    params = list(model.parameters())
    train_loss = models.loss(model, parts.train) + models.penalty(params, lam)
    val_loss = models.loss(model, parts.validation)
    solver = dataclasses.replace(solver, preconditioner=jacobi(lam))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", hg.SolveWarning)
        grads = hg.hypergradient(val_loss, train_loss, params, lam, solver, throw=False)
    for t, grad in zip(lam, grads, strict=True):
        t.grad = grad
    return not caught


def unrolled_step(model: nn.Module, lam: list[Tensor], parts: Split, p: Protocol) -> None:
    """The same through the inner steps that come next, without a step taken: truncated unrolling."""

    def train_loss(params: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, params, parts.train.x)
        return cross_entropy(logits, parts.train.y) + models.penalty(params.values(), lam)

    trained = hg.unroll(train_loss, model, lam, steps=p.inner_steps, lr=p.inner_lr, optimizer="adam")
    val_loss = cross_entropy(functional_call(model, trained, parts.validation.x), parts.validation.y)
    for t, grad in zip(lam, torch.autograd.grad(val_loss, lam), strict=True):
        t.grad = grad


def run(job: Job) -> Record:
    """Train and tune until all validation images are classified correctly."""
    p, parts = job.protocol, data(job)
    name, kind = job.arm.split()
    model = models.MODELS[name](job.images().shape).to(job.device)
    params, lam = list(model.parameters()), models.penalties(model, p.log_penalty)
    inner, outer = torch.optim.Adam(params, lr=p.inner_lr), torch.optim.RMSprop(lam, lr=p.outer_lr)
    state = job.restore() or {"step": 0, "curves": [[], []], "seconds": 0.0, "grew": 0}
    curves, grew, watch = state["curves"], state["grew"], Stopwatch(job.device, state["seconds"])
    if state["step"]:
        model.load_state_dict(state["model"])
        for t, saved in zip(lam, state["lam"], strict=True):
            t.data.copy_(saved)
        inner.load_state_dict(state["inner"])
        outer.load_state_dict(state["outer"])

    def paused() -> Record:
        kept = {"model": model.state_dict(), "lam": [t.detach() for t in lam]}
        optimizers = {"inner": inner.state_dict(), "outer": outer.state_dict()}
        return {**kept, **optimizers, "step": step, "curves": curves, "grew": grew, "seconds": watch.stop()}

    done = False
    for step in job.steps(p.untuned_steps if kind == "none" else p.max_steps, start=state["step"]):
        if step % _LOOK_EVERY == 0:
            job.pause_if_expired(paused)
        for _ in range(p.inner_steps):
            inner.zero_grad()
            (models.loss(model, parts.train) + models.penalty(params, [t.detach() for t in lam])).backward()
            inner.step()
        if kind == "none":
            continue
        if kind == "unrolled":
            unrolled_step(model, lam, parts, p)
        else:
            solver = hg.Neumann(steps=int(kind.removeprefix("K=")), alpha=p.alpha, adaptive=True)
            grew += not implicit_step(model, lam, parts, solver)
        outer.step()
        for curve, value in zip(curves, scores(model, parts), strict=True):
            curve.append(value)
        done = min(curves[0][-1], curves[1][-1]) >= p.target
        if done:
            break
    seconds = watch.stop()
    return {
        "train": curves[0],
        "validation": curves[1],
        "final": [*scores(model, parts), test_accuracy(model, parts.test)],
        "steps": len(curves[0]) if done else None,
        "grew": grew,
        "seconds": seconds,
        "weights": models.size(model),
        "largest_penalty": max(float(t.detach().exp().max()) for t in lam),
    }


@torch.no_grad()
def scores(model: nn.Module, parts: Split) -> list[float]:
    """Accuracy on the training and on the validation set."""
    return [accuracy(model(part.x), part.y) for part in (parts.train, parts.validation)]


@torch.no_grad()
def test_accuracy(model: nn.Module, examples: Examples) -> float:
    """Accuracy on many examples, by chunks."""
    chunks = zip(examples.x.split(1000), examples.y.split(1000), strict=True)
    return sum(accuracy(model(x), y) * len(y) for x, y in chunks) / len(examples)


def report(results: Results) -> Report:
    tuned = [arm for arm in results.arms if not arm.endswith("none")]
    rows = [row(results, arm) for arm in results.arms]
    claims = []
    for name in dict.fromkeys(arm.split()[0] for arm in tuned):
        best = [arm for arm in tuned if arm.startswith(name)][0]
        final, without = results.values(best, "final"), results.values(f"{name} none", "final")
        reached = int((final[:, :2].min(1) == 1).sum())
        weights = results.of(best)[0]["weights"]
        claims.append(
            Claim(
                f"{weights:,} penalties ({name}) fit training and validation set fully, test clearly lower",
                f"{reached} of {len(final)} seeds at 100 %, test {final[:, 2].mean():.1%}; untuned: validation "
                f"{without[:, 1].mean():.1%}; {results.mean(best, 'seconds'):.1f} s",
                reached == len(final) and final[:, 2].max() <= 0.95 and without[:, 1].max() <= 0.9,
            )
        )
    if {"cnn K=3", "cnn K=0"} <= set(tuned):
        series, identity = (median_steps(results, arm) for arm in ("cnn K=3", "cnn K=0"))
        claims.append(
            Claim(
                "a Neumann series needs no more hyper-steps than the identity (cnn)",
                f"median {series:g} against {identity:g}",
                series <= identity,
            )
        )
    legend = (
        "One number per seed: hyper-steps until training and validation set were fitted (-: not), and hyper-steps "
        "whose Neumann series grew or failed. Largest penalty: of all seeds, at the end; the rest: means of the seeds."
    )
    return Report(rows, claims, {"accuracy": accuracy_figure(results, tuned)}, legend)


def median_steps(results: Results, arm: str) -> float:
    """Median hyper-steps until all was fitted; a seed that never did counts as infinite."""
    return statistics.median(float("inf") if r["steps"] is None else r["steps"] for r in results.of(arm))


def row(results: Results, arm: str) -> dict[str, object]:
    final = results.values(arm, "final")
    return {
        "arm": arm,
        "hyperparameters": 0 if arm.endswith("none") else results.of(arm)[0]["weights"],
        "hyper-steps": " ".join("-" if r["steps"] is None else str(r["steps"]) for r in results.of(arm)),
        "seconds": results.mean(arm, "seconds"),
        "train %": 100 * final[:, 0].mean(),
        "validation %": 100 * final[:, 1].mean(),
        "test %": 100 * final[:, 2].mean(),
        "series that grew": " ".join(str(r["grew"]) for r in results.of(arm)),
        "largest penalty": float(results.values(arm, "largest_penalty").max()),
    }


def accuracy_figure(results: Results, tuned: list[str]) -> figures.Figure:
    columns = min(len(tuned), 4)
    lines = -(-len(tuned) // columns)
    figure = figures.figure(
        columns,
        f"{results.data}, {figures.seeds(results.settings.seeds)}. With one penalty per weight the "
        "validation accuracy climbs to 100 %, as the training accuracy does, far above that of the untuned model "
        "(dotted: mean after its training), while the test accuracy (dots, at the end of every run) stays clearly "
        "below: the validation set has been overfitted.",
        rows=lines,
        width=4.0,
        height=3.2,
    )
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(tuned) :]:
        axis.remove()
    for arm, axis in zip(tuned, axes[: len(tuned)], strict=True):
        for color, key in enumerate(("train", "validation")):
            curve = 100 * results.values(arm, key)
            figures.band(axis, range(1, curve.shape[1] + 1), curve, key, color=f"C{color}")
        for i, record in enumerate(results.of(arm)):
            label = "test" if i == 0 else None
            axis.plot(len(record["train"]), 100 * record["final"][2], "o", color="C2", label=label)
        untuned = 100 * results.values(f"{arm.split()[0]} none", "final")[:, 1].mean()
        axis.axhline(untuned, color="C1", linestyle=":", label="validation, untuned")
        axis.set(title=arm, xlabel="hyper-steps", ylabel="accuracy (%)", xscale="log", ylim=(0, 103))
        figures.plain_ticks(axis.xaxis)
        axis.legend(loc="lower right", fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="overfit_validation",
    about="one L2 penalty per weight fits the validation set perfectly, and the test set not",
    protocol=protocol,
    arms=lambda p: p.arms,
    run=run,
    report=report,
    seeds=4,
    quick_seeds=4,
    not_yet_run="AlexNet (20 million) on a GPU (--data cifar10 --device cuda --time-limit 570, again until done)",
)

if __name__ == "__main__":
    sys.exit(main(only=EXPERIMENT))
