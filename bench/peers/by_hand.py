"""What one writes by hand in torch: double backward through the retained gradient, vectors updated by ``_foreach``.

Many vectors go one after another, or at once by ``is_grads_batched``, whichever is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.peers.problems import Problem
from bench.peers.tasks import Task

METHODS = ("neumann", "cg")


def neumann(
    gradient: Sequence[Tensor], params: Sequence[Tensor], v: Sequence[Tensor], alpha: float, steps: int, damping: float
) -> list[Tensor]:
    """The paper's Algorithm 3, with the graph of the gradient kept."""
    batched = v[0].dim() > params[0].dim()
    v, total = [t.clone() for t in v], [t.clone() for t in v]
    for _ in range(steps):
        hv = torch.autograd.grad(gradient, params, v, retain_graph=True, is_grads_batched=batched)
        with torch.no_grad():
            torch._foreach_add_(v, torch._foreach_add(hv, v, alpha=damping), alpha=-alpha)
            torch._foreach_add_(total, v)
    torch._foreach_mul_(total, alpha)
    return total


def conjugate_gradients(
    gradient: Sequence[Tensor], params: Sequence[Tensor], b: Sequence[Tensor], steps: int, damping: float
) -> list[Tensor]:
    """Textbook conjugate gradients, without a test that would stop them."""
    x, r, p = [torch.zeros_like(t) for t in b], [t.clone() for t in b], [t.clone() for t in b]
    square = _dot(r, r)
    for _ in range(steps):
        hp = torch.autograd.grad(gradient, params, p, retain_graph=True)
        with torch.no_grad():
            hp = torch._foreach_add(hp, p, alpha=damping)
            step = square / _dot(p, hp)
            torch._foreach_add_(x, torch._foreach_mul(p, step))
            torch._foreach_add_(r, torch._foreach_mul(hp, -step))
            new = _dot(r, r)
            torch._foreach_mul_(p, new / square)
            torch._foreach_add_(p, r)
            square = new
    return x


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.sum() for t in torch._foreach_mul(a, b)]).sum()


def make(problem: Problem, task: Task) -> Callable[[], list[Tensor]]:
    """The loop, from the loss on."""
    leaves, alpha, damping = problem.leaves, problem.alpha, problem.damping

    def gradient_of(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaves, create_graph=True)

    def solve(gradient: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
        if task.method == "neumann":
            return neumann(gradient, leaves, b, alpha, task.steps, damping)
        return conjugate_gradients(gradient, leaves, b, task.steps, damping)

    def hypergradient() -> list[Tensor]:
        gradient = gradient_of(problem.train_loss(problem.params, problem.log_l2))
        x = solve(gradient, torch.autograd.grad(problem.val_loss(problem.params), leaves))
        return [-g for g in torch.autograd.grad(gradient, problem.hparams, x)]

    def one_by_one() -> list[Tensor]:
        gradient = gradient_of(problem.train_loss(problem.params))
        columns = [solve(gradient, [t[j] for t in batch]) for j in range(task.vectors)]
        return [torch.stack(parts) for parts in zip(*columns, strict=True)]

    def at_once() -> list[Tensor]:
        return solve(gradient_of(problem.train_loss(problem.params)), batch)

    if task.what == "hypergradient":
        return hypergradient
    if task.vectors:
        batch = problem.vectors(task.vectors)
        return min((one_by_one, at_once), key=_seconds)
    return lambda: solve(gradient_of(problem.train_loss(problem.params)), problem.b)


def _seconds(run: Callable[[], object]) -> float:
    run()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
