"""The fused Chebyshev step: one pass over the lists, then the sums."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from hypergrad_ext.kernels import lists
from hypergrad_ext.kernels.richardson_step import store_residual_sums
from torch import Tensor


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def step_kernel(
    x_old,
    x,
    b,
    m,
    hx,
    x_old_stride,
    x_stride,
    b_stride,
    m_stride,
    hx_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    alpha: tl.float64,
    momentum: tl.float64,
    damping: tl.float64,
    PRECONDITIONED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of one row: the new solution over ``x_old``, and the block's sums."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    x_old += row * x_old_stride + i
    dtype = x_old.dtype.element_ty

    solution = tl.load(x + row * x_stride + i, mask=inside, other=0)
    product = tl.load(hx + row * hx_stride + i, mask=inside, other=0).to(dtype)
    rhs = tl.load(b + row * b_stride + i, mask=inside, other=0)
    residual = rhs - (product + tl.full([], damping, dtype) * solution)
    z = residual
    if PRECONDITIONED:
        z *= tl.load(m + row * m_stride + i, mask=inside, other=0)
    moved = solution - tl.load(x_old, mask=inside, other=0)
    new = solution + (tl.full([], momentum, dtype) * moved + tl.full([], alpha, dtype) * z)
    tl.store(x_old, new, mask=inside)
    store_residual_sums(partial + row * partial_stride + block * 3, residual, z, new, inside)


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
    out = lists.rows_of("stats", stats, 3)
    # Without preconditioner the kernel does not look at m.
    diagonal = lists.for_all_rows(m, len(out)) if m else b
    pieces = lists.cut(len(out), constants=("x", "b", "m"), x_old=x_old, x=x, b=b, m=diagonal, hx=hx)
    partial = lists.partial_sums(pieces, out, 3)
    lists.run(step_kernel, pieces, partial, alpha, momentum, damping, bool(m))
    lists.fill_residual_stats(out, partial)
