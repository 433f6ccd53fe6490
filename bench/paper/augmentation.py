"""Learned augmentation: the weights of a U-Net that changes the training images are the hyperparameters.

On digits, protocol D: validation and test images are brighter or darker by up to 0.8, training images are not, and the
U-Net has to find that out from the validation loss. On CIFAR-10, the paper's setting with ResNet-18, shortened to 30
epochs (of 200), without crops and flips; it is written for a GPU, and goes on where it was stopped.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import hypergrad_ext as hg
from bench.paper import cli, figures
from bench.paper.augmentation_nets import SCALED_WEIGHTS, WEIGHTS, ResNet18, UNet, small_cnn
from bench.paper.experiment import Claim, Experiment, Job, Record, Report, Settings
from bench.paper.store import Results
from hypergrad_ext.demo.data import Examples, Split

_SHOWN = 8
KNOWN = "known shift"


@dataclass(frozen=True)
class Protocol:
    """Sizes, steps and step sizes; hyper-steps come every ``every`` steps from ``first`` to before ``last``.

    Attributes:
        width: Of the ResNet; 0 for the small network with two convolutions.
        convolutions: Per level of the U-Net.
        shift: Largest change of brightness of validation and test images.
        one_cycle: Whether the step size rises and falls once; else it falls to a tenth for the last 15 %.
        alpha: Of the Neumann series; None for the present step size.
        outer: ``"adam"``, or ``"sgd"`` with Nesterov momentum 0.9.
        copies: Augmented copies of a test image whose logits are averaged with the image's own.
    """

    train: int
    validation: int
    test: int | None
    steps: int
    batch: int
    lr: float
    weight_decay: float
    every: int
    first: int
    last: int
    outer: str
    outer_lr: float
    alpha: float | None
    width: int
    convolutions: int
    momentum: float = 0.9
    shift: float = 0.0
    one_cycle: bool = False
    clip: float = 1.0
    copies: int = 0
    neumann: tuple[int, ...] = (0, 3, 10)


def protocol(settings: Settings) -> Protocol:
    """The protocol for a data set: the paper's, shortened, for CIFAR-10, the scaled one for grey images."""
    if settings.data != "cifar10":
        return Protocol(
            train=200,
            validation=400,
            test=None if settings.data == "digits" else 2000,
            steps=700,
            batch=100,
            lr=0.05,
            weight_decay=5e-3,
            every=2,
            first=100,
            last=595,
            outer="adam",
            outer_lr=3e-3,
            alpha=0.1,
            width=0,
            convolutions=1,
            shift=0.8,
            neumann=(0, 3) if settings.quick else (0, 3, 10),
        )
    train, validation, batch, epochs = (100, 50, 10, 2) if settings.quick else (45000, 5000, 128, 30)
    steps = epochs * (train // batch)
    return Protocol(
        train=train,
        validation=validation,
        test=100 if settings.quick else None,
        steps=steps,
        batch=batch,
        lr=0.1,
        weight_decay=5e-4,
        every=9,
        first=0,
        last=steps,
        outer="sgd",
        outer_lr=0.1,
        alpha=None,
        width=4 if settings.quick else 64,
        convolutions=2,
        one_cycle=True,
        copies=5,
        neumann=(0, 3),
    )


def arms(protocol: Protocol) -> list[str]:
    """Without augmentation, with K products per hypergradient (K = 0 is the identity), and with the very shift.

    A student that trains on images shifted as the validation images are tells how much there is to gain.
    """
    return ["none", *(f"K={k}" for k in protocol.neumann), *([KNOWN] if protocol.shift else [])]


class Training:
    """One run: student, U-Net, their optimisers and generators, and how far it is."""

    def __init__(self, job: Job) -> None:
        self.job, self.p = job, job.protocol
        self.neumann = int(job.arm.removeprefix("K=")) if job.arm.startswith("K=") else None
        self.split = _load(job)
        channels, side = self.split.train.x.shape[1], self.split.train.x.shape[2]
        layout = torch.channels_last if job.device.type == "cuda" else torch.contiguous_format
        student = ResNet18(self.p.width) if self.p.width else small_cnn(channels, side)
        self.student: nn.Module = student.to(job.device, memory_format=layout)
        self.unet: nn.Module = UNet(channels, self.p.convolutions).to(job.device, memory_format=layout)
        expected = WEIGHTS if self.p.convolutions == 2 else SCALED_WEIGHTS
        found = sum(t.numel() for t in self.unet.parameters())
        if found != expected:
            raise RuntimeError(f"augmentation: expected a U-Net of {expected} weights, got {found}")
        self.weights = dict(self.student.named_parameters())
        self.hparams = dict(self.unet.named_parameters())
        self.inner = torch.optim.SGD(
            self.weights.values(),
            lr=self.p.lr,
            momentum=self.p.momentum,
            nesterov=self.p.one_cycle,
            weight_decay=self.p.weight_decay,
        )
        self.outer: torch.optim.Optimizer
        if self.p.outer == "adam":
            self.outer = torch.optim.Adam(self.hparams.values(), lr=self.p.outer_lr)
        else:
            self.outer = torch.optim.SGD(self.hparams.values(), lr=self.p.outer_lr, momentum=0.9, nesterov=True)
        if self.p.one_cycle:
            self.schedule: Any = torch.optim.lr_scheduler.OneCycleLR(
                self.inner, self.p.lr, total_steps=self.p.steps, cycle_momentum=False
            )
        else:
            self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.inner, [round(0.85 * self.p.steps)], gamma=0.1)
        self.random = torch.Generator().manual_seed(job.seed)
        self.step, self.refused = 0, 0
        state = job.restore()
        if state is not None:
            self._load_state(state)

    def run(self) -> None:
        """Go on to the end, or until the time is up."""
        for _ in self.job.steps(self.p.steps, self.step):
            self.job.pause_if_expired(self.state)
            self.advance()

    def advance(self) -> None:
        """One step, and a hyper-step where there is one."""
        self._train()
        if self.neumann is not None and self.p.first <= self.step < self.p.last and self.step % self.p.every == 0:
            self._tune()
        self.schedule.step()
        self.step += 1

    def state(self) -> Record:
        """All that a later process needs to go on."""
        state: Record = {name: part.state_dict() for name, part in self._parts().items()}
        return state | {"step": self.step, "refused": self.refused, "random": self.random.get_state()}

    def augmented(self, x: Tensor, noise: Tensor) -> Tensor:
        """What the student trains on."""
        if self.job.arm == KNOWN:
            return _shifted(x, self.p.shift, self.random)
        return x if self.neumann is None else self.unet(x, noise)

    def accuracy(self, data: Examples) -> float:
        """Share of right answers by logits averaged over an image and its augmented copies."""
        self.student.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(data), 1000):
                part = data[slice(start, start + 1000)]
                logits = self.student(part.x)
                for _ in range(0 if self.neumann is None else self.p.copies):
                    logits = logits + self.student(self.unet(part.x, self._noise(len(part))))
                right += int((logits.argmax(1) == part.y).sum())
        self.student.train()
        return right / len(data)

    def pictures(self) -> tuple[Tensor, Tensor]:
        """A few training images, and two augmentations of each with the noise at -1 and 1."""
        x = self.split.train.x[:_SHOWN]
        with torch.no_grad():
            low, high = (self.unet(x, x.new_full((len(x),), z)) for z in (-1.0, 1.0))
        return x, torch.stack([low, high])

    def _train(self) -> None:
        batch = self._batch(self.split.train)
        with torch.no_grad():
            x = self.augmented(batch.x, self._noise(len(batch)))
        loss = cross_entropy(self.student(x), batch.y)
        for t, grad in zip(self.weights.values(), torch.autograd.grad(loss, self.weights.values()), strict=True):
            t.grad = grad
        self.inner.step()

    def _tune(self) -> None:
        """One hyper-step, on a fresh batch of each set; the weight decay of the optimiser is the damping."""
        train, validation = self._batch(self.split.train), self._batch(self.split.validation)
        noise = self._noise(len(train))
        val_loss = cross_entropy(self.student(validation.x), validation.y)
        train_loss = cross_entropy(functional_call(self.student, self.weights, self.unet(train.x, noise)), train.y)
        alpha = self.p.alpha or self.inner.param_groups[0]["lr"]
        solver = hg.Neumann(steps=self.neumann or 0, alpha=alpha, adaptive=True)
        with warnings.catch_warnings(record=True) as caught:
            # A student in training has directions of negative curvature, along which a series grows in any step size:
            # such a hyper-step is none.
            warnings.simplefilter("always", hg.SolveWarning)
            grads = hg.hypergradient(
                val_loss, train_loss, self.weights, self.hparams, solver, damping=self.p.weight_decay, throw=False
            )
        self.refused += len(caught)
        for name, t in self.hparams.items():
            t.grad = grads[name]
        nn.utils.clip_grad_norm_(self.hparams.values(), self.p.clip)
        self.outer.step()

    def _batch(self, data: Examples) -> Examples:
        return data[torch.randint(len(data), (self.p.batch,), generator=self.random).to(self.job.device)]

    def _noise(self, count: int) -> Tensor:
        return torch.randn(count, generator=self.random).to(self.job.device)

    def _parts(self) -> dict[str, Any]:
        names = ("student", "unet", "inner", "outer", "schedule")
        return {name: getattr(self, name) for name in names}

    def _load_state(self, state: Record) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.refused = state["step"], state["refused"]
        self.random.set_state(state["random"].cpu())


