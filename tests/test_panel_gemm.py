"""Matrix products of native plans, by every kernel there is for them, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypergrad_ext import _native
from tests.compare import assert_no_worse_than_torch

pytestmark = pytest.mark.skipif(_native._C is None, reason=f"native plans are C++: {_native.MISSING}")

SIZE = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 63, 64, 65, 100, 129]))
DEPTH = st.one_of(SIZE, st.sampled_from([255, 767, 768, 769, 1700]))


def laid_out(batch: int, rows: int, columns: int, transposed: bool, gap: int, dtype: torch.dtype) -> Tensor:
    """A random batch of matrices in rows or in columns, with elements between them that are no part of it."""
    shape = (batch, columns, rows + gap) if transposed else (batch, rows, columns + gap)
    t = torch.randn(shape, dtype=dtype)
    return t[..., :rows].transpose(1, 2) if transposed else t[..., :columns]


def view(slot: int, t: Tensor) -> tuple:
    return slot, t.storage_offset(), tuple(t.shape), t.stride()


def product(a: Tensor, b: Tensor, before: Tensor | None) -> Tensor:
    """``a b``, or ``before + a b``, by a plan of that one product."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    buffers = [t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0) for t in (a, b)]
    size = torch.Size(shape).numel()
    start = torch.zeros(size, dtype=a.dtype) if before is None else before.reshape(-1)
    strides = (shape[1] * shape[2], shape[2], 1)
    copy = ("pointwise", [(size,), [(4, 0, (size,), (1,)), (3, 0, (size,), (1,))], [(0, 0, 1, -1, -1, -1)]], [])
    gemm = ("gemm", [view(1, a), view(2, b), (4, 0, shape, strides), before is not None], [])
    leaves = [t.numel() for t in (*buffers, start)]
    instructions = [copy, gemm] if before is not None else [gemm]
    plan = _native._C.Plan(a.dtype == torch.float64, 0, leaves, [size], 0, 0, 0, [], instructions)
    return plan.bind([], []).product([*buffers, start]).view(shape)


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), SIZE, SIZE, DEPTH),
    transposed=st.tuples(st.booleans(), st.booleans()),
    gaps=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    accumulate=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    threads=st.integers(1, 3),
)
# Shared by columns, by rows of one panel, by matrices of a batch; in several depths; in place and packed.
@example((1, 300, 400, 129), (False, True), (0, 0), True, torch.float32, 2)
@example((1, 700, 40, 129), (True, False), (0, 1), False, torch.float32, 3)
@example((31, 40, 40, 70), (False, False), (2, 0), True, torch.float64, 2)
@example((1, 64, 64, 3000), (True, True), (0, 0), True, torch.float32, 2)
@example((1, 64, 64, 64), (False, False), (0, 0), False, torch.float32, 1)
# Wide enough for matrix units, where there are some: several parts of rows, depths and columns, none of them whole.
@example((1, 290, 270, 550), (False, True), (0, 3), True, torch.float32, 2)
@example((2, 70, 300, 600), (True, False), (1, 0), False, torch.float32, 3)
@example((1, 1000, 70, 129), (True, True), (0, 0), True, torch.float32, 2)
def test_every_shape(sizes, transposed, gaps, accumulate, dtype, threads):
    batch, rows, columns, depth = sizes
    a = laid_out(batch, rows, depth, transposed[0], gaps[0], dtype)
    b = laid_out(batch, depth, columns, transposed[1], gaps[1], dtype)
    before = torch.randn(batch, rows, columns, dtype=dtype) if accumulate else None
    truth, theirs = a.double() @ b.double(), a @ b
    if before is not None:
        truth, theirs = before.double() + truth, before + theirs
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = product(a, b, before)
    finally:
        torch.set_num_threads(kept)
    # Where terms cancel, rounding is relative to them.
    terms = a.double().abs() @ b.double().abs() + (0 if before is None else before.double().abs())
    floor = 2 * torch.finfo(dtype).eps * float(terms.norm() / truth.norm())
    assert_no_worse_than_torch(ours, theirs, truth, floor, f"{sizes}:")


def test_rows_that_are_one_row():
    """A stride of zero, as an expanded tensor has."""
    a, b = torch.randn(1, 1, 9).expand(1, 30, 9), torch.randn(1, 9, 30)
    assert torch.equal(product(a, b, None), product(a.contiguous(), b, None))


def test_threads_do_not_change_a_bit():
    a, b = torch.randn(1, 300, 900), torch.randn(1, 900, 300)
    kept = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(product(a, b, None))
    torch.set_num_threads(kept)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
