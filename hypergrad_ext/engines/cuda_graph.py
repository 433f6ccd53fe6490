"""One iteration of a solve as a CUDA graph: the host launches all kernels of a product and its step at once.

A graph remembers addresses. So what it touches is kept from solve to solve: copies of the solve's constants, the
vectors of the iteration, and step size and damping as numbers on the device. An iteration never waits for the device.
It pays for small models, whose kernels are over before the host has launched the next ones.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from hypergrad_ext import ops
from hypergrad_ext.engines.capture import captured
from hypergrad_ext.engines.recent import Recent
from hypergrad_ext.engines.record import Untraceable
from hypergrad_ext.structure import views

# Iterations between two looks at the device, for solves that may end early.
_LOOK_EVERY = 8

Product = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[float]], list[Tensor]]

_logger = logging.getLogger("hypergrad_ext")
# By program, thread and stream, with their memory on the device; or why there are none.
_kept: Recent[Graphs | str] = Recent(8)


def unavailable(device: torch.device) -> str:
    """Why there are no CUDA graphs on ``device``; empty if there are."""
    if device.type != "cuda":
        return f"CUDA graphs need parameters on a CUDA device, got {device}"
    return "CUDA graphs were not tried on ROCm" if torch.version.hip else ""


def launch_bound(run: Callable[[], object], device: torch.device) -> tuple[bool, float]:
    """Whether launching ``run`` takes the host as long as the device takes to run it, and the seconds of both."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    launched = time.perf_counter() - begin
    torch.cuda.synchronize(device)
    total = time.perf_counter() - begin
    return launched > total / 2, total


def bind(key: Hashable, program: Product, constants: list[Tensor], scalars: list[float], v: Sequence[Tensor]) -> Bound:
    """The products of one solve by graphs: those that were captured for the same program, or new ones.

    Args:
        key: Which program it is.
        program: ``program(v, constants, scalars)`` gives the parts of the product; nothing in it waits for the device.
        constants: This solve's.
        scalars: This solve's.
        v: A vector, for shapes.

    Returns:
        The products.

    Raises:
        Untraceable: If they cannot be captured.
    """
    device = v[0].device
    if reason := unavailable(device):
        raise Untraceable(reason)
    # Two streams, or two threads, may be in the middle of a solve at the same time.
    key = key, threading.get_ident(), torch.cuda.current_stream(device)
    graphs = _kept.get(key)
    fresh = not isinstance(graphs, str) and (graphs is None or not graphs.fits(constants, scalars))
    if fresh:
        graphs = _new(program, constants, scalars, v)
    assert graphs is not None
    _kept.put(key, graphs)
    if isinstance(graphs, str):
        raise Untraceable(graphs)
    return Bound(graphs, constants, [t.shape for t in v], fresh=fresh)


def clear_cache() -> None:
    """Give back all graphs and their memory."""
    _kept.clear()


def _new(program: Product, constants: list[Tensor], scalars: list[float], v: Sequence[Tensor]) -> Graphs | str:
    try:
        graphs = Graphs(program, constants, scalars, v)
        graphs.load(None, constants)
        return graphs if graphs.capture("product") else "it cannot be captured"
    except (RuntimeError, Untraceable) as error:
        return str(error).partition("\n")[0]


