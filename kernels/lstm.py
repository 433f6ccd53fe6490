"""The pointwise part of an LSTM step, forward, backward and backward of the backward; and layers made of it."""

# A kernel's tensors are pointers inside, for which there is no annotation.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hypergrad_ext.kernels import lists
from torch import Tensor

from hypergrad_ext import reference_lstm


@triton.jit
def _load_gates(pointer, at, units, inside, real: tl.constexpr):
    i = tl.load(pointer + at, mask=inside, other=0).to(real)
    f = tl.load(pointer + at + units, mask=inside, other=0).to(real)
    g = tl.load(pointer + at + 2 * units, mask=inside, other=0).to(real)
    o = tl.load(pointer + at + 3 * units, mask=inside, other=0).to(real)
    return i, f, g, o


@triton.jit
def _store_gates(pointer, at, units, inside, i, f, g, o):
    dtype = pointer.dtype.element_ty
    tl.store(pointer + at, i.to(dtype), mask=inside)
    tl.store(pointer + at + units, f.to(dtype), mask=inside)
    tl.store(pointer + at + 2 * units, g.to(dtype), mask=inside)
    tl.store(pointer + at + 3 * units, o.to(dtype), mask=inside)


@triton.jit
def _sigmoid(x):
    # The exponential of a number that is not positive cannot overflow.
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1) / (1 + e)


@triton.jit
def _tanh(x):
    # Near 0, where 1 - exp(-2 |x|) cancels, by its series: the term left out is below a rounding error.
    e = tl.exp(-2 * tl.abs(x))
    y = x * x
    if x.dtype == tl.float64:
        near = 0.1
        series = 62 / 2835 + y * (-1382 / 155925 + y * (21844 / 6081075))
    else:
        near = 0.2
        series = 62 / 2835 + y * 0
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * series))))
    far = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
    return tl.where(tl.abs(x) < near, series, far)


