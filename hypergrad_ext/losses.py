"""Losses that are called or handed in: what they have to be, and errors that say what they are not."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType

import torch
from torch import Tensor

from hypergrad_ext.engines import RetainedGradient, once_differentiable, twice_differentiable
from hypergrad_ext.structure import Leaves, Tree

STANDS_FOR = "_hypergrad_stands_for"
"""Attribute of a function that takes whatever another one takes: that one."""


def evaluate(
    argument: str, loss: Callable[[Tree], Tensor], params: Leaves, leaves: Sequence[Tensor], *, twice: bool = True
) -> Tensor:
    """Call a loss function on ``leaves`` in the structure of ``params`` and check what it returns.

    Args:
        argument: What the caller calls the loss.
        loss: The function.
        params: The parameters, for their structure.
        leaves: What to call it on.
        twice: Compute it by kernels that can be differentiated twice.

    Returns:
        The loss, a scalar with its graph.

    Raises:
        TypeError: If it takes no argument, or does not return a real floating point tensor.
        ValueError: If what it returns is not a scalar, has no graph, or depends on ``params`` beside its argument.
    """
    if not takes(1, loss):
        way_out = "; one of the parameters and a batch needs batches=" if twice and takes(2, loss) else ""
        raise TypeError(f"{argument}: expected a function of the parameters, got one that does not take one{way_out}")
    with twice_differentiable() if twice else once_differentiable():
        value = loss(params.rebuild(leaves))
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a function that returns a scalar tensor, got {type(value).__name__}")
    check_loss(argument, value)
    check_of_argument(argument, value, params)
    return value


def check_of_argument(argument: str, value: Tensor, params: Leaves) -> None:
    """Refuse what a function computed from the parameters themselves, which count as constants beside its argument.

    Raises:
        ValueError: If ``value`` depends on one of ``params``.
    """
    tracked = [(name, t) for name, t in zip(params.names, params.tensors, strict=True) if t.requires_grad]
    if not tracked:
        return
    # Passes through nothing as long as no path leads there, which takes less than to look for one from here.
    others = [t for _, t in tracked]
    grads = RetainedGradient([value], others).mixed([torch.ones_like(value.detach())], others)
    own = [name for (name, _), g in zip(tracked, grads, strict=True) if g is not None]
    if own:
        more = f" and {len(own) - 1} more" if own[1:] else ""
        raise ValueError(
            f"{argument}: expected a function of its argument, got one that uses {own[0]}{more} itself, which would "
            "count as a constant; compute it from the argument (torch.func.functional_call for a module), or detach "
            "what is to be constant"
        )


def takes(arguments: int, function: Callable) -> bool:
    """Whether a function can be called with so many arguments.

    Returns:
        True also where that cannot be told.
    """
    function = getattr(function, STANDS_FOR, function)
    plain = function.__func__ if isinstance(function, MethodType) else function
    if isinstance(plain, FunctionType):
        # To build a signature takes longer than a small loss.
        code, defaults = plain.__code__, len(plain.__defaults__ or ())
        count = code.co_argcount - (plain is not function)
        if count - defaults <= arguments <= count and not code.co_kwonlyargcount:
            return True
    # A wrapper may take less than what it wraps, and give the rest itself.
    for follow in (True, False):
        try:
            inspect.signature(function, follow_wrapped=follow).bind(*[None] * arguments)
        except TypeError:
            continue
        except ValueError:
            pass  # a builtin without a signature
        return True
    return False


@contextlib.contextmanager
def stale_graphs_named(argument: str) -> Iterator[None]:
    """Explain what autograd says of a loss whose graph was freed, or is of values that are no more.

    Raises:
        ValueError: The explanation.
    """
    try:
        yield
    except RuntimeError as error:
        if "second time" in str(error):
            raise ValueError(
                f"{argument}: expected a loss that still has its graph, got one whose graph was freed; "
                "call backward(retain_graph=True), or pass a function of the parameters"
            ) from error
        if "modified by an inplace operation" in str(error):
            raise ValueError(
                f"{argument}: expected a loss of what params and hparams are now, got one that was computed before one "
                "of its tensors was changed, as by optimizer.step(); compute it anew, or pass a function of params"
            ) from error
        if "donated buffers" in str(error):
            raise ValueError(
                f"{argument}: expected a loss whose graph can be kept, got one computed by what torch.compile has "
                "compiled; pass a function of the parameters, in which compiled modules run as they were before"
            ) from error
        raise


def check_loss(argument: str, loss: Tensor) -> None:
    """Refuse a loss that cannot be differentiated.

    Raises:
        TypeError: If it is not real floating point.
        ValueError: If it is not a scalar or has no graph.
    """
    if not loss.is_floating_point():
        raise TypeError(f"{argument}: expected a real floating point scalar, got {loss.dtype}")
    if loss.numel() != 1:
        raise ValueError(f"{argument}: expected a scalar, got shape {tuple(loss.shape)}; take the mean or the sum")
    if not loss.requires_grad:
        raise ValueError(
            f"{argument}: expected a loss with a graph, got one that does not require grad; "
            "compute it from params with gradients enabled"
        )


def check_tracked(params: Leaves) -> None:
    """Refuse parameters that a loss tensor cannot be differentiated by.

    Raises:
        ValueError: If one does not require grad.
    """
    for name, t in zip(params.names, params.tensors, strict=True):
        if not t.requires_grad:
            raise ValueError(
                f"{name}: expected a parameter that requires grad, got one that does not; "
                "leave it out, or pass the loss as a function of the parameters"
            )
