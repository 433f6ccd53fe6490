"""CUDA graphs on the CPU, for tests of what uses them: a capture notes operations and addresses, a replay repeats them.

As on a GPU, nothing runs during a capture, numbers are fixed by it, and what would wait for the device fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hypergrad_ext.engines import cuda_graph


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def replay(self) -> None:
        for op, args, kwargs, results in self.calls:
            for ours, new in zip(results, tensors_in(op(*args, **kwargs)), strict=True):
                if ours.data_ptr() != new.data_ptr():
                    ours.copy_(new)


class Generator:
    """Stands for the device's generator; nobody draws from a state that a capture has taken hold of."""

    def __init__(self, state: list[str] | None = None) -> None:
        self.state = [] if state is None else state

    def clone_state(self) -> Generator:
        return Generator(list(self.state))

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state


class Stream:
    """Stands for ``torch.cuda.Stream``."""

    def __init__(self, *_: object) -> None:
        self.waited = 0

    def wait_stream(self, other: object) -> None:
        self.waited += 1


class Capture(TorchDispatchMode):
    """Notes what runs, and undoes it at the end."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: dict[int, Tensor] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        if any(t.dtype == torch.bool for t in inputs) and "index" in str(op):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if op._schema.is_mutable:
            for t in inputs:
                if memory(t) not in self.own:
                    self.before.setdefault(t.data_ptr(), (t, t.clone()))
        result = op(*args, **kwargs)
        known = {memory(t) for t in inputs}
        results = tensors_in(result)
        self.own |= {memory(t): t for t in results if memory(t) not in known}
        self.graph.calls.append((op, args, kwargs, results))
        return result

    def undo(self) -> None:
        for t, value in self.before.values():
            t.copy_(value)
        for t in self.own.values():
            if t.is_floating_point():
                t.fill_(torch.nan)


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU a device with CUDA graphs."""
    current, generator = [Stream()], Generator()

    @contextlib.contextmanager
    def use(stream: Stream) -> Iterator[None]:
        """Stands for ``torch.cuda.stream``."""
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """Stands for ``torch.cuda.graph``, which where a capture fails ends it in no way."""
        assert stream.waited and capture_error_mode == "thread_local"
        before, current[0] = current[0], stream
        generator.state.append("held")
        mode = Capture(graph)
        with mode:
            yield
        mode.undo()
        current[0] = before
        generator.state.remove("held")

    for name, value in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "graph": capture,
        "stream": use,
        "device": lambda device: contextlib.nullcontext(),
        "set_stream": lambda stream: current.__setitem__(0, stream),
        "default_generators": {None: generator},
        "current_stream": lambda device: current[0],
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graph, "unavailable", lambda device: "")
