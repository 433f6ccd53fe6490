"""The outer loop: a torch optimiser that is fed hypergradients."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad_ext.bilevel import Bilevel, Unused, power_of_two_below
from hypergrad_ext.compilation import never_compiled
from hypergrad_ext.linear_solve import SolverChoice, report, solve_for
from hypergrad_ext.norms import finite
from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.operators.hessian import Engine, Loss
from hypergrad_ext.solution import Solution, SolveError, SolveWarning, Status
from hypergrad_ext.solvers import SolverState
from hypergrad_ext.solvers.base import check_number
from hypergrad_ext.structure import Space, Tree, held, take_apart


@dataclass(frozen=True)
class OuterStep:
    """What one `HyperOptimizer.step` did.

    Attributes:
        taken: Whether the hyperparameters were stepped; otherwise nothing was changed.
        norm: Euclidean norm of the hypergradient before clipping; NaN where there is none.
        clipped: Whether it was above ``max_norm``.
        solution: The solve behind it: value, status, steps, products.
        message: Why the step was not taken.
    """

    taken: bool
    norm: float
    clipped: bool
    solution: Solution
    message: str = ""


class HyperOptimizer:
    r"""Hypergradient descent: wraps the torch optimiser of the hyperparameters as that wraps their gradients.

    `step` computes the hypergradient (see `hypergrad_ext.hypergradient`), writes it to ``.grad`` of every
    hyperparameter, over whatever training has left there, clips its norm, and steps the optimiser. What a solve
    found out (`SolverState`) helps the next. A step is taken as a whole or not at all: after a failed solve, an
    error, or a step that would leave a hyperparameter other than finite, hyperparameters and optimiser are as they
    were.

    Learning rate schedulers take ``optimizer`` itself. A run that was killed goes on from `state_dict` to the same
    bits, if its weights and random state were kept too.

    Args:
        optimizer: A torch optimiser of the hyperparameters, which must require grad.
        params: The weights w: tensor, list, tuple, dict or ``nn.Module``.
        solver: ``"auto"`` or a solver; the attribute may be changed between steps.
        damping: d >= 0, or ``"auto"`` (see `solve`); likewise.
        direct: Whether the direct gradient counts.
        warm_start: Hand what a solve left, in ``state``, to the next.
        max_norm: Clip the norm of the hypergradient to this.
        on_failure: ``"raise"`` raises `SolveError`; ``"skip"`` warns, counts in ``skipped`` and leaves everything
            as it was. Either way the next solve starts afresh.
        scaler: A ``torch.amp.GradScaler``, for losses in float16: both losses are scaled by it, and a step that
            overflows is skipped and lowers the scale. It is updated here, once per step. (bfloat16 needs none.)
        unused: What hyperparameters get that no loss depends on: ``"warn"``, ``"zeros"`` or ``"error"``; see
            `hypergradient`.
        engine: How products are run (`Hessian`). The default is ``"eager"``, not ``"auto"``, which lets a clock
            decide, and with it about rounding: then no two runs are the same to the bit.
        backend: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``.
        residual: Spend one more product per step on the true residual in ``solution``.

    Attributes:
        state: What the last solve left: its solution, spectrum or sketch, and counts.
        steps: Steps taken.
        skipped: Steps not taken.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value.

    Cost: per step that of `hypergradient`, and a copy of the hyperparameters and the optimiser's state.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation", AISTATS 2020, Algorithm 1.

    Example:
        The inner minimum of ``(w - 3)^2 + lam w^2`` is ``w = 3 / (1 + lam)``; ``w = 1`` is wanted.

        >>> w, log_lam = torch.tensor(0.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        >>> outer = hg.HyperOptimizer(torch.optim.SGD([log_lam], lr=0.5), w, hg.CG())
        >>> train_loss = lambda w: (w - 3) ** 2 + log_lam.exp() * w**2
        >>> for _ in range(50):
        ...     w.data = 3 / (1 + log_lam.detach().exp())  # train
        ...     result = outer.step(lambda w: (w - 1) ** 2, train_loss)
        >>> round(log_lam.exp().item(), 2), str(result.solution.status)
        (2.0, 'converged')
    """

    def __init__(  # noqa: D107 (documented in the class)
        self,
        optimizer: torch.optim.Optimizer,
        params: Tree,
        solver: SolverChoice = "auto",
        *,
        damping: float | Literal["auto"] = 0.0,
        direct: bool = True,
        warm_start: bool = True,
        max_norm: float | None = None,
        on_failure: Literal["raise", "skip"] = "raise",
        scaler: torch.amp.GradScaler | None = None,
        unused: Unused = "warn",
        engine: Engine = "eager",
        backend: str | None = None,
        residual: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch optimiser, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer: expected one that steps without a closure, got LBFGS")
        if on_failure not in ("raise", "skip"):
            raise ValueError(f"on_failure: expected 'raise' or 'skip', got {on_failure!r}")
        if max_norm is not None:
            check_number("max_norm", max_norm, positive=True)
        if damping != "auto":
            check_number("damping", damping, positive=False)
        self.params = held(params)
        take_apart("params", self.params)
        self.optimizer = optimizer
        self.solver = solver
        self.damping = damping
        self.direct = direct
        self.warm_start = warm_start
        self.max_norm = max_norm
        self.on_failure = on_failure
        self.scaler = scaler
        self.steps = 0
        self.skipped = 0
        self._options: dict[str, Any] = {"unused": unused, "engine": engine}
        self._backend = backend
        self._residual = residual
        self.state = SolverState()

    @property
    def hparams(self) -> list[Tensor]:
        """The hyperparameters, in the optimiser's order."""
        return [t for group in self.optimizer.param_groups for t in group["params"]]

    @never_compiled
    def step(
        self,
        val_loss: Loss,
        train_loss: Loss,
        *,
        batches: Iterable[Any] | None = None,
        stochastic: bool = False,
        operator: LinearOperator | None = None,
    ) -> OuterStep:
        """Compute the hypergradient and step the optimiser; the weights are to be at a minimum of the training loss.

        Args:
            val_loss: Scalar tensor with its graph, or a function of ``params``.
            train_loss: Likewise; hyperparameters enter it by themselves.
            batches: What ``train_loss`` takes as second argument: its derivatives are then those of the mean,
                in which a smaller last batch counts as much as the others (a warning says so); see `Hessian`.
            stochastic: Take the next of the ``batches`` for every product, and one for the mixed derivative: an
                estimate, for `LiSSA`, which ``"auto"`` is then, `Neumann` and `Identity`; other solvers refuse it.
            operator: Solve with this instead of the Hessian of ``train_loss``.

        Returns:
            What happened.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or value, or a loss depends on nothing.
            SolveError: If the solve failed or the hypergradient is not finite, and ``on_failure`` is ``"raise"``.
            FloatingPointError: If a step would leave a hyperparameter other than finite, likewise.
        """
        hparams = self.hparams
        problem = Bilevel(
            val_loss,
            train_loss,
            self.params,
            hparams,
            direct=self.direct,
            batches=batches,
            stochastic=stochastic,
            loss_scale=self._loss_scale(),
            **self._options,
        )
        system = problem.system(operator)
        solution = solve_for(
            *system,
            self.solver,
            damping=self.damping,
            x0=None,
            residual=self._residual or not system[0].surely_symmetric,
            backend=self._backend,
            state=self.state if self.warm_start else None,
        )
        grads: list[Tensor] = []
        if not solution.useless:
            report(solution, throw=False)
            grads, solution = problem.hypergradient(solution)
        if solution.useless:
            return self._not_taken(solution, math.nan, SolveError(solution))

        size, unit = _norm(grads), 1.0
        if math.isinf(size):
            # Squares of float64 may overflow where the elements are finite.
            unit = power_of_two_below(grads)
            size = _norm([g / unit for g in grads])
        norm = size * unit
        clipped = self.max_norm is not None and norm > self.max_norm
        if self.max_norm is not None and clipped:
            grads = [g / unit * (self.max_norm / size) for g in grads]
        try:
            with _all_or_nothing(self.optimizer, hparams):
                scale = self._loss_scale()
                self._advance(hparams, grads)
                self._check(hparams, scale)
        except FloatingPointError as error:
            return self._not_taken(solution, norm, error)
        self.steps += 1
        return OuterStep(True, norm, clipped, solution)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` of the hyperparameters, as the optimiser does; `step` does not need it."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """All that the outer loop remembers, for ``torch.save``: references, as with torch's optimisers.

        Returns:
            ``hparams``, the states of ``optimizer``, ``scaler`` and solver, and the counts. Settings, weights and
            random state are not in it.
        """
        return {
            "hparams": [t.detach() for t in self.hparams],
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "solver": self.state.state_dict(),
            "steps": self.steps,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken; the hyperparameters are written in place.

        Args:
            state_dict: From `state_dict` of a `HyperOptimizer` with hyperparameters and weights of the same shapes, and
                an optimiser of the same kind.

        Raises:
            ValueError: If it does not fit; then nothing is changed.
        """
        hparams, space = self.hparams, Space(take_apart("params", self.params))
        missing = {"hparams", "optimizer", "scaler", "solver", "steps", "skipped"} - state_dict.keys()
        if missing:
            raise ValueError(
                f"state_dict: expected one of a HyperOptimizer, got one without {', '.join(sorted(missing))}"
            )
        shapes, expected = ([tuple(t.shape) for t in tensors] for tensors in (state_dict["hparams"], hparams))
        if shapes != expected:
            raise ValueError(f"state_dict['hparams']: expected tensors of shapes {expected}, got {shapes}")
        if (self.scaler is None) != (state_dict["scaler"] is None):
            raise ValueError("state_dict['scaler']: expected a scaler's state if and only if there is a scaler")
        scaler = {} if self.scaler is None or not state_dict["scaler"] else self.scaler.state_dict()
        _expect_keys("state_dict['scaler']", scaler, state_dict["scaler"] or {})
        _expect_keys("state_dict['optimizer']", self.optimizer.state_dict(), state_dict["optimizer"])
        for group in state_dict["optimizer"]["param_groups"]:
            _expect_keys("state_dict['optimizer']['param_groups']", {"params": None}, group)
        state = SolverState()
        state.load_state_dict(pytree.tree_map_only(Tensor, lambda t: t.to(space.device), state_dict["solver"]))
        state.check(space)
        with _all_or_nothing(self.optimizer, hparams), torch.no_grad():
            self.optimizer.load_state_dict(state_dict["optimizer"])
            for group in self.optimizer.param_groups:
                # Only now: what an older torch did not have yet has got its default.
                _expect_keys("state_dict['optimizer']['param_groups']", self.optimizer.defaults, group)
            for t, value in zip(hparams, state_dict["hparams"], strict=True):
                t.copy_(value)
            if self.scaler is not None and scaler:
                self.scaler.load_state_dict(state_dict["scaler"])
        self.state, self.steps, self.skipped = state, state_dict["steps"], state_dict["skipped"]

    def _loss_scale(self) -> float:
        # Asked for in this way, because the scaler makes its state when it first scales something.
        one = torch.ones((), device=self.hparams[0].device)
        return 1.0 if self.scaler is None else float(self.scaler.scale(one))

    def _advance(self, hparams: list[Tensor], grads: list[Tensor]) -> None:
        scale = self._loss_scale()
        for t, g in zip(hparams, grads, strict=True):
            t.grad = g if scale == 1 else g * scale
        if self.scaler is None:
            self.optimizer.step()
        else:
            try:
                self.scaler.step(self.optimizer)
            except BaseException:
                # The scaler remembers that it has unscaled these gradients, and would leave the next ones as they are.
                self.scaler.update(scale)
                raise
            self.scaler.update()

    def _check(self, hparams: list[Tensor], scale: float) -> None:
        if self._loss_scale() < scale:
            raise FloatingPointError("the hypergradient overflows when it is scaled; the scale has been lowered")
        if not finite(hparams):
            raise FloatingPointError(
                "the optimiser's step would leave a hyperparameter other than finite; lower its learning rate, or "
                "clip the hypergradient with max_norm"
            )

    def _not_taken(self, solution: Solution, norm: float, error: Exception) -> OuterStep:
        self.state.forget()
        overflow = solution.status in (Status.NON_FINITE_INPUT, Status.NON_FINITE_OPERATOR)
        if overflow and self._loss_scale() > 1:
            with _all_or_nothing(self.optimizer, self.hparams, keep=False):
                # The scaler finds the overflow here, skips the step and lowers the scale.
                self._advance(self.hparams, [torch.full_like(t, torch.inf) for t in self.hparams])
        elif self.on_failure == "raise":
            raise error
        self.skipped += 1
        warnings.warn(f"outer step skipped: {error}", SolveWarning, stacklevel=3)
        return OuterStep(False, norm, False, solution, str(error))


def _norm(grads: list[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in grads))


def _expect_keys(name: str, expected: dict[str, Any], got: dict[str, Any]) -> None:
    missing = expected.keys() - got.keys()
    if missing:
        raise ValueError(f"{name}: expected that of one of the same kind, got one without {', '.join(sorted(missing))}")


@contextmanager
def _all_or_nothing(optimizer: torch.optim.Optimizer, hparams: list[Tensor], *, keep: bool = True) -> Iterator[None]:
    """Put hyperparameters, their gradients and the optimiser back as they were, after an error or always."""
    values = [(t, t.detach().clone(), t.grad) for t in hparams]
    state = copy.deepcopy(optimizer.state_dict())
    try:
        yield
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            optimizer.load_state_dict(state)
            with torch.no_grad():
                for t, value, grad in values:
                    t.copy_(value)
                    t.grad = grad
