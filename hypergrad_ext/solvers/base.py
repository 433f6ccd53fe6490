"""The contract of a solver, and the linear system it sees."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.ops import Op
from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.checks import check_count as check_count
from hypergrad_ext.solvers.checks import check_number as check_number
from hypergrad_ext.solvers.checks import check_tolerance as check_tolerance
from hypergrad_ext.solvers.state import SolverState

# Steps between two looks at the device's flags where a look costs a synchronisation.
_LOOK_EVERY = 8


@dataclass
class Outcome:
    """What a solver hands back.

    Attributes:
        x: The solution in the flat layout, which the caller may overwrite.
        statuses: One status per row.
        steps: Steps taken.
        detail: The numbers behind the status.
        residuals: Per row, the norm of the residual that the recurrence knows, if it knows one.
        alpha: The step size, if there is one.
        solver: The solver that ran in the end, where it was chosen on the way.
        indefinite: Whether negative curvature was met, though the solve went on.
    """

    x: Tensor
    statuses: list[Status]
    steps: int
    detail: str = ""
    residuals: list[float] | None = None
    alpha: float | None = None
    solver: Solver | None = None
    indefinite: bool = False


class System:
    """``(H + damping I) x = b`` in flat coordinates: one buffer ``(n,)``, or ``(k, n)`` for a batch.

    Counts products, and applies the operator to views of a flat buffer, so that nothing is copied.

    Attributes:
        operator: The operator that was given.
        prepared: The form of it that a solve uses.
        damping: The damping.
        backend: The backend asked for, if any.
        hvps: Products so far; one with a batch of k vectors counts k.
        state: What earlier solves left; a new one if nobody keeps it.
        kept: Whether somebody does.
        history: Where steps leave norms of residuals, if somebody wants them.
    """

    def __init__(
        self, operator: LinearOperator, damping: float, backend: str | None, state: SolverState | None = None
    ) -> None:
        """Bind an operator, its damping, the choice of backend, and the state that goes on."""
        self.operator = operator
        self.state = SolverState() if state is None else state
        self.kept = state is not None
        self.prepared = operator
        self.damping = damping
        self.hvps = 0
        self.history: list[list[float]] | None = None
        self._space = operator.space
        self.backend = backend

    def record(self, squares: Iterable[float]) -> None:
        """Take squared norms of residuals, one per row, into the history."""
        if self.history is not None:
            self.history.append([math.sqrt(square) if square >= 0 else math.nan for square in squares])

    def kernel(self, op: Op) -> Callable:
        """The function that runs a fused op on this system's device."""
        return op.kernel(self._space.device, self.backend)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' views of a flat buffer: take them once, they follow the buffer."""
        return self._space.views(flat)

    def product(self, views: Sequence[Tensor]) -> list[Tensor]:
        """``H v``, without damping (the fused steps add it), for views of one vector or a batch."""
        return self._times(self.prepared, views)

    def _times(self, operator: LinearOperator, views: Sequence[Tensor]) -> list[Tensor]:
        batched = views[0].dim() > len(self._space.shapes[0])
        self.hvps += views[0].shape[0] if batched else 1
        multiply = operator.matmat if batched else operator.matvec
        if self._space.exact:
            return multiply(views)
        product = multiply([t.to(dtype) for t, dtype in zip(views, self._space.dtypes, strict=True)])
        # A fused step widens one low precision as it reads; several have to be brought to one first.
        return product if self._space.uniform else [t.to(self._space.dtype) for t in product]

    def apply(self, x: Tensor) -> Tensor:
        """``(H + damping I) x`` by the operator that was given: for residuals, outside the hot loop."""
        product = self._space.joined(self._times(self.operator, self.views(x)))
        return torch.add(product, x, alpha=self.damping)

    def product_of_given(self, v: Tensor) -> Tensor:
        """``H v`` by the operator that was given, as one flat tensor: to look at the spectrum, before a solve."""
        parts = self._times(self.operator, self.views(v))
        return torch.cat([part.reshape(*v.shape[:-1], -1).to(v.dtype) for part in parts], dim=-1)

    def prepare(self, products: int, b: Tensor) -> None:
        """Let the operator choose its fastest form for a solve of about this many products."""
        self.prepared = self.operator.prepare(products, b.shape[0] if b.dim() == 2 else 1)

    def iterate(self, steps: int, advance: Callable[[], None], over: Callable[[int], bool] | None) -> int:
        """The loop of every solver: ``advance`` until ``over``, given the number of steps, says that it is.

        Args:
            steps: Steps at the most.
            advance: Takes one step.
            over: Looks at flags on the device; called rarely where that means to wait for it. None never stops.

        Returns:
            Steps taken.
        """
        every = _look_every(self._space.device)
        for step in range(1, steps + 1):
            advance()
            if over and (step % every == 0 or step == steps) and over(step):
                return step
        return steps


def _look_every(device: torch.device) -> int:
    return 1 if device.type == "cpu" else _LOOK_EVERY


class Solver(ABC):
    """A way to find ``x`` with ``(H + d I) x = b``: a frozen dataclass of its settings.

    A subclass writes ``run``; warm starts, scaling, batches, unused parameters, the true residual
    and the messages are the business of `hypergrad_ext.solve`.

    Attributes:
        needs_symmetry: Whether it refuses an operator that is not symmetric.
        needs_one_matrix: Whether it refuses an operator whose every product is with another matrix.
        gains_from_start: Whether the last solution in a `SolverState` makes it better or faster.
    """

    needs_symmetry = True
    needs_one_matrix = True
    gains_from_start = True

    @abstractmethod
    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Solve for one flat right-hand side ``(n,)``, or a batch ``(k, n)``, from ``x = 0``.

        Args:
            system: The operator with its damping.
            b: Right-hand side; finite, magnitudes at most 1. The solver may overwrite it.
            b_norm: Norm per row that a relative tolerance refers to, ``()`` or ``(k,)``, float64.

        Returns:
            The outcome, with one status per row.
        """
