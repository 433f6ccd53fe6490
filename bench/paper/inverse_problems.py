"""The problems at which inverse Hessians are compared: losses of flat weights whose Hessian can be inverted densely."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

import hypergrad_ext as hg
from bench.paper.experiment import Job
from hypergrad_ext.demo.data import CLASSES, Examples


@dataclass(frozen=True)
class Problem:
    """Losses of the flat weights ``w``, at which all is measured; one log penalty per weight ``lam``, ``(n,)``."""

    train: Callable[[Tensor], Tensor]
    validation: Callable[[Tensor], Tensor]
    w: Tensor
    lam: Tensor

    def hypergradient(self, solver: hg.Solver, damping: float = 0.0) -> tuple[Tensor, hg.Solution]:
        """The hypergradient by ``solver``, and its solve."""
        losses = (self.validation, self.train, self.w, self.lam)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hg.SolveWarning)
            return hg.hypergradient(*losses, solver, damping=damping, throw=False, return_solution=True)

    def through(self, x: Tensor) -> Tensor:
        """The hypergradient that the inverse HVP ``x`` gives: minus x times the mixed derivative, 2 e^lam w."""
        return -x * 2 * self.lam.detach().exp() * self.w.detach()

    def dense(self) -> Tensor:
        """The Hessian of the training loss, ``(n, n)``, some hundred columns at a time."""
        return torch.func.jacrev(torch.func.grad(self.train), chunk_size=512)(self.w.detach()).detach()

    def right_hand_side(self) -> Tensor:
        """The validation gradient, ``(n,)``."""
        return torch.func.grad(self.validation)(self.w.detach()).detach()


def newton(loss: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """The minimum of a convex loss, to a gradient of 1e-12."""
    for _ in range(50):
        g = torch.func.grad(loss)(w).detach()
        if float(g.norm()) <= 1e-12:
            break
        step = torch.linalg.solve(torch.func.hessian(loss)(w).detach(), g)
        scale = 1.0
        while loss(w - scale * step).detach() > loss(w).detach() and scale > 1e-8:
            scale /= 2
        w = w - scale * step
    return w.detach()


def logistic(job: Job, log_penalty: float | None = None) -> Problem:
    """Digits, 65 x 10 weights, at the minimum; the condition number is 73, 293, 926 for log penalties -5, -7, -9."""
    log_penalty = job.protocol.log_penalty if log_penalty is None else log_penalty
    parts = job.images().split(job.seed, train=job.protocol.examples, validation=job.protocol.examples)
    parts = parts.map(lambda part: part.flat().to(torch.float64))
    lam = torch.full(((parts.train.x.shape[1] + 1) * CLASSES,), log_penalty, dtype=torch.float64)
    lam.requires_grad_()

    def loss(w: Tensor, part: Examples) -> Tensor:
        matrix = w.view(-1, CLASSES)
        return cross_entropy(part.x @ matrix[:-1] + matrix[-1], part.y)

    def train(w: Tensor) -> Tensor:
        return loss(w, parts.train) + (lam.exp() * w.square()).sum()

    w = newton(lambda w: train(w), torch.zeros_like(lam.detach()))
    return Problem(train, lambda w: loss(w, parts.validation), w.requires_grad_(), lam)


def ridge(job: Job) -> Problem:
    """Diabetes, ten features and a bias, at the minimum: in place of Boston housing, which is no longer distributed."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    x, y = torch.tensor(bunch.data), torch.tensor(bunch.target)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(job.seed))
    a, b = order[: len(y) // 2], order[len(y) // 2 :]
    lam = torch.full((x.shape[1],), job.protocol.log_penalty, dtype=x.dtype).requires_grad_()

    def train(w: Tensor) -> Tensor:
        return mse_loss(x[a] @ w, y[a]) + (lam.exp() * w.square()).sum()

    w = newton(train, torch.zeros_like(lam.detach()))
    return Problem(train, lambda w: mse_loss(x[b] @ w, y[b]), w.requires_grad_(), lam)


def mlp_at(job: Job, steps: int) -> Problem:
    """A tanh network, of 610 weights on digits, after ``steps`` steps of Adam: its Hessian is indefinite."""
    parts = job.images().split(job.seed, train=job.protocol.examples, validation=job.protocol.examples)
    parts = parts.map(lambda part: part.flat().to(torch.float64).to(job.device))
    generator = torch.Generator().manual_seed(job.seed)
    hidden, pixels = job.protocol.hidden, parts.train.x.shape[1]
    sizes = [pixels * hidden, hidden, hidden * CLASSES, CLASSES]
    scales = [pixels**-0.5, 0.0, hidden**-0.5, 0.0]
    draws = [torch.randn(n, generator=generator, dtype=torch.float64) * s for n, s in zip(sizes, scales, strict=True)]
    w = torch.cat(draws).to(job.device).requires_grad_()
    lam = torch.full_like(w, 1e-4).log().requires_grad_()

    def loss(w: Tensor, part: Examples) -> Tensor:
        first, bias, second, last = w.split(sizes)
        h = torch.tanh(part.x @ first.view(pixels, hidden) + bias)
        return cross_entropy(h @ second.view(hidden, CLASSES) + last, part.y)

    def train(w: Tensor) -> Tensor:
        return loss(w, parts.train) + (lam.exp() * w.square()).sum()

    optimizer = torch.optim.Adam([w], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (w.grad,) = torch.autograd.grad(train(w), w)
        optimizer.step()
    return Problem(train, lambda w: loss(w, parts.validation), w.detach().requires_grad_(), lam)


def in_training(
    problem: Problem, steps: Sequence[int], *, lr: float, outer_lr: float, warm_up: int
) -> Iterator[tuple[int, Problem]]:
    """The paper's run: from zero by Adam, and from ``warm_up`` on a step of RMSprop on the penalties after every step.

    Args:
        problem: Where the losses come from; its penalties are tuned in place.
        steps: When to look.
        lr: Of the weights.
        outer_lr: Of the penalties.
        warm_up: Steps before the first hyper-step.

    Yields:
        The steps taken, and the problem at these weights and penalties.
    """
    w = torch.zeros_like(problem.w).requires_grad_()
    here = dataclasses.replace(problem, w=w)
    inner, outer = torch.optim.Adam([w], lr=lr), torch.optim.RMSprop([problem.lam], lr=outer_lr)
    for step in range(1, max(steps) + 1):
        (w.grad,) = torch.autograd.grad(problem.train(w), w)
        inner.step()
        if step > warm_up:
            problem.lam.grad, _ = here.hypergradient(hg.CG(tol=1e-3))
            outer.step()
        if step in steps:
            yield step, here


PROBLEMS: dict[str, Callable[[Job], Problem]] = {
    "logistic regression": logistic,
    "diabetes ridge": ridge,
    "indefinite MLP": lambda job: mlp_at(job, job.protocol.training_steps[-1]),
}