class Graphs:
    """The graphs of one program, and the memory that they work on.

    Attributes:
        v: The flat vector that H is multiplied by.
        p: Sum of a Neumann series.
        x: Iterate of conjugate gradients.
        r: Its residual.
        alpha: Step size.
        damping: Damping.
        stats: What `ops.neumann_step_` leaves.
        state: What `ops.cg_step_` keeps.
        lock: Held by whoever uses all this: several threads may share an operator.
    """

    def __init__(
        self, program: Product, constants: Sequence[Tensor], scalars: Sequence[float], v: Sequence[Tensor]
    ) -> None:
        """Allocate for a program with constants and vectors like these.

        Raises:
            Untraceable: If a graph cannot run with them.
        """
        self._device, dtype = v[0].device, v[0].dtype
        if any(t.dtype != dtype for t in v):
            raise Untraceable("a CUDA graph needs parameters of one dtype")
        if any(t.device != self._device and t.dim() > 0 for t in constants):
            raise Untraceable("a constant is not on the parameters' device")
        self._program = program
        self._constants = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            if t.device == self._device
            else t.clone()
            for t in constants
        ]
        self._scalars = list(scalars)
        self._numbers = self._numbers_in(constants, scalars)
        self._owner: object = None
        self.lock = threading.Lock()
        n = sum(t.numel() for t in v)
        self.v, self.p, self.x, self.r = torch.zeros(4, n, dtype=dtype, device=self._device).unbind()
        self._parts = [part.view(t.shape) for part, t in zip(self.v.split([t.numel() for t in v]), v, strict=True)]
        self.alpha, self.damping = torch.zeros(2, dtype=dtype, device=self._device).unbind()
        self.stats = torch.zeros(2, dtype=torch.float64, device=self._device)
        self.state = torch.zeros(4, dtype=torch.float64, device=self._device)
        # None for what could not be captured.
        self._replays: dict[str, Callable[[], None] | None] = {}
        self._flat: Tensor | None = None

    def _numbers_in(self, constants: Sequence[Tensor], scalars: Sequence[float]) -> list[float]:
        """What the host hands to kernels by value: that is part of a graph."""
        return [*scalars, *(t.item() for t in constants if t.device != self._device)]

    def fits(self, constants: Sequence[Tensor], scalars: Sequence[float]) -> bool:
        """Whether the graphs were captured with the same numbers."""
        return self._numbers == self._numbers_in(constants, scalars)

    def load(self, owner: object, constants: Sequence[Tensor]) -> None:
        """Take the constants of a solve, unless they are here since its last product."""
        if owner is None or self._owner is not owner:
            for ours, theirs in zip(self._constants, constants, strict=True):
                if ours.device == self._device:
                    _distinct(ours).copy_(_distinct(theirs.detach()))
            self._owner = owner

    def product(self, v: Sequence[Tensor]) -> Tensor:
        """``H v``, flat; the next product overwrites it."""
        torch._foreach_copy_(self._parts, [t.detach() for t in v])
        self.replay("product")
        assert self._flat is not None
        return self._flat

    def replay(self, name: str) -> None:
        """Run what was captured under this name."""
        run = self._replays[name]
        assert run is not None
        run()

    def capture(self, name: str) -> bool:
        """Capture one iteration, unless that was done; it overwrites the vectors.

        Args:
            name: ``"product"``; ``"neumann step"``: ``v <- v - alpha (H v + damping v)``, ``p <- p + v``;
                ``"cg step"``: conjugate gradients with ``v`` as direction.

        Returns:
            Whether it can be replayed; if not, the log says why, once.
        """
        if name not in self._replays:
            run = {"product": self._product, "neumann step": self._neumann_step, "cg step": self._cg_step}[name]
            self._replays[name] = None
            try:
                self._replays[name] = captured(run, self._device)
            except RuntimeError as error:
                _logger.warning("no CUDA graph of the %s: %s", name, str(error).partition("\n")[0])
        return self._replays[name] is not None

    @torch.no_grad()
    def _multiplied(self) -> Tensor:
        return torch.cat([t.reshape(-1) for t in self._program(self._parts, self._constants, self._scalars)])

    def _product(self) -> None:
        self._flat = self._multiplied()

    # Step size and damping change from solve to solve: as arguments of the fused step they would be part of the graph.

    def _neumann_step(self) -> None:
        change = torch.addcmul(self._multiplied(), self.v, self.damping).mul_(self.alpha)
        ops.neumann_step_([self.v], [self.p], [change], self.stats, 1.0, 0.0)

    def _cg_step(self) -> None:
        product = torch.addcmul(self._multiplied(), self.v, self.damping)
        ops.cg_step_([self.x], [self.r], [self.v], [product], self.state, 0.0)


class Bound:
    """The products of one solve."""

    def __init__(self, graphs: Graphs, constants: list[Tensor], shapes: list[torch.Size], *, fresh: bool) -> None:
        """Products of ``graphs`` with a solve's constants; ``fresh`` if they were captured for it."""
        self._graphs = graphs
        self._constants = constants
        self._shapes = shapes
        # Tells this solve from others; not `self`, which would keep its constants alive.
        self._token = object()
        self.fresh = fresh

    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` in new tensors."""
        with self._graphs.lock:
            self._graphs.load(self._token, self._constants)
            return views(self._graphs.product(v).clone(), self._shapes)

    def neumann_series(
        self, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """See `LinearOperator.neumann_series`; None for several right-hand sides."""
        with self._ready("neumann step", b) as graphs:
            if graphs is None:
                return None
            graphs.v.copy_(b[0])
            graphs.p.copy_(b[0])
            graphs.alpha.fill_(alpha)
            graphs.damping.fill_(damping)
            history = stop.new_full((steps, 1, 2), -1.0)
            limit = float(stop)
            for step in range(steps):
                graphs.replay("neumann step")
                history[step, 0].copy_(graphs.stats)
                # Without a tolerance all steps are taken, and what went wrong is seen after them.
                if limit >= 0 and (step + 1) % _LOOK_EVERY == 0 and not float(graphs.stats[0]) > limit:
                    break
            # A term that meets the tolerance in the end is left out: it is the residual of the sum before it.
            total = graphs.p - graphs.v * (graphs.stats[0] <= limit) if steps else graphs.p
            return (total * graphs.alpha)[None], history

    def conjugate_gradients(
        self, b: Tensor, damping: float, steps: int, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `LinearOperator.conjugate_gradients`; None for several right-hand sides."""
        with self._ready("cg step", b) as graphs:
            if graphs is None:
                return None
            graphs.x.zero_()
            graphs.r.copy_(b[0])
            graphs.v.copy_(b[0])
            graphs.state.copy_(state[0])
            graphs.damping.fill_(damping)
            taken = 0
            while taken < steps and float(graphs.state[3]) == 0:
                for _ in range(min(_LOOK_EVERY, steps - taken)):
                    graphs.replay("cg step")
                    taken += 1
            return graphs.x.clone()[None], graphs.state.clone()[None], torch.tensor(taken)

    @contextlib.contextmanager
    def _ready(self, name: str, b: Tensor) -> Iterator[Graphs | None]:
        """The graphs, for this alone, with this solve's constants and the one asked for, if there is one."""
        if len(b) != 1:
            yield None
            return
        with self._graphs.lock:
            self._graphs.load(self._token, self._constants)
            yield self._graphs if self._graphs.capture(name) else None


def _distinct(t: Tensor) -> Tensor:
    """The elements of an expanded tensor that have memory of their own."""
    return t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]
