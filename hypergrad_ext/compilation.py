"""What is called inside of ``torch.compile`` runs as it is, between two compiled parts; in ``torch.func`` not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def never_compiled(function: Function) -> Function:
    """Have ``torch.compile`` leave a function and all that it calls alone, with a graph break.

    A solve decides by numbers, and takes second derivatives, which compiled functions have not. This does what
    ``torch.compiler.disable`` does, but without the import of the compiler, and on the function itself: a wrapper
    would hide its doctests. A torch that keeps these things elsewhere compiles what it can.

    Returns:
        The function itself.
    """
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "hypergrad_ext takes second derivatives and decides by numbers"
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(marked.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def refuse_transforms(argument: str) -> None:
    """Refuse a loss function inside of a transform of ``torch.func``, which lets nobody differentiate by hand.

    Raises:
        NotImplementedError: If this is called inside of one.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{argument}: expected to be differentiated outside of torch.func's vmap, grad, jvp and the like; go "
            "through tasks or examples in a loop, take many vectors as one batch (a leading dimension), and in the "
            "place of grad call backward on what was computed from hg.implicit"
        )
