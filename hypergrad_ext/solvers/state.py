"""What one outer step's solve leaves for the next: explicit, inspectable, never hidden in a global."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hypergrad_ext.solvers.checks import check_count

if TYPE_CHECKING:
    from hypergrad_ext.solvers.lanczos import Spectrum
    from hypergrad_ext.solvers.nystrom import Sketch
    from hypergrad_ext.structure import Space


@dataclass
class SolverState:
    r"""What a solve leaves for the next one of a slowly changing system: hold one per outer loop.

    .. code-block:: python

        state = hg.SolverState()
        for _ in range(outer_steps):
            ...
            x = hg.inverse_hvp(train_loss, model, v, state=state)  # or hg.solve, hg.hypergradient

    Solvers start from the last solution, unless that is worse than zero or ``x0`` is given (`Identity`, `Direct` and
    `LiSSA`, which gain nothing from it, do not). Where it is far from
    the tolerance, one more product shows how far to follow its last change: a steady drift is nearly undone. `Neumann`
    and `Chebyshev` reuse what Lanczos steps saw of the spectrum, and ``solver="auto"`` a Nystrom preconditioner once
    solves are long. What was measured on an earlier operator is measured again after ``refresh`` solves (a sketch
    once its age has cost what it did), and at once when a solve fails with it, or the spectrum of a preconditioned
    operator is to be that with another damping or preconditioner. A wrong start or an old sketch costs
    products, never accuracy: solvers with a tolerance still meet it.

    Args:
        refresh: Solves for which a spectrum is kept.

    Raises:
        TypeError: If ``refresh`` is not an integer.
        ValueError: If it is less than 1.

    Attributes:
        x: The last solution, flat ``(n,)`` or ``(k, n)``, in the dtype of the solver state.
        change: The last solution less the one before.
        spectrum: What Lanczos steps saw.
        spectrum_age: Solves since then.
        preconditioned: What they saw of the preconditioned operator.
        preconditioned_of: The damping, and a number that tells preconditioners apart, of the last solve with it.
        preconditioned_age: Solves since then.
        sketch: The Nystrom sketch of the operator.
        sketch_age: Solves since then.
        sketch_steps: Steps that the first solve with the sketch took.
        sketch_lost: Steps above that number that later ones took, in all.
        steps: Steps that the last solve took.
        solves: Solves so far.
        hvps: Hessian-vector products so far, in all solves.

    Example:
        >>> A, state = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), hg.SolverState()
        >>> for step in range(2):
        ...     print(hg.solve(hg.Callable(lambda v: A @ v, torch.ones(2)), torch.ones(2), state=state).steps)
        2
        0
    """

    refresh: int = 10
    x: Tensor | None = None
    change: Tensor | None = None
    spectrum: Spectrum | None = None
    spectrum_age: int = 0
    preconditioned: Spectrum | None = None
    preconditioned_of: tuple[float, float] | None = None
    preconditioned_age: int = 0
    sketch: Sketch | None = None
    sketch_age: int = 0
    sketch_steps: int = 0
    sketch_lost: int = 0
    steps: int = 0
    solves: int = 0
    hvps: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_count("refresh", self.refresh, 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything, for ``torch.save``: tensors, numbers and tuples; a solve goes on bit for bit."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("spectrum", "preconditioned", "sketch"):
            state[name] = None if state[name] is None else tuple(state[name])
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Args:
            state: The dict.

        Raises:
            ValueError: If its keys are not those of a `SolverState`.
        """
        from hypergrad_ext.solvers.lanczos import Spectrum
        from hypergrad_ext.solvers.nystrom import Sketch

        names = {field.name for field in fields(self)}
        if set(state) != names:
            raise ValueError(f"state: expected the keys {', '.join(sorted(names))}, got {', '.join(sorted(state))}")
        for name, value in state.items():
            setattr(self, name, value)
        self.spectrum, self.preconditioned = (
            None if state[name] is None else Spectrum(*state[name]) for name in ("spectrum", "preconditioned")
        )
        self.sketch = None if state["sketch"] is None else Sketch(*state["sketch"])

    def forget(self) -> None:
        """Drop what belongs to the last system, after a failure; the counts stay."""
        self.x = self.change = self.spectrum = self.preconditioned = self.sketch = None

    def check(self, space: Space) -> None:
        """Refuse a state of other parameters.

        Raises:
            ValueError: If it belongs to another number of weights, dtype or device.
        """
        for t in (self.x, self.change, None if self.sketch is None else self.sketch.basis):
            if t is not None and (t.shape[-1], t.dtype, t.device) != (space.numel, space.dtype, space.device):
                raise ValueError(
                    f"state: expected one of {space.numel} weights in {space.dtype} on {space.device}, got one of "
                    f"{t.shape[-1]} in {t.dtype} on {t.device}; a new system needs a new SolverState()"
                )
