"""Hessian-vector products of generalised linear models: a block of rows of X serves both products while in cache."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from hypergrad_ext.kernels import lists
from torch import Tensor

from hypergrad_ext import reference

# Columns of Z that one program has in registers; models with more classes are two matrix products.
MOST_COLUMNS = 32
# Programs per group of columns: a few per multiprocessor of the largest GPUs.
PROGRAMS = 528


@triton.jit(do_not_specialize=["n", "columns", "blocks"])
def rows_kernel(
    x,
    weights,
    v,
    partial,
    n,
    d,
    x_stride,
    columns,
    blocks,
    group_stride,
    column_stride,
    bias_begin,
    bias_stride,
    partial_stride,
    SOFTMAX: tl.constexpr,
    INTERCEPT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Every ``programs``-th block of rows of one group of columns: ``X^T D (X V)`` added to the program's own sums.

    Column c of group g starts at ``v + g group_stride + c column_stride``, its bias at
    ``v + g group_stride + bias_begin + c bias_stride``; the sums are laid out likewise.
    """
    program, programs, group = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    real = v.dtype.element_ty
    v += group * group_stride
    partial += program * partial_stride + group * group_stride
    c = tl.arange(0, COLUMNS)
    # The last group of a diagonal D may have fewer columns.
    in_column = c < (columns if SOFTMAX else columns - group * COLUMNS)
    column = c.to(tl.int64) * column_stride
    bias = bias_begin + c.to(tl.int64) * bias_stride

    for block in range(program, blocks, programs):
        row = block * ROWS + tl.arange(0, ROWS)
        in_row = row < n
        z = tl.zeros((ROWS, COLUMNS), real)
        if INTERCEPT:
            z += tl.load(v + bias, mask=in_column, other=0)[None, :]
        for begin in range(0, d, CHUNK):
            j = begin + tl.arange(0, CHUNK)
            inside = in_row[:, None] & (j < d)[None, :]
            xs = tl.load(x + row[:, None] * x_stride + j[None, :], mask=inside, other=0).to(real)
            vs = tl.load(v + column[:, None] + j[None, :], mask=in_column[:, None] & (j < d)[None, :], other=0)
            if COLUMNS == 1:
                z += tl.sum(xs * vs, 1)[:, None]
            else:
                z = tl.dot(xs, tl.trans(vs), z, input_precision="ieee", out_dtype=real)
        if SOFTMAX:
            at = weights + row[:, None] * columns + c[None, :]
            p = tl.load(at, mask=in_row[:, None] & in_column[None, :], other=0)
            z = p * (z - tl.sum(p * z, 1)[:, None])
        else:
            z *= tl.load(weights + row, mask=in_row, other=0)[:, None]

        first = block == program
        for begin in range(0, d, CHUNK):
            j = begin + tl.arange(0, CHUNK)
            inside = in_row[:, None] & (j < d)[None, :]
            xs = tl.load(x + row[:, None] * x_stride + j[None, :], mask=inside, other=0).to(real)
            to = partial + column[:, None] + j[None, :]
            inside = in_column[:, None] & (j < d)[None, :]
            g = tl.load(to, mask=inside & (not first), other=0)
            if COLUMNS == 1:
                g += tl.sum(z * xs, 0)[None, :]
            else:
                g = tl.dot(tl.trans(z), xs, g, input_precision="ieee", out_dtype=real)
            tl.store(to, g, mask=inside)
        if INTERCEPT:
            g_bias = tl.load(partial + bias, mask=in_column & (not first), other=0) + tl.sum(z, 0)
            tl.store(partial + bias, g_bias, mask=in_column)


def launch_parameters(n: int, columns: int) -> dict[str, int]:
    """Columns per group, rows per block, elements of a row at a time, and warps."""
    # A matrix product has at least 16 rows and columns; a single column takes plain sums.
    padded = 1 if columns == 1 else max(16, triton.next_power_of_2(columns))
    if lists.INTERPRETED:  # Time goes by programs, whatever their size.
        return {"COLUMNS": padded, "ROWS": max(16, triton.next_power_of_2(n)), "CHUNK": 512}
    # More elements of a matrix product at a time do not fit in registers: exact products are not for tensor cores.
    return {"COLUMNS": padded, "ROWS": 32, "CHUNK": 128 if padded == 1 else 16, "num_warps": 4}


def glm_hvp(x: Tensor, weights: Tensor, v: Tensor, l2: Tensor | None, scale: float, intercept: bool) -> Tensor:
    """See `hypergrad_ext.reference.glm_hvp`."""
    classes = _classes(x, weights, v, l2, intercept)
    (n, d), k = x.shape, v.shape[0]
    if classes > MOST_COLUMNS:
        return reference.glm_hvp(x, weights, v, l2, scale, intercept)
    softmax = classes > 1
    columns = classes if softmax else k
    parameters = launch_parameters(n, min(columns, MOST_COLUMNS))
    width, size = parameters["COLUMNS"], v.shape[1]
    blocks = triton.cdiv(n, parameters["ROWS"])
    programs = min(blocks, PROGRAMS)
    out = torch.zeros_like(v) if l2 is None else l2.reshape(-1) * v
    if programs == 0 or v.numel() == 0:
        return out
    partial = v.new_empty(programs, k, size)
    groups, group_stride = (k, size) if softmax else (triton.cdiv(k, width), width * size)
    column_stride, bias_stride = (d, 1) if softmax else (size, size)
    with lists.on_device_of(v):
        rows_kernel[(programs, groups)](
            x,
            weights,
            v,
            partial,
            n,
            d,
            x.stride(0),
            columns,
            blocks,
            group_stride,
            column_stride,
            classes * d,
            bias_stride,
            partial.stride(0),
            SOFTMAX=softmax,
            INTERCEPT=intercept,
            **parameters,
        )
    return out.add_(partial.sum(0), alpha=scale)


def _classes(x: Tensor, weights: Tensor, v: Tensor, l2: Tensor | None, intercept: bool) -> int:
    """Number of classes; raises where the kernel would read what is not there."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise TypeError(f"x must be float64, float32 or bfloat16, got {x.dtype}")
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"x must have shape (n, d) with contiguous rows, got {tuple(x.shape)}, strides {x.stride()}")
    n, d = x.shape
    if weights.dim() not in (1, 2) or weights.shape[0] != n or not weights.is_contiguous():
        raise ValueError(f"weights must be contiguous with shape ({n},) or ({n}, classes), got {tuple(weights.shape)}")
    classes = weights.shape[1] if weights.dim() == 2 else 1
    if weights.dim() == 2 and classes < 2:
        raise ValueError(f"weights must have at least 2 classes, got {classes}")
    size = classes * (d + intercept)
    if v.dim() != 2 or v.shape[1] != size or not v.is_contiguous():
        raise ValueError(f"v must be contiguous with shape (k, {size}), got {tuple(v.shape)}")
    if weights.dtype != real or v.dtype != real or (l2 is not None and l2.dtype != real):
        raise TypeError(f"weights, v and l2 must be {real} beside x of {x.dtype}, got {weights.dtype} and {v.dtype}")
    if l2 is not None and l2.numel() != size:
        raise ValueError(f"l2 must be like one row of v: {size} elements, got {tuple(l2.shape)}")
    if len({t.device for t in (x, weights, v)} | ({l2.device} if l2 is not None else set())) > 1:
        raise ValueError(f"x, weights, v and l2 must be on one device, got {x.device}, {weights.device}, {v.device}")
    return classes
