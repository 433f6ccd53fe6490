"""The inverse-Hessian-vector product: one line to drop in."""

from __future__ import annotations

from typing import Literal

import torch

from hypergrad_ext.compilation import never_compiled
from hypergrad_ext.linear_solve import SolverChoice, report, solve_for
from hypergrad_ext.operators import Hessian
from hypergrad_ext.operators.hessian import Engine, Loss
from hypergrad_ext.solvers import SolverState, System
from hypergrad_ext.solvers.base import check_count, check_number
from hypergrad_ext.solvers.neumann import series
from hypergrad_ext.structure import Tree


@never_compiled
def inverse_hvp(
    loss: Loss,
    params: Tree,
    v: Tree,
    solver: SolverChoice = "auto",
    *,
    damping: float | Literal["auto"] = 0.0,
    x0: Tree | None = None,
    state: SolverState | None = None,
    throw: bool = True,
    unused: Literal["zeros", "error"] = "zeros",
    engine: Engine = "auto",
    backend: str | None = None,
) -> Tree:
    r"""Inverse-Hessian-vector product :math:`x \approx (H + d I)^{-1} v` with :math:`H = \partial^2 L / \partial w^2`.

    Args:
        loss: Scalar tensor that still has its graph, or a function from ``params`` to one. For an
            ``nn.Module`` the function gets the dict of its trainable parameters.
        params: Tensor, list, tuple, dict or ``nn.Module``: the weights w, real floating point, on one device.
        v: The vector, with one leaf per parameter: shape of the parameter, or with one more leading
            dimension k on every leaf for a batch of k vectors.
        solver: ``"auto"``, or a solver such as ``Neumann(steps=20)`` or ``CG(tol=1e-4)``.
        damping: d >= 0, or ``"auto"``; see `solve`.
        x0: Start from this instead of zero, in any structure that ``v`` may have.
        state: What the last solve of a slowly changing system left; see `SolverState`.
        throw: Raise `SolveError` if the solve failed. Otherwise failures only warn.
        unused: ``"zeros"`` or ``"error"``, for parameters that the loss does not depend on.
        engine: How products are run; `Hessian` lists the engines.
        backend: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``.

    Returns:
        ``x``, in the structure and dtypes of ``v``, without a graph. Parameters that the loss does not
        depend on get zero (with damping, ``v / d``).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or value; the message names it.
        SolveError: If the series diverged, the operator is singular, negative curvature left nothing of
            use, or something was not finite, and ``throw``.

    Cost: one forward and backward pass, then the solver's Hessian-vector products.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation", AISTATS 2020.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> loss = (w**4).sum() / 12
        >>> hg.inverse_hvp(loss, w, torch.tensor([1.0, 1.0]))
        tensor([1.0000, 0.2500])
    """
    operator = Hessian(loss, params, unused=unused, engine=engine)
    solution = solve_for(operator, v, "v", solver, damping=damping, x0=x0, residual=False, backend=backend, state=state)
    report(solution, throw)
    return solution.value


@never_compiled
def approx_inverse_hvp(v: Tree, f: Tree, params: Tree, iterations: int = 3, alpha: float = 1.0) -> Tree:
    r"""The paper's Algorithm 3 as its code has it: :math:`\alpha \sum_{j=0}^{K} (I - \alpha H)^j v`.

    That is with the factor :math:`\alpha` that the printed form leaves out.
    For code written against the paper or Betty. No step size is chosen and nothing is checked for
    divergence; `inverse_hvp` does both.

    Args:
        v: The vector, one tensor per parameter.
        f: Gradient of the training loss with its graph (``create_graph=True``), one tensor per parameter.
        params: The parameters.
        iterations: K, the number of Hessian-vector products.
        alpha: Step size.

    Returns:
        One tensor per parameter, in the structure and dtypes of ``v``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes or lengths do not match, ``f`` has no graph, ``iterations`` is negative
            or ``alpha`` is not positive.

    Cost: K Hessian-vector products.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation", AISTATS 2020, Algorithm 3.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> f = torch.autograd.grad((w**2).sum(), [w], create_graph=True)
        >>> hg.approx_inverse_hvp([torch.ones(2)], f, [w], iterations=3, alpha=0.25)
        [tensor([0.4688, 0.4688])]
    """
    check_count("iterations", iterations, 0)
    check_number("alpha", alpha, positive=True)
    operator = Hessian.of_gradient(f, params)
    packed = operator.space.pack("v", v)
    with torch.no_grad():
        x, _, _ = series(System(operator, 0.0, None), packed.flat, iterations, alpha)
    return packed.restore(x)
