"""One iteration of MINRES in two passes, and one for rows that stop; the scalars never leave the device."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from hypergrad_ext.kernels import lists
from torch import Tensor

from hypergrad_ext.reference_minres import COLUMNS, Scalars


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def dot_kernel(
    v,
    hv,
    v_stride,
    hv_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    live,
    damping: tl.float64,
    BLOCK: tl.constexpr,
):
    """Partial sums of v.Hv, with damping in Hv."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(tl.load(live + row) != 0, numel, 0)
    dtype = v.dtype.element_ty
    vector = tl.load(v + row * v_stride + i, mask=inside, other=0)
    product = tl.load(hv + row * hv_stride + i, mask=inside, other=0).to(dtype)
    product = (product + tl.full([], damping, dtype) * vector).to(tl.float64)
    tl.store(partial + row * partial_stride + block, tl.sum(vector.to(tl.float64) * product))


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def vectors_kernel(
    x,
    v,
    v_old,
    w,
    w_old,
    hv,
    x_stride,
    v_stride,
    v_old_stride,
    w_stride,
    w_old_stride,
    hv_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    live,
    factors,
    damping: tl.float64,
    BLOCK: tl.constexpr,
):
    """``x``, the next Lanczos vector over ``v_old``, the next direction over ``w_old``, and its squared norm."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(tl.load(live + row) != 0, numel, 0)
    dtype = x.dtype.element_ty
    factors += row * 7
    x += row * x_stride + i
    v_old += row * v_old_stride + i
    w_old += row * w_old_stride + i

    vector = tl.load(v + row * v_stride + i, mask=inside, other=0)
    direction = tl.load(w + row * w_stride + i, mask=inside, other=0)
    tl.store(x, tl.load(x, mask=inside, other=0) + tl.load(factors + 6).to(dtype) * direction, mask=inside)

    new = tl.load(factors + 3).to(dtype) * vector + tl.load(factors + 4).to(dtype) * direction
    new += tl.load(factors + 5).to(dtype) * tl.load(w_old, mask=inside, other=0)
    tl.store(w_old, new, mask=inside)

    product = tl.load(hv + row * hv_stride + i, mask=inside, other=0).to(dtype)
    product += tl.full([], damping, dtype) * vector
    new = tl.load(factors).to(dtype) * product + tl.load(factors + 1).to(dtype) * vector
    new += tl.load(factors + 2).to(dtype) * tl.load(v_old, mask=inside, other=0)
    tl.store(v_old, new, mask=inside)
    wide = tl.where(inside, new, 0).to(tl.float64)
    tl.store(partial + row * partial_stride + block, tl.sum(wide * wide))


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def close_kernel(
    x,
    w,
    x_stride,
    w_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    step,
    BLOCK: tl.constexpr,
):
    """``x <- x + step w`` in the rows where the step is not 0; takes no sums."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(step + row)
    inside = i < tl.where(factor != 0, numel, 0)
    x += row * x_stride + i
    direction = tl.load(w + row * w_stride + i, mask=inside, other=0)
    tl.store(x, tl.load(x, mask=inside, other=0) + factor.to(x.dtype.element_ty) * direction, mask=inside)


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
    scalars = Scalars(lists.rows_of("state", state, len(COLUMNS)))
    rows = len(scalars.state)
    pieces = lists.cut(rows, constants=("v", "w"), x=x, v=v, v_old=v_old, w=w, w_old=w_old, hv=hv)
    partial = lists.partial_sums(pieces, scalars.state, 1)
    live = scalars.running.double()
    lists.run(dot_kernel, [(piece[1], piece[5]) for piece in pieces], partial, live, damping)
    factors = torch.stack(scalars.lanczos(partial.sum(1).squeeze(1)), dim=1)
    live = scalars.running.double()
    lists.run(vectors_kernel, pieces, partial, live, factors, damping)
    scalars.rotation(partial.sum(1).squeeze(1), torch.finfo(x[0].dtype).eps if pieces else 0.0)
    step = torch.where(scalars.running, 0, scalars["step"])
    lists.run(close_kernel, [(piece[0], piece[4]) for piece in pieces], partial, step)
    scalars["step"].masked_fill_(step != 0, 0)
