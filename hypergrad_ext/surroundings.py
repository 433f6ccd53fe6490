"""What a loss runs in beside its arguments, for losses that run later, and what is to run without autocast."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import CodeType, FunctionType, MethodType
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


class Meaning:
    """What the names that a function uses but does not assign stand for now, to be looked at again when it runs."""

    def __init__(self, function: object) -> None:
        """Take note; of what is no function of Python's there is nothing to be noted."""
        plain: Any = function.__func__ if isinstance(function, MethodType) else function
        self._function = plain if isinstance(plain, FunctionType) else None
        self._then = self._look()

    def changed(self) -> list[str]:
        """The names that stand for something else by now, such as the variables of a loop that went on."""
        now = self._look()
        return [name for name, value in self._then.items() if not _same(value, now.get(name))]

    def _look(self) -> dict[str, Any]:
        if self._function is None:
            return {}
        code, around = self._function.__code__, self._function.__globals__
        found = {name: around[name] for name in _global_names(code) if name in around}
        for name, cell in zip(code.co_freevars, self._function.__closure__ or (), strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:
                pass  # not assigned yet, or deleted
        return found


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


@functools.lru_cache(maxsize=256)
def _global_names(code: CodeType) -> frozenset[str]:
    """Names that a function, or one inside of it, looks up in its module."""
    steps = dis.get_instructions(code)
    names = frozenset(step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return names.union(*(_global_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _same(a: Any, b: Any) -> bool:
    """Whether it is the same object, or the same number or string."""
    return a is b or (isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b)
