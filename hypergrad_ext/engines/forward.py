"""The forward pass of a loss, on kernels that can be differentiated twice."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn
from unittest import mock

import torch
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class _Shared:
    """A change of the whole process: the first thread that comes in makes it, the last one that goes undoes it.

    Each on its own would put back what another one had changed, and leave it so.
    """

    def __init__(self, *changes: Callable[[], AbstractContextManager]) -> None:
        self._changes = changes
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                with contextlib.ExitStack() as made:
                    for change in self._changes:
                        made.enter_context(change())
                    self._undo = made.pop_all()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._undo.close()


_WITHOUT_CUDNN = _Shared(lambda: torch.backends.cudnn.flags(enabled=False))


class _PlainRecurrence(TorchFunctionMode):
    """Recurrent layers without cuDNN, whose kernels have no second derivative; everything else with it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RECURRENT:
            return func(*args, **(kwargs or {}))
        with _WITHOUT_CUDNN:
            return func(*args, **(kwargs or {}))


class _Checkpoint:
    """In the place of reentrant checkpoints, which ``torch.autograd.grad`` cannot go through: the other kind."""

    @staticmethod
    def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )


_PLAIN_KERNELS = _Shared(
    lambda: sdpa_kernel(SDPBackend.MATH),
    lambda: mock.patch.object(torch.utils.checkpoint, "CheckpointFunction", _Checkpoint),
)
_UNCOMPILED = _Shared(lambda: torch.compiler.set_stance("force_eager"))


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Route what a model calls to kernels that have a second derivative, without a change to the model.

    Attention takes the math kernel; recurrent layers leave cuDNN; compiled modules run as they were
    before ``torch.compile``; reentrant checkpoints become non-reentrant ones. Everything else runs as always.
    """
    with (
        _PLAIN_KERNELS,
        # It looks at every call of torch, and there is no cuDNN without CUDA.
        _PlainRecurrence() if torch.backends.cuda.is_built() else contextlib.nullcontext(),
        uncompiled(),
    ):
        yield


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled modules run as they were before ``torch.compile``, whose graphs may be gone through only once."""
    # Importing the compiler takes as long as importing torch; where nobody did, nothing is compiled.
    return _UNCOMPILED if "torch._dynamo" in sys.modules else contextlib.nullcontext()


_ONCE_ONLY = re.compile(
    r"derivative for '?(?P<op>[\w:]+)'? is not implemented|(?P<compiled>does not currently support double backward)"
)


def raise_explained(error: RuntimeError) -> NoReturn:
    """Raise an error of autograd again, explained if it says that something can be differentiated only once.

    Raises:
        ValueError: The explanation.
        RuntimeError: Any other error, as it is.
    """
    found = _ONCE_ONLY.search(str(error))
    if found is None:
        raise error
    what = "a module compiled by torch.compile" if found["compiled"] else found["op"]
    raise ValueError(
        f"loss: expected one that can be differentiated twice, got one computed by {what}, which torch can "
        "differentiate only once; pass the loss as a function of the parameters (attention, recurrent layers and "
        "compiled modules then take kernels that have a second derivative), or compute it without that kernel"
    ) from error
