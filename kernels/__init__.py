"""Triton kernels, one module per op, and whether they can run here.

An op's module, and with it triton, is imported when the op is first called.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

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


def softmax_hessian(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> Tensor:
    """See `hypergrad_ext.reference.softmax_hessian`."""
    from hypergrad_ext.kernels import softmax

    return softmax.softmax_hessian(logits, u, scale, weights)


def softmax_hessian_(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> None:
    """See `hypergrad_ext.reference.softmax_hessian_`."""
    from hypergrad_ext.kernels import softmax

    softmax.softmax_hessian_(logits, u, scale, weights)


def glm_hvp(x: Tensor, weights: Tensor, v: Tensor, l2: Tensor | None, scale: float, intercept: bool) -> Tensor:
    """See `hypergrad_ext.reference.glm_hvp`."""
    from hypergrad_ext.kernels import glm

    return glm.glm_hvp(x, weights, v, l2, scale, intercept)
