"""Norms, and what is read from them: whether all is finite, and the power of two that scales a vector."""

from __future__ import annotations

import math

import pytest
import torch

from hypergrad_ext.norms import finite, finite_rows, norms, power_of_two_scale, safe_norms

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (67,), (100_003,), (1, 5), (3, 40_000), (0, 4), (2, 0)])
def test_norms_are_those_of_float64(shape, dtype):
    flat = torch.randn(shape, dtype=dtype)
    truth = flat.double().square().sum(-1).sqrt()
    assert norms(flat).dtype == torch.float64 and norms(flat).shape == truth.shape
    torch.testing.assert_close(norms(flat), truth, rtol=1e-13, atol=0)


def test_norms_of_strided_rows():
    flat = torch.randn(4, 30)[:, ::3]
    torch.testing.assert_close(norms(flat), flat.double().norm(dim=1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30, 3e38])
def test_norms_of_float32_neither_underflow_nor_overflow(size):
    flat = torch.full((1000,), size)
    torch.testing.assert_close(norms(flat), flat[0].double() * math.sqrt(1000), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_found(bad, dtype):
    flat = torch.randn(3, 70_000, dtype=dtype)
    flat[1, 69_999] = bad
    assert finite_rows(flat, norms(flat).tolist()) == [True, False, True]
    assert not finite([flat[0], flat[1]]) and finite([flat[0], flat[2]])


def test_elements_whose_squares_overflow_are_finite():
    flat = torch.full((2, 5), 1e200, dtype=torch.float64)
    assert all(finite_rows(flat, norms(flat).tolist())) and finite([flat])


@pytest.mark.parametrize("sizes", [(1e200, 1e-200), (1e-320, 3.0), (1e300, 0.0)])
def test_safe_norms_of_what_has_no_squares(sizes):
    flat = torch.tensor(sizes, dtype=torch.float64)[:, None] * torch.ones(4, dtype=torch.float64)
    found, numbers = safe_norms(flat)
    torch.testing.assert_close(found, 2 * flat[:, 0], rtol=1e-13, atol=0)
    assert numbers == found.tolist() and safe_norms(flat[0])[1] == numbers[:1]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_safe_norms_of_nothing(shape):
    found, numbers = safe_norms(torch.ones(shape, dtype=torch.float64))
    assert found.shape == shape[:-1] and not any(numbers)


def test_tensors_of_several_dtypes_and_layouts():
    assert finite([torch.randn(3), torch.randn(4, 4).mT, torch.randn(2).half()])
    assert not finite([torch.randn(3), torch.full((2,), math.nan).half()])


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.float32, (1e-37, 1e-3, 1e36)), (torch.float64, (1e-250, 1, 1e250))]
)
def test_scaled_rows_have_squares_that_can_be_summed(dtype, sizes):
    flat = torch.randn(len(sizes), 300, dtype=dtype) * torch.tensor(sizes, dtype=dtype)[:, None]
    scale = power_of_two_scale(flat)
    scaled = norms(flat * scale[:, None])
    assert bool((scaled < 300).all()) and bool((scaled > 1e-2).all())
    assert torch.equal(flat * scale[:, None] / scale[:, None], flat)
    assert scale.dtype == dtype and torch.equal(scale, torch.exp2(scale.log2().round()))


def test_a_zero_row_is_not_scaled():
    assert power_of_two_scale(torch.zeros(2, 3)).tolist() == [1, 1]
