"""Solves with the Hessian of a generalised linear model, differentiable in everything that goes in."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.functional.batching import one_by_one
from hypergrad_ext.functional.glm import check_model, scale_of
from hypergrad_ext.linear_solve import report, solve_for
from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.solvers import CG, Solver
from hypergrad_ext.structure import Space, take_apart
from hypergrad_ext.surroundings import without_autocast


def glm_solve(
    x: Tensor,
    weights: Tensor,
    b: Tensor,
    *,
    l2: Tensor | None = None,
    damping: float | Tensor = 0.0,
    scale: float | None = None,
    intercept: bool = False,
    solver: Solver | None = None,
) -> Tensor:
    r"""Solve with a generalised linear model's Hessian: :math:`u = (s X^\top D X + \mathrm{diag}(l_2) + d I)^{-1} b`.

    Differentiable in ``b``, ``x``, ``weights``, ``l2`` and ``damping`` by the implicit function theorem: a backward
    pass is one more solve, :math:`\bar b = (H + d I)^{-1} \bar u`, and :math:`-\bar b^\top \partial(H + d I)\, u` for
    each of the others, whatever the solver; nothing of its steps is kept. Any number of times, in reverse and forward
    mode; under ``torch.func.vmap`` a batch of ``b`` is more vectors of one solve, a batch of anything else a loop.
    ``torch.compile`` leaves it out of its graph, because a solve looks at its results.

    Derivatives are as exact as the solves: choose the solver's tolerance for them.

    Cost: one solve; a derivative costs one more, and, where it is by ``x`` or ``weights``, about two products.

    Args:
        x: X, ``(n, d)``, of the dtype of ``b``; bfloat16 beside float32 if no derivative by it is asked for.
        weights: D: ``(n,)``, its diagonal, or ``(n, classes)``, probabilities p with ``D = diag(p) - p p^T``.
        b: ``(m,)``, or ``(k, m)`` for k right-hand sides, laid out as the vectors of `glm_hvp`.
        l2: ``(m,)``, the diagonal of the penalty's Hessian.
        damping: d >= 0, a number or a tensor of one element.
        scale: s; 1/n if not given, for a mean loss.
        intercept: Whether the model has intercepts.
        solver: ``CG(tol=1e-6)`` if not given; ``Neumann`` sums the same series for ``b`` and for its derivative.

    Returns:
        A tensor like ``b``.

    Raises:
        ValueError: If shapes or values do not go together.
        TypeError: If dtypes do not go together.
        SolveError: If the solve failed; one that misses its tolerance warns.

    Example:
        >>> from hypergrad_ext import functional
        >>> x, weights = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2)
        >>> damping = torch.tensor(0.5, requires_grad=True)
        >>> u = functional.glm_solve(x, weights, torch.ones(2), damping=damping)
        >>> u.sum().backward()
        >>> u.detach(), damping.grad
        (tensor([1.0000, 0.4000]), tensor(-1.1600))
    """
    check_model("b", x, weights, b, l2, intercept)
    if not isinstance(damping, (numbers.Real, Tensor)):
        raise TypeError(f"damping: expected a number or a tensor of one element, got {damping!r}")
    if isinstance(damping, Tensor) and damping.numel() != 1:
        raise ValueError(f"damping: expected a number or a tensor of one element, got shape {tuple(damping.shape)}")
    if x.dtype != b.dtype and x.requires_grad:
        raise TypeError(f"x: expected {b.dtype} like b for a derivative by x, got {x.dtype}")
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(f"solver: expected a solver such as CG(tol=1e-6), got {solver!r}")
    solve = torch.compiler.disable(_Solve.apply)
    u = solve(x, weights, torch.atleast_2d(b), l2, damping, scale_of(x, scale), intercept, solver or CG(tol=1e-6))
    return u.view(b.shape)


class _Model(LinearOperator):
    """``scale X^T D X + diag(l2)`` on flat vectors."""

    surely_symmetric = True

    def __init__(
        self, x: Tensor, weights: Tensor, l2: Tensor | None, scale: float, intercept: bool, like: Tensor
    ) -> None:
        self.space = Space(take_apart("b", like))
        l2 = None if l2 is None else l2.contiguous()
        self._before = x if x.stride(1) == 1 else x.contiguous(), weights.contiguous()
        self._after = l2, scale, intercept

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``."""
        return [ops.glm_hvp(*self._before, v[0][None].contiguous(), *self._after)[0]]

    def matmat(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` for k vectors; reads X once for all of them."""
        return [ops.glm_hvp(*self._before, v[0].contiguous(), *self._after)]

    def neumann_series(
        self, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        """The whole series in one call."""
        kernel = ops.glm_neumann_solve.kernel(b.device, backend)
        return kernel(*self._before, b, *self._after, alpha, damping, steps, stop)

    def conjugate_gradients(
        self, b: Tensor, damping: float, steps: int, state: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The whole solve in one call."""
        kernel = ops.glm_cg_solve.kernel(b.device, backend)
        return kernel(*self._before, b, *self._after, damping, steps, state)


def _derivative(
    x: Tensor,
    weights: Tensor,
    u: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    scale: float,
    intercept: bool,
) -> Tensor:
    """``d(H + dI) u``, the directional derivative of the matrix along tangents of x, weights, l2 and damping."""
    x_t, weights_t, l2_t, damping_t = tangents
    result = torch.zeros_like(u)
    z, p = _outputs(x, weights, u, intercept), _columns(weights)
    if weights_t is not None:
        q = _columns(weights_t)
        result = result + scale * _inputs(x, _curved(q, z, p), intercept)
    if x_t is not None:
        z_t = _outputs(x_t, weights, u, False)
        result = result + scale * _inputs(x, _curved(p, z_t), intercept)
        at_weights = _inputs(x_t, _curved(p, z), False)
        result = result + scale * torch.nn.functional.pad(at_weights, (0, u.shape[1] - at_weights.shape[1]))
    if l2_t is not None:
        result = result + l2_t * u
    # One number in whatever shape and dtype the damping came.
    return result if damping_t is None else result + damping_t.reshape(()).to(u.dtype) * u


def _columns(weights: Tensor) -> Tensor:
    """``(n, classes)``."""
    return weights if weights.dim() == 2 else weights.unsqueeze(1)


def _outputs(x: Tensor, weights: Tensor, u: Tensor, intercept: bool) -> Tensor:
    """``X u``, ``(k, n, classes)``."""
    classes, d = _columns(weights).shape[1], x.shape[1]
    # In the precision of u, as in the kernels.
    z = x.to(u.dtype) @ u[:, : classes * d].reshape(len(u), classes, d).mT
    return z + u[:, None, classes * d :] if intercept else z


def _inputs(x: Tensor, z: Tensor, intercept: bool) -> Tensor:
    """``X^T z``, ``(k, m)``."""
    flat = (z.mT @ x.to(z.dtype)).flatten(1)
    return torch.cat([flat, z.sum(1)], 1) if intercept else flat


def _curved(p: Tensor, z: Tensor, at: Tensor | None = None) -> Tensor:
    """``D z``; with ``at``, the derivative of ``D z`` along p at the probabilities ``at``."""
    if p.shape[1] == 1:
        return p * z
    if at is None:
        return p * (z - (p * z).sum(-1, keepdim=True))
    return p * (z - (at * z).sum(-1, keepdim=True)) - at * (p * z).sum(-1, keepdim=True)


def _by_model(ctx: Any, x: Tensor, weights: Tensor, u: Tensor, adjoint: Tensor) -> list[Tensor | None]:
    """Gradients of ``-<adjoint, scale X^T D X u>`` by its two factors X and by D, those that are wanted."""
    by_x, by_weights, *_ = ctx.needs_input_grad
    grads: list[Tensor | None] = [None, None]
    p, d = _columns(weights), x.shape[1]
    z, z_adjoint = (_outputs(x, weights, t, ctx.intercept) for t in (u, adjoint))
    if by_x:
        rows = [t[:, : p.shape[1] * d].reshape(len(t) * p.shape[1], d) for t in (u, adjoint)]
        curved = [_curved(p, t).transpose(0, 1).flatten(1) for t in (z_adjoint, z)]
        grads[0] = -ctx.scale * (curved[0] @ rows[0] + curved[1] @ rows[1])
    if by_weights:
        terms = z * z_adjoint
        if p.shape[1] > 1:
            means = [(p * t).sum(-1, keepdim=True) for t in (z, z_adjoint)]
            terms = terms - z_adjoint * means[0] - z * means[1]
        grads[1] = -ctx.scale * terms.sum(0).view(weights.shape)
    return grads


class _Solve(torch.autograd.Function):
    """``b`` is ``(k, m)``."""

    @staticmethod
    def forward(
        x: Tensor,
        weights: Tensor,
        b: Tensor,
        l2: Tensor | None,
        damping: float | Tensor,
        scale: float,
        intercept: bool,
        solver: Solver,
    ) -> Tensor:
        l2 = None if l2 is None else l2.detach()
        operator = _Model(x.detach(), weights.detach(), l2, scale, intercept, b.new_empty(b.shape[1]))
        with without_autocast(b.device):
            solution = solve_for(operator, b, "b", solver, damping=float(damping), x0=None, residual=True, backend=None)
        report(solution, throw=True)
        return solution.value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weights, _, l2, damping, ctx.scale, ctx.intercept, ctx.solver = inputs
        ctx.damping = None if isinstance(damping, Tensor) else damping
        tensors = x, weights, l2, damping if isinstance(damping, Tensor) else None, output
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weights, l2, damping, u = ctx.saved_tensors
        damping = damping if ctx.damping is None else ctx.damping
        settings = ctx.scale, ctx.intercept
        adjoint = _Solve.apply(x, weights, grad, l2, damping, *settings, ctx.solver)
        by_x, by_weights, _, by_l2, by_damping, *_ = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 4
        if by_x or by_weights:
            with without_autocast(u.device):
                grads[:2] = _by_model(ctx, x, weights, u, adjoint)
        if by_l2:
            grads[2] = -(adjoint * u).sum(0)
        if by_damping:
            grads[3] = -(adjoint * u).sum().reshape(damping.shape).to(damping.dtype)
        return grads[0], grads[1], adjoint, grads[2], grads[3], None, None, None

    @staticmethod
    def jvp(
        ctx: Any,
        x_t: Tensor | None,
        weights_t: Tensor | None,
        b_t: Tensor | None,
        l2_t: Tensor | None,
        damping_t: Tensor | None,
        *_: None,
    ) -> Tensor:
        x, weights, l2, damping, u = ctx.saved_tensors
        damping = damping if ctx.damping is None else ctx.damping
        with without_autocast(u.device):
            change = _derivative(x, weights, u, (x_t, weights_t, l2_t, damping_t), ctx.scale, ctx.intercept)
        rhs = -change if b_t is None else b_t - change
        return _Solve.apply(x, weights, rhs, l2, damping, ctx.scale, ctx.intercept, ctx.solver)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        """A batch of ``b`` is more right-hand sides; of anything else, a loop."""
        if any(dim is not None for dim in (*in_dims[:2], *in_dims[3:])):
            return one_by_one(_Solve.apply, info.batch_size, in_dims, *arguments), 0
        b = arguments[2].movedim(in_dims[2], 0)
        return _Solve.apply(*arguments[:2], b.flatten(0, -2), *arguments[3:]).view(b.shape), 0
