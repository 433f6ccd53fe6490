"""The forward pass of a loss, on kernels that can be differentiated twice."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hypergrad_ext.engines.checkpoints import repeatable
from hypergrad_ext.engines.shared import Shared

_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}

_WITHOUT_CUDNN = Shared(lambda: torch.backends.cudnn.flags(enabled=False))


class _PlainRecurrence(TorchFunctionMode):
    """Recurrent layers without cuDNN, whose kernels have no second derivative; everything else with it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RECURRENT:
            return func(*args, **(kwargs or {}))
        with _WITHOUT_CUDNN:
            return func(*args, **(kwargs or {}))


_PLAIN_KERNELS = Shared(lambda: sdpa_kernel(SDPBackend.MATH))
_UNCOMPILED = Shared(lambda: torch.compiler.set_stance("force_eager"))


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Route what a model calls to kernels that have a second derivative, without a change to the model.

    Attention takes the math kernel; recurrent layers leave cuDNN; compiled modules run as they were
    before ``torch.compile``; checkpoints can be gone through. Everything else runs as always.
    """
    with (
        repeatable(twice_differentiable),
        _PLAIN_KERNELS,
        # It looks at every call of torch, and there is no cuDNN without CUDA.
        _PlainRecurrence() if torch.backends.cuda.is_built() else contextlib.nullcontext(),
        uncompiled(),
    ):
        yield


@contextlib.contextmanager
def once_differentiable() -> Iterator[None]:
    """Only that a forward pass can be gone through as often as a hypergradient needs: checkpoints, compiled modules."""
    with repeatable(once_differentiable), uncompiled():
        yield


def uncompiled() -> contextlib.AbstractContextManager[Any]:
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
