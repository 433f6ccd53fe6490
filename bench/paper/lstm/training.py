"""One training run: inner steps on the weights, and hyper-steps on what regularises them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hypergrad_ext as hg
from bench.paper.lstm import text
from bench.paper.lstm.model import LanguageModel, Regularisation, State


@dataclass(frozen=True)
class Setting:
    """Everything that fixes a run besides text, method and seed. The defaults are the paper's.

    Args:
        units: Of the embedding and of every layer.
        embedding: Its start, see `LanguageModel`.
        batch: Columns of text in training, and in the validation windows of hyper-steps.
        eval_batch: Columns of the validation text in evaluation; the test text is one column.
        bptt: Steps of a window.
        optimiser: Of the weights: ``"sgd"`` or ``"adam"``.
        rate: Its learning rate; a quarter of it once an evaluation is worse than the best of those before the last
            ``drop_after``; None never drops it.
        clip: Largest norm of a gradient of the training loss.
        drop_after: See ``rate``.
        stop_after: End after so many evaluations without a new best; None never does.
        evaluate_every: Steps between evaluations; None is an epoch.
        dropout: Rates at the start.
        penalty: Penalties at the start.
        many_penalties: Whether ``"many"`` tunes the two penalties, too; the paper's count is without them.
        hyper_rate: Learning rate of Adam for the hyperparameters.
        hyper_every: Inner steps per hyper-step.
        hyper_after: Inner steps before the first.
        neumann_steps: Hessian-vector products per hyper-step; 0 takes the identity for the inverse Hessian.
        alpha: Step size of the Neumann series.
        device: Where it runs.
        precision: Of matrix products: ``"fp32"``, ``"tf32"``, or ``"bf16"``, which is autocast.
        cuda_graphs: Replay steps and hyper-steps as CUDA graphs (`Graphed`).
    """

    units: int = 650
    embedding: Literal["uniform", "normal"] = "uniform"
    batch: int = 40
    eval_batch: int = 10
    bptt: int = 70
    optimiser: Literal["sgd", "adam"] = "sgd"
    rate: float = 30.0
    clip: float = 0.25
    drop_after: int | None = 5
    stop_after: int | None = 20
    evaluate_every: int | None = None
    dropout: float = 0.5
    penalty: float = 1e-2
    many_penalties: bool = False
    hyper_rate: float = 1e-3
    hyper_every: int = 1
    hyper_after: int = 0
    neumann_steps: int = 1
    alpha: float = 0.1
    device: str = "cpu"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    cuda_graphs: bool = False


class Windows:
    """Windows of columns of text, one after another and round again, with the state that the last one left."""

    def __init__(self, words: Tensor, bptt: int, zero: State) -> None:
        """Start at the first."""
        self.words, self.bptt, self.zero = words, bptt, zero
        self.count = text.windows(words, bptt)
        self.taken, self.state = 0, zero

    def take(self) -> tuple[Tensor, Tensor, State]:
        """The next window's words, the words that follow them, and the state before."""
        i = self.taken % self.count
        self.taken += 1
        return *text.window(self.words, self.bptt, i), self.zero if i == 0 else self.state


@dataclass
class Point:
    """An evaluation: when, and what it found."""

    seconds: float
    step: int
    train: float
    valid: float
    hyper: dict[str, float]


