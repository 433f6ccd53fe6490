"""What the products of a generalised linear model cost, and what a solve does with its Gram matrix instead."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hypergrad_ext import _native

# Gram matrices up to this size are formed: 64 MB in float32.
_LIMIT = 4096


@dataclass(frozen=True)
class _Rates:
    """What things cost in multiply-adds of the fused product."""

    from_memory: float  # a byte
    from_cache: float  # a byte of data that fit in the cache
    gram: float  # a multiply-add of the Gram matrix when it is formed
    strip: int  # of that as many columns of the matrix at a time: what they have beyond the diagonal is lost
    step: float  # a multiply-add of a product with it
    short_row: float  # what the sums at the end of a row of X cost, beside its elements
    row: float  # what a row of X costs at least, beside reading it
    loop_step: float  # the calls of a step with the Gram matrix
    scaling: float  # a number of D x when the matrix is formed
    forming: float  # the calls that form it
    cache_bytes: float
    product: float = 1.0  # a multiply-add of a product with X


# Measured on AMD: Zen 4, where the product makes 85 to 100 GFLOP/s per core; Zen 3, 55, what forms the matrix and
# multiplies by it on a Zen 4 without AVX-512; Zen 5, 200, of which the same is not measured. On Intel's server cores
# (Granite Rapids), 105, whose last cache gives 27 GB/s to each; their matrix units form the matrix of wide data in
# float32, and make products of several columns with data in bfloat16, of many with data in float32.
_ON_AVX2 = _Rates(
    from_memory=2.0,
    from_cache=1.4,
    gram=0.9,
    strip=48,
    step=1.0,
    short_row=30.0,
    row=170.0,
    loop_step=4e4,
    scaling=20.0,
    forming=2e6,
    cache_bytes=32e6,
)
_ON_AVX512 = replace(_ON_AVX2, from_cache=1.0, gram=1.0)
_ON_INTEL_AVX512 = replace(_ON_AVX512, from_memory=3.0, from_cache=1.9, gram=0.85, step=1.2, cache_bytes=1e8)
_ON_INTEL_AMX = replace(_ON_INTEL_AVX512, gram=0.3, strip=32, scaling=50.0)
_AMX_PRODUCT = {torch.bfloat16: 0.5, torch.float32: 0.65}
# Rows and columns of the data, and columns of vectors and classes, from which on they do.
_AMX_GRAM, _AMX_COLUMNS = (1024, 128), {torch.bfloat16: (256, 64, 2), torch.float32: (128, 256, 64)}
_ON_FAST_CORES = replace(_ON_AVX512, from_memory=3.5, short_row=0.0, row=500.0, loop_step=1.2e5, forming=1e7)
# By arithmetic for an H200, not measured: 25 TFLOP/s in the fused product, 45 in cuBLAS, 4.3 TB/s from memory, about
# 10 from shared memory and L2, four launches per step.
_ON_CUDA = _Rates(
    from_memory=3.0,
    from_cache=1.2,
    gram=0.55,
    strip=112,
    step=0.55,
    short_row=0.0,
    row=0.0,
    loop_step=2.5e8,
    scaling=40.0,
    forming=1.2e9,
    cache_bytes=30e6,
)


def estimate(
    inputs: Tensor, intercept: bool, parameters: int, dtype: torch.dtype, products: int, rows: int, *, formed: bool
) -> tuple[Literal["gram", "products"], str]:
    """Whether to form the Gram matrix for a solve, by the time that bytes and multiply-adds take.

    Args:
        inputs: The data, ``(n, d)``.
        intercept: Whether there is one.
        parameters: Their number.
        dtype: Of them, and so of the matrix.
        products: Products that the solve is expected to take.
        rows: Right-hand sides.
        formed: Whether the matrix is there already.

    Returns:
        The choice, and the estimate behind it.
    """
    n, d = inputs.shape
    classes = parameters // (d + intercept)
    rates = _rates(inputs, classes * rows)

    def reading(size: int) -> float:
        return size * (rates.from_memory if size > rates.cache_bytes else rates.from_cache)

    data = n * d * inputs.element_size()
    product = rates.product * 2 * n * (d + rates.short_row) * classes * rows
    streaming = products * max(product, reading(data) + n * rates.row)
    forming = 0.0
    if not formed:
        # Of every pair of classes a symmetric block.
        pairs = classes * (classes + 1) / 2
        multiplying = pairs * n * (d * (rates.gram * min(d, (d + rates.strip) / 2) + rates.scaling) + rates.row)
        forming = max(multiplying, reading(data)) + rates.forming
    matrix = parameters * parameters
    step = max(rates.step * matrix * rows, reading(matrix * dtype.itemsize)) + rates.loop_step
    forming += products * step
    choice: Literal["gram", "products"] = "gram" if forming < streaming and parameters <= _LIMIT else "products"
    return choice, f"Gram matrix {forming / 1e6:.3g} against {streaming / 1e6:.3g} million multiply-adds"


def _rates(inputs: Tensor, columns: int) -> _Rates:
    if inputs.is_cuda:
        return _ON_CUDA

    def reach(*least: int) -> bool:
        return all(size >= bound for size, bound in zip((*inputs.shape, columns), least, strict=False))

    wide = inputs.dtype != torch.float64 and reach(*_AMX_GRAM)
    several = inputs.dtype in _AMX_COLUMNS and reach(*_AMX_COLUMNS[inputs.dtype])
    return _rates_of_cpu(wide, _AMX_PRODUCT[inputs.dtype] if several else 1.0)


@functools.cache
def _rates_of_cpu(wide: bool, product: float) -> _Rates:
    cpu = _native.build_info()
    if cpu.get("blas_at_half_speed"):
        return _ON_FAST_CORES
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return _ON_AVX2
    if not cpu.get("amx"):
        return _ON_INTEL_AVX512 if cpu.get("vendor") == "intel" else _ON_AVX512
    return replace(_ON_INTEL_AMX if wide else _ON_INTEL_AVX512, product=product)
