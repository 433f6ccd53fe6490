"""Torch ops as instructions of a native plan: convolutions that are gradients by a weight in disguise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad_ext.engines.layout import COPY, Instruction
from hypergrad_ext.engines.record import Call
from hypergrad_ext.engines.views import Root, View, contiguous_strides, extent

if TYPE_CHECKING:
    from hypergrad_ext.engines.lowering import Lowering

aten = torch.ops.aten


def _convolution(plan: Lowering, call: Call) -> bool:
    """A convolution of transposed images, as which the double backward pass asks for a gradient by a weight."""
    # Its kernel is as large as an image, which is slow (up to 3 times on the CPU). `convolution_backward` gives the
    # same gradient; stride and dilation change places.
    x_name, kernel_name, bias, stride, padding, dilation, transposed, _, groups = call.args
    name = call.outputs[0] or ""
    sizes = tuple(plan.tensors[name].shape)
    x, kernel = plan.operand(x_name), plan.operand(kernel_name)
    if x is None or kernel is None or bias is not None or transposed or groups != 1 or call.kwargs or len(sizes) < 3:
        return False
    if not all(_images_are_transposed(view) for view in (x, kernel)):
        return False
    # From here in the names of the layer: its input, the gradient by its output, its weight.
    image, grad = _swapped(x), _swapped(kernel)
    weight = (sizes[1], sizes[0], *sizes[2:])
    # An image may have rows that the layer's stride skips: then no layer has a weight of this size.
    parts = zip(image.sizes[2:], grad.sizes[2:], weight[2:], dilation, padding, stride, strict=True)
    if any((i + 2 * p - d * (w - 1) - 1) // s + 1 != g for i, g, w, s, p, d in parts):
        return False
    dtype = plan.dtype

    def like_weight(constants: Sequence[Tensor], scalars: Sequence[float]) -> Tensor:
        return torch.zeros(weight, dtype=dtype)

    shape = plan.views[plan.derive(("zeros", weight), like_weight)]
    strides = contiguous_strides(weight)
    found = View(Root("dynamic", plan.dynamic, extent(weight, strides)), 0, weight, strides)
    plan.dynamic += 1
    literals = [None, dilation, padding, stride, False, (0,) * (len(sizes) - 2), 1, (False, True, False)]
    arguments: list[tuple[str, Any]] = [("tensor", grad), ("tensor", image), ("tensor", shape)]
    arguments += [("literal", list(a) if isinstance(a, tuple) else a) for a in literals]
    fields: list[Any] = ["aten::convolution_backward", "", arguments, [None, found, None]]
    plan.instructions.append(Instruction("aten", fields, [found.root]))
    plan.pointwise(plan.result(call), [(COPY, _swapped(found))])
    return True


def _images_are_transposed(x: View) -> bool:
    """Whether a batch is walked through along its second dimension first."""
    return x.strides[1] > x.strides[0]


def _swapped(x: View) -> View:
    (a, b, *sizes), (c, d, *strides) = x.sizes, x.strides
    return View(x.root, x.offset, (b, a, *sizes), (d, c, *strides))


OPS: dict[Any, Callable[[Lowering, Call], bool]] = {aten.convolution.default: _convolution}
