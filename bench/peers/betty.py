"""Betty: its ``neumann`` and ``cg``, called as its engine calls them, on a stand-in for its ``Problem``.

It has no damping: the loss gets it as a penalty. Its conjugate gradients take the next direction from the residual
before the step (as of 0.2.1), so they end elsewhere. They run where they are asked for, and are shown as wrong; to
an error it goes by the series.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from betty.hypergradient.cg import cg
from betty.hypergradient.neumann import approx_inverse_hvp, neumann
from torch import Tensor

from bench.peers.problems import Problem
from bench.peers.tasks import Task, Unsupported

METHODS = ("neumann", "cg")
TO_ERROR = ("neumann",)


def make(problem: Problem, task: Task) -> Callable[[], list[Tensor]]:
    """``neumann`` or ``cg``; for the product alone ``approx_inverse_hvp``."""
    if task.vectors:
        raise Unsupported("one vector at a time")
    leaves = problem.leaves

    def loss(penalties: dict[str, Tensor] | None) -> Tensor:
        return problem.train_loss(problem.params, penalties, ridge=problem.damping)

    if task.what == "inverse_hvp":
        if task.method == "cg":
            # Its conjugate gradients end in a hypergradient: the one by what is added to the gradient.
            shift = [torch.zeros_like(t).requires_grad_() for t in leaves]

            def shifted(batch: object) -> Tensor:
                return loss(None) - sum((s * t).sum() for s, t in zip(shift, leaves, strict=True))

            return lambda: cg(problem.b, _lower(problem, task, shifted), _upper(shift), False)

        def run() -> list[Tensor]:
            gradient = torch.autograd.grad(loss(None), leaves, create_graph=True)
            return approx_inverse_hvp(problem.b, gradient, leaves, iterations=task.steps, alpha=problem.alpha)

        return run

    solve = neumann if task.method == "neumann" else cg

    def hypergradient() -> list[Tensor]:
        v = torch.autograd.grad(problem.val_loss(problem.params), leaves)
        return solve(v, _lower(problem, task, lambda batch: loss(problem.log_l2)), _upper(problem.hparams), False)

    return hypergradient


def _lower(problem: Problem, task: Task, training_step: Callable[[object], Tensor]) -> SimpleNamespace:
    config = SimpleNamespace(
        neumann_iterations=task.steps, neumann_alpha=problem.alpha, cg_iterations=task.steps, cg_alpha=1.0
    )
    return SimpleNamespace(
        paths=[],
        config=config,
        cur_batch=None,
        training_step_exec=training_step,
        trainable_parameters=lambda: problem.leaves,
        parameters=lambda: problem.leaves,
    )


def _upper(hparams: list[Tensor]) -> SimpleNamespace:
    return SimpleNamespace(trainable_parameters=lambda: hparams)
