"""Torch ops as instructions of a native plan: matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hypergrad_ext.engines.layout import COPY, Instruction
from hypergrad_ext.engines.record import Call, Name
from hypergrad_ext.engines.views import View, batched, contiguous_strides, expanded, rows_are_dense, transposed

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
        plan.gemms[out.root] = plan.instructions[-1]
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
    """``x + A B`` where nothing else needs x or A B: the product is added to x in place."""
    name = call.outputs[0] or ""
    out = plan.tensors[name]
    for x_name, product_name in ((a, b), (b, a)):
        x, product = plan.views[x_name], plan.views[product_name]
        gemm = plan.gemms.get(product.root)
        once = plan.reads[plan.base(x_name)] == plan.reads[plan.base(product_name)] == 1
        if gemm is None or not once or x.root.kind != "arena" or x.root is product.root:
            continue
        if not (x.whole and product.whole and x.sizes == product.sizes == tuple(out.shape)):
            continue
        left, right, target = gemm.fields[0], gemm.fields[1], _same_walk(gemm.fields[2], product, x)
        if x.strides != out.stride() or target is None:
            continue
        if not rows_are_dense(target):
            left, right, target = transposed(right), transposed(left), transposed(target)
        if not rows_are_dense(target):
            continue
        plan.instructions.remove(gemm)
        # From here on the memory of x holds the sum, which is no bare product.
        del plan.gemms[product.root]
        plan.gemms.pop(x.root, None)
        plan.instructions.append(Instruction("gemm", [left, right, target, True], [x.root]))
        plan.views[name] = x
        return True
    return False


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