def _load(job: Job) -> Split:
    p: Protocol = job.protocol
    split = job.images().split(job.seed, train=p.train, validation=p.validation, test=p.test)
    random = torch.Generator().manual_seed(job.seed)

    def shifted(part: Examples) -> Examples:
        return Examples(_shifted(part.x, p.shift, random), part.y)

    split = Split(split.train, shifted(split.validation), shifted(split.test))
    if job.settings.data == "cifar10":
        mean, deviation = split.train.x.mean((0, 2, 3), keepdim=True), split.train.x.std((0, 2, 3), keepdim=True)
        split = split.map(lambda part: Examples((part.x - mean) / deviation, part.y))
    return split.map(lambda part: part.to(job.device))


def _shifted(x: Tensor, most: float, random: torch.Generator) -> Tensor:
    """Every image brighter or darker by a number of its own."""
    return x + ((2 * torch.rand(len(x), 1, 1, 1, generator=random) - 1) * most).to(x.device)


def run(job: Job) -> Record:
    """Train one student, and its U-Net with it."""
    if job.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    training = Training(job)
    training.run()
    record: Record = {
        "validation": training.accuracy(training.split.validation),
        "test": training.accuracy(training.split.test),
        "train": training.accuracy(training.split.train),
        "hyperparameters": sum(t.numel() for t in training.hparams.values()),
        "cut short": training.refused,
    }
    if job.seed == 0 and training.neumann is not None:
        record["original"], record["augmented"] = training.pictures()
    return record


