"""Checkpoints inside of a model, which run a part of it again in every pass: on what it ran on the first time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import stateless

from hypergrad_ext.engines.shared import Shared


class _Here(threading.local):
    """What this thread's forward pass is in the middle of."""

    def __init__(self) -> None:
        self.kernels: list[Callable[[], AbstractContextManager]] = []
        self.contexts: list[Callable[[], AbstractContextManager]] = []


_here = _Here()
_checkpoint = torch.utils.checkpoint
_reentrant = _checkpoint.CheckpointFunction
# What checkpoints that are not reentrant are made of, and ``functional_call``. A torch that has them elsewhere is left
# as it is.
_GENERATOR, _REPARAMETRIZE = "_checkpoint_without_reentrant_generator", "_reparametrize_module"
_generator, _reparametrize = getattr(_checkpoint, _GENERATOR, None), getattr(stateless, _REPARAMETRIZE, None)


class _NotReentrant:
    """In the place of reentrant checkpoints, which ``torch.autograd.grad`` cannot go through: the other kind."""

    @staticmethod
    def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
        if not _here.kernels:  # another thread's
            return _reentrant.apply(function, preserve_rng_state, *args)
        return _checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


class _Rerun:
    """The context that a checkpoint's part of the model runs in again: kernels and parameters of the first time."""

    def __init__(self, users: AbstractContextManager) -> None:
        self._contexts = [_here.kernels[-1], lambda: users, *_here.contexts]
        self._inside: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as made:
            for context in self._contexts:
                made.enter_context(context())
            self._inside.append(made.pop_all())

    def __exit__(self, *exception: Any) -> bool | None:
        return self._inside.pop().__exit__(*exception)


def _generator_with_rerun(function: Callable, preserve: bool, contexts: Callable, *args: Any, **kwargs: Any) -> Any:
    def wrapped() -> tuple[AbstractContextManager, AbstractContextManager]:
        first, again = contexts()
        return first, _Rerun(again)

    assert _generator is not None
    return _generator(function, preserve, wrapped if _here.kernels else contexts, *args, **kwargs)


@contextlib.contextmanager
def _reparametrize_noted(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Run a module with other tensors than its own, as ``functional_call`` does, and take note."""
    assert _reparametrize is not None
    with (
        _reparametrize(module, tensors, *args, **kwargs),
        rerun_in(lambda: _reparametrize_noted(module, dict(tensors), *args, **kwargs)),
    ):
        yield


_REPLACEMENTS = [
    (_checkpoint, "CheckpointFunction", _NotReentrant),
    (_checkpoint, _GENERATOR, _generator_with_rerun),
    (stateless, _REPARAMETRIZE, _reparametrize_noted),
]


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    before = [(where, name, getattr(where, name)) for where, name, _ in _REPLACEMENTS if hasattr(where, name)]
    for where, name, what in _REPLACEMENTS:
        if hasattr(where, name):
            setattr(where, name, what)
    try:
        yield
    finally:
        for where, name, what in before:
            setattr(where, name, what)


_NOTED = Shared(_replaced)


@contextlib.contextmanager
def repeatable(kernels: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Run a forward pass whose checkpoints run again, in whatever pass that is, as they ran in it.

    Reentrant ones become non-reentrant ones.

    Args:
        kernels: Makes a context like the one that the forward pass runs in; it is to be `repeatable` itself.
    """
    with _NOTED:
        _here.kernels.append(kernels)
        try:
            yield
        finally:
            _here.kernels.pop()


@contextlib.contextmanager
def rerun_in(context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Have checkpoints of a forward pass that is `repeatable` run again in a context, of which this makes one each."""
    _here.contexts.append(context)
    try:
        yield
    finally:
        _here.contexts.pop()
