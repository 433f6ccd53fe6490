"""The generalised Gauss-Newton matrix of a model and its loss."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hypergrad_ext import ops
from hypergrad_ext.buffers import buffers_kept
from hypergrad_ext.engines import RetainedGradient, twice_differentiable
from hypergrad_ext.losses import check_loss, check_of_argument, evaluate
from hypergrad_ext.operators.base import LinearOperator
from hypergrad_ext.structure import Space, Tree, take_apart
from hypergrad_ext.surroundings import without_autocast

Model = nn.Module | Callable[[Tree, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class GaussNewton(LinearOperator):
    r"""The generalised Gauss-Newton matrix :math:`G = J^\top S J` of a loss of a model's outputs.

    .. math::
        z = f(w, \text{inputs}), \quad J = \partial z / \partial w, \quad
        S = \partial^2 \ell(z, \text{targets}) / \partial z^2

    It is the Hessian without the curvature of the model itself: positive semi-definite for every loss that is
    convex in the outputs, where the Hessian of a network is not, so that CG and Neumann can be trusted with it.
    For cross entropy and squared error it is also the Fisher matrix (Martens, New insights and perspectives on
    the natural gradient method, 2020).

    The model runs once, here; all products see one dropout mask, and buffers (the statistics of BatchNorm) are
    put back as they were. Cost of a product: one pass forward through the linearised model and one backward,
    about two training gradients. S is a fused kernel (`hypergrad_ext.ops.softmax_hessian_`) for cross entropy of class
    indices and a multiple of the identity for squared error; any other loss is differentiated twice.

    What else the training loss has, such as L2 penalties, is not in G, and a hypergradient with this in the place of
    the Hessian lacks its curvature: give it as ``penalty``, whose Hessian is added.

    Args:
        model: An ``nn.Module``, called with ``inputs``; or a function of ``params`` and ``inputs``.
        loss: Function of the outputs and the targets that returns a scalar, such as ``nn.CrossEntropyLoss()`` or
            ``torch.nn.functional.mse_loss``.
        inputs: What the model takes.
        targets: What the loss takes.
        params: Tensor, list, tuple or dict; by default the module's parameters that require grad.
        penalty: Function of the parameters (for a module of their dict) that returns a scalar; it runs once, here.

    Raises:
        TypeError: If the model does not return a real floating point tensor, or the loss or the penalty not a scalar
            of one.
        ValueError: If ``params`` is missing beside a function, or the outputs or the penalty do not depend on the
            parameters they get.

    Example:
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> G = hg.GaussNewton(model, torch.nn.functional.mse_loss, x, y)
        >>> G @ {"weight": torch.tensor([[1.0, 0.0]])}
        {'weight': tensor([[2., 4.]])}
        >>> G = hg.GaussNewton(
        ...     model, torch.nn.functional.mse_loss, x, y, penalty=lambda p: 5 * (p["weight"] ** 2).sum()
        ... )
        >>> G @ {"weight": torch.tensor([[1.0, 0.0]])}
        {'weight': tensor([[12.,  4.]])}
    """

    surely_symmetric = True

    def __init__(  # noqa: D107 (documented in the class)
        self,
        model: Model,
        loss: Loss,
        inputs: Tensor,
        targets: Tensor,
        *,
        params: Tree | None = None,
        penalty: Callable[[Tree], Tensor] | None = None,
    ) -> None:
        module = model if isinstance(model, nn.Module) else None
        if not callable(model):
            raise TypeError(
                f"model: expected an nn.Module or a function of params and inputs, got {type(model).__name__}"
            )
        if not callable(loss):
            raise TypeError(f"loss: expected a function of outputs and targets, got {type(loss).__name__}")
        if params is None:
            if module is None:
                raise ValueError("params: expected the parameters that a model given as a function takes, got None")
            params = module
        elif module is not None:
            raise ValueError("params: expected None beside a module, whose parameters are its own")
        if penalty is not None and not callable(penalty):
            raise TypeError(f"penalty: expected a function of the parameters, got {type(penalty).__name__}")
        leaves = take_apart("params", params)
        self.space = Space(leaves)
        tensors = [t.detach().requires_grad_() for t in leaves.tensors]
        with torch.enable_grad():
            with buffers_kept(module) as buffers, twice_differentiable():
                tree = leaves.rebuild(tensors)
                outputs = model(tree, inputs) if module is None else torch.func.functional_call(module, tree, (inputs,))
            if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
                kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
                raise TypeError(f"model: expected a real floating point tensor as output, got {kind}")
            if not outputs.requires_grad:
                raise ValueError("model: expected outputs that depend on params, got some that depend on none of them")
            check_of_argument("model", outputs, leaves)
            # J^T u, whose graph is linear in u: one pass through it backwards is J v.
            self._u = torch.zeros_like(outputs, requires_grad=True)
            pull = functools.partial(
                torch.autograd.grad, outputs, tensors, self._u, create_graph=True, allow_unused=True
            )
            around: Callable[[], AbstractContextManager] = contextlib.nullcontext
            with without_autocast(outputs.device):
                pulled = pull()
                if buffers.changed():
                    # A checkpoint ran a part of the model again, and will in every pass.
                    buffers.put_back()
                    around = functools.partial(buffers_kept, module)
                    with around():
                        pulled = pull()
        self._outputs = RetainedGradient([outputs], tensors)
        self._used = [g is not None for g in pulled]
        self._pushed = RetainedGradient(pulled, [self._u])
        self._outputs.around = self._pushed.around = around
        self._middle = (
            _softmax(loss, outputs, targets) or _squared(loss, outputs, targets) or _any(loss, outputs, targets)
        )
        self._penalty: RetainedGradient | None = None
        if penalty is not None:
            with torch.enable_grad():
                value = evaluate("penalty", penalty, leaves, tensors)
            with without_autocast(value.device):
                self._penalty = RetainedGradient.of(value, tensors)
            self._used = [a or b for a, b in zip(self._used, self._penalty.used, strict=True)]

    @property
    def used(self) -> list[bool]:
        """For every parameter, whether the outputs or the penalty depend on it."""
        return self._used

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``J^T S J v``: through the linearised model, the loss, and back."""
        product = self._outputs.hvp([self._middle(self._pushed.hvp(v)[0])])
        return product if self._penalty is None else _sums(product, self._penalty.hvp(v))

    def matmat(self, v: Sequence[Tensor]) -> list[Tensor]:
        """The same for a batch: batched passes where the first batch shows them to be faster."""
        product = self._outputs.hvps([self._middle(self._pushed.hvps(v)[0])])
        return product if self._penalty is None else _sums(product, self._penalty.hvps(v))


