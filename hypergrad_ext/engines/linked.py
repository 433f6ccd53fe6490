"""The constants of a recorded product in a later solve, found in its graph without a backward pass.

Which ops a backward pass makes, and on what, is decided by its graph: the nodes, how they are connected, and all that
they have saved. `_C.Graph` takes that down by the visitor of torch's compiled autograd, as a key and the saved tensors.
What a recorded pass computed on its own, whatever the vector, was noted as ops on those tensors: a `_C.Link`. In a
graph of equal key the same ops give the constants of the new solve.

Nothing is linked where a graph may do what its nodes do not show (Python's functions, hooks, checkpoints), where an
op reads numbers that decide about others, or writes to its arguments, or where a tensor appears from nowhere. And no
link is used before it has given, bit by bit, the constants of two recorded passes, in two solves.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hypergrad_ext import _native
from hypergrad_ext.engines.eager import RetainedGradient
from hypergrad_ext.engines.recent import Recent
from hypergrad_ext.engines.record import Recording

_logger = logging.getLogger("hypergrad_ext")


@dataclass
class _Known:
    """What is known of graphs of one key; a link of None is not tried again."""

    link: Any | None
    key: Hashable
    scalars: list[float]
    first: weakref.ref[RetainedGradient]
    confirmed: bool = False


_known: Recent[_Known] = Recent(64)


def look(gradient: RetainedGradient, v: Sequence[Tensor]) -> Any | None:
    """The graph of a gradient, taken down; None where that cannot be."""
    if _native._C is None or any(t.device.type != "cpu" or not t.is_contiguous() for t in v):
        return None
    graph = _native._C.Graph(gradient.outputs, gradient.leaves)
    return None if graph.refusal else graph


def find(graph: Any) -> Recording | None:
    """The recording of a product through this graph, if a link knows it."""
    known = _known.get(graph.key)
    if known is None or known.link is None or not known.confirmed:
        return None
    try:
        constants = known.link.constants(graph)
    except RuntimeError as error:
        _refuse(known, str(error))
        return None
    return Recording(known.key, constants, known.scalars)


def wanted(graph: Any) -> bool:
    """Whether a recorded pass through this graph is to be followed, to make a link or to confirm one."""
    known = _known.get(graph.key)
    return known is None or (known.link is not None and not known.confirmed)


def learn(graph: Any, recording: Recording, gradient: RetainedGradient) -> None:
    """Make a link from a recorded pass, or hold the one that there is against it."""
    known = _known.get(graph.key)
    if known is None:
        known = _Known(recording.link, recording.key, recording.scalars, weakref.ref(gradient))
        _known.put(graph.key, known)
    elif known.link is None or known.confirmed or known.first() is gradient:
        return
    else:
        known.confirmed = True
    if known.link is None:
        return
    if (known.key, known.scalars) != (recording.key, recording.scalars):
        _refuse(known, "another recording")
    elif not known.link.agrees(graph, recording.constants):
        _refuse(known, "other constants")


def _refuse(known: _Known, reason: str) -> None:
    known.link, known.confirmed = None, False
    _logger.debug("every Hessian-vector product is recorded: two graphs of one key gave %s", reason)


def clear() -> None:
    """Forget all links."""
    _known.clear()
