"""A bilevel problem at one point: two losses, differentiated as far as a hypergradient needs."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from hypergrad_ext.buffers import buffers_kept
from hypergrad_ext.compilation import refuse_transforms
from hypergrad_ext.engines import RetainedGradient
from hypergrad_ext.error_bound import mixed_norms
from hypergrad_ext.losses import STANDS_FOR, check_loss, check_tracked, evaluate, stale_graphs_named
from hypergrad_ext.norms import finite
from hypergrad_ext.operators import Hessian, LinearOperator
from hypergrad_ext.operators.hessian import Engine, Loss
from hypergrad_ext.solution import Solution, Status
from hypergrad_ext.solvers.base import check_number
from hypergrad_ext.structure import Leaves, Tree, check_real, dense, take_apart
from hypergrad_ext.surroundings import without_autocast

Unused = Literal["warn", "zeros", "error"]
"""What to do with hyperparameters that no loss depends on: zeros with a warning, zeros, or an error."""


class Bilevel:
    """Both losses with their gradients: `solve`, then `hypergradient`.

    Attributes:
        hessian: Of the training loss by the weights.
        hparams: The hyperparameters.
    """

    def __init__(
        self,
        val_loss: Loss,
        train_loss: Loss,
        params: Tree,
        hparams: Tree,
        *,
        direct: bool,
        batches: Iterable[Any] | None,
        stochastic: bool,
        unused: Unused,
        loss_scale: float,
        engine: Engine,
    ) -> None:
        """Check the arguments, which are those of `hypergrad_ext.hypergradient`, and take the first gradients."""
        if unused not in ("warn", "zeros", "error"):
            raise ValueError(f"unused: expected 'warn', 'zeros' or 'error', got {unused!r}")
        check_number("loss_scale", loss_scale, positive=True)
        self._unused = unused
        self._scale = float(loss_scale)
        self._as_it_is = self._scale == 1 and engine != "eager"
        self.hessian = Hessian(
            _scaled(train_loss, self._scale),
            params,
            batches=batches,
            stochastic=stochastic,
            unused="error" if unused == "error" else "zeros",
            engine=engine,
            name="train_loss",
        )
        self.hparams = take_apart("hparams", hparams)
        check_hparams(self.hparams, self.hessian.params)
        if isinstance(train_loss, Tensor) or (isinstance(val_loss, Tensor) and direct):
            check_apart(self.hparams, self.hessian.params)
        self.hessian.expect_mixed(self.hparams.tensors)
        self._v, self._direct = self._validation_gradients(val_loss, direct)

    def system(self, operator: LinearOperator | None) -> tuple[LinearOperator, Tree, str]:
        """``(H + d I) x = dL_V/dw`` as `solve_for` takes it, with H the Hessian or the ``operator`` in its place."""
        if operator is None:
            operator = self.hessian if self._as_it_is else _Plain(self.hessian, self._scale)
        elif not isinstance(operator, LinearOperator):
            raise TypeError(
                f"operator: expected a LinearOperator (Hessian, GaussNewton, Callable), got {type(operator).__name__}"
            )
        return operator, self.hessian.params.rebuild(self._v), "params"

    def bounded(self, solution: Solution) -> Solution:
        """The solution with what its error may do to the hypergradient, where that is known."""
        gradient = self.hessian.gradient
        if solution.error_bound is None or not isinstance(gradient, RetainedGradient):
            return solution
        with without_autocast(self.hessian.space.device):
            norms = mixed_norms(gradient, self.hparams.tensors)
        if norms is None:
            return solution
        factor = float(solution.error_bound) / self._scale
        bound = self.hparams.rebuild([norm * factor for norm in norms])
        return dataclasses.replace(solution, hypergradient_bound=tuple(bound) if isinstance(bound, list) else bound)

    def hypergradient(self, solution: Solution) -> tuple[list[Tensor], Solution]:
        """The hypergradient, one tensor per hyperparameter, and the solution it came from.

        Args:
            solution: Of the `system`.

        Returns:
            The gradients, and ``solution``, with the status of a failure if a gradient is not finite.

        Raises:
            ValueError: If hyperparameters are unused, or all of them in the training loss, and that was to be an error,
                or all are in both.
        """
        x = take_apart("x", solution.value).tensors
        # A small x would underflow beside a scaled loss, whose own derivatives do not.
        unit = 1.0 if self._scale == 1 or solution.status.failed else power_of_two_below(x)
        with without_autocast(self.hessian.space.device):
            mixed = self._unscaled(self.hessian.mixed([t / unit for t in x] if unit != 1 else x, self.hparams.tensors))
        mixed = [t if t is None or unit == 1 else t * unit for t in mixed]
        self._name_unused(mixed)
        grads = [_difference(t, d, m) for t, d, m in zip(self.hparams.tensors, self._direct, mixed, strict=True)]
        if not solution.status.failed and not finite(grads):
            solution = self._blame(solution, mixed)
        return grads, solution

    def _blame(self, solution: Solution, mixed: Sequence[Tensor | None]) -> Solution:
        """The solution with the status that says which loss made the hypergradient other than finite."""
        for status, what, parts in (
            (Status.NON_FINITE_INPUT, "gradient of val_loss", self._direct),
            (Status.NON_FINITE_OPERATOR, "mixed derivative of train_loss", mixed),
        ):
            for name, part in zip(self.hparams.names, parts, strict=True):
                if part is not None and not finite([part]):
                    return dataclasses.replace(solution, status=status, detail=f"{what} by {name}", useless=True)
        detail = "overflow in the sum of direct and indirect gradient"
        return dataclasses.replace(solution, status=Status.NON_FINITE_OPERATOR, detail=detail, useless=True)

    def _name_unused(self, mixed: Sequence[Tensor | None]) -> None:
        pairs = zip(self.hparams.names, self._direct, mixed, strict=True)
        idle = [name for name, d, m in pairs if d is None and m is None]
        if self._unused == "error" and idle or len(idle) == len(mixed):
            raise unused_error(idle)
        if self._unused != "zeros" and all(m is None for m in mixed):
            message = (
                "train_loss: expected a loss whose gradient by params depends on hparams, as val_loss does, got one "
                "that depends on none of them; are val_loss and train_loss exchanged?"
            )
            if self._unused == "error":
                raise ValueError(message)
            warnings.warn(f"{message} (unused='zeros' says nothing)", UserWarning, stacklevel=4)
        if self._unused == "warn" and idle:
            warnings.warn(
                f"hparams: no loss depends on {', '.join(idle)}; their hypergradient is zero "
                "(unused='zeros' says nothing, 'error' raises)",
                UserWarning,
                stacklevel=4,
            )

    def _validation_gradients(self, val_loss: Loss, direct: bool) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients by the weights, zero where unused, and by the hyperparameters, None where unused."""
        params = self.hessian.params
        if isinstance(val_loss, Tensor):
            check_loss("val_loss", val_loss)
            check_tracked(params)
            leaves, loss = params.tensors, val_loss
        elif callable(val_loss):
            refuse_transforms("val_loss")
            leaves = [t.detach().requires_grad_() for t in params.tensors]
            with torch.enable_grad(), buffers_kept(self.hessian.module):
                loss = evaluate("val_loss", val_loss, params, leaves, twice=False)
        else:
            raise TypeError(
                f"val_loss: expected a scalar tensor or a function of the parameters, got {type(val_loss).__name__}"
            )
        others = self.hparams.tensors if direct else []
        loss = _scaled(loss, self._scale)
        # The graph is kept: it is the caller's, and may be shared with the training loss.
        # A checkpoint runs a part of it again.
        with stale_graphs_named("val_loss"), buffers_kept(self.hessian.module), without_autocast(loss.device):
            grads = torch.autograd.grad(loss, [*leaves, *others], retain_graph=True, allow_unused=True)
        inner, outer = grads[: len(leaves)], grads[len(leaves) :]
        if all(g is None for g in inner):
            raise ValueError("val_loss: expected a loss that depends on params, got one that depends on none of them")
        v = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, self._unscaled(inner), strict=True)]
        return v, self._unscaled(outer) if direct else [None] * len(self.hparams.tensors)

    def _unscaled(self, derivatives: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Derivatives of a loss, dense, from those of its multiple."""
        whole = [None if t is None else dense(t) for t in derivatives]
        if self._scale == 1:
            return whole
        return [None if t is None else _at_least_float32(t) / self._scale for t in whole]


class _Plain(LinearOperator):
    """The Hessian of a loss from that of a multiple of it, whose intermediates do not underflow.

    Its products come one by one, where otherwise a clock decides which go together, and with that about rounding.
    """

    surely_symmetric = True

    def __init__(self, scaled: Hessian, scale: float) -> None:
        self.space = scaled.space
        self._scaled = scaled
        self._scale = scale
        self.stochastic = scaled.stochastic

    @property
    def engine(self) -> str:
        return self._scaled.engine

    @property
    def used(self) -> list[bool]:
        return self._scaled.used

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        product = self._scaled.matvec(v)
        return product if self._scale == 1 else [_at_least_float32(t) / self._scale for t in product]

    def prepare(self, products: int, rows: int) -> _Plain:
        self._scaled.prepare(products, rows)
        return self


def _scaled(loss: Any, scale: float) -> Any:
    """A multiple of a loss; what is no loss goes on to whoever says so."""
    if scale == 1:
        return loss
    if isinstance(loss, Tensor):
        return loss * scale
    if not callable(loss):
        return loss

    def scaled(*arguments: Any) -> Any:
        return _scaled(loss(*arguments), scale)

    setattr(scaled, STANDS_FOR, loss)
    return scaled


def check_hparams(hparams: Leaves, params: Leaves) -> None:
    """Refuse hyperparameters that cannot have a gradient, or that are weights.

    Raises:
        TypeError: If one is not real floating point.
        ValueError: If one does not require grad, or is among ``params``.
    """
    check_real(hparams)
    inner = {id(t): name for name, t in zip(params.names, params.tensors, strict=True)}
    for name, t in zip(hparams.names, hparams.tensors, strict=True):
        if not t.requires_grad:
            raise ValueError(f"{name}: expected a hyperparameter that requires grad, got one that does not")
        if id(t) in inner:
            raise ValueError(f"{name}: expected a tensor that is not among params, got {inner[id(t)]}")


def unused_error(names: Sequence[str]) -> ValueError:
    """The error for hyperparameters that get no gradient."""
    return ValueError(
        f"hparams: expected hyperparameters that a loss depends on, got unused {', '.join(names)}; "
        "were they detached or copied on the way to the loss? (a learning rate: hg.unroll)"
    )


def check_apart(hparams: Leaves, params: Leaves) -> None:
    """Refuse weights that were computed from hyperparameters, for losses whose graph leads on through them.

    Raises:
        ValueError: If a weight depends on one of ``hparams``.
    """
    computed = [t for t in params.tensors if not t.is_leaf]
    if computed and reach(computed, hparams.tensors):
        raise ValueError(
            "params: expected weights that do not depend on hparams, got ones that were computed from them, which a "
            "loss given as a tensor depends on a second time; compute the losses from detached weights, or pass them "
            "as functions of the parameters"
        )


def reach(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether the graph of one of the tensors leads to one of the ``others``; what is near is looked at first."""
    ends = {(edge.node, edge.output_nr) for edge in map(get_gradient_edge, others)}
    edges = [(t.grad_fn, t.output_nr) for t in tensors]
    seen: set[Node] = set()
    while edges:
        if not ends.isdisjoint(edges):
            return True
        nodes = {node for node, _ in edges if node is not None} - seen
        seen |= nodes
        edges = [edge for node in nodes for edge in node.next_functions]
    return False


def _difference(like: Tensor, direct: Tensor | None, mixed: Tensor | None) -> Tensor:
    if mixed is None and direct is not None:
        # Autograd hands one tensor to several, or an expanded one: the caller's are to be theirs to write to.
        return direct.detach().to(like.dtype, copy=True, memory_format=torch.contiguous_format)
    result = torch.zeros_like(like) if direct is None else direct
    return (result if mixed is None else result - mixed).detach().to(like.dtype)


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def power_of_two_below(tensors: Sequence[Tensor]) -> float:
    """The power of two next below the largest magnitude; 1 if all are zero or one is not finite."""
    largest = float(torch.nn.utils.get_total_norm(list(tensors), torch.inf))
    return 2.0 ** (math.frexp(largest)[1] - 1) if 0 < largest < math.inf else 1.0
