"""How registered ops are differentiated and batched: by one ``autograd.Function`` each, wherever the op is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hypergrad_ext.ops import Op, _library


def with_rules(op: Op, apply: Callable, only: str | None = None) -> Callable:
    """Have the registered op, too, do what ``apply`` does in reverse and forward mode and under ``torch.func``.

    Eager calls go straight to ``apply``. What ``torch.compile`` and ``torch.export`` make of an ``autograd.Function``
    loses rules: they get the registered op, which stays in their graphs and comes back to ``apply`` when these run.

    Args:
        op: The op.
        apply: That of an ``autograd.Function`` (or what ends in some) that runs the op in its ``forward``.
        only: The argument that ``apply`` differentiates by; all if None.

    Returns:
        What to call with the op's arguments.
    """
    schema = op.registered._schema.arguments

    def kernel(*args: Any) -> Any:
        if not _derived(args):
            with torch._C._AutoDispatchBelowAutograd():
                return op.registered(*args)
        # The dispatcher leaves out what equals its default.
        args = (*args, *(argument.default_value for argument in schema[len(args) :]))
        if only is not None:
            refuse_grad(only, **{a.name: t for a, t in zip(schema, args, strict=True) if a.name != only})
        return apply(*args)

    # The second key: before any transform of torch.func takes the call apart.
    for key in ("Autograd", "FuncTorchDynamicLayerFrontMode"):
        _library.impl(op.name, kernel, key)

    def call(*args: Any) -> Any:
        return (op.registered if torch.compiler.is_compiling() else apply)(*args)

    return call


def _derived(args: tuple) -> bool:
    """Whether anyone asks for a derivative or for a batch."""
    return (
        (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
        or (forward_ad._current_level >= 0 and forward_ad._is_fwd_grad_enabled())
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def refuse_grad(variable: str, **arguments: object) -> None:
    """Refuse tensors that require grad, in reverse or forward mode, where only ``variable`` may.

    Raises:
        ValueError: If one does: its gradient would silently be missing.
    """
    for name, argument in arguments.items():
        for t in argument if isinstance(argument, list) else [argument]:
            if isinstance(t, Tensor) and ((t.requires_grad and torch.is_grad_enabled()) or _has_tangent(t)):
                raise ValueError(
                    f"{name}: expected a tensor that does not require grad, since the product is differentiable in "
                    f"{variable} only; pass {name}.detach()"
                )


def refuse_tangents(variable: str, **tangents: Tensor | None) -> None:
    """Refuse tangents in the rule of forward mode, where only ``variable`` may have one.

    Raises:
        ValueError: If there is one: it would silently be taken for zero.
    """
    for name, tangent in tangents.items():
        if tangent is not None:
            raise ValueError(f"{name}: expected no tangent, since the product is differentiable in {variable} only")


def _has_tangent(t: Tensor) -> bool:
    level = forward_ad._current_level
    return level >= 0 and forward_ad.unpack_dual(t, level=level).tangent is not None
