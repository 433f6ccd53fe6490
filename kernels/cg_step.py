"""One iteration of conjugate gradients in three passes; the scalars in between never leave the device."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from hypergrad_ext.kernels import lists
from torch import Tensor

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
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of p.Hp, p.p and Hp.Hp, with damping in Hp."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(tl.load(state + row * COLUMNS + 3) == 0, numel, 0)
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
    m,
    hp,
    x_stride,
    r_stride,
    p_stride,
    m_stride,
    hp_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    state,
    alpha,
    damping: tl.float64,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``x <- x + alpha p``, ``r <- r - alpha (Hp + damping p)``, and partial sums of r.r and, if M is there, r.Mr."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(tl.load(state + row * COLUMNS + 3) == 0, numel, 0)
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
    partial += row * partial_stride + block * (COLUMNS - 3)
    tl.store(partial, tl.sum(wide * wide))
    if COLUMNS == 5:
        z = tl.load(m + row * m_stride + i, mask=inside, other=0) * residual
        tl.store(partial + 1, tl.sum(tl.where(inside, z, 0).to(tl.float64) * wide))


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def direction_kernel(
    r,
    p,
    m,
    r_stride,
    p_stride,
    m_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    state,
    beta,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``p <- M r + beta p``; takes no sums."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(tl.load(state + row * COLUMNS + 3) == 0, numel, 0)
    factor = tl.load(beta + row).to(p.dtype.element_ty)
    p += row * p_stride + i
    z = tl.load(r + row * r_stride + i, mask=inside, other=0)
    if COLUMNS == 5:
        z *= tl.load(m + row * m_stride + i, mask=inside, other=0)
    tl.store(p, z + factor * tl.load(p, mask=inside, other=0), mask=inside)


def step_length(state: Tensor, dots: Tensor, eps: float) -> Tensor:
    """The step length of every row, and the flag where there is none: ``CgScalars::step_length`` in torch ops."""
    curvature, flag = state[:, 2], state[:, 3]
    php, pp, hphp = dots.unbind(1)
    running = flag == RUNNING
    broken = running & ~php.isfinite()
    rounding = torch.where((pp + hphp).isfinite(), eps * pp.sqrt() * hphp.sqrt(), 0)
    flat = running & ~broken & (php <= rounding)
    curvature.copy_(torch.where(running & ~broken, torch.where(pp > 0, php / pp, 0), curvature))
    flag.masked_fill_(broken, BROKEN).masked_fill_(flat, NON_POSITIVE_CURVATURE)
    return state[:, _energy(state)] / php


def conjugation(state: Tensor, squares: Tensor) -> Tensor:
    """The conjugation factor of every row, and the flag where the solve is over: ``CgScalars::conjugation``."""
    residual, stop, flag, energy = state[:, 0], state[:, 1], state[:, 3], state[:, _energy(state)]
    rr, rz = squares[:, 0], squares[:, -1]
    running = flag == RUNNING
    beta = rz / energy
    residual.copy_(torch.where(running, rr, residual))
    energy.copy_(torch.where(running, rz, energy))
    flag.masked_fill_(running & (rz <= 0), NON_POSITIVE_CURVATURE).masked_fill_(running & (rr <= stop), CONVERGED)
    flag.masked_fill_(running & ~(rr.isfinite() & rz.isfinite()), BROKEN)
    return beta


def _energy(state: Tensor) -> int:
    """The column of r.Mr; without preconditioner that is r.r."""
    return 4 if state.shape[1] == 5 else 0


def cg_step_(
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    p: Sequence[Tensor],
    hp: Sequence[Tensor],
    state: Tensor,
    damping: float = 0.0,
) -> None:
    """See `hypergrad_ext.reference.cg_step_`."""
    # Without preconditioner the kernels do not look at m.
    _iterate(x, r, p, r, hp, lists.rows_of("state", state, 4), damping)


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
    scalars = lists.rows_of("state", state, 5)
    _iterate(x, r, p, lists.for_all_rows(m, len(scalars)), hp, scalars, damping)


def _iterate(
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    p: Sequence[Tensor],
    m: Sequence[Tensor],
    hp: Sequence[Tensor],
    state: Tensor,
    damping: float,
) -> None:
    rows, columns = state.shape
    pieces = lists.cut(rows, constants=("m",), x=x, r=r, p=p, m=m, hp=hp)
    eps = torch.finfo(x[0].dtype).eps if pieces else 0.0
    partial = lists.partial_sums(pieces, state, 3)
    lists.run(dots_kernel, [(piece[2], piece[4]) for piece in pieces], partial, state, damping, columns)
    alpha = step_length(state, partial.sum(1), eps)
    partial = lists.partial_sums(pieces, state, columns - 3)
    lists.run(advance_kernel, pieces, partial, state, alpha, damping, columns)
    beta = conjugation(state, partial.sum(1))
    lists.run(direction_kernel, [piece[1:4] for piece in pieces], partial, state, beta, columns)
