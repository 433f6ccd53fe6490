"""What a loss runs in beside its arguments, for losses that run later, and what is to run without autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


class Surroundings:
    """The training modes of a module's parts and the state of autocast as they are now, to be had again."""

    def __init__(self, module: nn.Module | None, device: torch.device) -> None:
        """Take note.

        Args:
            module: Whose modes; None has none.
            device: Of the parameters.
        """
        self._modes = [] if module is None else [(part, part.training) for part in module.modules()]
        kinds = dict.fromkeys(["cpu", device.type])
        self._casts = [_cast(kind) for kind in kinds if torch.amp.is_autocast_available(kind)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run in what was noted."""
        now = [(part, part.training) for part, _ in self._modes]
        with ExitStack() as stack:
            for cast in self._casts:
                if cast != _cast(cast[0]):
                    stack.enter_context(torch.autocast(*cast))
            _set(self._modes)
            try:
                yield
            finally:
                _set(now)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context for what ``torch.autocast`` is to leave alone: all but the user's own functions.

    Returns:
        One that does nothing where autocast is off.
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _cast(kind: str) -> tuple[str, torch.dtype, bool, bool]:
    """How ``torch.autocast`` is set for a kind of device: what it takes."""
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return kind, dtype, enabled, torch.is_autocast_cache_enabled()


def _set(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training
