"""Torch ops as instructions of a native plan: matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hypergrad_ext.engines.layout import COPY, Instruction
from hypergrad_ext.engines.record import Call, Name
from hypergrad_ext.engines.views import View, batched, expanded, rows_are_dense, transposed
from hypergrad_ext.structure import contiguous_strides

if TYPE_CHECKING:
    from hypergrad_ext.engines.lowering import Lowering

aten = torch.ops.aten


def _mm(plan: Lowering, call: Call) -> bool:
    return _gemm(plan, plan.result(call), plan.views[call.args[0]], plan.views[call.args[1]])


def _addmm(plan: Lowering, call: Call) -> bool:
    c, a, b = call.args[:3]
    if any(x != 1 for x in (*call.args[3:], *(x for _, x in call.kwargs))):
        return False
    bias = plan.operand(c)
    if bias is None:
        return False
    out = plan.result(call)
    plan.pointwise(out, [(COPY, expanded(bias, out.sizes))])
    return _gemm(plan, out, plan.views[a], plan.views[b], accumulate=True)


def _gemm(plan: Lowering, out: View, a: View, b: View, accumulate: bool = False) -> bool:
    a, b, out = (x if len(x.sizes) == 3 else batched(x) for x in (a, b, out))
    a, b = _matrix(plan, a), _matrix(plan, b)
    if not rows_are_dense(out):
        return False
    plan.instructions.append(Instruction("gemm", [a, b, out, accumulate], [out.root]))
    if not accumulate:
        plan.products[out.root] = plan.instructions[-1]
    return True


def _matrix(plan: Lowering, x: View) -> View:
    """A batch of matrices with unit stride along rows or columns; a copy where there is none."""
    _, rows, columns = x.sizes
    _, down, along = x.strides
    if (along == 1 and (down >= columns or rows == 1)) or (down == 1 and (along >= rows or columns == 1)):
        return x
    copy = plan.arena(x.sizes, contiguous_strides(x.sizes))
    plan.pointwise(copy, [(COPY, x)])
    return copy


def accumulate(plan: Lowering, call: Call, a: Name, b: Name) -> bool:
    """``x + A B`` where nothing else needs x or A B: the product, or convolution, is added to x in place."""
    name = call.outputs[0] or ""
    out = plan.tensors[name]
    for x_name, product_name in ((a, b), (b, a)):
        x, product = plan.views[x_name], plan.views[product_name]
        made = plan.products.get(product.root)
        once = plan.reads[plan.base(x_name)] == plan.reads[plan.base(product_name)] == 1
        if made is None or not once or x.root.kind != "arena" or x.root is product.root:
            continue
        if not (x.whole and product.whole and x.sizes == product.sizes == tuple(out.shape)):
            continue
        fields = _added(made, product, x) if x.strides == out.stride() else None
        if fields is None:
            continue
        plan.instructions.remove(made)
        # From here on the memory of x holds the sum, which is no bare product.
        del plan.products[product.root]
        plan.products.pop(x.root, None)
        plan.instructions.append(Instruction(made.kind, fields, [x.root]))
        plan.views[name] = x
        return True
    return False


def _added(made: Instruction, product: View, x: View) -> list[Any] | None:
    """Fields of an instruction that adds its result to ``x``, where ``product`` shows that result."""
    if made.kind == "convolution":
        *operands, stride, padding, dilation, by_weight, flipped, _ = made.fields
        place = 1 if by_weight else 2
        target = _same_walk(operands[place], product, x)
        if target is None or not (by_weight or target.strides[3] == 1):
            return None
        operands[place] = target
        return [*operands, stride, padding, dilation, by_weight, flipped, True]
    left, right, target = made.fields[0], made.fields[1], _same_walk(made.fields[2], product, x)
    if target is None:
        return None
    if not rows_are_dense(target):
        left, right, target = transposed(right), transposed(left), transposed(target)
    return [left, right, target, True] if rows_are_dense(target) else None


def _same_walk(product: View, as_read: View, x: View) -> View | None:
    """The elements of ``x`` in the order of ``product``, when ``as_read`` shows the memory of ``product``."""
    moved = dict(zip(as_read.strides, zip(as_read.sizes, x.strides, strict=True), strict=True))
    if all(size == 1 or a == b for size, a, b in zip(x.sizes, as_read.strides, x.strides, strict=True)):
        return View(x.root, x.offset, product.sizes, product.strides)
    strides = []
    for size, stride in zip(product.sizes, product.strides, strict=True):
        if size != 1 and moved.get(stride, (0, 0))[0] != size:
            return None
        strides.append(moved[stride][1] if size != 1 else 0)
    return View(x.root, x.offset, product.sizes, tuple(strides))


OPS: dict[Any, Callable[[Lowering, Call], bool]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
}
