"""Products with the Hessian of a multilayer perceptron: torch's matrix products, and one pass for what is between."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from hypergrad_ext.kernels import lists
from torch import Tensor


@triton.jit
def forward_kernel(
    product,
    tangent,
    bias,
    slope,
    bend,
    bias_stride,
    slope_stride,
    bend_stride,
    rows,
    n,
    width,
    BIAS: tl.constexpr,
    BEND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``Ra = product + bias``; ``tangent = act'(a) Ra``; ``product = act''(a) dL/dh Ra``, if activations bend."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None]
    inside = (row < rows) & (column < width)
    at = row * width + column
    r_a = tl.load(product + at, mask=inside, other=0)
    if BIAS:
        r_a += tl.load(bias + row // n * bias_stride + column, mask=inside, other=0)
    by = tl.load(slope + row % n * slope_stride + column, mask=inside, other=0)
    tl.store(tangent + at, by * r_a, mask=inside)
    if BEND:
        by = tl.load(bend + row % n * bend_stride + column, mask=inside, other=0)
        tl.store(product + at, by * r_a, mask=inside)


@triton.jit
def loss_kernel(
    product,
    bias,
    probabilities,
    bias_stride,
    p_stride,
    rows,
    n,
    width,
    scale: tl.float64,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """R(dL/dz) from ``Rz = product + bias``, in place: ``scale p (Rz - <p, Rz>)``, or ``scale Rz``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    factor = tl.full([], scale, product.dtype.element_ty)
    mean = tl.zeros([ROWS, 1], product.dtype.element_ty)
    if ENTROPY:
        for begin in range(0, width, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)[None]
            inside = (row < rows) & (column < width)
            z = tl.load(product + row * width + column, mask=inside, other=0)
            if BIAS:
                z += tl.load(bias + row // n * bias_stride + column, mask=inside, other=0)
            p = tl.load(probabilities + row % n * p_stride + column, mask=inside, other=0)
            mean += tl.sum(p * z, 1, keep_dims=True)
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)[None]
        inside = (row < rows) & (column < width)
        z = tl.load(product + row * width + column, mask=inside, other=0)
        if BIAS:
            z += tl.load(bias + row // n * bias_stride + column, mask=inside, other=0)
        if ENTROPY:
            z = tl.load(probabilities + row % n * p_stride + column, mask=inside, other=0) * (z - mean)
        tl.store(product + row * width + column, factor * z, mask=inside)


@triton.jit
def backward_kernel(
    product,
    slope,
    curved,
    slope_stride,
    rows,
    n,
    width,
    BEND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``R(dL/da) = act'(a) product + curved``, in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None]
    inside = (row < rows) & (column < width)
    at = row * width + column
    r_e = tl.load(product + at, mask=inside, other=0)
    r_delta = r_e * tl.load(slope + row % n * slope_stride + column, mask=inside, other=0)
    if BEND:
        r_delta += tl.load(curved + at, mask=inside, other=0)
    tl.store(product + at, r_delta, mask=inside)


def launch_parameters(width: int) -> dict[str, int]:
    """Shape of a program's tile, and warps, for rows of ``width`` elements."""
    columns = min(triton.next_power_of_2(width), 256)
    if lists.INTERPRETED:  # Time goes by programs, whatever their size.
        return {"ROWS": 4096 // columns, "COLUMNS": columns}
    return {"ROWS": min(16, 512 // columns), "COLUMNS": columns, "num_warps": 4}


def mlp_hvp(
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
    deltas: Sequence[Tensor],
    probabilities: Tensor | None,
    v: Tensor,
    scale: float,
    biases: bool,
    l2: float,
) -> Tensor:
    """See `hypergrad_ext.reference_mlp.mlp_hvp`."""
    n, last = len(hidden[0]), len(weights) - 1
    sizes = [size for w in weights for size in ([w.numel(), len(w)] if biases else [w.numel()])]
    if v.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"v must be float64 or float32, got {v.dtype}")
    if v.dim() != 2 or v.shape[1] != sum(sizes) or not v.is_contiguous():
        raise ValueError(f"v must be contiguous with shape (k, {sum(sizes)}), got {tuple(v.shape)}")
    widths = [len(w) for w in weights]
    slopes = [_rows("slopes", t, (n, width), v) for t, width in zip(slopes, widths[:-1], strict=True)]
    bends = [_rows("bends", t, (n, width), v) for t, width in zip(bends, widths, strict=False)]
    p = None if probabilities is None else _rows("probabilities", probabilities, (n, widths[-1]), v)
    if v.requires_grad and torch.is_grad_enabled():
        raise ValueError("v must not require grad")  # autograd does not see the kernels
    k, out = len(v), torch.empty_like(v)
    if k == 0:
        return out
    v_w, v_b = _parts(v, weights, sizes, biases)
    out_w, out_b = _parts(out, weights, sizes, biases)

    tangents: list[Tensor] = []
    curved: list[Tensor | None] = []
    for layer, w in enumerate(weights):
        r = torch.bmm(hidden[layer].expand(k, -1, -1), v_w[layer].mT)
        if layer:
            r.view(k * n, -1).addmm_(tangents[-1].view(k * n, -1), w.T)
        bias = v_b[layer] if biases else None
        if layer == last:
            _loss(r, bias, p, scale)
            break
        tangents.append(torch.empty_like(r))
        _forward(r, tangents[-1], bias, slopes[layer], bends[layer] if bends else None)
        curved.append(r if bends else None)

    for layer in range(last, -1, -1):
        saved = hidden[layer].expand(k, -1, -1)
        if l2:
            torch.baddbmm(v_w[layer], r.mT, saved, beta=2 * l2, out=out_w[layer])
        else:
            torch.bmm(r.mT, saved, out=out_w[layer])
        if biases:
            torch.sum(r, 1, out=out_b[layer])
        if layer:
            delta = deltas[layer - 1].expand(k, -1, -1)
            out_w[layer].baddbmm_(delta.mT, tangents[layer - 1])
            r_e = torch.bmm(delta, v_w[layer])
            r_e.view(k * n, -1).addmm_(r.view(k * n, -1), weights[layer])
            _backward(r_e, slopes[layer - 1], curved[layer - 1])
            r = r_e
    return out


def _forward(product: Tensor, tangent: Tensor, bias: Tensor | None, slope: Tensor, bend: Tensor | None) -> None:
    tensors = product, tangent, _or(bias, product), slope, _or(bend, product)
    strides = _stride(bias), slope.stride(0), _stride(bend)
    _launch(forward_kernel, product, tensors, strides, BIAS=bias is not None, BEND=bend is not None)


def _loss(product: Tensor, bias: Tensor | None, probabilities: Tensor | None, scale: float) -> None:
    k, n, width = product.shape
    parameters = launch_parameters(width)
    with lists.on_device_of(product):
        loss_kernel[(triton.cdiv(k * n, parameters["ROWS"]),)](
            *(product, _or(bias, product), _or(probabilities, product), _stride(bias), _stride(probabilities)),
            *(k * n, n, width, scale),
            BIAS=bias is not None,
            ENTROPY=probabilities is not None,
            **parameters,
        )


def _backward(product: Tensor, slope: Tensor, curved: Tensor | None) -> None:
    tensors = product, slope, _or(curved, product)
    _launch(backward_kernel, product, tensors, (slope.stride(0),), BEND=curved is not None)


def _launch(
    kernel: triton.JITFunction, product: Tensor, tensors: tuple[Tensor, ...], strides: tuple[int, ...], **flags: bool
) -> None:
    k, n, width = product.shape
    parameters = launch_parameters(width)
    grid = triton.cdiv(k * n, parameters["ROWS"]), triton.cdiv(width, parameters["COLUMNS"])
    with lists.on_device_of(product):
        kernel[grid](*tensors, *strides, k * n, n, width, **flags, **parameters)


def _or(t: Tensor | None, placeholder: Tensor) -> Tensor:
    # A kernel's pointer has to be some tensor's, read or not.
    return placeholder if t is None else t


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _rows(name: str, t: Tensor, shape: tuple[int, int], v: Tensor) -> Tensor:
    """``t`` with contiguous rows, if it is what the kernels may read."""
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    if t.dtype != v.dtype or t.device != v.device:
        raise TypeError(f"{name} must be {v.dtype} on {v.device} like v, got {t.dtype} on {t.device}")
    return t if t.stride(1) == 1 or shape[1] == 1 else t.contiguous()


def _parts(v: Tensor, weights: Sequence[Tensor], sizes: list[int], biases: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the weights, ``(k, out, in)``, and of the biases, ``(k, out)``."""
    parts = v.split(sizes, dim=1)
    matrices = [part.view(len(v), *w.shape) for part, w in zip(parts[:: 1 + biases], weights, strict=True)]
    return matrices, list(parts[1::2]) if biases else []
