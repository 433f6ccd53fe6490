"""Ours with ``engine="compiled"``, which takes some seconds once for a function, as JAX and ``torch.compile`` do."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers import ours
from bench.peers.ours import METHODS as METHODS
from bench.peers.problems import Problem
from bench.peers.tasks import Task


def make(problem: Problem, task: Task) -> Callable[[], list[Tensor]]:
    """`inverse_hvp` or `hypergradient`."""
    return ours.make(problem, task, "compiled")
