"""The constants of a recorded product in a later solve, found in the graph of its loss without a backward pass.

Which ops backward passes make, and on what, is decided by the graph of the loss: the nodes, how they are connected, and
all that they have saved. `_C.Graph` takes that down by the visitor of torch's compiled autograd, as a key and the saved
tensors. What two recorded passes, the gradient's and the product's, computed on their own, whatever the vector, was
noted as ops on those tensors: a `_C.Link`. In a graph of equal key the same ops give the constants of the new solve,
which then needs no gradient with a graph of its own.

Nothing is linked where a graph may do what its nodes do not show (Python's functions, hooks, checkpoints), where an
op reads numbers that decide about others, or writes to its arguments, or where a tensor appears from nowhere. And no
link is used before it has given, bit by bit, the constants of two recorded products, in two solves.
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
    mixed: list[bool]
    first: weakref.ref[RetainedGradient]
    shape: tuple[list[bool], list[int]]
    confirmed: bool = False


_known: Recent[_Known] = Recent(64)


def look(gradient: RetainedGradient, v: Sequence[Tensor]) -> Any | None:
    """The graph of a loss, taken down; None where that cannot be."""
    if any(t.device.type != "cpu" or not t.is_contiguous() for t in v):
        return None
    seen, gradient.graph = gradient.graph, None
    # By now what the graph has saved may have been overwritten.
    return seen if seen is not None and seen.current() else _graph(gradient)


def _graph(gradient: RetainedGradient) -> Any | None:
    if _native._C is None or gradient.loss is None or gradient.loss.device.type != "cpu":
        return None
    graph = _native._C.Graph([gradient.loss], [*gradient.leaves, *gradient.others], [gradient.seed])
    return None if graph.refusal else graph


def recall(gradient: RetainedGradient) -> bool:
    """Spare a gradient to be built whose products will be found by a link; whether there is one."""
    graph = _graph(gradient) if len(_known) > 0 else None
    known = None if graph is None else _known.get(graph.key)
    if known is None or known.link is None or not known.confirmed:
        return False
    gradient.assume(known.shape)
    gradient.graph = graph
    return True


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
    return Recording(known.key, constants, known.scalars, mixed=known.mixed)


def wanted(graph: Any) -> bool:
    """Whether recorded passes from this graph on are to be followed, to make a link or to confirm one."""
    known = _known.get(graph.key)
    return known is None or (known.link is not None and not known.confirmed)


def learn(graph: Any, recording: Recording, gradient: RetainedGradient) -> bool:
    """Make a link from recorded passes, or hold the one that there is against them; whether it is now confirmed."""
    known = _known.get(graph.key)
    if known is None:
        first, mixed = weakref.ref(gradient), recording.mixed
        known = _Known(recording.link, recording.key, recording.scalars, mixed, first, gradient.shape)
        _known.put(graph.key, known)
    elif known.link is None or known.confirmed or known.first() is gradient:
        return False
    else:
        known.confirmed = True
    if known.link is None:
        return False
    shown = recording.key, recording.scalars, recording.mixed, gradient.shape
    if (known.key, known.scalars, known.mixed, known.shape) != shown:
        _refuse(known, "another recording")
    elif not known.link.agrees(graph, recording.constants):
        _refuse(known, "other constants")
    return known.confirmed


def _refuse(known: _Known, reason: str) -> None:
    known.link, known.confirmed = None, False
    _logger.debug("every Hessian-vector product is recorded: two graphs of one key gave %s", reason)


def clear() -> None:
    """Forget all links."""
    _known.clear()
