"""Norms in float64: that of a float32 vector is finite exactly where all of it is, and zero only where all of it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad_ext import _native


def norms(flat: Tensor) -> Tensor:
    """Euclidean norm of a vector ``(n,)``, as ``()``, or of each of several ``(k, n)``, as ``(k,)``; float64."""
    compiled = _compiled((flat,))
    if compiled is not None:
        return compiled.norms([flat.detach()], None if flat.dim() == 1 else len(flat))
    return torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64)


def safe_norms(flat: Tensor) -> tuple[Tensor, list[float]]:
    """`norms` and the same as numbers, right also where squares of float64 overflow or vanish."""
    found = norms(flat)
    sizes: list[float] = found.reshape(-1).tolist()
    if flat.dtype == torch.float64 and flat.numel() and not all(1e-150 < size < 1e150 for size in sizes):
        largest = flat.abs().amax(-1)
        unit = torch.where((largest > 0) & largest.isfinite(), largest, 1)
        found = norms(flat / unit[..., None]) * unit
        sizes = found.reshape(-1).tolist()
    return found, sizes


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite; the device is asked once."""
    parts = [t.detach() for t in tensors]
    compiled = _compiled(parts)
    if compiled is not None and bool(compiled.norms(parts, None).isfinite()):
        return True
    # Squares of float64 may overflow where the elements are finite.
    return bool(torch.nn.utils.get_total_norm(parts, torch.inf).isfinite())


def finite_rows(flat: Tensor, sizes: list[float]) -> list[bool]:
    """For a vector or each of several, whether no element is NaN or infinite, given its `norms` as numbers."""
    known = [math.isfinite(size) for size in sizes]
    if flat.dtype == torch.float32 or all(known):
        return known
    rows: list[bool] = flat.isfinite().all(-1).reshape(-1).tolist()
    return rows


def power_of_two_scale(flat: Tensor, norm: Tensor | None = None) -> Tensor:
    """Power of two per row that brings its norm into [0.5, 1); 1 for a zero row. Exact to undo.

    With it, squares neither underflow nor overflow whatever the units of the loss.

    Args:
        flat: A vector or several.
        norm: Their `norms`, if known.

    Returns:
        Shape ``()`` or ``(k,)``, in the dtype of ``flat``.
    """
    size = norms(flat) if norm is None else norm
    scales = powers_of_two(flat, size.reshape(-1).tolist())
    return torch.tensor(scales, dtype=flat.dtype, device=flat.device).view(size.shape)


def powers_of_two(flat: Tensor, sizes: list[float]) -> list[float]:
    """`power_of_two_scale` as numbers, given the `norms` as numbers."""
    if flat.dtype == torch.float64 and not all(1e-150 < size < 1e150 for size in sizes):
        # Where squares are not to be trusted, by the largest magnitude.
        sizes = flat.abs().amax(-1).reshape(-1).tolist()
    limit = 1000 if flat.dtype == torch.float64 else 120
    return [2.0 ** -min(max(math.frexp(size)[1], -limit), limit) for size in sizes]


def _compiled(tensors: Sequence[Tensor]) -> Any | None:
    """The compiled module, if it takes them."""
    runs = (
        bool(tensors)
        and tensors[0].dtype in (torch.float32, torch.float64)
        and all(t.device.type == "cpu" and t.dtype == tensors[0].dtype and t.is_contiguous() for t in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
    )
    return _native._C if runs else None
