"""What all list kernels share: checks, cutting lists into common pieces, launch parameters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from hypergrad_ext import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Piece = tuple[Tensor, ...]


def rows_of(name: str, t: Tensor, columns: int) -> Tensor:
    """A view of the per-row scalars.

    Args:
        name: Name of the argument, for messages.
        t: Shape ``(columns,)`` or ``(k, columns)``.
        columns: Scalars per row.

    Returns:
        Shape ``(rows, columns)``.

    Raises:
        ValueError: If it has another shape or dtype than float64, or is not contiguous.
    """
    if t.dtype != torch.float64 or t.dim() not in (1, 2) or t.shape[-1] != columns or not t.is_contiguous():
        expected = f"float64, contiguous, of shape ({columns},) or (k, {columns})"
        raise ValueError(f"{name} must be {expected}, got {t.dtype} {tuple(t.shape)}")
    return t.view(-1, columns)


def cut(rows: int, *, constants: Sequence[str] = (), **lists: Sequence[Tensor]) -> list[Piece]:
    """Cut lists into pieces ``(rows, m)`` that are contiguous in each of them.

    Args:
        rows: Number of rows of every tensor.
        constants: Names of the lists that the kernel only reads.
        **lists: Lists of solver state, which must have one dtype, and at last a product, which may have another.

    Returns:
        One tuple of views per piece, in order.

    Raises:
        TypeError: If a state is neither float64 nor float32, or two states differ.
        ValueError: If a state that is written to is not contiguous, or two lists differ in length.
    """
    *states, (product, _) = lists.items()
    first, head = states[0]
    for name, tensors in states:
        for t in tensors:
            if t.dtype not in (torch.float64, torch.float32) or head and t.dtype != head[0].dtype:
                raise TypeError(f"{name} must be float64 or float32 and have the dtype of {first}, got {t.dtype}")
            if not t.is_contiguous() and name not in constants:
                raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
    total = sum(t.numel() for t in head)
    for name, tensors in lists.items():
        if (numel := sum(t.numel() for t in tensors)) != total:
            raise ValueError(f"{name} must have as many elements as {first}: expected {total}, got {numel}")
    read = {name: [_with_rows(rows, t) for t in lists[name]] for name in (*constants, product)}
    return list(reference.aligned(rows, *(lists | read).values()))


def _with_rows(rows: int, t: Tensor) -> Tensor:
    """``(rows, m)`` with elements side by side: a kernel knows no strides but those of rows."""
    t = t.reshape(rows, -1)
    return t if t.shape[1] < 2 or t.stride(1) == 1 else t.contiguous()


def for_all_rows(m: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Views of a list without rows that repeat it in every row."""
    return [t.reshape(1, -1).expand(rows, -1) for t in m]


def launch_parameters(numel: int, itemsize: int) -> dict[str, int]:
    """Block size and warps for a piece of ``numel`` elements of ``itemsize`` bytes per row."""
    if INTERPRETED:  # Time goes by programs, whatever their size.
        return {"BLOCK": min(triton.next_power_of_2(numel), 65536)}
    # Two sizes only: every other one would be compiled on its first use.
    # 32 bytes per thread and list leave registers for the five lists and more of some kernels.
    block = 8192 // itemsize
    return {"BLOCK": block // 2, "num_warps": 4} if numel <= block // 2 else {"BLOCK": block, "num_warps": 8}


def blocks_of(piece: Piece) -> int:
    """Programs per row of a piece."""
    numel = piece[0].shape[1]
    return triton.cdiv(numel, launch_parameters(numel, piece[0].itemsize)["BLOCK"])


def partial_sums(pieces: Sequence[Piece], like: Tensor, sums: int) -> Tensor:
    """A buffer ``(rows, programs, sums)``: every program of a pass over ``pieces`` writes its own sums."""
    return like.new_empty(like.shape[0], sum(map(blocks_of, pieces)), sums)


def fill_residual_stats(stats: Tensor, partial: Tensor) -> None:
    """``stats`` of `reference.richardson_step_` from the sums of all programs."""
    sums = partial.sum(1)
    sums[:, 1] = (sums[:, 1] > 0).double()
    stats.copy_(sums)


def run(kernel: triton.JITFunction, pieces: Sequence[Piece], partial: Tensor, *scalars: Tensor | float) -> None:
    """Launch ``kernel`` for every piece, all rows at once.

    Its arguments are the piece's tensors, their row strides, elements and programs per row, the partial sums
    with their row stride, then ``scalars``.
    """
    done = 0
    with on_device_of(partial):
        for piece in pieces:
            rows, numel = piece[0].shape
            blocks = blocks_of(piece)
            # A stride of 0 keeps the alignment of a single row known to the compiler.
            strides = [t.stride(0) if rows > 1 else 0 for t in piece]
            out = partial[:, done : done + blocks]
            arguments = (*piece, *strides, numel, blocks, out, out.stride(0), *scalars)
            kernel[(rows * blocks,)](*arguments, **launch_parameters(numel, piece[0].itemsize))
            done += blocks


def on_device_of(t: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of ``t``."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
