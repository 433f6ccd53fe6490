"""The Hessian of a generalised linear model, from its closed form."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hypergrad_ext import ops
from hypergrad_ext.operators.base import LinearOperator
from hypergrad_ext.operators.glm_gram import Gram, form_gram
from hypergrad_ext.operators.glm_plan import estimate
from hypergrad_ext.operators.mlp import runs_as_written
from hypergrad_ext.structure import Space, Tree, take_apart, versions
from hypergrad_ext.surroundings import without_autocast

Family = Literal["logistic", "softmax", "squared", "poisson"]
FAMILIES = ("logistic", "softmax", "squared", "poisson")

_logger = logging.getLogger("hypergrad_ext")


class GLMHessian(LinearOperator):
    r"""Hessian :math:`H = \frac1n X^\top D X + \mathrm{diag}(2\,\ell_2)` of a generalised linear model's mean loss.

    Every product reads the data once, or twice, as two matrix products: on a GPU for more than 24 columns of vectors
    and classes, on the CPU where columns and sums take more than 2 MB, or where there are 64 columns and matrix
    units. A whole Neumann or CG solve is one call of a compiled kernel. Where forming the Gram matrix is cheaper than
    the products of a solve, it is formed instead (``plan`` says so and why).

    ======== ================================================================ ===================
    family   loss of which this is the Hessian                                D
    ======== ================================================================ ===================
    logistic ``F.binary_cross_entropy_with_logits(x @ w + b, y)``             ``p (1 - p)``
    softmax  ``F.cross_entropy(x @ w.T + b, y)``                              ``diag(p) - p p^T``
    squared  ``F.mse_loss(x @ w + b, y)``                                     ``2``
    poisson  ``F.poisson_nll_loss(x @ w + b, y)``                             ``exp(x @ w + b)``
    ======== ================================================================ ===================

    Args:
        inputs: X, ``(n, d)``: float64, float32, or, in half the bytes beside float32 parameters, float16 (on the
            CPU; the solution moves by about 1e-4 at a condition number of 100) or bfloat16 (by about 1e-3). Not
            copied (unless its columns are not next to each other in memory), and not to be changed afterwards.
        params: The weight, ``(d,)`` or ``(1, d)``, ``(classes, d)`` for softmax; or a pair of it and the bias,
            ``()`` or ``(1,)``, ``(classes,)`` for softmax, as a list, a dict in that order, or an ``nn.Linear``,
            all of it trainable.
        family: ``"logistic"``, ``"softmax"``, ``"squared"`` or ``"poisson"``.
        l2: Penalty ``sum(l2 * w**2)`` in the loss: a number >= 0, or a tensor like the weight. The bias is
            not penalised.

    Raises:
        TypeError: If a tensor is not real floating point, or dtypes do not go together.
        ValueError: If shapes, devices or the family are wrong, or ``l2`` is negative or not finite.
        RuntimeError: In products and solves, if ``inputs`` were changed in place since.

    Example:
        >>> x, w = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2)
        >>> operator = hg.GLMHessian(x, w, "logistic", l2=0.5)
        >>> operator @ torch.ones(2)
        tensor([1.1250, 1.5000])
        >>> hg.solve(operator, torch.ones(2), hg.CG(tol=1e-6)).value
        tensor([0.8889, 0.6667])
    """

    surely_symmetric = True

    def __init__(  # noqa: D107 (documented in the class)
        self, inputs: Tensor, params: Tree, family: Family, *, l2: float | Tensor = 0.0
    ) -> None:
        if family not in FAMILIES:
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
        _check_params(params)
        self.space = Space(take_apart("params", params))
        self.family = family
        weight, bias = self._weight_and_bias()
        self.inputs = self._checked_inputs(inputs, weight)
        n, d = self.inputs.shape
        self.intercept = bias is not None
        self.scale = 1.0 / n
        # X itself, for it may be most of the memory there is.
        self._versions = versions([self.inputs])
        with torch.no_grad(), without_autocast(weight.device):
            eta = self.inputs.to(weight.dtype) @ torch.atleast_2d(weight).T
            eta = eta if bias is None else eta + bias.reshape(1, -1)
            self.weights = _curvature(family, eta).contiguous()
            self.l2 = self._penalty(l2, weight)
            if self.l2 is not None and not self.intercept:
                self.lower = float(self.l2.min())
        self._gram: Tensor | None = None

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``; reads X once."""
        return [t[0] for t in self.matmat([t[None] for t in v])]

    def matmat(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` for k vectors; reads X once for all of them."""
        return self.space.views(ops.glm_hvp(*self._model(self.space.joined(v))))

    def dense(self) -> Tensor:
        """The matrix of ``H`` as a new tensor: a Gram matrix, ``n (classes d)^2`` multiply-adds."""
        return self._formed().clone()

    def _formed(self) -> Tensor:
        self._check_unchanged()
        if self._gram is None:
            with without_autocast(self.space.device):
                gram = form_gram(self.inputs, self.weights, self.scale, self.intercept)
                if self.l2 is not None:
                    gram.diagonal().add_(self.l2)
                self._gram = gram
        return self._gram

    def plan(self, products: int, rows: int) -> tuple[Literal["gram", "products"], str]:
        """Whether to form the Gram matrix for a solve, by the time that bytes and multiply-adds take.

        Args:
            products: Products that the solve is expected to take.
            rows: Right-hand sides.

        Returns:
            The choice, and the estimate behind it.
        """
        formed, space = self._gram is not None, self.space
        return estimate(self.inputs, self.intercept, space.numel, space.dtype, products, rows, formed=formed)

    def prepare(self, products: int, rows: int) -> LinearOperator:
        """The Gram matrix as an operator, where that is cheaper than this many products; else itself."""
        choice, why = self.plan(products, rows)
        _logger.debug("GLMHessian, %d products with %d vectors: %s (%s)", products, rows, choice, why)
        return Gram(self._formed(), self.space) if choice == "gram" else self

    def neumann_series(
        self, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        """The whole series in one call."""
        kernel = ops.glm_neumann_solve.kernel(b.device, backend)
        return kernel(*self._model(b), alpha, damping, steps, stop)

    def conjugate_gradients(
        self, b: Tensor, damping: float, steps: int, state: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The whole solve in one call."""
        kernel = ops.glm_cg_solve.kernel(b.device, backend)
        return kernel(*self._model(b), damping, steps, state)

    def _model(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool]:
        self._check_unchanged()
        return self.inputs, self.weights, v, self.l2, self.scale, self.intercept

    def __getstate__(self) -> dict:
        self._check_unchanged()
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        # A copy's inputs count from zero.
        self.__dict__.update(state)
        self._versions = versions([self.inputs])

    def _check_unchanged(self) -> None:
        if versions([self.inputs]) != self._versions:
            raise RuntimeError(
                "inputs: changed in place since this operator was made, which keeps them and what it computed from "
                "them; make a new one"
            )

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        tensors = self.space.leaves.tensors
        if len(tensors) > 2 or not self.space.exact:
            raise ValueError(
                "params: expected a weight, or a weight and a bias, all float64 or all float32, "
                f"got {len(tensors)} tensors of {', '.join(map(str, self.space.dtypes))}"
            )
        weight, bias = tensors[0].detach(), tensors[1].detach() if len(tensors) == 2 else None
        many = self.family == "softmax"
        if not (
            weight.dim() == 2 and weight.shape[0] > 1
            if many
            else weight.dim() in (1, 2) and weight.numel() == weight.shape[-1]
        ):
            expected = "(classes, d)" if many else "(d,) or (1, d)"
            raise ValueError(
                f"{self.space.names[0]}: expected shape {expected} for {self.family}, got {tuple(weight.shape)}"
            )
        if bias is not None and bias.numel() != (weight.shape[0] if many else 1):
            expected = f"({weight.shape[0]},)" if many else "() or (1,)"
            raise ValueError(f"{self.space.names[1]}: expected shape {expected}, got {tuple(bias.shape)}")
        return weight, bias

    def _checked_inputs(self, inputs: Tensor, weight: Tensor) -> Tensor:
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs: expected a tensor, got {type(inputs).__name__}")
        if inputs.layout != torch.strided:
            raise TypeError(f"inputs: expected a dense tensor, got one of layout {inputs.layout}")
        halves = (torch.bfloat16, torch.float16) if weight.device.type == "cpu" else (torch.bfloat16,)
        allowed = (torch.float32, *halves) if weight.dtype == torch.float32 else (torch.float64,)
        if inputs.dtype not in allowed:
            names = " or ".join(map(str, allowed))
            raise TypeError(f"inputs: expected {names} beside {weight.dtype} parameters, got {inputs.dtype}")
        if inputs.dim() != 2 or inputs.shape[1] != weight.shape[-1] or inputs.shape[0] == 0:
            raise ValueError(f"inputs: expected shape (n, {weight.shape[-1]}) with n > 0, got {tuple(inputs.shape)}")
        if inputs.device != weight.device:
            raise ValueError(f"inputs: expected device {weight.device}, got {inputs.device}")
        inputs = inputs.detach()
        return inputs if inputs.stride(1) == 1 else inputs.contiguous()

    def _penalty(self, l2: float | Tensor, weight: Tensor) -> Tensor | None:
        if not isinstance(l2, (numbers.Real, Tensor)) or (isinstance(l2, Tensor) and l2.is_complex()):
            got = l2.dtype if isinstance(l2, Tensor) else type(l2).__name__
            raise TypeError(f"l2: expected a real number or tensor, got {got}")
        penalty = torch.as_tensor(l2, dtype=weight.dtype, device=weight.device).detach()
        if penalty.dim() and penalty.shape != weight.shape:
            raise ValueError(f"l2: expected a number or shape {tuple(weight.shape)}, got {tuple(penalty.shape)}")
        if not bool(((penalty >= 0) & (2 * penalty).isfinite()).all()):
            raise ValueError(
                f"l2: expected values >= 0, got one that is negative, or NaN or infinite in {weight.dtype}"
            )
        if not bool(penalty.any()):
            return None
        diagonal = torch.zeros(self.space.numel, dtype=weight.dtype, device=weight.device)
        diagonal[: weight.numel()] = 2 * penalty.expand(weight.shape).reshape(-1)
        return diagonal


def _check_params(params: Tree) -> None:
    if isinstance(params, nn.Module):
        # Of a subclass, or where the weight is computed (pruning, parametrizations), what multiplies is something else.
        names = [name for name, _ in params.named_parameters()]
        if type(params) is not nn.Linear or names not in (["weight"], ["weight", "bias"]):
            raise ValueError(
                "params: expected an nn.Linear whose parameters are its weight and bias, "
                f"got {type(params).__name__} with {', '.join(names) or 'none'}"
            )
        if not runs_as_written(params):
            raise ValueError("params: expected a plain nn.Linear, got one with hooks or a forward of its own")
        if not all(p.requires_grad for p in params.parameters()):
            raise ValueError("params: expected a module, all of it trainable, got parameters that do not require grad")
    elif isinstance(params, dict) and list(params) == ["bias", "weight"]:
        raise ValueError("params: expected the weight before the bias, got a dict of bias and weight in that order")


def _curvature(family: Family, eta: Tensor) -> Tensor:
    if family == "softmax":
        return eta.softmax(1)
    eta = eta[:, 0]
    if family == "logistic":
        return eta.sigmoid() * (-eta).sigmoid()
    return eta.exp() if family == "poisson" else torch.full_like(eta, 2.0)
