"""The fused Neumann step: one pass over the lists, then the norm."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypergrad_ext.kernels import lists


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def step_kernel(
    v,
    p,
    hv,
    v_stride,
    p_stride,
    hv_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    alpha: tl.float64,
    damping: tl.float64,
    BLOCK: tl.constexpr,
):
    """One program per block of one row: ``v``, ``p``, and the block's sum of squares and finite flag."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    v += row * v_stride + i
    p += row * p_stride + i
    hv += row * hv_stride + i
    dtype = v.dtype.element_ty

    old = tl.load(v, mask=inside, other=0)
    product = tl.load(hv, mask=inside, other=0).to(dtype)
    term = old - tl.full([], alpha, dtype) * (product + tl.full([], damping, dtype) * old)
    total = tl.load(p, mask=inside, other=0) + term
    tl.store(v, term, mask=inside)
    tl.store(p, total, mask=inside)

    # In float64, where the square of a float32 does not overflow. NaN and infinities minus themselves are not 0.
    wide = tl.where(inside, term, 0).to(tl.float64)
    partial += row * partial_stride + block * 2
    tl.store(partial, tl.sum(wide * wide))
    tl.store(partial + 1, tl.max((wide - wide != 0).to(tl.int32)).to(tl.float64))


def neumann_step_(
    v: Sequence[Tensor], p: Sequence[Tensor], hv: Sequence[Tensor], stats: Tensor, alpha: float, damping: float = 0.0
) -> None:
    """See `hypergrad_ext.reference.neumann_step_`."""
    out = lists.rows_of("stats", stats, 2)
    pieces = lists.cut(out.shape[0], v=v, p=p, hv=hv)
    partial = lists.partial_sums(pieces, out, 2)
    lists.run(step_kernel, pieces, partial, alpha, damping)
    squares, bad = partial.sum(1).unbind(1)
    out.copy_(torch.stack([squares, (bad > 0).double()], dim=1))