def report(results: Results) -> Report:
    """Accuracies, and what the U-Net does."""
    p: Protocol = results.protocol
    seeds = results.settings.seeds
    rows = [
        {
            "arm": arm,
            **{key: f"{results.mean(arm, key):.4f}" for key in ("train", "validation", "test")},
            "test, sd of seeds": f"{results.values(arm, 'test').std():.4f}",
            "series cut short": f"{results.mean(arm, 'cut short'):.0f}",
        }
        for arm in results.arms
    ]
    none, identity, three = (results.values(arm, "test") for arm in ("none", "K=0", "K=3"))
    better = int((three > none).sum())
    least = 0.03 if p.shift else 0.01
    claims = [
        Claim(
            f"a learnt augmentation, {_COUNTS[p.convolutions]} hyperparameters, improves the test accuracy",
            f"K = 3 {three.mean():.3f}, none {none.mean():.3f}; {better} of {seeds} seeds improve",
            three.mean() >= none.mean() + least and better >= 0.6 * seeds,
        ),
        Claim(
            "three Neumann terms beat the identity",
            f"K = 3 {three.mean():.3f}, K = 0 {identity.mean():.3f}",
            three.mean() > identity.mean(),
        ),
        Claim(
            "smaller variance between restarts",
            f"standard deviation of test accuracy: K = 3 {three.std():.3f}, none {none.std():.3f}",
            _smaller(three.std(), none.std()) if len(three) > 1 else None,
        ),
    ]
    if p.shift:
        known = results.mean(KNOWN, "test")
        claims.insert(
            2,
            Claim(
                "they do by 0.05 (our aim, not the paper's)",
                f"by {three.mean() - identity.mean():.3f}; training on the very shift, which is the most to be had: "
                f"{known:.3f}, so {known - identity.mean():.3f} better than K = 0",
                three.mean() >= identity.mean() + 0.05,
            ),
        )
    shown = {"accuracy": _accuracy_figure(results), "pictures": _pictures_figure(results)}
    legend = "Accuracies, means of the seeds. Series cut short: hypergradients of a run whose solve warned, mean."
    return Report(rows, claims, shown, legend)


