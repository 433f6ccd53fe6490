"""Triton kernels, one module per op, and whether they can run here.

An op's module, and with it triton, is imported when the op is first called.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def unavailable(device_type: str) -> str:
    """Why Triton kernels cannot run on ``device_type``; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device_type != "cuda":
        return f"triton kernels run on CUDA devices, not {device_type} (TRITON_INTERPRET=1 emulates them)"
    return ""


def neumann_step_(
    v: Sequence[Tensor], p: Sequence[Tensor], hv: Sequence[Tensor], stats: Tensor, alpha: float, damping: float = 0.0
) -> None:
    """See `hypergrad_ext.reference.neumann_step_`."""
    from hypergrad_ext.kernels import neumann_step

    neumann_step.neumann_step_(v, p, hv, stats, alpha, damping)


def cg_step_(
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    p: Sequence[Tensor],
    hp: Sequence[Tensor],
    state: Tensor,
    damping: float = 0.0,
) -> None:
    """See `hypergrad_ext.reference.cg_step_`."""
    from hypergrad_ext.kernels import cg_step

    cg_step.cg_step_(x, r, p, hp, state, damping)


def pcg_step_(
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    p: Sequence[Tensor],
    hp: Sequence[Tensor],
    m: Sequence[Tensor],
    state: Tensor,
    damping: float = 0.0,
) -> None:
    """See `hypergrad_ext.reference.pcg_step_`."""
    from hypergrad_ext.kernels import cg_step

    cg_step.pcg_step_(x, r, p, hp, m, state, damping)


def richardson_step_(
    x: Sequence[Tensor],
    hx: Sequence[Tensor],
    b: Sequence[Tensor],
    m: Sequence[Tensor],
    stats: Tensor,
    alpha: float,
    damping: float = 0.0,
) -> None:
    """See `hypergrad_ext.reference.richardson_step_`."""
    from hypergrad_ext.kernels import richardson_step

    richardson_step.richardson_step_(x, hx, b, m, stats, alpha, damping)


def chebyshev_step_(
    x_old: Sequence[Tensor],
    x: Sequence[Tensor],
    hx: Sequence[Tensor],
    b: Sequence[Tensor],
    m: Sequence[Tensor],
    stats: Tensor,
    alpha: float,
    momentum: float,
    damping: float = 0.0,
) -> None:
    """See `hypergrad_ext.reference.chebyshev_step_`."""
    from hypergrad_ext.kernels import chebyshev_step

    chebyshev_step.chebyshev_step_(x_old, x, hx, b, m, stats, alpha, momentum, damping)


def minres_step_(
    x: Sequence[Tensor],
    v: Sequence[Tensor],
    v_old: Sequence[Tensor],
    w: Sequence[Tensor],
    w_old: Sequence[Tensor],
    hv: Sequence[Tensor],
    state: Tensor,
    damping: float = 0.0,
) -> None:
    """See `hypergrad_ext.reference_minres.minres_step_`."""
    from hypergrad_ext.kernels import minres_step

    minres_step.minres_step_(x, v, v_old, w, w_old, hv, state, damping)


def softmax_hessian(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> Tensor:
    """See `hypergrad_ext.reference.softmax_hessian`."""
    from hypergrad_ext.kernels import softmax

    return softmax.softmax_hessian(logits, u, scale, weights)


def softmax_hessian_(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> None:
    """See `hypergrad_ext.reference.softmax_hessian_`."""
    from hypergrad_ext.kernels import softmax

    softmax.softmax_hessian_(logits, u, scale, weights)


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_cell`."""
    from hypergrad_ext.kernels import lstm

    return lstm.lstm_cell(gates, c)


def lstm_cell_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_cell_backward`."""
    from hypergrad_ext.kernels import lstm

    return lstm.lstm_cell_backward(*args)


def lstm_cell_double_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_cell_double_backward`."""
    from hypergrad_ext.kernels import lstm

    return lstm.lstm_cell_double_backward(*args)


def lstm_layer(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_layer`."""
    from hypergrad_ext.kernels import lstm

    return lstm.lstm_layer(*args)


def lstm_layer_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_layer_backward`."""
    from hypergrad_ext.kernels import lstm

    return lstm.lstm_layer_backward(*args)


def lstm_layer_double_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_layer_double_backward`."""
    from hypergrad_ext.kernels import lstm

    return lstm.lstm_layer_double_backward(*args)


def mlp_hvp(
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
    deltas: Sequence[Tensor],
    probabilities: Tensor | None,
    v: Tensor,
    scale: float,
    biases: bool,
    l2: float,
) -> Tensor:
    """See `hypergrad_ext.reference_mlp.mlp_hvp`."""
    from hypergrad_ext.kernels import mlp

    return mlp.mlp_hvp(weights, hidden, slopes, bends, deltas, probabilities, v, scale, biases, l2)


def glm_hvp(x: Tensor, weights: Tensor, v: Tensor, l2: Tensor | None, scale: float, intercept: bool) -> Tensor:
    """See `hypergrad_ext.reference.glm_hvp`."""
    from hypergrad_ext.kernels import glm

    return glm.glm_hvp(x, weights, v, l2, scale, intercept)
