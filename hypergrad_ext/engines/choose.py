"""Which engine runs the products of a solve: as asked for, or by a rule and one small measurement.

``"auto"`` on the CPU: the first solve of a function runs backward passes, unless it is long (`LONG`). The
second one, if `EXPLORE` products are to be expected (the solver's steps, or as many as the last solve took),
records one product, compiles it and times it. What was found (seconds per product either way, seconds to
start) is remembered, and from then on a solve is replayed exactly if that is expected to be faster.
On a GPU the same with a CUDA graph, if launching a product takes the host as long as the GPU takes to run it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad_ext import _native, backends
from hypergrad_ext.engines import cuda_graph, native, traced
from hypergrad_ext.engines.batches import BatchedGradient
from hypergrad_ext.engines.eager import RetainedGradient
from hypergrad_ext.engines.recent import Recent
from hypergrad_ext.engines.traced import TracedGradient

ENGINES = ("auto", "eager", "traced", "native", "cuda_graph", "compiled")

# Products still to come that make it worth finding out whether replaying them is faster: recording and compiling
# take about as long as ten to thirty of them.
EXPLORE = 8
# Products, expected or made, that make a solve long: worth it even for a function that is never seen again.
LONG = 64
# A replay has to be this much faster to be chosen: the clock is not better than that.
GAIN = 0.9
# Programs in a row that were compiled for one solve and not used by another: then the function is never the same.
PATIENCE = 3
# Every time that `start` is what speaks against replaying it is taken for this much less, so that one bad measurement
# on a busy machine is not the last; and it is never taken for more than this much more than it was.
FADE, RISE = 0.99, 1.02

_logger = logging.getLogger("hypergrad_ext")

Gradient = RetainedGradient | BatchedGradient


@dataclass
class History:
    """What is known of one function at one set of parameter shapes. It steers speed, never results.

    Attributes:
        products: Products of the last solve.
        eager: Seconds per product by a backward pass; None before the first.
        replay: Seconds per product replayed; None before the first.
        start: Seconds to record and bind, without compilation; None before the first.
        starts: How many times that was measured.
        misses: Solves in a row that had to compile.
        refusal: Why this function is left to backward passes.
    """

    products: int = 0
    eager: float | None = None
    replay: float | None = None
    start: float | None = None
    starts: int = 0
    misses: int = 0
    refusal: str = ""


_histories: Recent[History] = Recent(256)


def history_of(key: Hashable) -> History:
    """The history under a key, a new one if there is none; the oldest are forgotten."""
    history = _histories.get(key) or History()
    _histories.put(key, history)
    return history


def clear_histories() -> None:
    """Forget what was measured."""
    _histories.clear()


class Products:
    """The Hessian-vector products of one operator, by the engine that was asked for or chosen.

    Attributes:
        reason: Why the engine in use was chosen, if it was not asked for.
    """

    def __init__(self, gradient: Gradient, engine: str, key: Hashable) -> None:
        """Products of ``gradient``; ``key`` tells which function it is, for what is remembered."""
        self._gradient = gradient
        self._asked = engine
        self._history = history_of(key)
        self._expected = self._history.products
        self._seen = self._history.products > 0
        self._made = 0
        self._declined = False
        self._device = gradient.leaves[0].device
        self._traced: TracedGradient | None = None
        self.reason = "asked for" if engine != "auto" else ""
        if engine == "auto" and self._device.type != "cpu" and cuda_graph.unavailable(self._device):
            self.reason = cuda_graph.unavailable(self._device)
        elif engine == "auto" and torch.are_deterministic_algorithms_enabled():
            # The engines round differently, and which one runs is for a clock to say.
            self.reason = "deterministic algorithms"
        elif not gradient.curved:
            self.reason = "the gradient is constant"
        self._eager = engine == "eager" or self.reason not in ("asked for", "")

    @property
    def engine(self) -> str:
        """The engine in use: ``"eager"``, ``"traced"``, ``"native"``, ``"cuda_graph"`` or ``"compiled"``."""
        return "eager" if self._traced is None else self._traced.form

    def expect(self, products: int) -> None:
        """Take note that about so many products will follow."""
        self._expected = self._made + products

    def hvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``, one tensor per parameter."""
        self._count(1)
        if self._passes_backward():
            return self._timed(self._gradient.hvp, v, 1)
        return self._replayed(v)

    def hvps(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` for tensors with a leading dimension k."""
        k = v[0].shape[0]
        self._count(k)
        if self._passes_backward():
            return self._timed(self._gradient.hvps, v, k)
        products = [self._replayed([t[j] for t in v]) for j in range(k)]
        return [torch.stack(parts) for parts in zip(*products, strict=True)]

    def _passes_backward(self) -> bool:
        if self._eager or torch._C._len_torch_dispatch_stack() > 0:
            return True
        return self._traced is None and not self._worth_it()

    def _replayed(self, v: Sequence[Tensor]) -> list[Tensor]:
        if self._traced is not None:
            return self._traced.hvp(v)
        return self._gradient.hvp(v) if self._eager else self._start(v)

    def bound(self, v: Sequence[Tensor], backend: str | None) -> native.Bound | cuda_graph.Bound | None:
        """What runs whole solves with this solve's data, if products run on it; recorded with ``v`` if need be."""
        if self._eager or torch._C._len_torch_dispatch_stack() > 0:
            return None
        form = _form(self._device, backend)
        if form == "traced" or self._asked not in ("auto", form):
            return None
        if self._traced is None:
            if not self._worth_it():
                return None
            self._start(v)
        return self._traced.bound_now() if self._traced is not None else None

    def made(self, products: int) -> None:
        """Take note of products that were made elsewhere, by the plan itself."""
        self._count(products)

    def _count(self, products: int) -> None:
        self._made += products
        self._history.products = self._made

    def _timed(self, run: Callable, v: Sequence[Tensor], products: int) -> list[Tensor]:
        if self._eager:
            return run(v)
        begin = time.perf_counter()
        result = run(v)
        seconds = (time.perf_counter() - begin) / products
        known = self._history.eager
        self._history.eager = seconds if known is None else min(known * RISE, seconds)
        return result

    def _worth_it(self) -> bool:
        if self._asked != "auto":
            return True
        history, left = self._history, self._expected - self._made + 1
        if history.refusal:
            self._eager, self.reason = True, history.refusal
            return False
        if history.eager is None or history.replay is None or history.start is None:
            # Without one backward pass there is nothing to compare with.
            return history.eager is not None and (left >= (EXPLORE if self._seen else LONG) or self._made > LONG)
        # A solve that goes on longer than expected is expected to go on.
        left = max(left, self._made - LONG)
        if left * (history.eager - history.replay) > history.start:
            return True
        if history.starts < 2 and left >= EXPLORE:
            # The first recording of a process is not like the others.
            return True
        if not self._declined:
            self._declined = True
            history.start *= FADE
        return False

    def _start(self, v: Sequence[Tensor]) -> list[Tensor]:
        assert isinstance(self._gradient, RetainedGradient)
        form = self._asked
        if form == "auto":
            form = _form(self._device, None)
            if form == "cuda_graph" and self._history.replay is None and not self._launch_bound(v):
                self._history.refusal = self.reason = "the GPU takes longer than launching does"
                self._eager = True
                return self._gradient.hvp(v)
        made, begin = traced.counts.made, time.perf_counter()
        self._traced = TracedGradient(self._gradient, form)
        result = self._traced.start(v)
        if self._asked == "auto":
            self._learn(v, time.perf_counter() - begin, traced.counts.made > made)
        return result

    def _launch_bound(self, v: Sequence[Tensor]) -> bool:
        bound, seconds = cuda_graph.launch_bound(lambda: self._gradient.hvp(v), self._device)
        # What was known was the time to launch it.
        self._history.eager = seconds
        return bound

    def _learn(self, v: Sequence[Tensor], seconds: float, compiled: bool) -> None:
        history, running = self._history, self._traced
        assert running is not None
        if running.form == "eager":
            history.refusal = running.reason
        elif compiled:
            history.misses += 1
            seconds = running.seconds
            if history.misses > PATIENCE:
                history.refusal = "every solve is another program"
        else:
            history.misses = 0
        history.starts += 1
        history.start = seconds if history.start is None else min(history.start * RISE, seconds)
        if running.form != "eager" and history.replay is None:
            history.replay = min(_seconds(running, v, self._device) for _ in range(3))
            ratio = (history.eager or 0.0) / history.replay
            if history.replay > GAIN * (history.eager or 0.0):
                history.refusal = f"a replayed product takes {1 / max(ratio, 1e-9):.2f} of a backward pass"
            _logger.info(
                "engine %s for %d parameters: %.3g times as fast as backward passes, %.3g ms to start%s",
                "eager" if history.refusal else running.form,
                len(self._gradient.leaves),
                ratio,
                history.start * 1e3,
                f" ({history.refusal})" if history.refusal else "",
            )
        self.reason = (
            history.refusal or f"measured, {(history.eager or 0.0) / (history.replay or 1.0):.2f} times faster"
        )
        if history.refusal:
            self._traced, self._eager = None, True


def _seconds(running: TracedGradient, v: Sequence[Tensor], device: torch.device) -> float:
    if not cuda_graph.unavailable(device):
        return cuda_graph.launch_bound(lambda: running.hvp(v), device)[1]
    begin = time.perf_counter()
    running.hvp(v)
    return time.perf_counter() - begin


def _form(device: torch.device, backend: str | None) -> str:
    """The fastest form of a replay on this device with this backend for the steps."""
    if not cuda_graph.unavailable(device):
        # A graph's steps are those of the default backend.
        return "cuda_graph" if backend is None else "traced"
    return "native" if _native_may_run(device, backend) else "traced"


def _native_may_run(device: torch.device, backend: str | None) -> bool:
    if _native._C is None or device.type != "cpu":
        return False
    return backends.select({"cpp": native.lower, "torch": native.lower}, "cpu", backend)[0] == "cpp"
