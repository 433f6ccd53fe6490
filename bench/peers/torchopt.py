"""TorchOpt: ``custom_root`` with its ``solve_inv(ns=True)`` and ``solve_cg``, whose ``ridge`` is the damping."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchopt
from torch import Tensor
from torchopt.diff.implicit import custom_root

from bench.peers.problems import Problem
from bench.peers.tasks import Task, Unsupported

METHODS = ("neumann", "cg")


def make(problem: Problem, task: Task) -> Callable[[], list[Tensor]]:
    """The linear solver itself, or the backward pass through the root."""
    if task.vectors:
        raise Unsupported("one vector at a time")
    names, ridge = list(problem.params), problem.damping
    if task.method == "neumann":
        solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=task.steps, alpha=problem.alpha, ridge=ridge)
    else:
        solve = torchopt.linear_solve.solve_cg(maxiter=task.steps, rtol=0.0, ridge=ridge)

    if task.what == "inverse_hvp":
        gradient_of = torch.func.grad(lambda w: problem.train_loss(dict(zip(names, w, strict=True))))

        def run() -> list[Tensor]:
            _, pull_back = torch.func.vjp(gradient_of, tuple(p.detach() for p in problem.leaves))
            return list(solve(lambda v: pull_back(v)[0], tuple(problem.b)))

        return run

    def loss(w: tuple[Tensor, ...], log_l2: tuple[Tensor, ...]) -> Tensor:
        return problem.train_loss(dict(zip(names, w, strict=True)), dict(zip(problem.log_l2, log_l2, strict=True)))

    @custom_root(torch.func.grad(loss, argnums=0), argnums=1, solve=solve)
    def train(w: tuple[Tensor, ...], log_l2: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return w

    def hypergradient() -> list[Tensor]:
        trained = train(tuple(problem.leaves), tuple(problem.hparams))
        val = problem.val_loss(dict(zip(names, trained, strict=True)))
        return list(torch.autograd.grad(val, problem.hparams))

    return hypergradient
