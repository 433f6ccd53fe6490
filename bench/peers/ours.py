"""Ours as one drops it in: the loss as a function, the parameters as a dict, the default engine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import hypergrad_ext as hg
from bench.peers.problems import Problem
from bench.peers.tasks import Task

METHODS = ("neumann", "cg")


def solver_of(problem: Problem, task: Task) -> hg.Solver:
    """So many steps of the method, whatever happens."""
    if task.method == "neumann":
        return hg.Neumann(task.steps, alpha=problem.alpha)
    return hg.CG(tol=1e-20, max_steps=task.steps)


def make(problem: Problem, task: Task, engine: str = "auto") -> Callable[[], list[Tensor]]:
    """`inverse_hvp` or `hypergradient`."""
    solver, params = solver_of(problem, task), problem.params
    names = list(params)
    if task.what == "hypergradient":
        return lambda: list(
            hg.hypergradient(
                problem.val_loss,
                lambda w: problem.train_loss(w, problem.log_l2),
                params,
                problem.hparams,
                solver,
                damping=problem.damping,
                engine=engine,
            )
        )
    b = problem.vectors(task.vectors) if task.vectors else problem.b
    v = dict(zip(names, b, strict=True))

    def run() -> list[Tensor]:
        x = hg.inverse_hvp(problem.train_loss, params, v, solver, damping=problem.damping, engine=engine)
        return list(x.values())

    return run
