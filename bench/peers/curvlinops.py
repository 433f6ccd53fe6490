"""curvlinops: its Hessian and the inverses of it; damping by its own identity, the mixed derivative by torch.

It has no penalty per weight; the Hessian of one is an operator with its interface, below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from curvlinops import CGInverseLinearOperator, HessianLinearOperator, NeumannInverseLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.examples import IdentityLinearOperator
from torch import Tensor, nn

from bench.peers.problems import Problem
from bench.peers.tasks import Task

METHODS = ("neumann", "cg")


class Diagonal(PyTorchLinearOperator):
    """A diagonal matrix."""

    SELF_ADJOINT = True

    def __init__(self, diagonal: Sequence[Tensor]) -> None:
        super().__init__([t.shape for t in diagonal], [t.shape for t in diagonal])
        self.diagonal = diagonal

    @property
    def device(self) -> torch.device:
        return self.diagonal[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.diagonal[0].dtype

    def _matmat(self, columns: list[Tensor]) -> list[Tensor]:
        return [d.unsqueeze(-1) * t for d, t in zip(self.diagonal, columns, strict=True)]


def make(problem: Problem, task: Task) -> Callable[[], list[Tensor]]:
    """An inverse operator times the vector, or the vectors as columns."""
    leaves = problem.leaves

    def solve(b: list[Tensor], penalised: bool) -> list[Tensor]:
        x, y = problem.train
        hessian = HessianLinearOperator(
            problem.module, nn.CrossEntropyLoss(), leaves, [(x, y)], check_deterministic=False, num_data=len(x)
        )
        identity = IdentityLinearOperator([p.shape for p in leaves], x.device, x.dtype)
        matrix = hessian + problem.damping * identity
        if penalised:
            zeros = {n: torch.zeros_like(p) for n, p in problem.params.items()}
            second = zeros | {n: 2 * t.detach().exp() for n, t in problem.log_l2.items()}
            matrix = matrix + Diagonal(list(second.values()))
        if task.method == "neumann":
            inverse = NeumannInverseLinearOperator(matrix, num_terms=task.steps, scale=problem.alpha)
        else:
            inverse = CGInverseLinearOperator(matrix, max_iter=task.steps, max_tridiag_iter=0, tolerance=1e-20)
        return inverse @ b

    def hypergradient() -> list[Tensor]:
        b = list(torch.autograd.grad(problem.val_loss(problem.params), leaves))
        x = solve(b, True)
        loss = problem.train_loss(problem.params, problem.log_l2)
        gradient = torch.autograd.grad(loss, leaves, create_graph=True)
        return [-g for g in torch.autograd.grad(gradient, problem.hparams, x)]

    if task.what == "hypergradient":
        return hypergradient
    if task.vectors:
        columns = [t.movedim(0, -1).contiguous() for t in problem.vectors(task.vectors)]
        return lambda: [t.movedim(-1, 0) for t in solve(columns, False)]
    return lambda: solve(problem.b, False)
