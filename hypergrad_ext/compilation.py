"""What is called inside of ``torch.compile`` and runs as it is, between two compiled parts."""

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
