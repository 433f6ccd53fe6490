"""Torch ops as instructions of a native plan: convolutions, and their gradients, some of them in disguise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad_ext.engines.layout import COPY, Instruction
from hypergrad_ext.engines.lower_pointwise import summed
from hypergrad_ext.engines.record import Call
from hypergrad_ext.engines.views import Root, View, expanded, extent, inserted
from hypergrad_ext.structure import contiguous_strides

if TYPE_CHECKING:
    from hypergrad_ext.engines.lowering import Lowering

aten = torch.ops.aten

# Elements of a weight that our kernels are faster with than oneDNN: it passes through the cache for every image.
_MOST = 2**18


def _convolution(plan: Lowering, call: Call) -> bool:
    x_name, w_name, bias_name, stride, padding, dilation, transposed, beyond, groups = call.args
    x, w = plan.operand(x_name), plan.operand(w_name)
    bias = None if bias_name is None else plan.operand(bias_name)
    if x is None or w is None or groups != 1 or call.kwargs or (bias is None) != (bias_name is None):
        return False
    if bias is None and not transposed and all(_images_are_transposed(view) for view in (x, w)):
        return _gradient_by_weight(plan, call, x, w)
    if math.prod(w.sizes) > _MOST or not _image_like(plan, call.outputs[0], stride, padding, dilation):
        return False
    flipped = False
    if transposed:
        w, flipped, padding = _swapped(w), True, _mirrored(w, stride, padding, dilation)
        if padding is None or any(beyond):
            return False
    y = plan.result(call)
    if bias is not None:
        sizes = (*bias.sizes, *(1,) * (len(y.sizes) - 2))
        by_output = View(bias.root, bias.offset, sizes, (*bias.strides, *(0,) * (len(y.sizes) - 2)))
        plan.pointwise(y, [(COPY, expanded(by_output, y.sizes))])
    _convolve(plan, x, w, y, (stride, padding, dilation), flipped=flipped, accumulate=bias is not None)
    return True


def _backward(plan: Lowering, call: Call) -> bool:
    """The gradients of a convolution by its input, its weight and its bias."""
    grad_name, x_name, w_name, _, stride, padding, dilation, transposed, _, groups, _ = call.args
    grad, x, w = (plan.operand(name) for name in (grad_name, x_name, w_name))
    by_input, by_weight, by_bias = call.outputs
    if grad is None or x is None or w is None or groups != 1 or transposed or call.kwargs:
        return False
    if math.prod(w.sizes) > _MOST:
        return False
    mirrored = _mirrored(w, stride, padding, dilation)
    if by_input is not None and (mirrored is None or not _image_like(plan, by_input, stride, padding, dilation)):
        return False
    if not _image_like(plan, grad_name, stride, padding, dilation, any_layout=True):
        return False
    if by_input is not None and mirrored is not None:
        y = plan.memory(by_input)
        _convolve(plan, grad, _swapped(w), y, (stride, mirrored, dilation), flipped=True)
    if by_weight is not None:
        _convolve(plan, x, plan.memory(by_weight), grad, (stride, padding, dilation), by_weight=True)
    if by_bias is not None:
        summed(plan, grad, plan.memory(by_bias), {0, *range(2, len(grad.sizes))})
    return True


def _gradient_by_weight(plan: Lowering, call: Call, x: View, kernel: View) -> bool:
    """A convolution of transposed images, as which the double backward pass asks for a gradient by a weight."""
    # Its kernel is as large as an image, which is slow (up to 3 times on the CPU). In the names of the layer x is its
    # input and the kernel the gradient by its output; stride and dilation change places.
    _, _, _, dilation, padding, stride, _, _, _ = call.args
    name = call.outputs[0] or ""
    sizes = tuple(plan.tensors[name].shape)
    image, grad = _swapped(x), _swapped(kernel)
    weight = (sizes[1], sizes[0], *sizes[2:])
    # An image may have rows that the layer's stride skips: then no layer has a weight of this size.
    parts = zip(image.sizes[2:], grad.sizes[2:], weight[2:], dilation, padding, stride, strict=True)
    if len(sizes) < 3 or any((i + 2 * p - d * (w - 1) - 1) // s + 1 != g for i, g, w, d, p, s in parts):
        return False
    if math.prod(weight) <= _MOST and _image_like(plan, name, stride, padding, dilation, any_layout=True):
        result = _swapped(plan.result(call))
        _convolve(plan, image, result, grad, (stride, padding, dilation), by_weight=True)
        return True
    dtype = plan.dtype

    def like_weight(constants: Sequence[Tensor], scalars: Sequence[float]) -> Tensor:
        return torch.zeros(weight, dtype=dtype)

    shape = plan.views[plan.derive(("zeros", weight), like_weight)]
    strides = contiguous_strides(weight)
    found = View(Root("dynamic", plan.dynamic, extent(weight, strides)), 0, weight, strides)
    plan.dynamic += 1
    literals = [None, stride, padding, dilation, False, (0,) * (len(sizes) - 2), 1, (False, True, False)]
    arguments: list[tuple[str, Any]] = [("tensor", grad), ("tensor", image), ("tensor", shape)]
    arguments += [("literal", list(a) if isinstance(a, tuple) else a) for a in literals]
    fields: list[Any] = ["aten::convolution_backward", "", arguments, [None, found, None]]
    plan.instructions.append(Instruction("aten", fields, [found.root]))
    plan.pointwise(plan.result(call), [(COPY, _swapped(found))])
    return True


def _convolve(
    plan: Lowering,
    x: View,
    w: View,
    y: View,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
    *,
    by_weight: bool = False,
    flipped: bool = False,
    accumulate: bool = False,
) -> None:
    if len(x.sizes) == 3:
        # A signal is an image of one row.
        x, w, y = (View(v.root, v.offset, inserted(v.sizes, 2, 1), inserted(v.strides, 2, 0)) for v in (x, w, y))
        geometry = tuple((first, *given) for first, given in zip((1, 0, 1), geometry, strict=True))  # type: ignore
    result = (w if by_weight else y).root
    fields = [x, w, y, *map(tuple, geometry), by_weight, flipped, accumulate]
    plan.instructions.append(Instruction("convolution", fields, [result]))
    if not accumulate:
        plan.products[result] = plan.instructions[-1]


def _image_like(
    plan: Lowering,
    name: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    any_layout: bool = False,
) -> bool:
    """Whether the kernels for images take this: one or two dimensions, rows that are dense where they are written."""
    t = plan.tensors[name or ""]
    return (
        t.dim() in (3, 4)
        and len(stride) == len(padding) == len(dilation) == t.dim() - 2
        and (any_layout or t.stride()[-1] == 1)
    )


def _mirrored(
    w: View, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...] | None:
    """Padding with which the transposed convolution is one with the kernel read from its end; None if there is none."""
    if any(s != 1 for s in stride) or len(padding) != len(w.sizes) - 2:
        return None
    found = tuple(d * (k - 1) - p for d, k, p in zip(dilation, w.sizes[2:], padding, strict=True))
    return found if min(found) >= 0 else None


def _images_are_transposed(x: View) -> bool:
    """Whether a batch is walked through along its second dimension first."""
    return x.strides[1] > x.strides[0]


def _swapped(x: View) -> View:
    (a, b, *sizes), (c, d, *strides) = x.sizes, x.strides
    return View(x.root, x.offset, (b, a, *sizes), (d, c, *strides))


OPS: dict[Any, Callable[[Lowering, Call], bool]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _backward,
}