@triton.jit
def _place(units, blocks, BLOCK: tl.constexpr):
    """Where a program's block is in rows of ``units`` and of gates, and which of it is inside."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    j = block * BLOCK + tl.arange(0, BLOCK)
    return row * units + j, 4 * row * units + j, j < units


@triton.jit(do_not_specialize=["blocks"])
def forward_kernel(gates, c, h, c_next, activations, units, blocks, BLOCK: tl.constexpr):
    """``c' = f c + i g``, ``h' = o tanh(c')``."""
    at, gates_at, inside = _place(units, blocks, BLOCK)
    real: tl.constexpr = tl.float64 if c.dtype.element_ty == tl.float64 else tl.float32
    i, f, g, o = _load_gates(gates, gates_at, units, inside, real)
    i, f, g, o = _sigmoid(i), _sigmoid(f), _tanh(g), _sigmoid(o)
    after = f * tl.load(c + at, mask=inside, other=0).to(real) + i * g
    _store_gates(activations, gates_at, units, inside, i, f, g, o)
    tl.store(c_next + at, after.to(c.dtype.element_ty), mask=inside)
    tl.store(h + at, (o * _tanh(after)).to(c.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def backward_kernel(
    activations,
    c,
    c_next,
    grad_h,
    grad_c,
    grad_activations,
    grad_gates,
    grad_c_prev,
    units,
    blocks,
    ACTIVATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients by gates and memory; ``ACTIVATIONS`` says whether ``grad_activations`` is there."""
    at, gates_at, inside = _place(units, blocks, BLOCK)
    real: tl.constexpr = tl.float64 if c.dtype.element_ty == tl.float64 else tl.float32
    i, f, g, o = _load_gates(activations, gates_at, units, inside, real)
    before = tl.load(c + at, mask=inside, other=0).to(real)
    t = _tanh(tl.load(c_next + at, mask=inside, other=0).to(real))
    by_h = tl.load(grad_h + at, mask=inside, other=0).to(real)
    d = tl.load(grad_c + at, mask=inside, other=0).to(real) + by_h * o * (1 - t * t)
    by_i, by_f, by_g, by_o = d * g, d * before, d * i, by_h * t
    if ACTIVATIONS:
        more_i, more_f, more_g, more_o = _load_gates(grad_activations, gates_at, units, inside, real)
        by_i, by_f, by_g, by_o = by_i + more_i, by_f + more_f, by_g + more_g, by_o + more_o
    by_i, by_f = by_i * i * (1 - i), by_f * f * (1 - f)
    _store_gates(grad_gates, gates_at, units, inside, by_i, by_f, by_g * (1 - g * g), by_o * o * (1 - o))
    tl.store(grad_c_prev + at, (d * f).to(c.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def double_backward_kernel(
    activations,
    c,
    c_next,
    grad_h,
    grad_c,
    v_gates,
    v_c,
    by_activations,
    by_c,
    by_c_next,
    by_grad_h,
    by_grad_c,
    units,
    blocks,
    BLOCK: tl.constexpr,
):
    """Gradients of ``<v_gates, grad_gates> + <v_c, grad_c_prev>`` by all that the backward kernel reads."""
    at, gates_at, inside = _place(units, blocks, BLOCK)
    dtype = c.dtype.element_ty
    real: tl.constexpr = tl.float64 if c.dtype.element_ty == tl.float64 else tl.float32
    i, f, g, o = _load_gates(activations, gates_at, units, inside, real)
    v_i, v_f, v_g, v_o = _load_gates(v_gates, gates_at, units, inside, real)
    before = tl.load(c + at, mask=inside, other=0).to(real)
    t = _tanh(tl.load(c_next + at, mask=inside, other=0).to(real))
    by_h = tl.load(grad_h + at, mask=inside, other=0).to(real)
    v_before = tl.load(v_c + at, mask=inside, other=0).to(real)
    slope_t = 1 - t * t
    d = tl.load(grad_c + at, mask=inside, other=0).to(real) + by_h * o * slope_t
    w_i, w_f, w_g, w_o = v_i * i * (1 - i), v_f * f * (1 - f), v_g * (1 - g * g), v_o * o * (1 - o)
    by_d = g * w_i + before * w_f + i * w_g + f * v_before
    _store_gates(
        by_activations,
        gates_at,
        units,
        inside,
        d * g * v_i * (1 - 2 * i) + d * w_g,
        d * before * v_f * (1 - 2 * f) + d * v_before,
        d * w_i - 2 * g * d * i * v_g,
        by_h * t * v_o * (1 - 2 * o) + by_d * by_h * slope_t,
    )
    tl.store(by_c + at, (d * w_f).to(dtype), mask=inside)
    tl.store(by_c_next + at, (by_h * (w_o - 2 * t * o * by_d) * slope_t).to(dtype), mask=inside)
    tl.store(by_grad_h + at, (by_d * o * slope_t + t * w_o).to(dtype), mask=inside)
    tl.store(by_grad_c + at, by_d.to(dtype), mask=inside)


def launch_parameters(units: int, item_size: int) -> dict[str, int]:
    """Block size and warps for rows of so many units: two units per thread, or what has registers in float64."""
    if lists.INTERPRETED:  # Time goes by programs and blocks, whatever their size.
        return {"BLOCK": min(triton.next_power_of_2(max(1, units)), 65536)}
    warps = 1 if units <= 128 else 4
    return {"BLOCK": (32 if item_size == 8 else 64) * warps, "num_warps": warps}


def _launch(kernel, c: Tensor, *tensors: Tensor, **options: bool) -> None:
    if c.numel() == 0:
        return
    rows, units = c.shape
    parameters = launch_parameters(units, c.element_size())
    blocks = triton.cdiv(units, parameters["BLOCK"])
    with lists.on_device_of(c):
        kernel[(rows * blocks,)](*tensors, units, blocks, **options, **parameters)


def _checked(c: Tensor, states: dict[str, Tensor], gates: dict[str, Tensor | None]) -> list[Tensor | None]:
    """All tensors contiguous, and of the shapes, dtype and device that go with ``c``."""
    if c.dim() != 2:
        raise ValueError(f"c must have shape (rows, units), got {tuple(c.shape)}")
    if not c.is_floating_point():
        raise TypeError(f"c must be floating point, got {c.dtype}")
    rows, units = c.shape
    shapes = [(t, name, (rows, units)) for name, t in states.items()]
    shapes += [(t, name, (rows, 4 * units)) for name, t in gates.items() if t is not None]
    for t, name, shape in shapes:
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
        if t.dtype != c.dtype:
            raise TypeError(f"{name} must be {c.dtype} like c, got {t.dtype}")
        if t.device != c.device:
            raise ValueError(f"{name} must be on {c.device} like c, got {t.device}")
    return [None if t is None else t.contiguous() for t in (*gates.values(), c, *states.values())]


def _empty(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_cell`."""
    gates, c = _checked(c, {}, {"gates": gates})  # type: ignore[assignment]
    h, c_next, activations = _empty(c, c, gates)
    _launch(forward_kernel, c, gates, c, h, c_next, activations)
    return h, c_next, activations


def lstm_cell_backward(
    activations: Tensor,
    c: Tensor,
    c_next: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    grad_activations: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_cell_backward`."""
    states = {"c_next": c_next, "grad_h": grad_h, "grad_c": grad_c}
    gates = {"activations": activations, "grad_activations": grad_activations}
    activations, more, c, *rest = _checked(c, states, gates)  # type: ignore[assignment]
    out = _empty(activations, c)
    options = {"ACTIVATIONS": more is not None}
    _launch(backward_kernel, c, activations, c, *rest, activations if more is None else more, *out, **options)  # type: ignore[arg-type]
    return out[0], out[1]


def lstm_cell_double_backward(
    activations: Tensor, c: Tensor, c_next: Tensor, grad_h: Tensor, grad_c: Tensor, v_gates: Tensor, v_c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_cell_double_backward`."""
    states = {"c_next": c_next, "grad_h": grad_h, "grad_c": grad_c, "v_c": v_c}
    activations, v_gates, c, c_next, grad_h, grad_c, v_c = _checked(  # type: ignore[assignment]
        c, states, {"activations": activations, "v_gates": v_gates}
    )
    out = _empty(activations, c, c, c, c)
    _launch(double_backward_kernel, c, activations, c, c_next, grad_h, grad_c, v_gates, v_c, *out)
    return tuple(out)  # type: ignore[return-value]


def lstm_layer(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_layer`."""
    return reference_lstm.lstm_layer(*args, cell=lstm_cell)


def lstm_layer_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_layer_backward`."""
    return reference_lstm.lstm_layer_backward(*args, cell=lstm_cell_backward)


def lstm_layer_double_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `hypergrad_ext.reference_lstm.lstm_layer_double_backward`."""
    return reference_lstm.lstm_layer_double_backward(*args, cell=lstm_cell_double_backward)
