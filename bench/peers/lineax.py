"""lineax, jitted: ``linear_solve`` with its conjugate gradients; the mixed derivative by JAX. It has no series.

Its conjugate gradients return NaN where the curvature ``p^T A p / |p|^2`` is below 100 times eps times the number of
weights, whatever the scale of A: in float32 that is most networks. So the system is scaled up, by a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import lineax as lx

from bench.peers.jax_models import Twin
from bench.peers.problems import Problem
from bench.peers.tasks import Task

METHODS = ("cg",)


def scale(problem: Problem) -> float:
    """What keeps curvatures, which are about the damping or more, far from where they count as zero."""
    return 1e3 * 1.2e-7 * sum(p.numel() for p in problem.leaves) / problem.damping


def make(problem: Problem, task: Task) -> Callable[[], list[Any]]:
    """One jitted function of weights, penalties, batches and right-hand side."""
    twin, damping, up = Twin(problem), problem.damping, scale(problem)
    # Without tests and without the true residual, which it would compute in every tenth step.
    solver = lx.CG(rtol=0.0, atol=0.0, max_steps=task.steps, stabilise_every=None)

    def solve(gradient: Callable, params: Any, b: Any) -> Any:
        hessian = lx.JacobianLinearOperator(lambda w, _: gradient(w), params, tags=lx.positive_semidefinite_tag)
        identity = lx.IdentityLinearOperator(hessian.in_structure())
        matrix = lx.TaggedLinearOperator(up * (hessian + damping * identity), lx.positive_semidefinite_tag)
        return lx.linear_solve(matrix, jax.tree.map(lambda t: up * t, b), solver, throw=False).value

    @jax.jit
    def inverse_hvp(params: Any, batch: Any, b: Any) -> Any:
        return solve(lambda w: jax.grad(twin.train_loss)(w, {}, batch), params, b)

    @jax.jit
    def hypergradient(params: Any, log_l2: Any, batch: Any, val: Any) -> Any:
        b = jax.grad(twin.cross_entropy)(params, val)
        x = solve(lambda w: jax.grad(twin.train_loss)(w, log_l2, batch), params, b)
        _, pull_back = jax.vjp(lambda log_l2: jax.grad(twin.train_loss)(params, log_l2, batch), log_l2)
        return jax.tree.map(lambda t: -t, pull_back(x)[0])

    if task.what == "hypergradient":
        return lambda: twin.listed(hypergradient(twin.params, twin.log_l2, twin.train, twin.val))
    return lambda: twin.listed(inverse_hvp(twin.params, twin.train, twin.b))
