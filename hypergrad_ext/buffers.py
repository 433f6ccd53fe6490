"""A module's buffers, which passes that are not part of the user's training leave alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Attribute of a copy that a module works on: the buffer it stands for. Another thread may be in the middle of a pass.
_ORIGINAL = "_hypergrad_original"


class Buffers:
    """A module's buffers, with what they hold at this time."""

    def __init__(self, module: nn.Module | None) -> None:
        """Take note of them."""
        self._places = [
            (part._buffers, name, _original(buffer))
            for part in ([] if module is None else module.modules())
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        # A buffer may be in several places. Into an expanded one nobody can write.
        self._kept = {id(t): (t, t.detach().clone(), _version(t)) for _, _, t in self._places if not _expanded(t)}

    def changed(self) -> bool:
        """Whether there are others now, or they hold something else."""
        others = any(name not in buffers or _original(buffers[name]) is not t for buffers, name, t in self._places)
        return others or any(_differ(t, value) for t, value, _ in self._kept.values())

    def lend_copies(self) -> None:
        """Have the module work on copies, which a graph may save as they are left."""
        copies = {key: t.clone() for key, (t, _, _) in self._kept.items()}
        for key, copy in copies.items():
            setattr(copy, _ORIGINAL, self._kept[key][0])
        for buffers, name, t in self._places:
            buffers[name] = copies.get(id(t), t)

    def put_back(self) -> None:
        """Make everything as it was."""
        for buffers, name, t in self._places:
            buffers[name] = t
        # A function may have handed the user's own tensors to functional_call. If it wrote there in the open, a graph
        # that has saved them is to say so; batch norm, which writes unseen, makes no use of what it has saved.
        for t, value, version in self._kept.values():
            (t.data if _version(t) == version else t.detach()).copy_(value)


@contextlib.contextmanager
def buffers_kept(module: nn.Module | None) -> Iterator[Buffers]:
    """Put a module's buffers back after a pass that is not part of the user's training, and works on copies."""
    buffers = Buffers(module)
    buffers.lend_copies()
    try:
        yield buffers
    finally:
        buffers.put_back()


def _original(buffer: Any) -> Any:
    return getattr(buffer, _ORIGINAL, buffer)


def _expanded(t: Tensor) -> bool:
    plain = t.layout == torch.strided and not t.is_nested
    return plain and any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True))


def _differ(a: Tensor, b: Tensor) -> bool:
    try:
        if a.is_nested or torch.equal(a, b):
            return False
        # What was NaN may go on being so.
        return a.shape != b.shape or bool(((a != b) & ((a == a) | (b == b))).any())
    except RuntimeError:
        return False  # sparse, nested, meta: nothing that a layer counts or averages in place


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version