def _sums(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [s + t for s, t in zip(a, b, strict=True)]


def _softmax(loss: Loss, outputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor] | None:
    """``S u`` of cross entropy with class indices: ``weight (diag(p) - p p^T)`` for every row."""
    if loss is F.cross_entropy:
        loss = nn.CrossEntropyLoss()
    indices = isinstance(targets, Tensor) and not targets.is_floating_point()
    if type(loss) is not nn.CrossEntropyLoss or not indices or loss.reduction == "none":
        return None
    if loss.weight is not None and loss.label_smoothing:
        return None  # smoothing spreads the classes' weights over each row
    _evaluate(loss, outputs, targets)
    # The classes are in dimension 1 of a batch.
    dim = min(1, outputs.dim() - 1) - outputs.dim()
    logits = outputs.detach().movedim(dim, -1)
    logits = logits.reshape(-1, logits.shape[-1])
    accurate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat = targets.reshape(-1).long()
    kept = flat != loss.ignore_index
    per_class = (
        torch.ones(logits.shape[-1], dtype=accurate, device=logits.device) if loss.weight is None else loss.weight
    )
    weights = torch.where(kept, per_class.to(accurate)[torch.where(kept, flat, 0)], 0)
    if loss.reduction == "mean":
        weights = weights / weights.sum()

    def product(u: Tensor) -> Tensor:
        vectors = u.movedim(dim, -1)
        rows = vectors.reshape(-1, *logits.shape)
        return ops.softmax_hessian(logits, rows, 1.0, weights).view(vectors.shape).movedim(-1, dim)

    return product


def _squared(loss: Loss, outputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor] | None:
    """``S u`` of squared error: ``2 u``, divided by the number of outputs for a mean."""
    if loss is F.mse_loss:
        loss = nn.MSELoss()
    if type(loss) is not nn.MSELoss or loss.reduction == "none":
        return None
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
        return None  # one of them is broadcast, with a warning, and counts several times; or torch refuses them
    _evaluate(loss, outputs, targets)
    factor = 2 / outputs.numel() if loss.reduction == "mean" else 2.0
    return lambda u: factor * u


def _evaluate(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    """Run a loss whose value is not needed for torch's own checks of the targets."""
    with torch.no_grad():
        loss(outputs.detach(), targets)


def _any(loss: Loss, outputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """``S u`` of any loss, by double backward through it alone."""
    z = outputs.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(z, targets)
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: expected a function that returns a scalar tensor, got {type(value).__name__}")
    check_loss("loss", value)
    with without_autocast(z.device):
        gradient = RetainedGradient.of(value, [z])
    return lambda u: (gradient.hvps if u.dim() > z.dim() else gradient.hvp)([u])[0]