class Run:
    """A model in training.

    Args:
        corpus: The text.
        setting: How.
        method: ``"none"`` trains without regularisation, ``"fixed"`` with the hyperparameters as they start,
            ``"seven"`` and ``"many"`` tune them, ``"identity"`` tunes the seven and the caller takes no products.
        seed: Of weights and masks.
    """

    def __init__(self, corpus: text.Corpus, setting: Setting, method: str, seed: int = 0) -> None:
        """See the class."""
        torch.manual_seed(seed)
        if setting.device != "cpu":
            torch.set_float32_matmul_precision("highest" if setting.precision == "fp32" else "high")
        self.corpus, self.setting, self.method = corpus, setting, method
        self.model = LanguageModel(len(corpus.words), setting.units, start=setting.embedding).to(setting.device)
        many = method == "many"
        penalties = setting.many_penalties or not many
        hyper = Regularisation(setting.units, many, setting.dropout, setting.penalty, penalties)
        self.hyper = None if method == "none" else hyper.to(setting.device)
        self.optimiser = self.inner_optimiser(self.model)
        self.outer = torch.optim.Adam(hyper.parameters(), lr=setting.hyper_rate)
        zero = self.model.start(setting.batch)
        self.train = Windows(text.columns(corpus.train, setting.batch).to(setting.device), setting.bptt, zero)
        self.valid = Windows(text.columns(corpus.valid, setting.batch).to(setting.device), setting.bptt, zero)
        self.curve: list[Point] = []
        self.best: dict[str, Tensor] = {}
        self.seconds = 0.0
        # A sum, not a list: a number kept from every step keeps the memory of a step's logits from being used again.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=setting.device)
        self.losses = 0
        self.failed_solves = 0

    def inner_optimiser(self, weights: nn.Module) -> torch.optim.Optimizer:
        """The one of the setting."""
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.setting.optimiser]
        return kind(weights.parameters(), lr=self.setting.rate)

    @property
    def step(self) -> int:
        """Inner steps so far."""
        return self.train.taken

    @property
    def tuned(self) -> bool:
        """Whether there are hyper-steps."""
        return self.method in ("seven", "many", "identity")

    @property
    def finished(self) -> bool:
        """Whether it is no use to go on."""
        last = self.setting.stop_after
        values = [point.valid for point in self.curve]
        if values and not math.isfinite(values[-1]):
            return True
        return last is not None and len(values) > last and min(values[-last:]) > min(values[:-last])

    @property
    def best_valid(self) -> float:
        """The lowest validation perplexity so far."""
        return min((point.valid for point in self.curve if math.isfinite(point.valid)), default=math.inf)

    def advance(self) -> Point | None:
        """One inner step, the hyper-step that is due, the evaluation that is due."""
        start = self.clock()
        setting = self.setting
        window = self.train.take()
        self.inner_step(window)
        if self.tuned and self.step > setting.hyper_after and self.step % setting.hyper_every == 0:
            self.hyper_step(window)
        point = None
        if self.step % (setting.evaluate_every or self.train.count) == 0:
            point = self.evaluated(start)
        self.seconds += self.clock() - start
        return point

    def clock(self) -> float:
        """Seconds: of this thread alone where it does all the work, so that other jobs on the machine do not count."""
        if self.setting.device != "cpu" or torch.get_num_threads() > 1:
            return time.perf_counter()
        return time.thread_time()

    def loss(
        self, words: Tensor, following: Tensor, state: State, hyper: nn.Module | None
    ) -> tuple[Tensor, Tensor, State]:
        """See `LanguageModel`."""
        with self.autocast():
            return self.model(words, following, state, hyper)

    def autocast(self) -> torch.autocast:
        """The precision of the setting."""
        return torch.autocast(torch.device(self.setting.device).type, torch.bfloat16, self.setting.precision == "bf16")

    def inner_step(self, window: tuple[Tensor, Tensor, State]) -> None:
        """Descend the training loss on a window, with penalties and fresh masks."""
        loss, penalty, self.train.state = self.loss(*window, self.hyper)
        weights = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.descend(weights, torch.autograd.grad(loss + penalty, weights))
        self.note(loss)

    def note(self, loss: Tensor) -> None:
        """Count a training loss for the next evaluation's line."""
        self.loss_sum += loss.detach()
        self.losses += 1

    def descend(self, weights: list[Tensor], grads: Sequence[Tensor]) -> None:
        """A clipped step."""
        for p, grad in zip(weights, grads, strict=True):
            p.grad = grad
        nn.utils.clip_grad_norm_(weights, self.setting.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def hyper_step(self, window: tuple[Tensor, Tensor, State]) -> None:
        """Descend the hypergradient: the training loss on this window, the validation loss on the next of its text."""
        assert self.hyper is not None
        hparams = list(self.hyper.parameters())
        loss, penalty, _ = self.loss(*window, self.hyper)
        validation, _, self.valid.state = self.loss(*self.valid.take(), None)
        solver = hg.Neumann(steps=self.setting.neumann_steps, alpha=self.setting.alpha)
        try:
            grads = hg.hypergradient(
                validation, loss + penalty, list(self.model.parameters()), hparams, solver, engine="eager"
            )
        except hg.SolveError:  # the terms grew: this step would go anywhere
            self.failed_solves += 1
            return
        for p, grad in zip(hparams, grads, strict=True):
            p.grad = grad
        self.outer.step()

    def evaluated(self, start: float) -> Point:
        """Evaluate, keep the weights if they are the best, and lower the learning rate if that is due."""
        valid = self.perplexity(self.corpus.valid, self.setting.eval_batch)
        seconds = self.seconds + self.clock() - start
        train = math.exp(min(float(self.loss_sum) / self.losses, 50.0)) if self.losses else math.nan
        self.loss_sum.zero_()
        self.losses = 0
        point = Point(seconds, self.step, train, valid, self.hyper.means() if self.hyper is not None else {})
        if valid < self.best_valid:
            self.best = {name: t.detach().clone() for name, t in self.evaluation_weights().items()}
        last = self.setting.drop_after
        before = [p.valid for p in self.curve[:-last]] if last is not None else []
        if before and valid > min(before):
            for group in self.optimiser.param_groups:
                group["lr"] /= 4
        self.curve.append(point)
        return point

    def evaluation_weights(self) -> dict[str, Tensor]:
        """The model's weights for evaluation."""
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def perplexity(self, words: Tensor, batch: int, weights: dict[str, Tensor] | None = None) -> float:
        """Of the text, without regularisation."""
        weights = self.evaluation_weights() if weights is None else weights
        words = text.columns(words, batch).to(self.setting.device)
        total, state = torch.zeros((), dtype=torch.float64, device=words.device), self.model.start(batch)
        for i in range(text.windows(words, self.setting.bptt)):
            now, following = text.window(words, self.setting.bptt, i)
            with self.autocast():
                loss, _, state = torch.func.functional_call(self.model, weights, (now, following, state))
            total += loss.double() * len(now)
        mean = float(total / (len(words) - 1))
        return math.exp(mean) if mean < 700 else math.inf

    def test(self) -> float:
        """Perplexity of the test text with the best weights."""
        return self.perplexity(self.corpus.test, 1, self.best) if self.best else math.nan

    def modules(self) -> Iterator[tuple[str, Any]]:
        """What has a state dict."""
        yield from (("model", self.model), ("optimiser", self.optimiser), ("outer", self.outer))
        if self.hyper is not None:
            yield "hyper", self.hyper

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on bit by bit as if nothing had happened."""
        windows = {name: (w.taken, w.state) for name, w in (("train", self.train), ("valid", self.valid))}
        return {
            "modules": {name: module.state_dict() for name, module in self.modules()},
            "windows": windows,
            "curve": [vars(point) for point in self.curve],
            "best": self.best,
            "seconds": self.seconds,
            "loss_sum": self.loss_sum,
            "losses": self.losses,
            "failed_solves": self.failed_solves,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self.setting.device.startswith("cuda") else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there; also sets torch's random state."""
        for name, module in self.modules():
            module.load_state_dict(saved["modules"][name])
        self.train.taken, self.train.state = saved["windows"]["train"]
        self.valid.taken, self.valid.state = saved["windows"]["valid"]
        self.curve = [Point(**point) for point in saved["curve"]]
        self.best, self.seconds, self.losses = saved["best"], saved["seconds"], saved["losses"]
        self.loss_sum.copy_(saved["loss_sum"])
        self.failed_solves = saved["failed_solves"]
        torch.set_rng_state(saved["random"].cpu())
        if saved["random_cuda"] is not None:
            torch.cuda.set_rng_state(saved["random_cuda"].cpu())
