"""Dataset distillation: one image per class, learned, is the whole training set (Figure 6).

Nothing asks free pixels to look like a digit: only differences between the ten images matter, and they may be negative.
A *bounded* arm learns images as they are printed, with pixels between 0 and 1 (a sigmoid), from an even dark grey, and
a penalty on brightness that pays for every pixel: neither knows what a digit is. The arm that starts from the class
means has no such penalty.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypergrad_ext as hg
from bench.paper import figures
from bench.paper.cli import main
from bench.paper.experiment import Claim, Experiment, Job, Record, Report, Settings, Stopwatch, accuracy
from bench.paper.store import Results
from hypergrad_ext.demo.data import CLASSES, Examples

_LOOK_EVERY = 50
MEANS = "K=0, bounded, from class means"


@dataclass(frozen=True)
class Protocol:
    """The numbers; ``validation`` None takes all labelled images, ``l2`` is the weights' penalty.

    Attributes:
        cosine: Whether the outer step size falls to zero along a cosine.
        grey: All pixels of bounded images at the start; free ones start black.
        brightness: Penalty on the mean square norm of the bounded images, a part of the validation loss.
        damping: Shifts the biases' common direction, along which the loss is flat.
    """

    arms: tuple[str, ...]
    steps: int
    validation: int | None
    batch: int
    warm_up: int = 200
    inner_steps: int = 5
    inner_lr: float = 0.5
    momentum: float = 0.9
    outer_lr: float = 0.02
    l2: float = 0.0183
    weak_l2: float = 1e-4
    cosine: bool = False
    grey: float = 0.03
    brightness: float = 0.1
    damping: float = 1e-5
    retrain_tol: float = 1e-6
    retrain_steps: int = 1000


def protocol(settings: Settings) -> Protocol:
    arms = ("K=0", "K=5", "K=20", "CG", "K=5, weak penalty", "random real images", "class means")
    if settings.data == "digits":
        return Protocol(arms, steps=300, validation=1400, batch=1400)
    arms = ("CG", MEANS, "K=0, bounded", "CG, bounded", "random real images", "class means")
    validation = 5000 if settings.quick and settings.data == "cifar10" else None
    return Protocol(arms, steps=100 if settings.quick else 200, validation=validation, batch=2000, cosine=True)


def logits(params: list[Tensor], x: Tensor) -> Tensor:
    """``x W^T + bias`` for ``W`` of shape (classes, pixels)."""
    return torch.addmm(params[1], x, params[0].T)


def objective(params: list[Tensor], data: Examples, l2: float) -> Tensor:
    """Training loss: cross-entropy and a penalty on the weights, which keeps the minimum unique."""
    return cross_entropy(logits(params, data.x), data.y) + l2 * params[0].square().sum()


def zeros(pixels: int, like: Tensor) -> list[Tensor]:
    """A weight and a bias that start at zero."""
    return [like.new_zeros(*shape).requires_grad_() for shape in ((CLASSES, pixels), (CLASSES,))]


def retrained_accuracy(data: Examples, test: Examples, p: Protocol, l2: float | None = None) -> float:
    """Test accuracy of a model that starts at zero and has seen ``data`` only, trained to its minimum by L-BFGS."""
    params = zeros(data.x.shape[1], data.x)
    optimizer = torch.optim.LBFGS(
        params,
        max_iter=p.retrain_steps,
        tolerance_grad=p.retrain_tol,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(params, data, p.l2 if l2 is None else l2)
        value.backward()
        return value.detach()

    optimizer.step(closure)
    with torch.no_grad():
        return accuracy(logits(params, test.x), test.y)


def one_per_class(images: Tensor) -> Examples:
    """Ten images with their labels 0 to 9."""
    return Examples(images, torch.arange(CLASSES, device=images.device))


def random_images(data: Examples, generator: torch.Generator) -> Tensor:
    """One real image per class, drawn at random."""
    members = [data.x[data.y == label] for label in range(CLASSES)]
    return torch.stack([x[int(torch.randint(len(x), (), generator=generator))] for x in members])


def class_means(data: Examples) -> Tensor:
    """The mean image of every class."""
    return torch.stack([data.x[data.y == label].mean(0) for label in range(CLASSES)])


def recognised(images: Tensor, data: Examples) -> int:
    """How many of the ten images correlate most with the mean of their own class."""
    rows = [x - x.mean(1, keepdim=True) for x in (images, class_means(data))]
    learnt, means = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in rows)
    return int(((learnt @ means.T).argmax(1) == torch.arange(CLASSES, device=images.device)).sum())


def solver_of(arm: str) -> hg.Solver:
    """The solver that an arm names."""
    if arm.startswith("CG"):
        return hg.CG(tol=1e-3)
    steps = int(arm.split(",")[0].removeprefix("K="))
    return hg.Neumann(steps=steps)


def run(job: Job) -> Record:
    """Learn ten images, or take them, and train from scratch on nothing but them."""
    p = job.protocol
    parts = job.images().split(job.seed, train=0, validation=p.validation)
    parts = parts.map(lambda part: part.flat().to(job.device))
    generator = torch.Generator().manual_seed(job.seed)
    if job.arm == "random real images":
        draws = [random_images(parts.validation, generator) for _ in range(10)]
        found = [retrained_accuracy(one_per_class(images), parts.test, p) for images in draws]
        return {"accuracy": sum(found) / len(found), "images": draws[0].cpu(), "seconds": None, "retrained": []}
    if job.arm == "class means":
        images = class_means(parts.validation)
        found_one = retrained_accuracy(one_per_class(images), parts.test, p)
        return {"accuracy": found_one, "images": images.cpu(), "seconds": None, "retrained": []}
    return learn(job, parts.validation, parts.test, generator)


def learn(job: Job, labelled: Examples, test: Examples, generator: torch.Generator) -> Record:
    """Hypergradient steps on the pixels, or on what is behind them, against random batches of real images."""
    p, solver, bounded = job.protocol, solver_of(job.arm), "bounded" in job.arm
    l2 = p.weak_l2 if "weak" in job.arm else p.l2
    start = torch.full((CLASSES, labelled.x.shape[1]), p.grey if bounded else 0.0, device=job.device)
    if job.arm == MEANS:
        start = class_means(labelled).clamp(p.grey, 1 - p.grey)
    pixels = (start.logit() if bounded else start).requires_grad_()
    params = zeros(labelled.x.shape[1], pixels.detach())
    inner = torch.optim.SGD(params, lr=p.inner_lr, momentum=p.momentum)
    outer = torch.optim.Adam([pixels], lr=p.outer_lr)
    state = job.restore() or {"step": 0, "seconds": 0.0, "retrained": []}
    retrained, watch = state["retrained"], Stopwatch(job.device, state["seconds"])
    if state["step"]:
        pixels.data.copy_(state["pixels"])
        for t, saved in zip(params, state["params"], strict=True):
            t.data.copy_(saved)
        inner.load_state_dict(state["inner"])
        outer.load_state_dict(state["outer"])
        generator.set_state(state["generator"].cpu())

    def paused() -> Record:
        return {
            "step": step,
            "pixels": pixels.detach(),
            "params": [t.detach() for t in params],
            "inner": inner.state_dict(),
            "outer": outer.state_dict(),
            "generator": generator.get_state(),
            "retrained": retrained,
            "seconds": watch.stop(),
        }

    def shown() -> Tensor:
        return pixels.sigmoid() if bounded else pixels

    for step in job.steps(p.steps, start=state["step"]):
        images = shown()
        if step % _LOOK_EVERY == 0:
            job.pause_if_expired(paused)
            watch.stop()
            retrained.append(retrained_accuracy(one_per_class(images.detach()), test, p, l2))
            watch.start()
        for _ in range(p.inner_steps if step else p.warm_up):
            inner.zero_grad()
            objective(params, one_per_class(images.detach()), l2).backward()
            inner.step()
        batch = labelled
        if p.batch < len(labelled):
            batch = labelled[torch.randint(len(labelled), (p.batch,), generator=generator).to(job.device)]
        val_loss = cross_entropy(logits(params, batch.x), batch.y)
        if bounded and job.arm != MEANS:
            val_loss = val_loss + p.brightness * images.square().sum(1).mean()
        train_loss = objective(params, one_per_class(images), l2)
        # Ten rows of data: the closed form of the Hessian, one fused product.
        fused = hg.GLMHessian(images.detach(), params, "softmax", l2=l2)
        pixels.grad = hg.hypergradient(val_loss, train_loss, params, pixels, solver, operator=fused, damping=p.damping)
        if p.cosine:
            outer.param_groups[0]["lr"] = p.outer_lr * (1 + math.cos(math.pi * step / p.steps)) / 2
        outer.step()
    seconds = watch.stop()
    images = shown()
    final = retrained_accuracy(one_per_class(images.detach()), test, p, l2)
    with torch.no_grad():
        warm = accuracy(logits(params, test.x), test.y)
    return {
        "accuracy": final,
        "warm_accuracy": warm,
        "retrained": [*retrained, final],
        "recognised": recognised(images.detach(), labelled),
        "seconds": seconds,
        "images": images.detach().cpu(),
    }


def report(results: Results) -> Report:
    learnt = [arm for arm in results.arms if results.of(arm)[0]["retrained"]]
    rows = [
        {
            "training set of ten images": arm if arm not in learnt else f"learnt, {arm}",
            "re-trained test %": 100 * results.mean(arm, "accuracy"),
            "least %": 100 * float(results.values(arm, "accuracy").min()),
            "like their class": results.mean(arm, "recognised") if arm in learnt else "-",
            "warm test %": 100 * results.mean(arm, "warm_accuracy") if arm in learnt else "-",
            "seconds": results.mean(arm, "seconds") if arm in learnt else "-",
        }
        for arm in results.arms
    ]
    strong = [arm for arm in learnt if "weak" not in arm]
    shown = [arm for arm in strong if "bounded" in arm] or [strong[0], strong[-1]]
    best, random = strong[-1], results.mean("random real images", "accuracy")
    ours, aim = results.mean(best, "accuracy"), {"digits": 0.9, "mnist": 0.85}.get(results.settings.data, 0.0)
    gain = 0.1 if results.settings.data == "cifar10" else 0.2
    claims = [
        Claim(
            f"ten learnt images train a classifier: at least {gain:.0%} above random real images"
            + (f", and {aim:.0%}" if aim else ""),
            f"{ours:.1%} ({best}), random real images {random:.1%}, class means "
            f"{results.mean('class means', 'accuracy'):.1%}",
            ours >= max(aim, random + gain),
        ),
        Claim(
            "every learnt image is closest to its own class's mean (by correlation)",
            ", ".join(f"{arm} {results.mean(arm, 'recognised'):g} of {CLASSES}" for arm in shown),
            min(results.values(arm, "recognised").min() for arm in shown) == CLASSES,
        ),
    ]
    if "K=5, weak penalty" in learnt:
        weak = results.mean("K=5, weak penalty", "accuracy")
        warm = results.mean("K=5, weak penalty", "warm_accuracy")
        claims.append(
            Claim(
                "trap: with a weak penalty warm weights carry what the images do not",
                f"re-trained {weak:.1%}, warm {warm:.1%}",
                weak < warm - 0.05,
            )
        )
    return Report(
        rows,
        claims,
        {
            "images": image_figure(results, list(dict.fromkeys((strong[0], *shown)))),
            "accuracy": curve_figure(results, learnt),
        },
        "Re-trained: from scratch on nothing but the ten images, mean and least of the seeds. Like their class: images "
        "that correlate most with the mean of their own class, of ten. Warm: the weights that were trained along.",
    )


def image_figure(results: Results, learnt: list[str]) -> figures.Figure:
    shape = results.settings.images().shape
    rows = ("random real images", "class means", *learnt)
    grid = [results.of(arm)[0]["images"].view(CLASSES, *shape) for arm in rows]
    scores = ", ".join(f"{arm} {results.mean(arm, 'accuracy'):.1%}" for arm in rows)
    bounded = any("bounded" in arm for arm in learnt)
    start = "free ones from black, bounded ones from an even dark grey or the means" if bounded else "from black"
    see = (
        "free pixels carry what tells the classes apart, bounded ones show digits"
        if bounded
        else "learnt images show the strokes of their digit, darkest where a stroke would make it another"
    )
    figure = figures.figure(
        CLASSES,
        f"{results.data}, seed 0: ten images, one per class, that are a whole training set; the last rows were learnt, "
        f"{start}. Every image has a scale of grey of its own, from its least to its largest pixel. Test accuracy of a "
        f"model trained on nothing else (mean of seeds): {scores}. To see: {see}."
        if shape[0] == 1
        else f"{results.data}, seed 0: ten images, one per class; the last rows were learnt, {start}. Test accuracy "
        f"of a model trained on nothing else (mean of seeds): {scores}. To see: averages of colour and coarse shapes.",
        rows=len(rows),
        width=1.1,
        height=1.1,
    )
    titles = ["real", "class means", *("learnt,\n" + arm.replace(", ", ",\n") for arm in learnt)]
    columns = [str(label) for label in range(CLASSES)]
    figures.pictures(figure, [list(row) for row in grid], titles, columns, shared=False)
    return figure


def curve_figure(results: Results, learnt: list[str]) -> figures.Figure:
    figure = figures.figure(
        1,
        f"{results.data}, {figures.seeds(results.settings.seeds)}. Training from scratch on nothing "
        "but the ten learnt images soon does far better than on ten real ones (dotted).",
        width=7,
    )
    axis = figure.subplots()
    for arm in learnt:
        curve = 100 * results.values(arm, "retrained")
        figures.band(axis, [*range(0, results.protocol.steps, _LOOK_EVERY), results.protocol.steps], curve, arm)
    for style, arm in ((":", "random real images"), ("--", "class means")):
        axis.axhline(100 * results.mean(arm, "accuracy"), color="black", linestyle=style, label=arm)
    axis.set(xlabel="hyper-steps", ylabel="re-trained test accuracy (%)")
    axis.legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="distillation",
    about="one learnt image per class is a whole training set",
    protocol=protocol,
    arms=lambda p: p.arms,
    run=run,
    report=report,
    not_yet_run="on a GPU (--device cuda)",
)

if __name__ == "__main__":
    sys.exit(main(only=EXPERIMENT))
