"""Ours where the Hessian has a closed form: `GLMHessian` and `MLPHessian` in place of the Hessian of the loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import hypergrad_ext as hg
from bench.peers.ours import METHODS as METHODS
from bench.peers.ours import solver_of
from bench.peers.problems import Problem
from bench.peers.tasks import Task, Unsupported


def operator_of(problem: Problem, penalised: bool) -> hg.LinearOperator:
    """The operator at the problem's weights.

    Raises:
        Unsupported: If there is none for this model and penalty.
    """
    x, y = problem.train
    if problem.closed_form == "glm":
        l2 = problem.hparams[0].detach().exp() if penalised else 0.0
        return hg.GLMHessian(x, problem.leaves, "softmax", l2=l2)
    if problem.closed_form == "mlp" and not penalised:
        return hg.MLPHessian(x, problem.leaves, y, activation="tanh")
    if problem.closed_form == "mlp":
        raise Unsupported("MLPHessian takes one penalty, not one per weight")
    raise Unsupported("the model has no closed form here")


def make(problem: Problem, task: Task) -> Callable[[], list[Tensor]]:
    """`solve` or `hypergradient` with the operator, which is made anew every time."""
    solver, penalised = solver_of(problem, task), task.what == "hypergradient"
    operator_of(problem, penalised)
    if penalised:
        return lambda: list(
            hg.hypergradient(
                problem.val_loss,
                lambda w: problem.train_loss(w, problem.log_l2),
                problem.params,
                problem.hparams,
                solver,
                damping=problem.damping,
                operator=operator_of(problem, True),
            )
        )
    b = problem.vectors(task.vectors) if task.vectors else problem.b

    def run() -> list[Tensor]:
        operator = operator_of(problem, False)
        return hg.solve(operator, b, solver, damping=problem.damping, residual=False).value

    return run
