"""jaxopt, jitted: ``root_vjp`` of the gradient, with its conjugate gradients or with a series.

It has no Neumann series, but takes any ``solve``: here a ``lax.scan``, which is as fast as JAX can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxopt.implicit_diff import root_vjp
from jaxopt.linear_solve import solve_cg

from bench.peers.jax_models import Twin
from bench.peers.problems import Problem
from bench.peers.tasks import Task

METHODS = ("neumann", "cg")


def make(problem: Problem, task: Task) -> Callable[[], list[Any]]:
    """One jitted function of weights, penalties, batches and right-hand sides."""
    twin, alpha, damping = Twin(problem), problem.alpha, problem.damping

    def neumann(product: Callable, b: Any) -> Any:
        def step(state: Any, _: None) -> Any:
            v, total = state
            v = jax.tree.map(lambda t, h: t - alpha * (h + damping * t), v, product(v))
            return (v, jax.tree.map(jnp.add, total, v)), None

        (_, total), _ = jax.lax.scan(step, (b, b), None, length=task.steps)
        return jax.tree.map(lambda t: alpha * t, total)

    def cg(product: Callable, b: Any) -> Any:
        return solve_cg(product, b, ridge=damping, tol=0.0, maxiter=task.steps)

    solve = neumann if task.method == "neumann" else cg

    @jax.jit
    def inverse_hvp(params: Any, batch: Any, b: Any) -> Any:
        gradient = jax.grad(twin.train_loss)
        _, pull_back = jax.vjp(lambda w: gradient(w, {}, batch), params)

        def run(b: Any) -> Any:
            return solve(lambda v: pull_back(v)[0], b)

        return jax.vmap(run)(b) if task.vectors else run(b)

    @jax.jit
    def hypergradient(params: Any, log_l2: Any, batch: Any, val: Any) -> Any:
        b = jax.grad(twin.cross_entropy)(params, val)
        optimality = jax.grad(twin.train_loss)
        return root_vjp(lambda w, log_l2: optimality(w, log_l2, batch), params, (log_l2,), b, solve)[0]

    if task.what == "hypergradient":
        return lambda: twin.listed(hypergradient(twin.params, twin.log_l2, twin.train, twin.val))
    b = twin.vectors(problem, task.vectors) if task.vectors else twin.b
    return lambda: twin.listed(inverse_hvp(twin.params, twin.train, b))
