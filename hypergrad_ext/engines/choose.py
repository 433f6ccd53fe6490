"""Which engine runs the products of a solve: as asked for, or by a rule and one small measurement.

``"auto"`` on the CPU: a solve of which `EXPLORE` products are to be expected (the solver's steps, but no more than the
last solve took) records one product, compiles it, and times it in turn with backward passes: in the function's first
solve if a backward pass takes less than `QUICK` seconds or the solve is long (`LONG`), else in the second. What was
found (seconds per product either way, seconds to start) is remembered, and from then on a solve is replayed exactly
if that is expected to be faster. On a GPU the same with a CUDA graph, if launching a product takes the host as long as
the GPU takes to run it.
"""

from __future__ import annotations

import logging
import statistics
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
# Seconds of a backward pass below which finding out is not noticed, even if the function is never seen again.
QUICK = 0.05
# Pairs of a backward pass and a replay that are timed, at least and at most; none begins `BUDGET` seconds after the
# first, but for the least number.
PAIRS, BUDGET = (3, 9), 0.1
# The seconds of a replayed solve, by those of backward passes, that are worth it: the clock is not better than that.
GAIN = 0.98
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
        misses: Solves in a row that had to compile.
        refusal: Why this function is left to backward passes.
    """

    products: int = 0
    eager: float | None = None
    replay: float | None = None
    start: float | None = None
    misses: int = 0
    refusal: str = ""


_histories: Recent[History] = Recent(256)


def history_of(key: Hashable) -> History:
    """The history under a key, a new one if there is none; the oldest are forgotten."""
    history = _histories.get(key) or History()
    _histories.put(key, history)
    return history


def expects_replay(key: Hashable, engine: str) -> bool:
    """Whether single products of a function are likely to be replayed, as far as is known before the first of them."""
    if engine != "auto":
        return engine not in ("eager", "cuda_graph")
    history = _histories.get((key, 1, torch.get_num_threads()))
    return history is not None and history.replay is not None and not history.refusal


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
        self._key = key
        self._declined = False
        self._device = gradient.leaves[0].device
        self._traced: TracedGradient | None = None
        self._look_up(1)
        self.reason = "asked for" if engine != "auto" else ""
        if engine == "auto" and self._device.type != "cpu" and cuda_graph.unavailable(self._device):
            self.reason = cuda_graph.unavailable(self._device)
        elif engine == "auto" and torch.are_deterministic_algorithms_enabled():
            # The engines round differently, and which one runs is for a clock to say.
            self.reason = "deterministic algorithms"
        elif not gradient.curved:
            self.reason = "the gradient is constant"
        self._eager = engine == "eager" or self.reason not in ("asked for", "")

    def _look_up(self, rows: int) -> None:
        """Go on with products of so many vectors: what is known is known of their number, and of torch's threads."""
        self._rows = rows
        self._history = history_of((self._key, rows, torch.get_num_threads()))
        # Products of the last solve, of this one as far as is known, and made in this one.
        self._last = self._expected = self._history.products
        self._made = 0

    @property
    def engine(self) -> str:
        """The engine in use: ``"eager"``, ``"traced"``, ``"native"``, ``"cuda_graph"`` or ``"compiled"``."""
        return "eager" if self._traced is None else self._traced.form

    def expect(self, products: int, rows: int) -> None:
        """Take note that about so many products with so many vectors each will follow."""
        if rows != self._rows:
            self._look_up(rows)
        # A solver that stops at a tolerance tells the most that it could take.
        most = self._made + products * rows
        self._expected = min(most, self._last) if self._last > self._made else most

    def hvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``, one tensor per parameter."""
        self._count(1, 1)
        if self._passes_backward():
            return self._timed(self._gradient.hvp, v, 1)
        return self._replayed(v, None)

    def hvps(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` for tensors with a leading dimension k."""
        k = v[0].shape[0]
        self._count(k, k)
        if self._passes_backward():
            return self._timed(self._gradient.hvps, v, k)
        return self._replayed(v, k)

    def mixed(self, x: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor | None]:
        """``d <gradient, x> / d others``, replayed where products are, if the gradient knows of ``others``."""
        replayed = None if self._traced is None else self._traced.mixed(x, others)
        return self._gradient.mixed(x, others) if replayed is None else replayed

    def _passes_backward(self) -> bool:
        if self._eager or torch._C._len_torch_dispatch_stack() > 0:
            return True
        # The product at hand has been counted.
        return self._traced is None and not self._worth_it(self._expected - self._made + self._rows)

    def _replayed(self, v: Sequence[Tensor], rows: int | None) -> list[Tensor]:
        first = self._start(v, rows) if self._traced is None else None
        if first is not None and rows is None:
            return first
        if self._traced is None:
            return self._gradient.hvp(v) if rows is None else self._gradient.hvps(v)
        return _product(self._traced, v, rows)

    def bound(self, v: Callable[[], Sequence[Tensor]], backend: str | None) -> native.Bound | cuda_graph.Bound | None:
        """What runs whole solves with this solve's data, if products run on it.

        Args:
            v: Gives vectors with a leading dimension k, to be recorded with if need be.
            backend: The backend of the solver's steps.

        Returns:
            A bound plan or graph; None where products are made one by one.
        """
        if self._eager or torch._C._len_torch_dispatch_stack() > 0:
            return None
        form = _form(self._device, backend)
        if form == "traced" or self._asked not in ("auto", form, "compiled" if form == "native" else form):
            return None
        if self._traced is None:
            if not self._worth_it(self._expected - self._made):
                return None
            vectors = v()
            k = vectors[0].shape[0]
            self._start([t[0] for t in vectors] if k == 1 else vectors, None if k == 1 else k)
        return self._traced.bound_now() if self._traced is not None else None

    def made(self, products: int) -> None:
        """Take note of products that were made elsewhere, by the plan itself."""
        self._count(products, self._rows)

    def _count(self, products: int, rows: int) -> None:
        if rows != self._rows:
            self._look_up(rows)
        self._made += products
        self._history.products = self._made

    def _timed(self, run: Callable, v: Sequence[Tensor], products: int) -> list[Tensor]:
        if self._eager or self._history.replay is not None:
            return run(v)
        clock = _clock(self._device)
        begin = clock()
        result = run(v)
        seconds = (clock() - begin) / products
        known = self._history.eager
        self._history.eager = seconds if known is None else min(known, seconds)
        return result

    def _worth_it(self, left: int) -> bool:
        if self._asked != "auto":
            return True
        history = self._history
        if history.refusal:
            self._eager, self.reason = True, history.refusal
            return False
        if history.eager is None:
            return False
        if history.replay is None or history.start is None:
            soon = self._last > 0 or history.eager <= QUICK
            return left >= (EXPLORE if soon else LONG) or self._made > LONG
        # A solve that goes on longer than expected is expected to go on.
        left = max(left, self._made - LONG)
        if history.start + left * history.replay < GAIN * left * history.eager:
            return True
        if not self._declined:
            self._declined = True
            history.start *= FADE
        return False

    def _start(self, v: Sequence[Tensor], rows: int | None) -> list[Tensor] | None:
        """Record, and bind what is found under it, or remember why not; the product with the first vector if made."""
        first = v if rows is None else [t[0] for t in v]
        form = self._asked
        if form == "auto":
            form = _form(self._device, None)
            if form == "cuda_graph" and self._history.replay is None and not self._launch_bound(first):
                self._history.refusal = self.reason = "the GPU takes longer than launching does"
                self._eager = True
                return None
        made = traced.counts.made
        result, seconds = self._bind(form, first)
        if self._asked == "auto":
            compiled = traced.counts.made > made
            if self._history.replay is None and self.engine != "eager":
                # The first recording of a process is not like the others.
                seconds = min(seconds, self._bind(form, first)[1])
                self._compare(v, rows)
            self._learn(seconds, compiled)
        return result

    def _bind(self, form: str, v: Sequence[Tensor]) -> tuple[list[Tensor] | None, float]:
        """Record a product in this form; the product, if made, and the seconds that took, without compilation."""
        assert isinstance(self._gradient, RetainedGradient)
        self._traced = TracedGradient(self._gradient, form, _clock(self._device))
        return self._traced.start(v), self._traced.seconds

    def _launch_bound(self, v: Sequence[Tensor]) -> bool:
        bound, seconds = cuda_graph.launch_bound(lambda: self._gradient.hvp(v), self._device)
        # What was known was the time to launch it.
        self._history.eager = seconds
        return bound

    def _compare(self, v: Sequence[Tensor], rows: int | None) -> None:
        """Time backward passes and replays in turn: the median of the ratios, and of the replays."""
        running, eager = self._traced, self._gradient.hvp if rows is None else self._gradient.hvps
        assert running is not None
        ratios, replays = _pairs(lambda: eager(v), lambda: _product(running, v, rows), self._device)
        history, k = self._history, rows or 1
        history.replay = statistics.median(replays) / k
        history.eager = history.replay * statistics.median(ratios)

    def _learn(self, seconds: float, compiled: bool) -> None:
        history, running = self._history, self._traced
        assert running is not None
        if running.form == "eager":
            history.refusal = running.reason
        elif compiled:
            history.misses += 1
            if history.misses > PATIENCE:
                history.refusal = "every solve is another program"
        else:
            history.misses = 0
        news = history.start is None
        history.start = seconds if history.start is None else min(history.start * RISE, seconds)
        gain = (history.eager or 0.0) / (history.replay or 1.0)
        if news and not history.refusal:
            if gain <= 1:
                history.refusal = f"a replayed product takes {1 / max(gain, 1e-9):.2f} of a backward pass"
            _logger.info(
                "engine %s for %d parameters: %.3g times as fast as backward passes, %.3g ms to start%s",
                "eager" if history.refusal else running.form,
                len(self._gradient.leaves),
                gain,
                history.start * 1e3,
                f" ({history.refusal})" if history.refusal else "",
            )
        self.reason = history.refusal or f"measured, {gain:.2f} times faster"
        if history.refusal:
            self._traced, self._eager = None, True


def _product(running: TracedGradient, v: Sequence[Tensor], rows: int | None) -> list[Tensor]:
    return running.hvp(v) if rows is None else running.hvps(v)


def _pairs(
    eager: Callable[[], object], replay: Callable[[], object], device: torch.device
) -> tuple[list[float], list[float]]:
    """Ratios of seconds within a pair, and the seconds of replays; in turn, so that both see the same machine."""
    eager(), replay()
    least, most = PAIRS
    ratios: list[float] = []
    replays: list[float] = []
    begin = time.perf_counter()
    while len(ratios) < least or (len(ratios) < most and time.perf_counter() - begin < BUDGET):
        seconds = _seconds(eager, device)
        replays.append(_seconds(replay, device))
        ratios.append(seconds / replays[-1])
    return ratios, replays


def _clock(device: torch.device) -> Callable[[], float]:
    """What time is taken by: torch on one thread runs in the caller's, whose clock other jobs do not move."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if not cuda_graph.unavailable(device):
        return cuda_graph.launch_bound(run, device)[1]
    clock = _clock(device)
    begin = clock()
    run()
    return clock() - begin


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
