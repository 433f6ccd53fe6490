"""hypertorch, from github.com/prolearner/hypertorch: on PyPI the name ``hypergrad`` is another package.

It returns hypergradients of the fixed point of a map, here a step of gradient descent with step size alpha. K steps of
a series are K + 1 of its, which begins with zero. It has no damping: the loss gets it as a penalty. An inverse-Hessian-
vector product is the hypergradient by what is added to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypergrad.hypergradients import CG, fixed_point
from torch import Tensor

from bench.peers.problems import Problem
from bench.peers.tasks import Task, Unsupported

METHODS = ("neumann", "cg")


def make(problem: Problem, task: Task) -> Callable[[], list[Tensor]]:
    """``fixed_point`` or ``CG``."""
    if task.vectors:
        raise Unsupported("one validation loss at a time")
    names = list(problem.params)
    hyper = task.what == "hypergradient"

    def named(w: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(names, w, strict=True))

    def step(w: Sequence[Tensor], hparams: Sequence[Tensor]) -> list[Tensor]:
        log_l2 = dict(zip(problem.log_l2, hparams, strict=True)) if hyper else None
        loss = problem.train_loss(named(w), log_l2, ridge=problem.damping)
        gradient = torch.autograd.grad(loss, w, create_graph=True)
        if hyper:
            return [t - problem.alpha * g for t, g in zip(w, gradient, strict=True)]
        return [t - problem.alpha * (g - s) for t, g, s in zip(w, gradient, hparams, strict=True)]

    def outer(w: Sequence[Tensor], hparams: Sequence[Tensor]) -> Tensor:
        if hyper:
            return problem.val_loss(named(w))
        return sum((t * s).sum() for t, s in zip(w, problem.b, strict=True))

    hparams = problem.hparams if hyper else [torch.zeros_like(t).requires_grad_() for t in problem.leaves]
    steps, solve = (task.steps + 1, fixed_point) if task.method == "neumann" else (task.steps, CG)
    return lambda: solve(problem.leaves, hparams, steps, step, outer, tol=0.0, set_grad=False)
