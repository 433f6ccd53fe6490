"""The Hessian of a multilayer perceptron, by Pearlmutter's R-operator in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hypergrad_ext import ops
from hypergrad_ext.operators.base import LinearOperator
from hypergrad_ext.structure import Space, Tree, take_apart
from hypergrad_ext.surroundings import without_autocast

Activation = Literal["relu", "tanh", "gelu", "softplus", "sigmoid"]
Loss = Literal["cross_entropy", "squared"]

_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
    nn.Softplus: "softplus",
    nn.Sigmoid: "sigmoid",
}
ACTIVATIONS = tuple(_MODULES.values())
LOSSES = ("cross_entropy", "squared")

# Bytes that rows are padded to, as the compiled kernel reads them; other rows it has to copy.
_PADDING = 64


class MLPHessian(LinearOperator):
    r"""Hessian of a multilayer perceptron's mean loss, :math:`H = \partial^2 L / \partial w^2`, all of it.

    .. math::
        h_{l+1} = \mathrm{act}(h_l W_l^\top + b_l), \quad
        L = \frac1n \sum_i \mathrm{loss}(\text{last layer, without act}) + \ell_2 \sum_l \|W_l\|^2

    Everything that does not depend on the vector (activations, their derivatives, the gradient by every
    layer's output) is computed once, here; a product is then one pass forward and one back in a compiled
    kernel (Pearlmutter, Fast exact multiplication by the Hessian, 1994). H is indefinite in general.

    ============= ==========================================================================
    loss          of the outputs z, ``(n, classes)``
    ============= ==========================================================================
    cross_entropy ``F.cross_entropy(z, targets)``, targets ``(n,)``: class indices
    squared       ``F.mse_loss(z, targets)``, targets like z
    ============= ==========================================================================

    Cost: the constructor does about one gradient's work; a product with k vectors k times the
    multiply-adds of two gradients.

    Args:
        inputs: ``(n, inputs of the first layer)``, of the dtype of the parameters.
        params: Weights ``(outputs, inputs)`` and biases ``(outputs,)`` in order, ``[W1, b1, W2, b2, ...]``, or
            ``[W1, W2, ...]``, or a dict in that order, all float64 or all float32; or an ``nn.Sequential`` of
            ``nn.Linear`` with the activation's module between.
        targets: Class indices, ``(n,)``, int64; or values, ``(n, outputs)``.
        activation: ``"relu"`` (the default), ``"tanh"``, ``"gelu"`` (the exact one), ``"softplus"`` (beta 1) or
            ``"sigmoid"``, as in ``torch.nn.functional``. A module brings its own.
        loss: ``"cross_entropy"`` or ``"squared"``.
        l2: Penalty on the weights, a number >= 0. Biases are not penalised.

    Raises:
        TypeError: If a tensor is not real floating point, or dtypes do not go together.
        ValueError: If shapes, devices, modules or names are wrong, or ``l2`` is negative.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [0.0]])
        >>> params = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])]
        >>> operator = hg.MLPHessian(x, params, y, activation="relu", loss="squared", l2=0.5)
        >>> (operator @ [torch.ones(2, 2), torch.ones(1, 2)])[1]
        tensor([[ 3., -3.]])
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        >>> hg.MLPHessian(x, model, y, loss="squared").activation
        'tanh'
    """

    surely_symmetric = True

    def __init__(  # noqa: D107 (documented in the class)
        self,
        inputs: Tensor,
        params: Tree,
        targets: Tensor,
        *,
        activation: Activation | None = None,
        loss: Loss = "cross_entropy",
        l2: float = 0.0,
    ) -> None:
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
        if not 0 <= l2 < math.inf:
            raise ValueError(f"l2: expected a finite number >= 0, got {l2}")
        if isinstance(params, nn.Module):
            found = _activation_of(params)
            if found is not None and activation not in (None, found):
                raise ValueError(f"activation: expected {found!r}, the one in params, got {activation!r}")
            activation = found or activation
        self.space = Space(take_apart("params", params))
        self.activation: Activation = activation or "relu"
        self.loss = loss
        self.l2 = float(l2)
        self.biases = any(len(shape) == 1 for shape in self.space.shapes)
        self.weights, bias = self._layers()
        inputs = self._checked_inputs(inputs)
        self._check_targets(targets, len(inputs))
        with torch.no_grad(), without_autocast(self.space.device):
            self._prepare(inputs, bias, targets)

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``: one pass forward and one back."""
        return self.space.views(self.product(self.space.joined(v)[None])[0])

    def matmat(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` for k vectors in one call."""
        return self.space.views(self.product(self.space.joined(v)))

    def product(self, flat: Tensor) -> Tensor:
        """``H v`` for the rows of a flat buffer, ``(k, n)``."""
        return ops.mlp_hvp(*self._model(flat))

    def neumann_series(
        self, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor] | None:
        """The whole series in one call; on a GPU step by step, since each step's stats would wait for it."""
        kernel = ops.mlp_neumann_solve.kernel_if_any(b.device, backend) if b.device.type == "cpu" else None
        return None if kernel is None else kernel(*self._model(b), alpha, damping, steps, stop)

    def conjugate_gradients(
        self, b: Tensor, damping: float, steps: int, state: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The whole solve in one call, likewise."""
        kernel = ops.mlp_cg_solve.kernel_if_any(b.device, backend) if b.device.type == "cpu" else None
        return None if kernel is None else kernel(*self._model(b), damping, steps, state)

    def _model(
        self, v: Tensor
    ) -> tuple[
        list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor | None, Tensor, float, bool, float
    ]:
        saved = self.weights, self._hidden, self._slopes, self._bends, self._deltas, self._probabilities
        return *saved, v, self._scale, self.biases, self.l2

    def _prepare(self, inputs: Tensor, bias: list[Tensor], targets: Tensor) -> None:
        """Forward and backward once: all that a product needs and that does not depend on the vector."""
        last = len(self.weights) - 1
        hidden, slopes, curvatures = [inputs], [], []
        for layer, w in enumerate(self.weights):
            a = F.linear(hidden[-1], w, bias[layer] if self.biases else None)
            if layer < last:
                h, slope, curvature = _derivatives(self.activation, a)
                hidden.append(h)
                slopes.append(slope)
                curvatures.append(curvature)
        n = len(inputs)
        self._probabilities: Tensor | None = None
        if self.loss == "cross_entropy":
            self._scale = 1 / n
            self._probabilities = _padded(a.softmax(1))
            delta = (self._probabilities - F.one_hot(targets, a.shape[1])) / n
        else:
            self._scale = 2 / a.numel()
            delta = self._scale * (a - targets)
        deltas: list[Tensor] = []
        bends: list[Tensor] = []
        for layer in range(last, 0, -1):
            deltas.insert(0, _padded(delta))
            by_hidden = delta @ self.weights[layer]
            delta = slopes[layer - 1] * by_hidden
            curvature = curvatures[layer - 1]
            if curvature is not None:
                bends.insert(0, _padded(curvature * by_hidden))
        self._hidden, self._slopes = [_padded(h) for h in hidden], [_padded(slope) for slope in slopes]
        self._deltas, self._bends = deltas, bends
        self.weights = [_padded(w) for w in self.weights]

    def _layers(self) -> tuple[list[Tensor], list[Tensor]]:
        tensors = [t.detach() for t in self.space.leaves.tensors]
        if not self.space.exact:
            dtypes = ", ".join(sorted({str(dtype) for dtype in self.space.dtypes}))
            raise TypeError(f"params: expected all float64 or all float32, got {dtypes}")
        step = 2 if self.biases else 1
        if len(tensors) % step:
            raise ValueError(f"params: expected a weight and a bias for every layer, got {len(tensors)} tensors")
        weights, bias = tensors[::step], tensors[1::2] if self.biases else []
        for layer, w in enumerate(weights):
            name = self.space.names[step * layer]
            size = "inputs" if layer == 0 else weights[layer - 1].shape[0]
            if w.dim() != 2 or not w.numel() or (layer and w.shape[1] != size):
                raise ValueError(f"{name}: expected a weight of shape (outputs, {size}), got {tuple(w.shape)}")
            if self.biases and bias[layer].shape != w.shape[:1]:
                expected, got = tuple(w.shape[:1]), tuple(bias[layer].shape)
                raise ValueError(f"{self.space.names[2 * layer + 1]}: expected a bias of shape {expected}, got {got}")
        return weights, bias

    def _checked_inputs(self, inputs: Tensor) -> Tensor:
        d = self.weights[0].shape[1]
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs: expected a tensor, got {type(inputs).__name__}")
        if inputs.dtype != self.space.dtype:
            raise TypeError(f"inputs: expected {self.space.dtype}, the dtype of params, got {inputs.dtype}")
        if inputs.dim() != 2 or inputs.shape[1] != d or inputs.shape[0] == 0:
            raise ValueError(f"inputs: expected shape (n, {d}) with n > 0, got {tuple(inputs.shape)}")
        if inputs.device != self.space.device:
            raise ValueError(f"inputs: expected device {self.space.device}, got {inputs.device}")
        return inputs.detach()

    def _check_targets(self, targets: Tensor, n: int) -> None:
        outputs = self.weights[-1].shape[0]
        entropy = self.loss == "cross_entropy"
        dtype, shape = (torch.int64, (n,)) if entropy else (self.space.dtype, (n, outputs))
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets: expected a tensor, got {type(targets).__name__}")
        if targets.dtype != dtype:
            raise TypeError(f"targets: expected {dtype} for {self.loss}, got {targets.dtype}")
        if targets.shape != shape:
            raise ValueError(f"targets: expected shape {shape} for {self.loss}, got {tuple(targets.shape)}")
        if targets.device != self.space.device:
            raise ValueError(f"targets: expected device {self.space.device}, got {targets.device}")
        if entropy and not 0 <= int(targets.min()) <= int(targets.max()) < outputs:
            got = f"{int(targets.min())} to {int(targets.max())}"
            raise ValueError(f"targets: expected classes from 0 to {outputs - 1}, got {got}")


def _activation_of(module: nn.Module) -> Activation | None:
    """The activation of a sequence of linear layers; None for a single layer."""
    expected = "params: expected an nn.Sequential of nn.Linear with one kind of activation between"
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        raise ValueError(f"{expected}, got {type(module).__name__}")
    if not runs_as_written(module):
        raise ValueError(f"{expected}, got one with hooks or a forward of its own")
    parts = list(module)
    parameters = [p for part in parts for p in part.parameters()]
    if len(set(map(id, parameters))) < len(parameters):
        raise ValueError(f"{expected}, got parameters that several of them share")
    found = set()
    for i, part in enumerate(parts):
        fits = type(part) is nn.Linear if i % 2 == 0 else type(part) in _MODULES
        if isinstance(part, nn.GELU):
            fits &= part.approximate == "none"
        if isinstance(part, nn.Softplus):
            fits &= (part.beta, part.threshold) == (1, 20)
        if not fits:
            raise ValueError(f"{expected}, got {part} in place {i}")
        # Pruning, weight and spectral norm: what multiplies is not what is trained.
        own = [name for name, p in part.named_parameters(recurse=False) if p is getattr(part, name)]
        if i % 2 == 0 and own not in (["weight"], ["weight", "bias"]) or not runs_as_written(part):
            raise ValueError(f"{expected}, got hooks or other parameters in place {i}: {part}")
        if not all(p.requires_grad for p in part.parameters()):
            raise ValueError(f"{expected}, all of it trainable, got parameters that do not require grad in place {i}")
        if i % 2:
            found.add(_MODULES[type(part)])
    if len(parts) % 2 == 0 or len(found) > 1:
        raise ValueError(f"{expected}, got {', '.join(type(part).__name__ for part in parts) or 'nothing'}")
    return found.pop() if found else None


def runs_as_written(module: nn.Module) -> bool:
    """Whether a module computes what its class says: it has no hooks, and no ``forward`` of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _derivatives(activation: Activation, a: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """``act(a), act'(a), act''(a)``; None for a second derivative that is zero."""
    if activation == "relu":
        return a.relu(), (a > 0).to(a.dtype), None
    if activation == "tanh":
        h = a.tanh()
        slope = 1 - h * h
        return h, slope, -2 * h * slope
    if activation == "gelu":
        density = (-a * a / 2).exp() / math.sqrt(2 * math.pi)
        cumulative = torch.special.ndtr(a)
        return F.gelu(a), cumulative + a * density, (2 - a * a) * density
    s = a.sigmoid()
    slope = s * (-a).sigmoid()
    if activation == "sigmoid":
        return s, slope, slope * (1 - 2 * s)
    linear = a > 20  # where torch's softplus becomes the identity
    return F.softplus(a), torch.where(linear, 1, s), torch.where(linear, 0, slope)


def _padded(t: Tensor) -> Tensor:
    """A copy, with rows at multiples of the padding, which is zero, but not of 512 bytes."""
    # Never the tensor itself: inputs or parameters that are changed in place must not change half of the operator.
    # Rows 512 bytes apart share a few sets of a CPU's cache, and drive each other out of it.
    width = t.shape[1]
    unit = _PADDING // t.element_size()
    padding = -width % unit
    if t.device.type == "cpu" and (width + padding) % (8 * unit) == 0:
        padding += unit
    return F.pad(t, (0, padding))[:, :width] if padding else t.clone(memory_format=torch.contiguous_format)
