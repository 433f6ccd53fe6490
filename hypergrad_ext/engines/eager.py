"""Double backward through a gradient graph that is built once and kept."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hypergrad_ext.engines.forward import raise_explained
from hypergrad_ext.structure import dense

# What torch.autograd.grad calls once it has compared shapes that we know to agree: with 44 tensors the
# comparison takes a tenth of a product.
_run_backward = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)

# Products of more elements than this go one after another: batched, the intermediate results of all of them
# would be in memory at once, and what batching saves is the overhead of small ones.
_BATCH_LIMIT = 2**24


class RetainedGradient:
    """The gradient of a loss with its graph: every product with the Hessian is one backward pass through it.

    The forward pass ran once, so random masks and buffer updates happened once: all products of
    one solve see the same function.
    """

    def __init__(
        self,
        grads: Sequence[Tensor | None] | None,
        leaves: Sequence[Tensor],
        loss: Tensor | None = None,
        others: Sequence[Tensor] = (),
    ) -> None:
        """Keep gradients that have a graph.

        Args:
            grads: Gradient by each leaf, built with ``create_graph=True``; None where there is none. Or None: to be
                built from the loss when it is needed, which a solve by replay may never do.
            leaves: The tensors it was taken by.
            loss: The scalar whose gradient it is, with its graph.
            others: What `mixed` will be asked for, as far as that is known.
        """
        self.leaves = list(leaves)
        self.loss = loss
        self.others = list(others)
        self._given = grads
        self._zeros: dict[int, Tensor] = {}
        # The loss's graph, taken down for the first product; see `linked`.
        self.graph: Any | None = None
        # Whether a batch of vectors goes at once; None as long as that was not measured.
        self.batches: bool | None = None
        # What passes run in, if they run code of the user's.
        self.around: Callable[[], AbstractContextManager] = contextlib.nullcontext

    @functools.cached_property
    def _grads(self) -> Sequence[Tensor | None]:
        return self._given if self._given is not None else self.fresh(self.seed)._grads

    @functools.cached_property
    def seed(self) -> Tensor:
        """The derivative of the loss by itself."""
        assert self.loss is not None
        return torch.ones_like(self.loss.detach())

    @functools.cached_property
    def used(self) -> list[bool]:
        """For every leaf, whether there is a gradient."""
        return [g is not None for g in self._grads]

    @functools.cached_property
    def _curved(self) -> list[int]:
        """Leaves whose gradient has a graph. One without is constant: its row of the Hessian is zero."""
        return [i for i, g in enumerate(self._grads) if g is not None and g.requires_grad]

    @functools.cached_property
    def outputs(self) -> list[Tensor]:
        """The gradients that have a graph."""
        return [g for g in self._grads if g is not None and g.requires_grad]

    @property
    def curved(self) -> bool:
        """Whether any part of the gradient depends on anything: else H is zero."""
        return bool(self._curved)

    @property
    def shape(self) -> tuple[list[bool], list[int]]:
        """Which leaves have a gradient, and which of those a graph."""
        return self.used, self._curved

    def assume(self, shape: tuple[list[bool], list[int]]) -> None:
        """Take from another gradient with an equal graph which leaves are used, so that this one need not be built."""
        self.used, self._curved = shape

    @classmethod
    def of(cls, loss: Tensor, leaves: Sequence[Tensor], others: Sequence[Tensor] = ()) -> RetainedGradient:
        """Build the gradient graph of a scalar loss."""
        return cls(None, leaves, loss, others).fresh()

    def fresh(self, seed: Tensor | None = None) -> RetainedGradient:
        """The gradient of the same loss, built anew."""
        assert self.loss is not None
        with torch.enable_grad(), self.around():
            try:
                grads = torch.autograd.grad(self.loss, self.leaves, seed, create_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise_explained(error)
        gradient = RetainedGradient(grads, self.leaves, self.loss, self.others)
        gradient.around = self.around
        return gradient

    def hvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``, one tensor per leaf. Cost: one backward pass through the gradient's graph."""
        if not self.curved:
            return [self._zero(i) for i in range(len(self.leaves))]
        return self._whole(self._pull(self.leaves, v))

    def hvp_and_mixed(self, v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """``H v`` and the mixed derivative by the `others`, of a curved gradient, in one backward pass."""
        parts = self._pull([*self.leaves, *self.others], v)
        return self._whole(parts[: len(self.leaves)]), list(parts[len(self.leaves) :])

    def _whole(self, parts: Sequence[Tensor | None]) -> list[Tensor]:
        return [self._zero(i) if part is None else part for i, part in enumerate(parts)]

    def hvps(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` for a batch: one batched backward pass, or one after another, as the first batch shows to be faster.

        Under deterministic algorithms always the latter, so that no clock decides about rounding.

        Args:
            v: One tensor per leaf, each with a leading dimension k.

        Returns:
            Tensors of the same shapes.
        """
        k = v[0].shape[0]
        if k == 1 or not self.outputs or self.batches is False or torch.are_deterministic_algorithms_enabled():
            return self._one_by_one(v)
        if k * sum(t.numel() for t in self.leaves) > _BATCH_LIMIT:
            return self._one_by_one(v)
        if self.batches is None:
            self.batches = self._batch_is_faster(v)
        return self._at_once(v) if self.batches else self._one_by_one(v)

    def _one_by_one(self, v: Sequence[Tensor]) -> list[Tensor]:
        products = [self.hvp([t[j] for t in v]) for j in range(v[0].shape[0])]
        return [torch.stack(parts) for parts in zip(*products, strict=True)]

    def _at_once(self, v: Sequence[Tensor]) -> list[Tensor]:
        vectors = [v[i] for i in self._curved]
        with self.around():
            parts = torch.autograd.grad(
                self.outputs, self.leaves, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        k = v[0].shape[0]
        zeros = (self._zero(i).expand(k, *t.shape) for i, t in enumerate(self.leaves))
        return [zero if part is None else dense(part) for part, zero in zip(parts, zeros, strict=True)]

    def _batch_is_faster(self, v: Sequence[Tensor]) -> bool:
        try:
            self._at_once(v)
        except (RuntimeError, NotImplementedError):
            return False  # an operation without a batching rule, or out of memory
        pair = [t[:2] for t in v]
        self._one_by_one(pair)
        together, alone = (self._seconds(run, on) for run, on in ((self._at_once, v), (self._one_by_one, pair)))
        return together < alone * v[0].shape[0] / 2

    def _seconds(self, run: Callable[[Sequence[Tensor]], list[Tensor]], v: Sequence[Tensor]) -> float:
        if v[0].is_cuda:
            torch.cuda.synchronize(v[0].device)
        start = time.perf_counter()
        run(v)
        if v[0].is_cuda:
            torch.cuda.synchronize(v[0].device)
        return time.perf_counter() - start

    def mixed(self, x: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor | None]:
        """``d <gradient, x> / d others``; None where the gradient does not depend on a tensor."""
        if not self.outputs:
            return [None] * len(others)
        return list(self._pull(others, x))

    def _pull(self, inputs: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        vectors = [v[i] for i in self._curved]
        try:
            with self.around():
                parts = self._backward(inputs, vectors)
        except RuntimeError as error:
            raise_explained(error)
        return tuple(part if part is None else dense(part) for part in parts)

    def _backward(self, inputs: Sequence[Tensor], vectors: list[Tensor]) -> tuple[Tensor | None, ...]:
        if _run_backward is None:
            return torch.autograd.grad(self.outputs, inputs, grad_outputs=vectors, retain_graph=True, allow_unused=True)
        return _run_backward(
            tuple(self.outputs),
            tuple(vectors),
            True,
            False,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )

    def _zero(self, i: int) -> Tensor:
        if i not in self._zeros:
            self._zeros[i] = torch.zeros_like(self.leaves[i], memory_format=torch.contiguous_format).detach()
        return self._zeros[i]
