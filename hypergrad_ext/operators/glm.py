"""The Hessian of a generalised linear model, from its closed form."""

from __future__ import annotations

import functools
import logging
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from hypergrad_ext import _native, ops, reference
from hypergrad_ext.operators.base import LinearOperator
from hypergrad_ext.operators.dense import DenseMatrix
from hypergrad_ext.operators.mlp import runs_as_written
from hypergrad_ext.structure import Space, Tree, take_apart, versions
from hypergrad_ext.surroundings import without_autocast

Family = Literal["logistic", "softmax", "squared", "poisson"]
FAMILIES = ("logistic", "softmax", "squared", "poisson")

_logger = logging.getLogger("hypergrad_ext")


@dataclass(frozen=True)
class _Rates:
    """What things cost in multiply-adds of the fused product."""

    from_memory: float  # a byte
    from_cache: float  # a byte of data that fit in the cache
    gram: float  # a multiply-add of the Gram matrix when it is formed
    strip: int  # of that as many columns of the matrix at a time: what they have beyond the diagonal is lost
    step: float  # a multiply-add of a product with it
    short_row: float  # what the sums at the end of a row of X cost, beside its elements
    row: float  # what a row of X costs at least, beside reading it
    loop_step: float  # the calls of a step with the Gram matrix
    scaling: float  # a number of D x when the matrix is formed
    forming: float  # the calls that form it
    cache_bytes: float
    product: float = 1.0  # a multiply-add of a product with X


# Measured on AMD: Zen 4, where the product makes 85 to 100 GFLOP/s per core; Zen 3, 55, what forms the matrix and
# multiplies by it on a Zen 4 without AVX-512; Zen 5, 200, of which the same is not measured. On Intel's server cores
# (Granite Rapids), 105, whose last cache gives 27 GB/s to each; their matrix units form the matrix of wide data in
# float32, and make products of several columns with data in bfloat16, of many with data in float32.
_ON_AVX2 = _Rates(
    from_memory=2.0,
    from_cache=1.4,
    gram=0.9,
    strip=48,
    step=1.0,
    short_row=30.0,
    row=170.0,
    loop_step=4e4,
    scaling=20.0,
    forming=2e6,
    cache_bytes=32e6,
)
_ON_AVX512 = replace(_ON_AVX2, from_cache=1.0, gram=1.0)
_ON_INTEL_AVX512 = replace(_ON_AVX512, from_memory=3.0, from_cache=1.9, gram=0.85, step=1.2, cache_bytes=1e8)
_ON_INTEL_AMX = replace(_ON_INTEL_AVX512, gram=0.3, strip=32, scaling=50.0)
_AMX_PRODUCT = {torch.bfloat16: 0.5, torch.float32: 0.65}
# Rows and columns of the data, and columns of vectors and classes, from which on they do.
_AMX_GRAM, _AMX_COLUMNS = (1024, 128), {torch.bfloat16: (256, 64, 2), torch.float32: (128, 256, 64)}
_ON_FAST_CORES = replace(_ON_AVX512, from_memory=3.5, short_row=0.0, row=500.0, loop_step=1.2e5, forming=1e7)
# By arithmetic for an H200, not measured: 25 TFLOP/s in the fused product, 45 in cuBLAS, 4.3 TB/s from memory, about
# 10 from shared memory and L2, four launches per step.
_ON_CUDA = _Rates(
    from_memory=3.0,
    from_cache=1.2,
    gram=0.55,
    strip=112,
    step=0.55,
    short_row=0.0,
    row=0.0,
    loop_step=2.5e8,
    scaling=40.0,
    forming=1.2e9,
    cache_bytes=30e6,
)

