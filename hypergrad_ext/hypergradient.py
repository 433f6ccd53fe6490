"""Hypergradients by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from hypergrad_ext.bilevel import Bilevel, Unused
from hypergrad_ext.compilation import never_compiled
from hypergrad_ext.linear_solve import SolverChoice, report, solve_for
from hypergrad_ext.operators import LinearOperator
from hypergrad_ext.operators.hessian import Engine, Loss
from hypergrad_ext.solvers import SolverState
from hypergrad_ext.structure import Tree


@never_compiled
def hypergradient(
    val_loss: Loss,
    train_loss: Loss,
    params: Tree,
    hparams: Tree,
    solver: SolverChoice = "auto",
    *,
    damping: float | Literal["auto"] = 0.0,
    x0: Tree | None = None,
    state: SolverState | None = None,
    lower: float | None = None,
    direct: bool = True,
    batches: Iterable[Any] | None = None,
    stochastic: bool = False,
    loss_scale: float = 1.0,
    throw: bool = True,
    unused: Unused = "warn",
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
        params: The weights w: tensor, list, tuple, dict or ``nn.Module``. Beside a loss that is a tensor they must not
            have been computed from ``hparams``.
        hparams: The hyperparameters :math:`\lambda`: any number of tensors of any shape that require grad.
        solver: ``"auto"`` or a solver.
        damping: d >= 0, or ``"auto"``; see `solve`.
        x0: Start of the solve, such as ``solution.value`` of the last outer step.
        state: What the last outer step's solve left, its solution included; see `SolverState`.
        lower: A number that no eigenvalue of H (without damping) is below, if you know one; see `solve`. With
            ``return_solution``, `Solution.error_bound` bounds the error of the solve, and
            `Solution.hypergradient_bound` what of it gets into every element of the hypergradient.
        direct: Whether the direct gradient, :math:`\partial L_V / \partial \lambda`, counts.
        batches: An iterable of what ``train_loss``, then a function, takes as second argument (a list or a
            ``DataLoader``): both of its derivatives are those of the mean over them, in which a smaller last batch
            counts as much as the others (a warning says so), see `Hessian`. For several validation batches let
            ``val_loss`` return the mean.
        stochastic: Take one of the ``batches`` for every product, and one for the mixed derivative: an estimate,
            for ``LiSSA``, which ``"auto"`` is then, ``Neumann`` and ``Identity``; other solvers refuse it.
        loss_scale: Both losses are multiplied by this before they are differentiated, and what comes of it divided:
            for losses in float16, whose small gradients would vanish. The result stays that of the losses given.
        throw: Raise `SolveError` if the solve failed or the result is not finite. Otherwise failures only warn.
        unused: What hyperparameters get that no loss depends on: ``"warn"``, zeros and a warning that names them;
            ``"zeros"``; ``"error"``, also for such parameters. A warning or error, too, where only ``val_loss`` depends
            on any hyperparameter, as if the two losses were exchanged.
        engine: How products are run; `Hessian` lists the engines.
        backend: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``.
        operator: Solve with this instead of the Hessian of ``train_loss``: a faster form of it, such as
            `GLMHessian`, or an approximation of your own, for which the true residual is looked at in any case. It
            has to have the curvature of all terms of ``train_loss``, penalties included (`GaussNewton` takes a
            ``penalty``).
        return_solution: Also return the `Solution` of the solve.

    Returns:
        The hypergradient in the structure of ``hparams`` (a tuple for a list), shapes and dtypes of
        ``hparams``; with ``return_solution`` a pair of it and the `Solution`.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value, or a loss depends on nothing; the message names it.
        SolveError: If the solve failed or the result is not finite, and ``throw``.

    Cost: a training gradient, a validation gradient, the solve, one product with the mixed derivative, and
    with ``return_solution`` one Hessian-vector product for the true residual, and with ``lower`` too one backward pass
    for every element of ``hparams``, if there are 64 at most.

    The cheaper approximations in use are choices of the solver:

    =============================== ============================================================
    T1-T2, no products              ``Identity(alpha)``, alpha the inner learning rate
    the last i inner SGD steps      ``Neumann(steps=i - 1, alpha=learning_rate)``, exact at the optimum
    the stochastic series           ``LiSSA(steps=K)`` with ``batches`` and ``stochastic``
    =============================== ============================================================

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
    problem = Bilevel(
        val_loss,
        train_loss,
        params,
        hparams,
        direct=direct,
        batches=batches,
        stochastic=stochastic,
        unused=unused,
        loss_scale=loss_scale,
        engine=engine,
    )
    system = problem.system(operator)
    solution = solve_for(
        *system,
        solver,
        damping=damping,
        x0=x0,
        residual=return_solution or not system[0].surely_symmetric,
        backend=backend,
        state=state,
        lower=lower,
    )
    report(solution, throw)
    grads, judged = problem.hypergradient(solution)
    if judged is not solution:
        report(judged, throw)
    result = problem.hparams.rebuild(grads)
    result = tuple(result) if isinstance(result, list) else result
    return (result, problem.bounded(judged)) if return_solution else result
