"""One iteration of conjugate gradients in three passes; the scalars in between never leave the device."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypergrad_ext.kernels import lists

# Values of the flag in column 3 of the state, as in csrc/update.h. The kernels see rows that are not
# running as empty.
RUNNING, CONVERGED, NON_POSITIVE_CURVATURE, BROKEN = 0.0, 1.0, 2.0, 3.0


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def dots_kernel(
    p,
    hp,
    p_stride,
    hp_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    state,
    damping: tl.float64,
    BLOCK: tl.constexpr,
):
    """Partial sums of p.Hp, p.p and Hp.Hp, with damping in Hp."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(tl.load(state + row * 4 + 3) == 0, numel, 0)
    dtype = p.dtype.element_ty

    direction = tl.load(p + row * p_stride + i, mask=inside, other=0)
    product = tl.load(hp + row * hp_stride + i, mask=inside, other=0).to(dtype)
    product = (product + tl.full([], damping, dtype) * direction).to(tl.float64)
    direction = direction.to(tl.float64)
    partial += row * partial_stride + block * 3
    tl.store(partial, tl.sum(direction * product))
    tl.store(partial + 1, tl.sum(direction * direction))
    tl.store(partial + 2, tl.sum(product * product))


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def advance_kernel(
    x,
    r,
    p,
    hp,
    x_stride,
    r_stride,
    p_stride,
    hp_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    state,
    alpha,
    damping: tl.float64,
    BLOCK: tl.constexpr,
):
    """``x <- x + alpha p``, ``r <- r - alpha (Hp + damping p)``, and partial sums of r.r."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(tl.load(state + row * 4 + 3) == 0, numel, 0)
    dtype = x.dtype.element_ty
    step = tl.load(alpha + row).to(dtype)
    x += row * x_stride + i
    r += row * r_stride + i

    direction = tl.load(p + row * p_stride + i, mask=inside, other=0)
    product = tl.load(hp + row * hp_stride + i, mask=inside, other=0).to(dtype)
    solution = tl.load(x, mask=inside, other=0) + step * direction
    residual = tl.load(r, mask=inside, other=0) - step * (product + tl.full([], damping, dtype) * direction)
    tl.store(x, solution, mask=inside)
    tl.store(r, residual, mask=inside)
    wide = tl.where(inside, residual, 0).to(tl.float64)
    tl.store(partial + row * partial_stride + block, tl.sum(wide * wide))


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def direction_kernel(
    r,
    p,
    r_stride,
    p_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    state,
    beta,
    BLOCK: tl.constexpr,
):
    """``p <- r + beta p``; takes no sums."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(tl.load(state + row * 4 + 3) == 0, numel, 0)
    factor = tl.load(beta + row).to(p.dtype.element_ty)
    p += row * p_stride + i
    residual = tl.load(r + row * r_stride + i, mask=inside, other=0)
    direction = tl.load(p, mask=inside, other=0)
    tl.store(p, residual + factor * direction, mask=inside)


def step_length(state: Tensor, dots: Tensor, eps: float) -> Tensor:
    """The step length of every row, and the flag where there is none: ``CgScalars::step_length`` in torch ops."""
    residual, _, curvature, flag = state.unbind(1)
    php, pp, hphp = dots.unbind(1)
    running = flag == RUNNING
    broken = running & ~php.isfinite()
    rounding = torch.where(hphp.isfinite(), eps * pp.sqrt() * hphp.sqrt(), 0)
    flat = running & ~broken & (php <= rounding)
    curvature.copy_(torch.where(running & ~broken, torch.where(pp > 0, php / pp, 0), curvature))
    flag.masked_fill_(broken, BROKEN).masked_fill_(flat, NON_POSITIVE_CURVATURE)
    return residual / php


def conjugation(state: Tensor, rr: Tensor) -> Tensor:
    """The conjugation factor of every row, and the flag where the solve is over: ``CgScalars::conjugation``."""
    residual, stop, _, flag = state.unbind(1)
    running = flag == RUNNING
    beta = rr / residual
    residual.copy_(torch.where(running, rr, residual))
    flag.masked_fill_(running & ~rr.isfinite(), BROKEN).masked_fill_(running & (rr <= stop), CONVERGED)
    return beta


def cg_step_(
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    p: Sequence[Tensor],
    hp: Sequence[Tensor],
    state: Tensor,
    damping: float = 0.0,
) -> None:
    """See `hypergrad_ext.reference.cg_step_`."""
    scalars = lists.rows_of("state", state, 4)
    pieces = lists.cut(scalars.shape[0], x=x, r=r, p=p, hp=hp)
    eps = torch.finfo(x[0].dtype).eps if pieces else 0.0
    partial = lists.partial_sums(pieces, scalars, 3)
    lists.run(dots_kernel, [(p_i, hp_i) for _, _, p_i, hp_i in pieces], partial, scalars, damping)
    alpha = step_length(scalars, partial.sum(1), eps)
    partial = lists.partial_sums(pieces, scalars, 1)
    lists.run(advance_kernel, pieces, partial, scalars, alpha, damping)
    beta = conjugation(scalars, partial.sum(1).squeeze(1))
    lists.run(direction_kernel, [(r_i, p_i) for _, r_i, p_i, _ in pieces], partial, scalars, beta)