def _smaller(ours: float, other: float) -> bool | None:
    """Deviations of a handful of seeds differ by chance: half is smaller, anything above that shows nothing."""
    return True if ours <= other / 2 else False if ours >= other else None


def _accuracy_figure(results: Results) -> object:
    p: Protocol = results.protocol
    shift = f"brightness of validation and test images shifted by up to {p.shift}. " if p.shift else ""
    figure = figures.figure(
        1,
        f"{results.data}, {p.train} training images; {shift}Dots: seeds; bars: means (the axis does not start at 0). "
        "Left to right: no augmentation, learnt with the identity as inverse Hessian, with Hessian products"
        + (", and, for comparison, training images shifted as those of validation are" if p.shift else "")
        + ". To see: how far a learnt augmentation gets from the first bars"
        + (" towards the last." if p.shift else ", and how seeds differ."),
        width=7.0,
        height=4.4,
    )
    axis = figure.subplots()
    for i, arm in enumerate(results.arms):
        for offset, colour, key in ((-0.2, "C0", "validation"), (0.2, "C1", "test")):
            seeds = results.values(arm, key)
            label = key if i == 0 else None
            axis.bar(i + offset, seeds.mean(), 0.36, color=colour, alpha=0.45, label=label)
            axis.plot([i + offset] * len(seeds), seeds, ".", color=colour)
            axis.annotate(f"{seeds.mean():.3f}", (i + offset, 0.02), ha="center", xycoords=("data", "axes fraction"))
    values = [results.values(arm, key).min() for arm in results.arms for key in ("validation", "test")]
    axis.set(ylabel="accuracy", xlabel="augmentation of the training images", ylim=(max(0.0, min(values) - 0.15), 1.0))
    axis.set_xticks(range(len(results.arms)), [_TITLES.get(arm, arm) for arm in results.arms])
    axis.set_title(f"A U-Net of {_COUNTS[p.convolutions]} weights as augmentation")
    axis.legend(loc="upper left")
    return figure


def _pictures_figure(results: Results) -> object:
    record = results.of("K=3")[0]
    original, (low, high) = record["original"], record["augmented"]
    shown = len(original)
    figure = figures.figure(
        shown,
        f"{results.data}: training images and what the U-Net (K = 3, seed 0) makes of them at noise -1 and +1. "
        "A row shares its scale of grey"
        + (
            ", written beside it. To see: the noise moves the brightness, as the validation images demand; a pattern "
            "of the U-Net's own comes with it."
            if results.protocol.shift
            else "."
        ),
        rows=3,
        width=1.25,
        height=1.35,
    )
    rows = ("original", "noise -1", "noise +1")
    grid = [list(original), list(low), list(high)]
    titles = [
        f"{r}\n[{min(float(i.min()) for i in g):.1f}, {max(float(i.max()) for i in g):.1f}]"
        for r, g in zip(rows, grid, strict=True)
    ]
    figures.pictures(figure, grid, titles, [str(i + 1) for i in range(shown)])
    return figure


_COUNTS = {1: f"{SCALED_WEIGHTS:,}", 2: f"{WEIGHTS:,}"}
_TITLES = {"none": "none", "K=0": "K = 0 (identity)", "K=3": "Neumann, K = 3", "K=10": "Neumann, K = 10"}

EXPERIMENT = Experiment(
    name="augmentation",
    about="The weights of a U-Net that augments images as hyperparameters (Fig. 7, Table 3).",
    protocol=protocol,
    arms=arms,
    run=run,
    report=report,
    seeds=5,
    quick_seeds=5,
    not_yet_run="CIFAR-10 at full size on a GPU (--data cifar10 --device cuda --time-limit 570, again until done)",
)

if __name__ == "__main__":
    raise SystemExit(cli.main(only=EXPERIMENT))
