"""Products by replaying a recorded one: as torch ops, as a native plan, as a CUDA graph, or compiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad_ext.engines import codegen, cuda_graph, linked, native
from hypergrad_ext.engines.eager import RetainedGradient
from hypergrad_ext.engines.lowering import Unsupported
from hypergrad_ext.engines.program import Program
from hypergrad_ext.engines.recent import Recent
from hypergrad_ext.engines.record import Recording, Untraceable, record

_logger = logging.getLogger("hypergrad_ext")

# Largest difference between a compiled product and an eager one with the same vector: relative to that part of
# the product, and to all of it (a part may be zero but for rounding). Rounding stays far below, a lost term does not.
_TOLERANCE = {torch.float64: (1e-7, 1e-10), torch.float32: (1e-3, 1e-5)}
_LOW_PRECISION = (1e-1, 1e-2)


@dataclass
class Counts:
    """What the caches have done so far in this process: each compilation is one new program."""

    recorded: int = 0
    linked: int = 0
    compiled: int = 0
    captured: int = 0
    refused: int = 0

    @property
    def made(self) -> int:
        """What cost more than looking it up."""
        return self.compiled + self.captured


counts = Counts()
# A program holds no tensors.
_compiled: Recent[Callable | native.Plan] = Recent(64)
_Linear = Callable[[Sequence[Tensor]], list[Tensor]]
_logged: set[str] = set()


class TracedGradient:
    """The Hessian-vector products of one solve, after the first of them was recorded.

    The first product is an ordinary backward pass that is recorded on the way. Its operations find their
    compiled program in a cache that is shared by all solves; the saved tensors of this solve become its
    constants. From the third solve of a loss with a like graph on, they are found without that pass, and without the
    gradient's graph, if `linked` can; then the mixed derivative is replayed, too, by a plan of its own from the same
    recording. A product that cannot be replayed goes on as a backward pass, and the log says why.

    Attributes:
        form: How products are run: ``"traced"``, ``"native"``, ``"compiled"``, ``"cuda_graph"``; ``"eager"`` after a
            refusal.
        reason: Why, if not as asked for.
        seconds: Time it took to record and to bind, without compilation.
    """

    def __init__(self, gradient: RetainedGradient, form: str, clock: Callable[[], float] = time.perf_counter) -> None:
        """Products of ``gradient`` in the form ``"traced"``, ``"native"``, ``"compiled"`` or ``"cuda_graph"``."""
        self._gradient = gradient
        self._clock = clock
        self.form = form
        self.reason = ""
        self.seconds = 0.0
        self._run: _Linear | None = None
        self._bound: native.Bound | cuda_graph.Bound | None = None
        self._versions: list[tuple[Tensor, int]] = []
        # That of a link; passes that are recorded in this solve have the gradient's graph.
        self._found: Recording | None = None

    def hvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``, one tensor per parameter."""
        first = self.start(v) if self._run is None else None
        if first is not None:
            return first
        return self._run(v) if self._run and self._unchanged() else self._gradient.hvp(v)

    def hvps(self, v: Sequence[Tensor]) -> list[Tensor]:
        """The same for tensors with a leading dimension k."""
        if isinstance(self._bound, native.Bound) and self._unchanged():
            return self._bound.products(v)
        products = [self.hvp([t[j] for t in v]) for j in range(len(v[0]))]
        return [torch.stack(parts) for parts in zip(*products, strict=True)]

    def mixed(self, x: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor | None] | None:
        """The mixed derivative, where that is replayed without the gradient's graph; else None."""
        if self._found is None or not self._unchanged() or not _same(others, self._gradient.others):
            return None
        plan = _compiled.get(("mixed", self._found.key))
        if not isinstance(plan, native.Plan) or any(t.dtype != x[0].dtype for t in self._gradient.leaves):
            return None
        parts = iter(plan.bind(self._found.constants, self._found.scalars).product(x))
        return [next(parts) if part else None for part in self._found.mixed]

    def bound_now(self) -> native.Bound | cuda_graph.Bound | None:
        """What runs whole solves, if it runs the products: a native plan or a CUDA graph."""
        return self._bound if self._unchanged() else None

    def _unchanged(self) -> bool:
        # After a change in place the saved tensors are no longer those of one point: autograd raises or copes.
        return all(t._version == version for t, version in self._versions)

    def start(self, v: Sequence[Tensor]) -> list[Tensor] | None:
        """Bind a program to this solve; the product with ``v``, recorded, where there was no other way."""
        begin = self._clock()
        graph = linked.look(self._gradient, v)
        found = linked.find(graph) if graph is not None else None
        if found is not None and self._cached(found) is not None:
            counts.linked += 1
            self.seconds = self._clock() - begin
            self._bind(found, v)
            self._found = found
            return None
        try:
            recording, result = self._record(graph, v)
            counts.recorded += 1
            self.seconds = self._clock() - begin
            self._bind(recording, v)
        except Untraceable as refusal:
            counts.refused += 1
            self._refuse(str(refusal))
            return self._gradient.hvp(v)
        if graph is not None and linked.learn(graph, recording, self._gradient):
            self._prepare_mixed(recording, v)
        # A product with a graph would be a leak.
        return [t.detach() for t in result]

    def _record(self, graph: Any | None, v: Sequence[Tensor]) -> tuple[Recording, list[Tensor]]:
        """Record a product, if it may be linked to ``graph`` together with the mixed derivative."""
        if graph is None:
            return record(self._gradient.hvp, v)
        mixed: list[bool] = []

        def product(v: Sequence[Tensor]) -> list[Tensor]:
            # To be followed from the loss on, the gradient is built once more.
            gradient = self._gradient.fresh(self._gradient.seed) if follow is not None else self._gradient
            whole, parts = gradient.hvp_and_mixed(v)
            mixed.extend(part is not None for part in parts)
            return [*whole, *(part for part in parts if part is not None)]

        follow = graph if linked.wanted(graph) else None
        recording, result = record(product, v, follow)
        recording.mixed = mixed
        return recording, result[: len(v)]

    def _prepare_mixed(self, recording: Recording, v: Sequence[Tensor]) -> None:
        """Compile the mixed derivative for solves that will have no graph of the gradient."""
        key = "mixed", recording.key
        if self.form == "traced" or not any(recording.mixed) or _compiled.get(key) is not None:
            return
        try:
            plan = native.lower(Program(recording, slice(len(v), None)), recording)
            bound = plan.bind(recording.constants, recording.scalars)
            self._check(bound.product, self._mixed_parts, v)
        except (Unsupported, Untraceable) as refusal:
            _log_once(f"mixed derivatives by backward passes: {refusal}")
        else:
            _compiled.put(key, plan)

    def _mixed_parts(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [part for part in self._gradient.mixed(v, self._gradient.others) if part is not None]

    def _bind(self, recording: Recording, v: Sequence[Tensor]) -> None:
        program = self._program(recording, v)
        begin = self._clock()
        constants, scalars = recording.constants, recording.scalars
        self._versions = [(t, t._version) for t in (*self._gradient.leaves, *constants) if not t.is_inference()]
        if isinstance(program, native.Plan):
            self._bound = program.bind(constants, scalars)
        else:
            self._run = lambda v: program([t.contiguous() for t in v], constants, scalars)
            if self.form == "cuda_graph":
                self._bound = self._graph(program, recording, v)
            if self._bound is None and self.form != "compiled":
                self.form = "traced"
        if self._bound is not None:
            self._run = self._bound.product
        self.seconds += self._clock() - begin

    def _graph(self, program: Callable, recording: Recording, v: Sequence[Tensor]) -> cuda_graph.Bound | None:
        try:
            bound = cuda_graph.bind(recording.key, program, recording.constants, recording.scalars, v)
            counts.captured += bound.fresh
            if bound.fresh:
                self._check(bound.product, self._gradient.hvp, v)
        except Untraceable as refusal:
            self.reason = str(refusal)
            _log_once(f"Hessian-vector products without a CUDA graph: {refusal}")
            return None
        return bound

    def _program(self, recording: Recording, v: Sequence[Tensor]) -> Callable | native.Plan:
        program = self._cached(recording)
        if program is not None:
            return program
        program = self._compile(recording, len(v))
        constants, scalars = recording.constants, recording.scalars
        if isinstance(program, native.Plan):
            self._check(program.bind(constants, scalars).product, self._gradient.hvp, v)
        else:
            self._check(lambda w: program(w, constants, scalars), self._gradient.hvp, v)
        counts.compiled += 1
        _compiled.put(self._key(recording), program)
        return program

    def _cached(self, recording: Recording) -> Callable | native.Plan | None:
        return _compiled.get(self._key(recording))

    def _key(self, recording: Recording) -> Hashable:
        return "traced" if self.form == "cuda_graph" else self.form, recording.key

    def _compile(self, recording: Recording, parts: int) -> Callable | native.Plan:
        program = Program(recording, slice(parts))
        if self.form in ("native", "compiled"):
            try:
                return native.lower(program, recording, compile_kernels=self.form == "compiled")
            except Unsupported as refusal:
                if self.form == "native":
                    _log_once(f"Hessian-vector products replayed as torch ops: {refusal}")
            except codegen.NoCompiler as refusal:
                _log_once(f"Hessian-vector products replayed by kernels for any shape: {refusal}")
                return native.lower(program, recording)
        run = torch.compile(program.run, fullgraph=True, dynamic=False) if self.form == "compiled" else program.run
        return torch.no_grad()(run)

    def _check(self, replay: _Linear, backward: _Linear, v: Sequence[Tensor]) -> None:
        """Compare with a backward pass for another vector: a recording that missed something is found here."""
        w = [_other(t) for t in v]
        truth, value = backward(w), replay(w)
        total = float(torch.stack([t.double().norm() for t in truth]).norm())
        if not total < float("inf"):
            raise Untraceable("a product is not finite")
        for part, (ours, theirs) in enumerate(zip(value, truth, strict=True)):
            relative, absolute = _TOLERANCE.get(theirs.dtype, _LOW_PRECISION)
            difference = float((ours.double() - theirs.double()).norm())
            if not difference <= relative * float(theirs.double().norm()) + absolute * total:
                raise Untraceable(f"replayed with another vector, part {part} of the product is wrong")

    def _refuse(self, reason: str) -> None:
        self._run, self._bound, self.form, self.reason = self._gradient.hvp, None, "eager", reason
        _log_once(f"Hessian-vector products by backward passes: {reason}")


def clear_cache() -> None:
    """Forget all compiled programs and set the counts to zero."""
    _compiled.clear()
    linked.clear()
    cuda_graph.clear_cache()
    counts.recorded = counts.linked = counts.compiled = counts.captured = counts.refused = 0


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _logger.warning(message)


def _same(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether they are the very same tensors."""
    return [id(t) for t in tensors] == [id(t) for t in others]


def _other(t: Tensor) -> Tensor:
    """A vector unlike ``t``, the same in every run."""
    generator = torch.Generator().manual_seed(t.numel())
    return torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device, t.dtype)
