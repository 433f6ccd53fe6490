"""What torch's CPU allocator gave out, as torch's profiler sees it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak(run: Callable[[], object]) -> int:
    """Bytes of tensors that ``run`` held at the most, beyond those before it."""
    # Else the profiler writes two lines to the terminal every time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)
