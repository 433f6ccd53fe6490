"""The fused Richardson step: one pass over the lists, then the sums."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from hypergrad_ext.kernels import lists
from torch import Tensor


@triton.jit
def store_residual_sums(partial, residual, z, solution, inside):
    """A block's r.r, r.z and whether any element of the new solution is not finite."""
    # In float64, where the square of a float32 does not overflow. NaN and infinities minus themselves are not 0.
    wide = tl.where(inside, residual, 0).to(tl.float64)
    solution = tl.where(inside, solution, 0)
    tl.store(partial, tl.sum(wide * wide))
    tl.store(partial + 1, tl.max((solution - solution != 0).to(tl.int32)).to(tl.float64))
    tl.store(partial + 2, tl.sum(wide * tl.where(inside, z, 0).to(tl.float64)))


@triton.jit(do_not_specialize=["blocks", "partial", "partial_stride"])
def step_kernel(
    x,
    b,
    m,
    hx,
    x_stride,
    b_stride,
    m_stride,
    hx_stride,
    numel,
    blocks,
    partial,
    partial_stride,
    alpha: tl.float64,
    damping: tl.float64,
    PRECONDITIONED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of one row: ``x``, and the block's sums."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    x += row * x_stride + i
    dtype = x.dtype.element_ty

    old = tl.load(x, mask=inside, other=0)
    product = tl.load(hx + row * hx_stride + i, mask=inside, other=0).to(dtype)
    rhs = tl.load(b + row * b_stride + i, mask=inside, other=0)
    residual = rhs - (product + tl.full([], damping, dtype) * old)
    z = residual
    if PRECONDITIONED:
        z *= tl.load(m + row * m_stride + i, mask=inside, other=0)
    new = old + tl.full([], alpha, dtype) * z
    tl.store(x, new, mask=inside)
    store_residual_sums(partial + row * partial_stride + block * 3, residual, z, new, inside)


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
    out = lists.rows_of("stats", stats, 3)
    # Without preconditioner the kernel does not look at m.
    diagonal = lists.for_all_rows(m, len(out)) if m else b
    pieces = lists.cut(len(out), constants=("b", "m"), x=x, b=b, m=diagonal, hx=hx)
    partial = lists.partial_sums(pieces, out, 3)
    lists.run(step_kernel, pieces, partial, alpha, damping, bool(m))
    lists.fill_residual_stats(out, partial)
