"""What a loss runs in beside its arguments, for losses that run in a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
        self._casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in dict.fromkeys(["cpu", device.type])
            if torch.amp.is_autocast_available(kind)
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run in what was noted."""
        now = [(part, part.training) for part, _ in self._modes]
        with ExitStack() as stack:
            for cast in self._casts:
                stack.enter_context(torch.autocast(*cast))
            _set(self._modes)
            try:
                yield
            finally:
                _set(now)


def _set(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training
