"""Products with the Hessian of cross-entropy: one program per row and vector, probabilities never stored."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypergrad_ext.kernels import lists


@triton.jit(do_not_specialize=["k"])
def rows_kernel(
    logits,
    u,
    out,
    weights,
    logits_stride,
    u_stride,
    u_row_stride,
    out_stride,
    out_row_stride,
    k,
    classes,
    scale: tl.float64,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = scale weight p (u - <p, u>)`` for one row: the sums in one pass, online, the result in a second."""
    # The vectors of one row are neighbours: its logits come from memory once.
    program = tl.program_id(0).to(tl.int64)
    row, vector = program // k, program % k
    logits += row * logits_stride
    u += vector * u_stride + row * u_row_stride
    out += vector * out_stride + row * out_row_stride
    real = tl.float64 if u.dtype.element_ty == tl.float64 else tl.float32
    factor = tl.full([], scale, real)
    end = classes
    if WEIGHTED:
        weight = tl.load(weights + row)
        factor *= weight
        # A row of weight 0 is not read: its logits may be anything, NaN included.
        end = tl.where(weight == 0, 0, classes)

    largest = tl.full([], float("-inf"), real)
    total = tl.full([], 0, real)
    dot = tl.full([], 0, real)
    for begin in range(0, end, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < end
        x = tl.load(logits + i, mask=inside, other=float("-inf")).to(real)
        z = tl.load(u + i, mask=inside, other=0).to(real)
        next_largest = tl.maximum(largest, tl.max(x))
        # Before the first finite logit there is nothing to shift by: -inf minus -inf would be NaN.
        shift = tl.where(next_largest == float("-inf"), 0, next_largest)
        e = tl.exp(x - shift)
        shrink = tl.exp(largest - shift)
        total = total * shrink + tl.sum(e)
        dot = dot * shrink + tl.sum(e * z)
        largest = next_largest

    mean = dot / total
    factor /= total
    for begin in range(0, classes, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < end
        x = tl.load(logits + i, mask=inside, other=float("-inf")).to(real)
        z = tl.load(u + i, mask=inside, other=0).to(real)
        result = tl.where(end > 0, factor * tl.exp(x - largest) * (z - mean), 0)
        tl.store(out + i, result.to(out.dtype.element_ty), mask=i < classes)


def launch_parameters(classes: int) -> dict[str, int]:
    """Block size and warps for rows of so many classes."""
    if lists.INTERPRETED:  # Time goes by programs and blocks, whatever their size.
        return {"BLOCK": min(triton.next_power_of_2(classes), 65536)}
    if classes <= 128:
        return {"BLOCK": 128, "num_warps": 1}
    return {"BLOCK": 1024, "num_warps": 4} if classes <= 1024 else {"BLOCK": 2048, "num_warps": 8}


def softmax_hessian(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> Tensor:
    """See `hypergrad_ext.reference.softmax_hessian`."""
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    _launch(logits, u, out, scale, weights)
    return out


def softmax_hessian_(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> None:
    """See `hypergrad_ext.reference.softmax_hessian_`."""
    _launch(logits, u, u, scale, weights)


def _launch(logits: Tensor, u: Tensor, out: Tensor, scale: float, weights: Tensor | None) -> None:
    if logits.dim() != 2 or u.dim() not in (2, 3) or u.shape[-2:] != logits.shape:
        expected = "(rows, classes) or (k, rows, classes), like logits of (rows, classes)"
        raise ValueError(f"u must have shape {expected}, got {tuple(u.shape)} and {tuple(logits.shape)}")
    if u.dtype != logits.dtype or not u.is_floating_point():
        raise TypeError(f"logits and u must be of one floating dtype, got {logits.dtype} and {u.dtype}")
    rows, classes = logits.shape
    for name, t in (("logits", logits), ("u", u)):
        if classes > 1 and t.stride(-1) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {t.stride()}")
    if weights is not None:
        if weights.shape != (rows,):
            raise ValueError(f"weights must have shape ({rows},), got {tuple(weights.shape)}")
        weights = weights.to(torch.promote_types(u.dtype, torch.float32)).contiguous()
    if u.numel() == 0:
        return
    u3, out3 = (t if t.dim() == 3 else t[None] for t in (u, out))
    strides = (logits.stride(0), *u3.stride()[:2], *out3.stride()[:2])
    with lists.on_device_of(u):
        rows_kernel[(rows * len(u3),)](
            *(logits, u, out, u if weights is None else weights, *strides, len(u3), classes, scale),
            WEIGHTED=weights is not None,
            **launch_parameters(classes),
        )
