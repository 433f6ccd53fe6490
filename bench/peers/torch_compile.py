"""``torch.compile`` of one step of the loop: the product by ``torch.func`` and the update of the vectors in one graph.

Double backward cannot be compiled as such, so the product is ``jvp(grad(loss))``, which ``torch.compile`` can trace; it
computes the gradient anew in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.peers.problems import Problem
from bench.peers.tasks import Task, Unsupported

METHODS = ("neumann", "cg")


def make(problem: Problem, task: Task) -> Callable[[], list[Tensor]]:
    """The loop around the compiled step, and the gradients around the loop."""
    if task.vectors:
        raise Unsupported("a compiled step per vector is the single vector's time, k times")
    names, leaves, damping = list(problem.params), problem.leaves, problem.damping
    log_l2 = problem.log_l2 if task.what == "hypergradient" else None

    def loss_of(w: Sequence[Tensor]) -> Tensor:
        return problem.train_loss(dict(zip(names, w, strict=True)), log_l2)

    def product(w: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> list[Tensor]:
        hv = torch.func.jvp(torch.func.grad(loss_of), (w,), (v,))[1]
        return [h + damping * t for h, t in zip(hv, v, strict=True)]

    @torch.compile
    def neumann_step(w, v, total):
        v = tuple(t - problem.alpha * h for t, h in zip(v, product(w, v), strict=True))
        return v, tuple(s + t for s, t in zip(total, v, strict=True))

    @torch.compile
    def cg_step(w, x, r, p, square):
        hp = product(w, p)
        step = square / sum((a * b).sum() for a, b in zip(p, hp, strict=True))
        x = tuple(a + step * b for a, b in zip(x, p, strict=True))
        r = tuple(a - step * b for a, b in zip(r, hp, strict=True))
        new = sum((a * a).sum() for a in r)
        return x, r, tuple(a + new / square * b for a, b in zip(r, p, strict=True)), new

    def solve(b: Sequence[Tensor]) -> list[Tensor]:
        w, v = tuple(t.detach() for t in leaves), tuple(b)
        with torch.no_grad():
            if task.method == "neumann":
                total = v
                for _ in range(task.steps):
                    v, total = neumann_step(w, v, total)
                return [problem.alpha * t for t in total]
            x, r, p, square = tuple(torch.zeros_like(t) for t in v), v, v, sum((t * t).sum() for t in v)
            for _ in range(task.steps):
                x, r, p, square = cg_step(w, x, r, p, square)
            return list(x)

    def hypergradient() -> list[Tensor]:
        x = solve(torch.autograd.grad(problem.val_loss(problem.params), leaves))
        gradient = torch.autograd.grad(loss_of(leaves), leaves, create_graph=True)
        return [-g for g in torch.autograd.grad(gradient, problem.hparams, x)]

    return hypergradient if task.what == "hypergradient" else lambda: solve(problem.b)
