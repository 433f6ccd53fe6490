"""Torch ops as instructions of a native plan: pointwise ops, copies, sums and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad_ext.engines.layout import ADD, AXPY, COPY, DIV, FILL, MUL, SCALE, SELECT, SUB, Instruction, coalesced
from hypergrad_ext.engines.lower_matrix import accumulate
from hypergrad_ext.engines.program import names_in
from hypergrad_ext.engines.record import Call, Text
from hypergrad_ext.engines.views import View, inserted

if TYPE_CHECKING:
    from hypergrad_ext.engines.lowering import Lowering

aten = torch.ops.aten

# Multiply the vector's part by something that only constants decide: found once per solve.
_DIAGONAL = {
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
    aten.threshold_backward.default,
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.softplus_backward.default,
    aten.elu_backward.default,
    aten.leaky_relu_backward.default,
    aten.hardtanh_backward.default,
}
# By zero or one, and zero is zero whatever the vector's part: what an inactive unit hides may be infinite.
_SELECTIVE = {aten.threshold_backward.default, aten.hardtanh_backward.default}


def _binary(plan: Lowering, call: Call, code: int) -> bool:
    a, b = call.args[:2]
    alpha = dict(call.kwargs).get("alpha", call.args[2] if len(call.args) > 2 else 1)
    if type(b) is str and b[0] == "s" or isinstance(b, (int, float)):
        if code == MUL:
            return plan.emit(call, [(SCALE, plan.operand(a), plan.number(b))])
        return False
    x, y = plan.operand(a), plan.operand(b)
    if x is None or y is None:
        return False
    if code in (ADD, SUB) and alpha != 1:
        if type(alpha) is str:
            return False
        return plan.emit(call, [(AXPY, x, y, plan.number(alpha if code == ADD else -alpha))])
    if code == ADD and accumulate(plan, call, a, b):
        return True
    return plan.emit(call, [(code, x, y)])


def _divide(plan: Lowering, call: Call) -> bool:
    a, b = call.args
    if type(b) is str and b[0] != "s":
        x, y = plan.operand(a), plan.operand(b)
        return x is not None and y is not None and plan.emit(call, [(DIV, x, y)])
    dtype = plan.dtype

    def inverse(constants: Sequence[Tensor], scalars: Sequence[float]) -> Tensor:
        return torch.tensor(_value(b, scalars), dtype=torch.float64).reciprocal().to(dtype)

    reciprocal = plan.derive(("reciprocal", b), inverse)
    return plan.emit(call, [(MUL, plan.operand(a), plan.views[reciprocal])])


def _negate(plan: Lowering, call: Call) -> bool:
    return plan.emit(call, [(SCALE, plan.operand(call.args[0]), plan.number(-1.0))])


def _diagonal(plan: Lowering, call: Call) -> bool:
    """``op(g, constants)`` as ``g * op(1, constants)``."""
    rest = call.args[1:]
    named = list(names_in(Call(None, rest, call.kwargs, (), True)))
    constants = [n for n in named if n[0] == "c"]
    if not constants or any(n[0] not in "cs" for n in named) or call.args[0][0] not in "vn":
        return False
    op, kwargs, dtype = call.op, call.kwargs, plan.dtype
    shape = plan.views[call.args[0]].sizes

    def slope(constants: Sequence[Tensor], scalars: Sequence[float]) -> Tensor:
        values = [_resolve(a, constants, scalars) for a in rest]
        like = next(a for a in values if isinstance(a, Tensor))
        ones = torch.ones(shape, dtype=dtype, device=like.device)
        return op(ones, *values, **{k: _resolve(a, constants, scalars) for k, a in kwargs})

    if any(plan.views[n].sizes != shape for n in constants):
        return False
    name = plan.derive((op, repr((rest, kwargs))), slope)
    code = SELECT if op in _SELECTIVE else MUL
    return plan.emit(call, [(code, plan.operand(call.args[0]), plan.views[name])])


def _copy(plan: Lowering, call: Call) -> bool:
    x = plan.operand(call.args[0])
    return x is not None and plan.emit(call, [(COPY, x)])


def _zeros(plan: Lowering, call: Call) -> bool:
    return plan.emit(call, [(FILL, plan.number(0.0))])


def _concatenate(plan: Lowering, call: Call) -> bool:
    dim = call.args[1] if len(call.args) > 1 else 0
    parts = [x for x in map(plan.operand, call.args[0]) if x is not None]
    if len(parts) < len(call.args[0]):
        return False
    out = plan.result(call)
    if call.op is aten.stack.default:
        dim %= len(out.sizes)
        parts = [View(x.root, x.offset, inserted(x.sizes, dim, 1), inserted(x.strides, dim, 0)) for x in parts]
    dim %= len(out.sizes)
    at = 0
    for x in parts:
        if len(x.sizes) != len(out.sizes):
            continue  # torch lets an empty vector join anything
        sizes = x.sizes
        plan.pointwise(View(out.root, out.offset + at * out.strides[dim], sizes, out.strides), [(COPY, x)])
        at += sizes[dim]
    return True


def _slice_backward(plan: Lowering, call: Call) -> bool:
    grad, x = call.args[0], plan.operand(call.args[0])
    if x is None or type(grad) is not str:
        return False
    out = plan.result(call)
    plan.pointwise(out, [(FILL, plan.number(0.0))])
    if call.op is aten.select_backward.default:
        _, sizes, dim, index = call.args
        dim, step = dim % len(sizes), 1
        start = index % sizes[dim]
        x = View(x.root, x.offset, inserted(x.sizes, dim, 1), inserted(x.strides, dim, 0))
    else:
        _, sizes, dim, start, _, step = call.args
        dim %= len(sizes)
        start = min(max(start + sizes[dim] if start < 0 else start, 0), sizes[dim])
    strides = tuple(s * step if d == dim else s for d, s in enumerate(out.strides))
    if math.prod(x.sizes):
        plan.pointwise(View(out.root, out.offset + start * out.strides[dim], x.sizes, strides), [(COPY, x)])
    return True


def _sum(plan: Lowering, call: Call) -> bool:
    x = plan.operand(call.args[0])
    if x is None or any(k == "dtype" and a is not None for k, a in call.kwargs):
        return False
    rank = len(x.sizes)
    dims = call.args[1] if len(call.args) > 1 else None
    reduced = {d % rank for d in dims} if dims and rank else set(range(rank))
    summed(plan, x, plan.result(call), reduced, keep=bool(call.args[2]) if len(call.args) > 2 else False)
    return True


def summed(plan: Lowering, x: View, out: View, reduced: set[int], keep: bool = False) -> None:
    """Sums over some dimensions of ``x``, which ``out`` keeps with size 1 or has not."""
    rank = len(x.sizes)
    strides, position = [], 0
    for d in range(rank):
        if d in reduced:
            strides.append(0)
            position += keep
        else:
            strides.append(out.strides[position])
            position += 1
    plan.pointwise(out, [(FILL, plan.number(0.0))])
    if math.prod(x.sizes):
        # By rows of memory, and what is kept before what is added up: one sum has all of its rows one after another.
        *order, last = sorted(range(rank), key=lambda d: (x.sizes[d] != 1, -x.strides[d])) or [0]
        order = [*sorted(order, key=lambda d: d in reduced), last] if rank else []
        target = View(out.root, out.offset, tuple(x.sizes[d] for d in order), tuple(strides[d] for d in order))
        source = View(x.root, x.offset, target.sizes, tuple(x.strides[d] for d in order))
        sizes, views = coalesced(target.sizes, [target, source])
        plan.instructions.append(Instruction("sum", [sizes, *views], [out.root]))


def _softmax(plan: Lowering, call: Call) -> bool:
    grad, output, dim = call.args[:3]
    t = plan.tensors[grad]
    if output[0] != "c" or t.dim() == 0 or dim % t.dim() != t.dim() - 1:
        return False
    log = call.op is aten._log_softmax_backward_data.default
    if log:
        i = int(output[1:])
        output = plan.derive(("exp", output), lambda c, s: c[i].exp().contiguous())
    g, y = plan.contiguous_operand(grad), plan.contiguous_operand(output)
    out = plan.result(call)
    if not out.contiguous:
        return False
    columns = t.shape[-1]
    plan.instructions.append(Instruction("softmax", [log, t.numel() // columns, columns, g, y, out], [out.root]))
    return True


def _resolve(a: Any, constants: Sequence[Tensor], scalars: Sequence[float]) -> Any:
    if type(a) is str:
        return constants[int(a[1:])] if a[0] == "c" else scalars[int(a[1:])]
    return a.value if isinstance(a, Text) else a


def _value(a: Any, scalars: Sequence[float]) -> float:
    return scalars[int(a[1:])] if type(a) is str else float(a)


OPS: dict[Any, Callable[[Lowering, Call], bool]] = {
    aten.add.Tensor: lambda plan, call: _binary(plan, call, ADD),
    aten.sub.Tensor: lambda plan, call: _binary(plan, call, SUB),
    aten.mul.Tensor: lambda plan, call: _binary(plan, call, MUL),
    aten.mul.Scalar: lambda plan, call: _binary(plan, call, MUL),
    aten.div.Tensor: _divide,
    aten.div.Scalar: _divide,
    aten.neg.default: _negate,
    aten.clone.default: _copy,
    aten.zeros_like.default: _zeros,
    aten.new_zeros.default: _zeros,
    aten.cat.default: _concatenate,
    aten.stack.default: _concatenate,
    aten.select_backward.default: _slice_backward,
    aten.slice_backward.default: _slice_backward,
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    aten._softmax_backward_data.default: _softmax,
    aten._log_softmax_backward_data.default: _softmax,
    **dict.fromkeys(_DIAGONAL, _diagonal),
}
