"""Every fused kernel as a torch op: schema, reference, fake and kernels in one block per op.

Calling an op object runs the fastest backend for its device directly (a pybind11 call costs about
1 us). While torch traces or compiles, the registered op ``torch.ops.hypergrad_ext.<name>`` is
called instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hypergrad_ext.kernels as triton_kernels
from hypergrad_ext import _native, backends, reference, reference_lstm, reference_minres, reference_mlp

_library = torch.library.Library("hypergrad_ext", "FRAGMENT")

# What ops of a family take, before what is special to each.
_GLM = "Tensor x, Tensor weights, Tensor {}, Tensor? l2, float scale, bool intercept"
_MLP = (
    "Tensor[] weights, Tensor[] hidden, Tensor[] slopes, Tensor[] bends, Tensor[] deltas, Tensor? probabilities,"
    " Tensor {}, float scale, bool biases, float l2"
)
# How a whole solve goes on from there.
_NEUMANN = "float alpha, float damping, int steps, Tensor stop) -> (Tensor, Tensor)"
_CG = "float damping, int steps, Tensor state) -> (Tensor, Tensor, Tensor)"


class Op:
    """One fused op and its implementations.

    Attributes:
        name: Name of the op, the same in csrc, kernels, tests and bench.
        kernels: Backend name to function.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable,
        fake: Callable,
        device_of: int,
        native: tuple[str, ...] = ("cpp", "cuda"),
    ) -> None:
        """Register the op.

        Args:
            schema: Schema in the dispatcher's language.
            reference: Plain torch implementation, used where no kernel can run.
            fake: Shape function for tracing.
            device_of: Position of the argument whose device chooses the backend.
            native: Backends that the compiled module has for it.
        """
        self.name = schema.partition("(")[0]
        self._device_of = device_of
        _library.define(schema)
        _library.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hypergrad_ext::{self.name}", fake, lib=_library)
        self.kernels: dict[str, Callable] = {"torch": reference}
        runs = "cuda" if _native.EMULATED else "cpp"
        if runs in native and _native._C is not None and hasattr(_native._C, self.name):
            self.kernels |= dict.fromkeys(native, getattr(_native._C, self.name))
        if hasattr(triton_kernels, self.name):
            self.kernels["triton"] = getattr(triton_kernels, self.name)
        self.registered = getattr(torch.ops.hypergrad_ext, self.name).default

    def kernel(self, device: torch.device, backend: str | None = None) -> Callable:
        """The function that runs this op on ``device``: look it up once, call it every step."""
        if _tracing():
            return self.registered
        return self.kernels[backends.select(self.kernels, device.type, backend)[0]]

    def kernel_if_any(self, device: torch.device, backend: str | None = None) -> Callable | None:
        """The same for an op that others can stand in for, step by step: None where no kernel of its own would run."""
        asked = backends.asked_for(backend)
        has = asked in self.kernels or (asked == "auto" and len(self.kernels) > 1)
        # Unknown names are refused as everywhere.
        return self.kernel(device, backend) if has or asked not in backends.NAMES else None

    def __call__(self, *args: Any) -> Any:
        """Run the op on the backend chosen for its device."""
        return self.kernel(args[self._device_of].device)(*args)


