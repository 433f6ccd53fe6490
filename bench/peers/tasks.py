"""What is asked of every package, and the truth in float64 that its answer is held against."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bench.peers.problems import Problem, gradient_graph, lanczos

# A step of a series too many or too few moves the result by more than this; float32 by less.
SAME_STEPS = 2e-3
# Conjugate gradients lose orthogonality: in float32 every package is up to a step behind what float64 has.
SAME_CG = 1e-2
# Of the exact solution, for the task that is timed to an error.
TARGET = 1e-2
LIMIT = 3000


class Unsupported(Exception):
    """A package has no way to do what is asked; the message says what is missing."""


@dataclass(frozen=True)
class Task:
    """A solve with ``H + d I``, or the hypergradient that it is for.

    Attributes:
        name: As on the command line and in tables.
        what: The inverse-Hessian-vector product itself, or the hypergradient by the penalties of all weights.
        method: ``"neumann"``, ``"cg"``, or ``"either"``: whichever of those a package has that needs the fewest steps.
        steps: Hessian-vector products; K of the series.
        vectors: Right-hand sides at once; 0 for a single one, the validation gradient.
    """

    name: str
    what: Literal["inverse_hvp", "hypergradient"]
    method: Literal["neumann", "cg", "either"]
    steps: int
    vectors: int = 0

    @property
    def to_error(self) -> bool:
        """Whether it is about reaching an error, not about a number of steps."""
        return self.method == "either"


TASKS = {
    task.name: task
    for task in (
        Task("neumann20", "inverse_hvp", "neumann", 20),
        Task("neumann100", "inverse_hvp", "neumann", 100),
        Task("cg20", "inverse_hvp", "cg", 20),
        Task("vectors8", "inverse_hvp", "neumann", 5, 8),
        Task("vectors32", "inverse_hvp", "neumann", 5, 32),
        Task("hypergradient", "hypergradient", "neumann", 20),
        Task("hypergradient_cg", "hypergradient", "cg", 20),
        Task("error1e-2", "inverse_hvp", "either", 0),
    )
}


def concrete(problem: Problem, task: Task, methods: Sequence[str]) -> Task:
    """The task with a method and a number of steps, for a package that has these methods.

    Raises:
        Unsupported: If it has none that will do.
    """
    if not task.to_error:
        if task.method not in methods:
            missing = {"neumann": "Neumann series", "cg": "conjugate gradients"}[task.method]
            raise Unsupported(f"it has no {missing}")
        return task
    known = {method: steps_to_target(problem, method) for method in methods}
    reached = {method: steps for method, steps in known.items() if steps is not None}
    if not reached:
        raise Unsupported(f"more than {LIMIT} steps to an error of {TARGET}")
    method = min(reached, key=reached.__getitem__)
    return replace(task, method=method, steps=reached[method])


def flat(tensors: Sequence[Any]) -> Tensor:
    """Tensors, or arrays of numpy or JAX, as one vector of float64."""
    parts = (t.detach() if isinstance(t, Tensor) else torch.tensor(np.asarray(t)) for t in tensors)
    return torch.cat([t.reshape(-1).double() for t in parts])


def error_of(problem: Problem, task: Task, result: Sequence[Tensor]) -> float:
    """Relative distance to the truth: the exact solution, or what so many steps give in float64."""
    truth = exact(problem) if task.to_error else flat(reference(problem, task))
    found = flat(result)
    if found.shape != truth.shape:
        return float("inf")
    return float((found - truth).norm() / truth.norm())


def tolerance(task: Task) -> float:
    """What `error_of` may be."""
    return 1.1 * TARGET if task.to_error else SAME_CG if task.method == "cg" else SAME_STEPS


@cache
def reference(problem: Problem, task: Task) -> list[Tensor]:
    """The result of the steps in float64, by the plainest code."""
    double = problem.double
    penalties = double.log_l2 if task.what == "hypergradient" else None
    loss = double.train_loss(double.params, penalties)
    gradient = torch.autograd.grad(loss, double.leaves, create_graph=True)

    def solve(b: Sequence[Tensor]) -> list[Tensor]:
        step = neumann_iterates if task.method == "neumann" else cg_iterates
        return _last(step(_damped(problem, gradient_graph(loss, double.leaves)), b, problem.alpha, task.steps))

    if task.vectors:
        columns = [solve([t[j].double() for t in problem.vectors(task.vectors)]) for j in range(task.vectors)]
        return [torch.stack(parts) for parts in zip(*columns, strict=True)]
    x = solve(double.b)
    return x if task.what == "inverse_hvp" else [-g for g in torch.autograd.grad(gradient, double.hparams, x)]


@cache
def exact(problem: Problem) -> Tensor:
    """``(H + d I)^{-1} b`` in float64, by conjugate gradients until nothing changes."""
    double = problem.double
    product = _damped(problem, gradient_graph(double.train_loss(double.params), double.leaves))
    norm = flat(double.b).norm()
    x = _last(cg_iterates(product, double.b, 0.0, LIMIT, tol=1e-12))
    residual = (flat(double.b) - flat(product(x))).norm() / norm
    if residual > 1e-9:
        raise ArithmeticError(f"{problem.name}: the exact solution has a residual of {residual:.1e}")
    return flat(x)


@cache
def steps_to_target(problem: Problem, method: str) -> int | None:
    """Fewest steps of a method to `TARGET`; None above `LIMIT`. Conjugate gradients have products in float32."""
    truth = exact(problem)
    if method == "neumann":
        # What is left of the solution after K updates is (I - alpha H)^(K + 1) times it.
        values, weights = lanczos(problem.double, truth)
        left = (1 - problem.alpha * (values + problem.damping)).square()
        for steps in range(LIMIT + 1):
            if (weights * left ** (steps + 1)).sum() <= TARGET**2 * weights.sum():
                return steps
        return None
    single = gradient_graph(problem.train_loss(problem.params), problem.leaves)

    def product(v: Sequence[Tensor]) -> list[Tensor]:
        return [h.double() for h in single([t.to(p.dtype) for t, p in zip(v, problem.leaves, strict=True)])]

    for steps, x in enumerate(cg_iterates(_damped(problem, product), problem.double.b, 0.0, LIMIT)):
        if (flat(x) - truth).norm() <= TARGET * truth.norm():
            return steps
    return None


Product = Callable[[Sequence[Tensor]], list[Tensor]]


def _last(iterates: Iterator[list[Tensor]]) -> list[Tensor]:
    return deque(iterates, maxlen=1).pop()


def _damped(problem: Problem, product: Product) -> Product:
    return lambda v: [h + problem.damping * t for h, t in zip(product(v), v, strict=True)]


def neumann_iterates(product: Product, b: Sequence[Tensor], alpha: float, steps: int) -> Iterator[list[Tensor]]:
    """Partial sums of the series: 0 to ``steps`` updates."""
    v, p = list(b), list(b)
    yield [alpha * t for t in p]
    for _ in range(steps):
        v = [t - alpha * h for t, h in zip(v, product(v), strict=True)]
        p = [s + t for s, t in zip(p, v, strict=True)]
        yield [alpha * t for t in p]


def cg_iterates(
    product: Product, b: Sequence[Tensor], alpha: float, steps: int, tol: float = 0.0
) -> Iterator[list[Tensor]]:
    """Iterates of conjugate gradients from zero, until the residual is ``tol`` of the right-hand side."""
    del alpha
    shapes, sizes = [t.shape for t in b], [t.numel() for t in b]

    def views(x: Tensor) -> list[Tensor]:
        return [t.view(s) for t, s in zip(x.split(sizes), shapes, strict=True)]

    r = flat(b)
    x, p, square, start = torch.zeros_like(r), r, r @ r, r @ r
    yield views(x)
    for _ in range(steps):
        if square <= tol**2 * start:
            return
        hp = flat(product(views(p)))
        step = square / (p @ hp)
        x, r = x + step * p, r - step * hp
        p, square = r + (r @ r) / square * p, r @ r
        yield views(x)