# Rows of a half precision X that are widened at a time when the Gram matrix is formed.
_ROWS = 8192
# Gram matrices up to this size are formed: 64 MB in float32.
_GRAM_LIMIT = 4096


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
                self._gram = self._form_gram()
        return self._gram

    def plan(self, products: int, rows: int) -> tuple[Literal["gram", "products"], str]:
        """Whether to form the Gram matrix for a solve, by the time that bytes and multiply-adds take.

        Args:
            products: Products that the solve is expected to take.
            rows: Right-hand sides.

        Returns:
            The choice, and the estimate behind it.
        """
        (n, d), m = self.inputs.shape, self.space.numel
        classes = m // (d + self.intercept)

        rates = _rates(self.inputs, classes * rows)

        def reading(size: int) -> float:
            return size * (rates.from_memory if size > rates.cache_bytes else rates.from_cache)

        data = n * d * self.inputs.element_size()
        product = rates.product * 2 * n * (d + rates.short_row) * classes * rows
        streaming = products * max(product, reading(data) + n * rates.row)
        forming = 0.0
        if self._gram is None:
            # Of every pair of classes a symmetric block.
            pairs = classes * (classes + 1) / 2
            multiplying = pairs * n * (d * (rates.gram * min(d, (d + rates.strip) / 2) + rates.scaling) + rates.row)
            forming = max(multiplying, reading(data)) + rates.forming
        step = max(rates.step * m * m * rows, reading(m * m * self.space.dtype.itemsize)) + rates.loop_step
        forming += products * step
        choice: Literal["gram", "products"] = "gram" if forming < streaming and m <= _GRAM_LIMIT else "products"
        return choice, f"Gram matrix {forming / 1e6:.3g} against {streaming / 1e6:.3g} million multiply-adds"

    def prepare(self, products: int, rows: int) -> LinearOperator:
        """The Gram matrix as an operator, where that is cheaper than this many products; else itself."""
        choice, why = self.plan(products, rows)
        _logger.debug("GLMHessian, %d products with %d vectors: %s (%s)", products, rows, choice, why)
        return _Gram(self._formed(), self.space) if choice == "gram" else self

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

    def _form_gram(self) -> Tensor:
        """``scale X^T D X + l2``: a symmetric block for every pair of classes."""
        (n, d), m = self.inputs.shape, self.space.numel
        p = self.weights.view(n, -1)
        classes, width = p.shape[1], d + self.intercept
        # A GPU has no kernel of ours for it, whatever backend was asked for: its libraries form it.
        form = ops.glm_gram.kernel_if_any(p.device) if p.device.type == "cpu" else None
        form = form or reference.glm_gram
        if classes == 1 and not self.intercept and self.inputs.dtype == p.dtype:
            # As it comes: a copy takes as long as hundreds of thousands of multiply-adds.
            return self._penalised(form(self.inputs, self.scale * p)[0])
        blocks = p.new_zeros(classes, classes, width, width)
        unit = torch.eye(classes, dtype=p.dtype, device=p.device)
        # A half precision X is widened by blocks of rows, so that no second copy of it is made.
        rows = n if self.inputs.dtype == p.dtype else _ROWS
        for x, p_x in zip(self.inputs.split(rows), p.split(rows), strict=True):
            x = x.to(p.dtype)
            for c in range(classes):
                curvature = self.scale * p_x
                if classes > 1:
                    curvature = curvature[:, c, None] * (unit[c, : c + 1] - p_x[:, : c + 1])
                blocks[c, : c + 1, :d, :d] += form(x, curvature)
                if self.intercept:
                    blocks[c, : c + 1, d, :d] += curvature.T @ x
                    blocks[c, : c + 1, d, d] += curvature.sum(0)
        if self.intercept:
            blocks[:, :, :d, d] = blocks[:, :, d, :d]
        for c in range(1, classes):
            blocks[:c, c] = blocks[c, :c]
        gram = blocks.transpose(1, 2).reshape(m, m)
        if classes > 1 and self.intercept:
            # Rows and columns in the order of the parameters: all weights, then all intercepts.
            order = torch.arange(classes * width, device=self.space.device).view(classes, width)
            order = torch.cat([order[:, :d].reshape(-1), order[:, d:].reshape(-1)])
            gram = gram[order][:, order]
        return self._penalised(gram)

    def _penalised(self, gram: Tensor) -> Tensor:
        if self.l2 is not None:
            gram.diagonal().add_(self.l2)
        return gram


class _Gram(DenseMatrix):
    """The Gram matrix as an operator on the model's own parameters."""

    def __init__(self, matrix: Tensor, space: Space) -> None:
        # Without the checks of a matrix from outside, which take as long as forming a small one.
        self.matrix, self.space, self.symmetric = matrix, space, True

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """One product with the matrix."""
        with without_autocast(self.space.device):
            return self.space.views(self.matrix @ self.space.joined(v))

    def matmat(self, v: Sequence[Tensor]) -> list[Tensor]:
        """One product with the matrix for all vectors."""
        with without_autocast(self.space.device):
            return self.space.views(self.space.joined(v) @ self.matrix)


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


def _rates(inputs: Tensor, columns: int) -> _Rates:
    if inputs.is_cuda:
        return _ON_CUDA

    def reach(*least: int) -> bool:
        return all(size >= bound for size, bound in zip((*inputs.shape, columns), least, strict=False))

    wide = inputs.dtype != torch.float64 and reach(*_AMX_GRAM)
    several = inputs.dtype in _AMX_COLUMNS and reach(*_AMX_COLUMNS[inputs.dtype])
    return _rates_of_cpu(wide, _AMX_PRODUCT[inputs.dtype] if several else 1.0)


@functools.cache
def _rates_of_cpu(wide: bool, product: float) -> _Rates:
    cpu = _native.build_info()
    if cpu.get("blas_at_half_speed"):
        return _ON_FAST_CORES
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return _ON_AVX2
    if not cpu.get("amx"):
        return _ON_INTEL_AVX512 if cpu.get("vendor") == "intel" else _ON_AVX512
    return replace(_ON_INTEL_AMX if wide else _ON_INTEL_AVX512, product=product)


def _curvature(family: Family, eta: Tensor) -> Tensor:
    if family == "softmax":
        return eta.softmax(1)
    eta = eta[:, 0]
    if family == "logistic":
        return eta.sigmoid() * (-eta).sigmoid()
    return eta.exp() if family == "poisson" else torch.full_like(eta, 2.0)
