"""The optimal weights as an autograd node: the implicit function theorem behind ``backward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypergrad_ext.bilevel import check_apart, check_hparams, unused_error
from hypergrad_ext.compilation import never_compiled, refuse_transforms
from hypergrad_ext.linear_solve import SolverChoice, report, solve_for
from hypergrad_ext.operators import Hessian
from hypergrad_ext.operators.hessian import Engine, Loss
from hypergrad_ext.solvers import SolverState
from hypergrad_ext.structure import Leaves, Tree, held, take_apart, versions
from hypergrad_ext.surroundings import Meaning, Surroundings, without_autocast


@never_compiled
def implicit(
    train_loss: Loss,
    params: Tree,
    hparams: Tree,
    solver: SolverChoice = "auto",
    *,
    damping: float | Literal["auto"] = 0.0,
    state: SolverState | None = None,
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
            in the backward pass, in the autocast of this call and, if ``params`` is a module, in the training modes
            that its parts have now (other modules are to be in the modes of training then), or a scalar tensor
            whose graph is kept until then. In a loop over tasks bind what changes, ``lambda w, x=x: ...``: names that
            stand for something else by then are refused.
        params: The weights, at a minimum of the training loss. Beside a function neither they nor ``hparams`` may be
            changed before the backward pass, which is refused. Beside a tensor they must not have been computed from
            ``hparams``.
        hparams: The hyperparameters; they must require grad.
        solver: ``"auto"`` or a solver.
        damping: d >= 0, or ``"auto"``; see `solve`.
        state: What the last outer step's backward pass left; see `SolverState`. For one call of ``backward`` each.
        throw: Raise `SolveError` in the backward pass if the solve failed. Otherwise failures only warn.
        engine: How products are run; `Hessian` lists the engines.
        backend: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``.

    Returns:
        The weights in the structure of ``params``; for an ``nn.Module`` the dict for ``functional_call``.

    Raises:
        NotImplementedError: If this is called inside of a transform of ``torch.func``.
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value, or, in the backward pass, the training loss depends on
            no hyperparameter, or is another one than before; the message names it.

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
    refuse_transforms("train_loss")
    params = held(params)
    hessian = Hessian(train_loss, params, engine=engine, name="train_loss")
    outer = take_apart("hparams", hparams)
    check_hparams(outer, hessian.params)
    if isinstance(train_loss, Tensor):
        check_apart(outer, hessian.params)

    then = Surroundings(hessian.module, hessian.space.device)
    check_unchanged = _Unchanged(train_loss, hessian.params, outer)

    def pull_back(grad_w: Sequence[Tensor]) -> list[Tensor | None]:
        check_unchanged()
        # A fresh operator, so that two backward passes do not share a graph that was changed in between.
        with then.again():
            now = Hessian(train_loss, params, engine=engine, name="train_loss")
            now.gradient  # noqa: B018 (builds it)
        v = now.params.rebuild(grad_w)
        solution = solve_for(
            now, v, "params", solver, damping=damping, x0=None, residual=False, backend=backend, state=state
        )
        report(solution, throw)
        with without_autocast(now.space.device):
            mixed = now.mixed(take_apart("x", solution.value).tensors, outer.tensors)
        if all(m is None for m in mixed):
            raise unused_error(outer.names)
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


class _Unchanged:
    """A check that a loss that runs later is the function that it was; what a tensor saved, autograd checks."""

    def __init__(self, loss: Loss, *trees: Leaves) -> None:
        self._meaning = Meaning(loss)
        late = () if isinstance(loss, Tensor) else trees
        self._leaves = [pair for t in late for pair in zip(t.names, t.tensors, strict=True)]
        self._versions = [versions([t]) for _, t in self._leaves]

    def __call__(self) -> None:
        changed = self._meaning.changed()
        if changed:
            raise ValueError(
                f"train_loss: expected the function that it was when implicit was called, got one in which "
                f"{', '.join(changed)} stand{'' if changed[1:] else 's'} for something else by now; bind the variables "
                "of a loop (lambda w, x=x: ...), or call backward before they change"
            )
        for (name, t), before in zip(self._leaves, self._versions, strict=True):
            if versions([t]) != before:
                raise ValueError(
                    f"{name}: expected values that stay until the backward pass, where train_loss runs, got some that "
                    "were changed in place, as by optimizer.step() or load_state_dict(); call backward before, or "
                    "train a copy"
                )
