"""optimistix, jitted: the backward pass through a root, by ``ImplicitAdjoint`` with conjugate gradients of lineax.

The weights are already what training made of them, so the root finder is one that stays where it begins. It has no
damping: the loss gets it as a penalty, and it is scaled up as for lineax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

from bench.peers.jax_models import Twin
from bench.peers.lineax import scale
from bench.peers.problems import Problem
from bench.peers.tasks import Task

METHODS = ("cg",)


class Stay(optx.AbstractRootFinder):
    """Take the initial value for the root."""

    rtol: float = 0.0
    atol: float = 0.0
    norm: Callable = eqx.field(default=optx.max_norm, static=True)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return None

    def step(self, fn, y, args, options, state, tags):
        return y, state, None

    def terminate(self, fn, y, args, options, state, tags):
        return jnp.array(True), optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}


def make(problem: Problem, task: Task) -> Callable[[], list[Any]]:
    """One jitted function: the gradient of a loss of the root."""
    twin, damping, up = Twin(problem), problem.damping, scale(problem)
    solver = lx.CG(rtol=0.0, atol=0.0, max_steps=task.steps, stabilise_every=None)
    adjoint = optx.ImplicitAdjoint(linear_solver=solver)

    def root(params: Any, args: Any) -> Any:
        def residual(w: Any, args: Any) -> Any:
            log_l2, shift, batch = args
            gradient = jax.grad(twin.train_loss)(w, log_l2, batch)
            gradient = jax.tree.map(lambda g, t: g + damping * t, gradient, w)
            gradient = gradient if shift is None else jax.tree.map(jnp.subtract, gradient, shift)
            return jax.tree.map(lambda g: up * g, gradient)

        tags = frozenset({lx.positive_semidefinite_tag})
        return optx.root_find(residual, Stay(), params, args, adjoint=adjoint, tags=tags, throw=False).value

    @jax.jit
    def inverse_hvp(params: Any, batch: Any, b: Any) -> Any:
        def along_b(shift: Any) -> Any:
            w = root(params, ({}, shift, batch))
            return sum(jax.tree.leaves(jax.tree.map(lambda t, s: (t * s).sum(), w, b)))

        return jax.grad(along_b)(jax.tree.map(jnp.zeros_like, params))

    @jax.jit
    def hypergradient(params: Any, log_l2: Any, batch: Any, val: Any) -> Any:
        return jax.grad(lambda t: twin.cross_entropy(root(params, (t, None, batch)), val))(log_l2)

    if task.what == "hypergradient":
        return lambda: twin.listed(hypergradient(twin.params, twin.log_l2, twin.train, twin.val))
    return lambda: twin.listed(inverse_hvp(twin.params, twin.train, twin.b))
