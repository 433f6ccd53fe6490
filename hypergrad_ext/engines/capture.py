"""A CUDA graph of what a function launches, or an error that leaves torch as it was.

A capture that fails leaves its stream the current one, the generator refusing to draw, and the allocator as if it went
on. So what waits for the device is refused before one begins; and stream and generator are put back whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Iterations before a capture: libraries make their handles and choose their kernels.
_WARM_UP = 3


def captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run ``run`` a few times on a stream of its own, then capture it.

    Returns:
        What replays it.

    Raises:
        RuntimeError: If it cannot be captured.
    """
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    generator = torch.cuda.default_generators[device.index]
    state = generator.graphsafe_get_state()
    with torch.cuda.device(device):
        side.wait_stream(here)
        with torch.cuda.stream(side):
            with _NoWaiting():
                run()
            for _ in range(_WARM_UP - 1):
                run()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # The graph takes hold of the state, for good if its capture fails.
            generator.graphsafe_set_state(generator.clone_state())
            # Other threads may go on allocating, as those that load data do.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                run()
        finally:
            generator.graphsafe_set_state(state)
            torch.cuda.set_stream(here)
    return graph.replay


class _NoWaiting(TorchDispatchMode):
    """Raises where an operation waits for the device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # An index by numbers has a shape that is known; one by a mask counts it first, and does not always say so.
        by_index = op in (
            torch.ops.aten.index.Tensor,
            torch.ops.aten.index_put.default,
            torch.ops.aten.index_put_.default,
        )
        masked = by_index and any(t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]) if t is not None)
        counted = not by_index and torch.Tag.dynamic_output_shape in op.tags
        if masked or counted or torch.Tag.data_dependent_output in op.tags:
            raise RuntimeError(f"{op} waits for the device")
        result = op(*args, **(kwargs or {}))
        # Numbers go to kernels by value; other tensors are copied from device to device while the host waits.
        tensors = [*inputs, *(t for t in tree_leaves(result) if isinstance(t, Tensor))]
        if len({t.device for t in tensors if t.dim() > 0}) > 1:
            raise RuntimeError(f"{op} copies from device to device")
        return result
