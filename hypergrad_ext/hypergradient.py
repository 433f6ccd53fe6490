"""Hypergradients by the implicit function theorem, as a function and as an autograd node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypergrad_ext.linear_solve import SolverChoice, report, solve_for
from hypergrad_ext.operators import Hessian, LinearOperator
from hypergrad_ext.operators.hessian import Engine, Loss, buffers_kept, check_loss, evaluate
from hypergrad_ext.structure import Leaves, Tree, check_real, take_apart


def hypergradient(
    val_loss: Loss,
    train_loss: Loss,
    params: Tree,
    hparams: Tree,
    solver: SolverChoice = "auto",
    *,
    damping: float = 0.0,
    x0: Tree | None = None,
    throw: bool = True,
    unused: Literal["zeros", "error"] = "zeros",
    engine: Engine = "auto",
    backend: str | None = None,
    operator: LinearOperator | None = None,
    return_solution: bool = False,
) -> Any:
    r"""Gradient of the validation loss by the hyperparameters, through the optimal weights.

    .. math::

        \frac{d L_V}{d \lambda} = \frac{\partial L_V}{\partial \lambda}
            - \left[ (H + d I)^{-1} \frac{\partial L_V}{\partial w} \right]^\top
              \frac{\partial^2 L_T}{\partial w\, \partial \lambda},
        \qquad H = \frac{\partial^2 L_T}{\partial w^2}.

    It is exact where ``params`` minimise the training loss and the solve is exact.

    Args:
        val_loss: :math:`L_V`: scalar tensor with its graph, or a function of ``params``.
        train_loss: :math:`L_T`: likewise. Hyperparameters enter it by themselves (a function closes over them).
        params: The weights w: tensor, list, tuple, dict or ``nn.Module``.
        hparams: The hyperparameters :math:`\lambda`: any number of tensors of any shape that require grad.
        solver: ``"auto"`` or a solver.
        damping: d >= 0.
        x0: Start of the solve, such as ``solution.value`` of the last outer step.
        throw: Raise `SolveError` if the solve failed. Otherwise failures only warn.
        unused: ``"zeros"`` or ``"error"``, for parameters and hyperparameters that nothing depends on.
        engine: How products are run (`Hessian`): ``"auto"``, ``"eager"``, ``"traced"``, ``"native"``, ``"compiled"``.
        backend: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``.
        operator: Solve with this instead of the Hessian of ``train_loss``: a faster form of it, such as
            `GLMHessian`, or an approximation of your own.
        return_solution: Also return the `Solution` of the solve.

    Returns:
        The hypergradient in the structure of ``hparams`` (a tuple for a list), shapes and dtypes of
        ``hparams``; with ``return_solution`` a pair of it and the `Solution`.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value, or a loss depends on nothing; the message names it.
        SolveError: If the solve failed, and ``throw``.

    Cost: a training gradient, a validation gradient, the solve, one product with the mixed derivative, and
    with ``return_solution`` one Hessian-vector product for the true residual.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation", AISTATS 2020, equation 3.

    Example:
        The inner minimum of ``(w - 3)^2 + lam w^2`` is ``w = 3 / (1 + lam)``.

        >>> w, lam = torch.tensor(1.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        >>> train, val = (w - 3) ** 2 + lam * w**2, w**2
        >>> hg.hypergradient(val, train, w, lam)
        tensor(-2.2500)
    """
    hessian = Hessian(train_loss, params, unused=unused, engine=engine, name="train_loss")
    outer = take_apart("hparams", hparams)
    _check_hparams(outer, hessian.params)
    v, direct = _validation_gradients(val_loss, hessian, outer)
    solution = solve_for(
        hessian if operator is None else operator,
        hessian.params.rebuild(v),
        "params",
        solver,
        damping=damping,
        x0=x0,
        residual=return_solution,
        backend=backend,
    )
    report(solution, throw)
    x = take_apart("x", solution.value).tensors
    mixed = hessian.mixed(x, outer.tensors)
    idle = [name for name, d, m in zip(outer.names, direct, mixed, strict=True) if d is None and m is None]
    if unused == "error" and idle or len(idle) == len(mixed):
        raise ValueError(f"hparams: expected hyperparameters that a loss depends on, got unused {', '.join(idle)}")
    grads = [_difference(t, d, m) for t, d, m in zip(outer.tensors, direct, mixed, strict=True)]
    result = outer.rebuild(grads)
    result = tuple(result) if isinstance(result, list) else result
    return (result, solution) if return_solution else result


def implicit(
    train_loss: Loss,
    params: Tree,
    hparams: Tree,
    solver: SolverChoice = "auto",
    *,
    damping: float = 0.0,
    throw: bool = True,
    engine: Engine = "auto",
    backend: str | None = None,
) -> Tree:
    r"""The optimal weights as a differentiable function of the hyperparameters: :math:`w^*(\lambda)`.

    Returns the weights, unchanged, as the output of an autograd node. Any loss computed from them can
    be called ``backward`` on, and adds :math:`-[(H + d I)^{-1} \partial L / \partial w]^\top \partial^2
    L_T / \partial w\, \partial \lambda` to ``hparam.grad``.

    Args:
        train_loss: :math:`L_T`, a function of the parameters that closes over ``hparams`` and is called
            in the backward pass, or a scalar tensor whose graph is kept until then.
        params: The weights, at a minimum of the training loss. They must not change before the backward pass.
        hparams: The hyperparameters; they must require grad.
        solver: ``"auto"`` or a solver.
        damping: d >= 0.
        throw: Raise `SolveError` in the backward pass if the solve failed. Otherwise failures only warn.
        engine: How products are run (`Hessian`): ``"auto"``, ``"eager"``, ``"traced"``, ``"native"``, ``"compiled"``.
        backend: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``.

    Returns:
        The weights in the structure of ``params``; for an ``nn.Module`` the dict for ``functional_call``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value; the message names it.

    Cost: nothing now; in the backward pass a training gradient, one solve per call of ``backward``, and
    one product with the mixed derivative. It can be differentiated once.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation", AISTATS 2020.

    Example:
        >>> w, lam = torch.tensor(1.5), torch.tensor(1.0, requires_grad=True)
        >>> best = hg.implicit(lambda w: (w - 3) ** 2 + lam * w**2, w, lam)
        >>> (best**2).backward()
        >>> lam.grad
        tensor(-2.2500)
    """
    hessian = Hessian(train_loss, params, engine=engine, name="train_loss")
    outer = take_apart("hparams", hparams)
    _check_hparams(outer, hessian.params)

    def pull_back(grad_w: Sequence[Tensor]) -> list[Tensor | None]:
        # A fresh operator, so that two backward passes do not share a graph that was changed in between.
        now = Hessian(train_loss, params, engine=engine, name="train_loss")
        v = now.params.rebuild(grad_w)
        solution = solve_for(now, v, "params", solver, damping=damping, x0=None, residual=False, backend=backend)
        report(solution, throw)
        mixed = now.mixed(take_apart("x", solution.value).tensors, outer.tensors)
        return [None if m is None else -m for m in mixed]

    weights = _OptimalWeights.apply(pull_back, hessian.params.tensors, *outer.tensors)
    return hessian.params.rebuild(weights)


class _OptimalWeights(torch.autograd.Function):
    """Identity on the weights forward, the implicit function theorem backward."""

    @staticmethod
    def forward(ctx: Any, pull_back: Any, params: Sequence[Tensor], *hparams: Tensor) -> tuple[Tensor, ...]:
        ctx.pull_back = pull_back
        return tuple(p.detach() for p in params)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_w: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.pull_back(grad_w)


def _check_hparams(hparams: Leaves, params: Leaves) -> None:
    check_real(hparams)
    inner = {id(t): name for name, t in zip(params.names, params.tensors, strict=True)}
    for name, t in zip(hparams.names, hparams.tensors, strict=True):
        if not t.requires_grad:
            raise ValueError(f"{name}: expected a hyperparameter that requires grad, got one that does not")
        if id(t) in inner:
            raise ValueError(f"{name}: expected a tensor that is not among params, got {inner[id(t)]}")


def _validation_gradients(
    val_loss: Loss, hessian: Hessian, hparams: Leaves
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients by the weights, zero where unused, and by the hyperparameters, None where unused."""
    params = hessian.params
    if isinstance(val_loss, Tensor):
        check_loss("val_loss", val_loss)
        leaves, loss = params.tensors, val_loss
    elif callable(val_loss):
        leaves = [t.detach().requires_grad_() for t in params.tensors]
        with torch.enable_grad(), buffers_kept(hessian.module):
            loss = evaluate("val_loss", val_loss, params, leaves, twice=False)
    else:
        raise TypeError(
            f"val_loss: expected a scalar tensor or a function of the parameters, got {type(val_loss).__name__}"
        )
    # The graph is kept: it is the caller's, and may be shared with the training loss.
    grads = torch.autograd.grad(loss, [*leaves, *hparams.tensors], retain_graph=True, allow_unused=True)
    inner: list[Tensor | None] = list(grads[: len(leaves)])
    direct: list[Tensor | None] = list(grads[len(leaves) :])
    if all(g is None for g in inner):
        raise ValueError("val_loss: expected a loss that depends on params, got one that depends on none of them")
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, inner, strict=True)], direct


def _difference(like: Tensor, direct: Tensor | None, mixed: Tensor | None) -> Tensor:
    result = torch.zeros_like(like) if direct is None else direct.detach()
    return result.detach() if mixed is None else result - mixed
