"""Time on a GPU: by events, variants in turn, from a warm cache or a cold one, and as CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
# Of the first, every variant is compiled, and clocks rise.
_WARMUP = 3
# Half a millisecond, about: more than it takes to launch a few kernels.
_CYCLES = 1_000_000


def microseconds(
    variants: dict[str, Callable[[], object]],
    rounds: int = 15,
    calls: int = 5,
    cold: bool = False,
    budget: float = 3.0,
) -> dict[str, list[float]]:
    """Device time per call of every variant, in turn in every round.

    Args:
        variants: What to time.
        rounds: How many times to time each.
        calls: Calls between two events: what repeats in a solve finds its data where the last call left them.
        cold: Whether every call is timed alone, after something else has filled the second cache.
        budget: Seconds after which no round begins, if three have been timed.
    """
    begin = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in variants}
    other = _twice_the_cache() if cold else None
    for round_ in range(rounds + _WARMUP):
        if round_ >= _WARMUP + 3 and time.perf_counter() - begin > budget:
            break
        for name, run in variants.items():
            each = [_between_events(run, 1, other) for _ in range(calls)] if cold else [_between_events(run, calls)]
            if round_ >= _WARMUP:
                times[name].append(statistics.mean(each))
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Of every variant."""
    return {name: statistics.median(t) for name, t in times.items()}


def in_graph(run: Callable[[], T]) -> Callable[[], T]:
    """The same, captured once and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = run()

    def replay() -> T:
        graph.replay()
        return value

    return replay


def _between_events(run: Callable[[], object], calls: int, other: torch.Tensor | None = None) -> float:
    if other is not None:
        other.zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # While the device is busy the host launches what is timed: else a device that is faster than its host waits for it
    # between the events. Launches that take the host longer than this are timed with the host.
    torch.cuda._sleep(_CYCLES)
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop) / calls


def _twice_the_cache() -> torch.Tensor:
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(2 * size, dtype=torch.int8, device="cuda")
