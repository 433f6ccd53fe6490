"""What a native plan does between its matrix products, as C++ for these very shapes, compiled by Inductor's compiler.

A group of pointwise ops becomes one loop whose intermediate results stay in registers: what nothing else reads is never
stored. Products and convolutions remain as they are, since Inductor would call for them what the plan calls, or slower
ones. Kernels take pointers, so that layers of equal shapes share one.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from hypergrad_ext.engines.layout import ADD, AXPY, COPY, DIV, FILL, MUL, MULADD, SCALE, SELECT, SUB, Instruction
from hypergrad_ext.engines.views import Root, View

_EXPRESSIONS = {
    COPY: "{a}",
    FILL: "{n}",
    ADD: "{a} + {b}",
    SUB: "{a} - {b}",
    MUL: "{a} * {b}",
    DIV: "{a} / {b}",
    AXPY: "{a} + {n} * {b}",
    SCALE: "{a} * {n}",
    MULADD: "{a} * {b} + {c}",
    SELECT: "{b} != 0 ? {a} : 0",
}
# Inductor writes vectors itself, and switches the compiler's off.
_FLAGS = ("-march=native", "-ftree-loop-vectorize", "-ffp-contract=fast")
# Elements that are added up in the plan's own dtype, before the sum goes on in float64.
_STRIP = 512


class NoCompiler(Exception):
    """There is no working C++ compiler; the text says more."""


def compiled(instructions: Sequence[Instruction], dtype: torch.dtype) -> list[Instruction]:
    """Instructions in which compiled kernels take the place of pointwise ones, sums and softmax.

    Args:
        instructions: Those of a plan, before its memory is laid out.
        dtype: The plan's.

    Returns:
        The instructions.

    Raises:
        NoCompiler: If Inductor finds none, or it fails.
    """
    single = [part for i in instructions for part in i.parts() or (i,)]
    users = Counter(root for i in single for root in {v.root for v in i.views()} | set(i.writes))
    bodies: dict[str, int] = {}
    kernels: list[Instruction] = []

    def replaced(i: Instruction) -> Instruction:
        if i.parts():
            parts = list(map(replaced, i.parts()))
            return Instruction(i.kind, [*i.fields[:-1], parts], [root for part in parts for root in part.writes])
        if i.kind == "pointwise":
            first, (views, numbers, lines) = (i.fields[0] or (1,))[0], _pointwise(i, users)
        elif i.kind == "sum":
            first, (views, numbers, lines) = (i.fields[0] or (1,))[0], _sum(i)
        elif i.kind == "softmax":
            first, (views, numbers, lines) = i.fields[1], _softmax(i)
        else:
            return i
        kernel = bodies.setdefault("\n".join(lines), len(bodies))
        written = {v.root for v in views}
        writes = [root for root in i.writes if root in written]
        kernels.append(Instruction("compiled", [kernel, views, numbers, first, _apart(i)], writes))
        return kernels[-1]

    result = list(map(replaced, instructions))
    addresses = _load(list(bodies), "double" if dtype == torch.float64 else "float")
    for i in kernels:
        i.fields[0] = addresses[i.fields[0]]
    return result


def _apart(i: Instruction) -> bool:
    """Whether what is written lies apart for indices of the first dimension that differ."""
    if i.kind == "softmax":
        return True
    sizes, *_ = i.fields
    if i.kind == "sum":
        return len(sizes) > 1 and i.fields[1].strides[0] != 0
    _, operands, ops = i.fields
    return bool(sizes) and all(operands[op[1]].strides[0] != 0 for op in ops)


def _load(bodies: list[str], real: str) -> list[int]:
    source = [f"typedef {real} real;"]
    for at, body in enumerate(bodies):
        arguments = "real* const* p, const double* numbers, long begin, long end"
        source.append(f'extern "C" void kernel{at}({arguments}) {{\n{body}\n}}')
    try:
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load("\n".join(source) + "\n", extra_flags=_FLAGS)
    except Exception as error:
        raise NoCompiler(f"{type(error).__name__}: {error}") from error
    functions = [getattr(library, f"kernel{at}") for at in range(len(bodies))]
    return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]


def _pointwise(instruction: Instruction, users: Counter[Root]) -> tuple[list[View], list[int], list[str]]:
    sizes, operands, ops = instruction.fields
    views: list[View] = []
    numbers: list[int] = []
    known: dict[int, str] = {}
    inner: list[str] = []

    def place(view: View) -> str:
        views.append(view)
        return f"p{len(views) - 1}[{_index(sizes, view, len(sizes) - 1)}]"

    def value(i: int) -> str:
        if i < 0:
            return ""
        if i not in known:
            known[i] = f"v{i}"
            inner.append(f"const real v{i} = {place(operands[i])};")
        return known[i]

    stores = []
    for code, out, *inputs, scalar in ops:
        a, b, c = map(value, inputs)
        if scalar >= 0:
            numbers.append(scalar)
        expression = _EXPRESSIONS[code].format(a=a, b=b, c=c, n=f"n{len(numbers) - 1}")
        inner.append(f"const real t{len(inner)} = {expression};")
        known[out] = inner[-1].split()[2]
        if operands[out].root.kind != "arena" or users[operands[out].root] > 1:
            stores.append((operands[out], known[out]))
    inner += [f"{place(view)} = {name};" for view, name in stores]
    lines = [f"const real n{at} = numbers[{at}];" for at in range(len(numbers))]
    return views, numbers, [*lines, *_loops(sizes, views, inner)]


def _loops(sizes: Sequence[int], views: Sequence[View], inner: Sequence[str]) -> list[str]:
    """Nested loops around the innermost statements; all views are walked through at once."""
    last = len(sizes) - 1
    lines = [_loop(sizes, d) for d in range(last)]
    for at, view in enumerate(views):
        offset = "".join(f" + i{d} * {view.strides[d]}" for d in range(last) if view.strides[d])
        lines.append(f"real* const p{at} = p[{at}]{offset};")
    if last >= 0:
        lines += ["#pragma GCC ivdep", _loop(sizes, last)]
    return [*lines, *inner, "}" * len(sizes)]


def _loop(sizes: Sequence[int], d: int) -> str:
    """The head of a loop; of the first dimension a kernel runs a range."""
    return f"for (long i{d} = {0 if d else 'begin'}; i{d} < {sizes[d] if d else 'end'}; ++i{d}) {{"


def _index(sizes: Sequence[int], view: View, d: int) -> str:
    return "0" if d < 0 or not view.strides[d] else f"i{d}" if view.strides[d] == 1 else f"i{d} * {view.strides[d]}"


def _sum(instruction: Instruction) -> tuple[list[View], list[int], list[str]]:
    sizes, out, source = instruction.fields
    views, last = [out, source], len(sizes) - 1
    if last < 0 or out.strides[last]:
        to, of = (_index(sizes, view, last) for view in views)
        return views, [], _loops(sizes, views, [f"p0[{to}] += p1[{of}];"])
    lines = [_loop(sizes, d) for d in range(last)]
    for at, view in enumerate(views):
        offset = "".join(f" + i{d} * {view.strides[d]}" for d in range(last) if view.strides[d])
        lines.append(f"real* const p{at} = p[{at}]{offset};")
    lines += _strips(sizes[last], f"sum += p1[{_index(sizes, source, last)}];", f"i{last}")
    return views, [], [*lines, "p0[0] += total;", "}" * last]


def _strips(n: int, statement: str, index: str) -> Iterator[str]:
    """A sum over ``index`` in strips, to a double called ``total``."""
    yield "double total = 0;"
    yield f"for (long strip = 0; strip < {n}; strip += {_STRIP}) {{"
    yield f"const long end = strip + {_STRIP} < {n} ? strip + {_STRIP} : {n};"
    yield "real sum = 0;"
    yield "#pragma omp simd reduction(+:sum)"
    yield f"for (long {index} = strip; {index} < end; ++{index}) {statement}"
    yield "total += sum;"
    yield "}"


def _softmax(instruction: Instruction) -> tuple[list[View], list[int], list[str]]:
    log, _, columns, grad, probabilities, out = instruction.fields
    term, result = ("g[j]", "g[j] - p1[j] * by") if log else ("g[j] * p1[j]", "p1[j] * (g[j] - by)")
    lines = [
        "for (long i = begin; i < end; ++i) {",
        f"const real* const g = p[0] + i * {columns};",
        f"const real* const p1 = p[1] + i * {columns};",
        f"real* const y = p[2] + i * {columns};",
        *_strips(columns, f"sum += {term};", "j"),
        "const real by = total;",
        "#pragma GCC ivdep",
        f"for (long j = 0; j < {columns}; ++j) y[j] = {result};",
        "}",
    ]
    return [grad, probabilities, out], [], lines