def _tracing() -> bool:
    # Under a dispatch mode (make_fx, FakeTensorMode) tensors have no memory for a kernel to touch.
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _fresh(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _fake_in_place(*args: Tensor | float | None) -> None:
    """In-place ops return nothing, whatever the shapes."""


def _fake_neumann(b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b), stop.new_empty(steps, b.shape[0], 2)


def _fake_cg(b: Tensor, damping: float, steps: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(b), torch.empty_like(state), torch.empty((), dtype=torch.int64, device=b.device)


neumann_step_ = Op(
    "neumann_step_(Tensor(a!)[] v, Tensor(b!)[] p, Tensor[] hv, Tensor(c!) stats, float alpha, float damping=0.0)"
    " -> ()",
    reference=reference.neumann_step_,
    fake=_fake_in_place,
    device_of=3,
)

cg_step_ = Op(
    "cg_step_(Tensor(a!)[] x, Tensor(b!)[] r, Tensor(c!)[] p, Tensor[] hp, Tensor(d!) state, float damping=0.0) -> ()",
    reference=reference.cg_step_,
    fake=_fake_in_place,
    device_of=4,
)

pcg_step_ = Op(
    "pcg_step_(Tensor(a!)[] x, Tensor(b!)[] r, Tensor(c!)[] p, Tensor[] hp, Tensor[] m, Tensor(d!) state,"
    " float damping=0.0) -> ()",
    reference=reference.pcg_step_,
    fake=_fake_in_place,
    device_of=5,
)

richardson_step_ = Op(
    "richardson_step_(Tensor(a!)[] x, Tensor[] hx, Tensor[] b, Tensor[] m, Tensor(b!) stats, float alpha,"
    " float damping=0.0) -> ()",
    reference=reference.richardson_step_,
    fake=_fake_in_place,
    device_of=4,
)

chebyshev_step_ = Op(
    "chebyshev_step_(Tensor(a!)[] x_old, Tensor[] x, Tensor[] hx, Tensor[] b, Tensor[] m, Tensor(b!) stats,"
    " float alpha, float momentum, float damping=0.0) -> ()",
    reference=reference.chebyshev_step_,
    fake=_fake_in_place,
    device_of=5,
)

minres_step_ = Op(
    "minres_step_(Tensor(a!)[] x, Tensor[] v, Tensor(b!)[] v_old, Tensor[] w, Tensor(c!)[] w_old, Tensor[] hv,"
    " Tensor(d!) state, float damping=0.0) -> ()",
    reference=reference_minres.minres_step_,
    fake=_fake_in_place,
    device_of=6,
)

glm_hvp = Op(
    f"glm_hvp({_GLM.format('v')}) -> Tensor",
    reference=reference.glm_hvp,
    fake=lambda x, weights, v, l2, scale, intercept: torch.empty_like(v),
    device_of=2,
)

glm_gram = Op(
    "glm_gram(Tensor x, Tensor weights) -> Tensor",
    reference=reference.glm_gram,
    fake=lambda x, weights: x.new_empty(weights.shape[1], x.shape[1], x.shape[1]),
    device_of=0,
    native=("cpp",),
)

glm_neumann_solve = Op(
    f"glm_neumann_solve({_GLM.format('b')}, {_NEUMANN}",
    reference=reference.glm_neumann_solve,
    fake=lambda x, weights, b, l2, scale, intercept, *solve: _fake_neumann(b, *solve),
    device_of=2,
)

glm_cg_solve = Op(
    f"glm_cg_solve({_GLM.format('b')}, {_CG}",
    reference=reference.glm_cg_solve,
    fake=lambda x, weights, b, l2, scale, intercept, *solve: _fake_cg(b, *solve),
    device_of=2,
)

softmax_hessian = Op(
    "softmax_hessian(Tensor logits, Tensor u, float scale, Tensor? weights=None) -> Tensor",
    reference=reference.softmax_hessian,
    fake=lambda logits, u, scale, weights=None: torch.empty_like(u, memory_format=torch.contiguous_format),
    device_of=1,
)

softmax_hessian_ = Op(
    "softmax_hessian_(Tensor logits, Tensor(a!) u, float scale, Tensor? weights=None) -> ()",
    reference=reference.softmax_hessian_,
    fake=_fake_in_place,
    device_of=1,
)

mlp_hvp = Op(
    f"mlp_hvp({_MLP.format('v')}) -> Tensor",
    reference=reference_mlp.mlp_hvp,
    fake=lambda weights, hidden, slopes, bends, deltas, probabilities, v, scale, biases, l2: torch.empty_like(v),
    device_of=6,
)

mlp_neumann_solve = Op(
    f"mlp_neumann_solve({_MLP.format('b')}, {_NEUMANN}",
    reference=reference_mlp.mlp_neumann_solve,
    fake=lambda weights, hidden, slopes, bends, deltas, probabilities, b, scale, biases, l2, *solve: _fake_neumann(
        b, *solve
    ),
    device_of=6,
    native=("cpp",),
)

mlp_cg_solve = Op(
    f"mlp_cg_solve({_MLP.format('b')}, {_CG}",
    reference=reference_mlp.mlp_cg_solve,
    fake=lambda weights, hidden, slopes, bends, deltas, probabilities, b, scale, biases, l2, *solve: _fake_cg(
        b, *solve
    ),
    device_of=6,
    native=("cpp",),
)

dense_neumann_solve = Op(
    f"dense_neumann_solve(Tensor matrix, Tensor b, {_NEUMANN}",
    reference=reference.dense_neumann_solve,
    fake=lambda matrix, b, *solve: _fake_neumann(b, *solve),
    device_of=1,
    native=("cpp",),
)

dense_cg_solve = Op(
    f"dense_cg_solve(Tensor matrix, Tensor b, {_CG}",
    reference=reference.dense_cg_solve,
    fake=lambda matrix, b, *solve: _fake_cg(b, *solve),
    device_of=1,
    native=("cpp",),
)

lstm_cell = Op(
    "lstm_cell(Tensor gates, Tensor c) -> (Tensor, Tensor, Tensor)",
    reference=reference_lstm.lstm_cell,
    fake=lambda gates, c: (_fresh(c), _fresh(c), _fresh(gates)),
    device_of=1,
)

lstm_cell_backward = Op(
    "lstm_cell_backward(Tensor activations, Tensor c, Tensor c_next, Tensor grad_h, Tensor grad_c,"
    " Tensor? grad_activations=None) -> (Tensor, Tensor)",
    reference=reference_lstm.lstm_cell_backward,
    fake=lambda activations, c, *rest: (_fresh(activations), _fresh(c)),
    device_of=1,
)

lstm_cell_double_backward = Op(
    "lstm_cell_double_backward(Tensor activations, Tensor c, Tensor c_next, Tensor grad_h, Tensor grad_c,"
    " Tensor v_gates, Tensor v_c) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_lstm.lstm_cell_double_backward,
    fake=lambda activations, c, *rest: (_fresh(activations), *(_fresh(c) for _ in range(4))),
    device_of=1,
)

lstm_layer = Op(
    "lstm_layer(Tensor x_gates, Tensor w_hh, Tensor h0, Tensor c0) -> (Tensor, Tensor, Tensor)",
    reference=reference_lstm.lstm_layer,
    fake=lambda x_gates, w_hh, h0, c0: (*(c0.new_empty(len(x_gates), *c0.shape) for _ in range(2)), _fresh(x_gates)),
    device_of=3,
)

lstm_layer_backward = Op(
    "lstm_layer_backward(Tensor activations, Tensor c, Tensor c0, Tensor w_hh, Tensor grad_h, Tensor? grad_c=None,"
    " Tensor? grad_activations=None) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_lstm.lstm_layer_backward,
    fake=lambda activations, c, c0, *rest: (_fresh(activations), _fresh(c0), _fresh(c), _fresh(c)),
    device_of=2,
)

lstm_layer_double_backward = Op(
    "lstm_layer_double_backward(Tensor activations, Tensor c, Tensor c0, Tensor w_hh, Tensor dh, Tensor dc,"
    " Tensor v_gates, Tensor v_h0, Tensor v_c0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_lstm.lstm_layer_double_backward,
    fake=lambda activations, c, c0, *rest: (_fresh(activations), _fresh(c), _fresh(c0), _fresh(c), _fresh(c)),
    device_of=2,
)

ALL = (
    neumann_step_,
    cg_step_,
    pcg_step_,
    richardson_step_,
    chebyshev_step_,
    minres_step_,
    glm_hvp,
    glm_gram,
    glm_neumann_solve,
    glm_cg_solve,
    softmax_hessian,
    softmax_hessian_,
    mlp_hvp,
    mlp_neumann_solve,
    mlp_cg_solve,
    dense_neumann_solve,
    dense_cg_solve,
    lstm_cell,
    lstm_cell_backward,
    lstm_cell_double_backward,
    lstm_layer,
    lstm_layer_backward,
    lstm_layer_double_backward,
)
