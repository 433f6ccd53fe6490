"""The mean loss over batches that do not fit into memory together, or one batch, by chance, for every product."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, SequentialSampler

from hypergrad_ext.engines.eager import RetainedGradient


class BatchedGradient:
    """The gradient of a loss averaged over batches, each batch's graph built when it is its turn and dropped after.

    Every product goes through all batches, in one order and with one random mask for each, so that all
    products of a solve are products with one matrix. With ``stochastic``, every product takes one batch: any of a
    sequence, by chance, or else the next, in the order in which they come.
    """

    curved = True

    def __init__(
        self,
        build: Callable[[Any], RetainedGradient],
        batches: Iterable[Any],
        leaves: Sequence[Tensor],
        *,
        stochastic: bool,
    ) -> None:
        """Look at the batches, once, and warn where their lengths differ.

        Args:
            build: From a batch to the gradient of its loss, with its graph.
            batches: The batches.
            leaves: The parameters.
            stochastic: Take one batch for every product, instead of all of them.

        Raises:
            ValueError: If there are no batches, or all are needed in every product and they can be had only once.
        """
        self._build = build
        self._batches = batches
        self._stochastic = stochastic
        self._next: Iterator[Any] = iter(())
        self._together: bool | None = None
        self.leaves = list(leaves)
        # Drawn from the caller's generator, so that the next solve sees other masks and another order.
        self._seed = int(torch.randint(2**62, (), device="cpu"))
        self._seeds: dict[torch.Generator, int] = {}
        if stochastic:
            # What later batches depend on is not known yet.
            self.used = [True] * len(self.leaves)
            self._chance = torch.Generator().manual_seed(self._seed)
            if isinstance(batches, DataLoader) and isinstance(batches.sampler, SequentialSampler) and len(batches) > 1:
                warnings.warn(
                    "batches: expected a DataLoader with shuffle=True beside stochastic=True, got one that goes "
                    "through the data in order, which the estimate then depends on, and no standard error shows",
                    UserWarning,
                    stacklevel=2,
                )
        elif isinstance(batches, Iterator):
            raise ValueError(
                "batches: expected an iterable that can be gone through for every product, such as a list or a "
                f"DataLoader, got an iterator ({type(batches).__name__}); or use stochastic=True"
            )
        else:
            self._seeds = {g: int(torch.randint(2**62, (), generator=g, device=g.device)) for g in _generators(batches)}
            uses: list[list[bool]] = []
            lengths: set[int] = set()
            self._each(lambda gradient: uses.append(gradient.used), lambda batch: lengths.update(_length(batch)))
            if len(lengths) > 1:
                warnings.warn(
                    f"batches: expected batches of one length, got {min(lengths)} to {max(lengths)} rows, and every "
                    "batch counts the same; use drop_last=True, or a train_loss that returns the batch's sum "
                    "* len(loader) / len(dataset) (and filter this warning)",
                    UserWarning,
                    stacklevel=2,
                )
            self.used = [any(of_one) for of_one in zip(*uses, strict=True)]

    def hvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``, one tensor per leaf. Cost: for every batch a gradient and a backward pass through its graph."""
        return self._mean(lambda gradient: gradient.hvp(v))

    def hvps(self, v: Sequence[Tensor]) -> list[Tensor]:
        """The same for tensors with a leading dimension k; every batch is evaluated once for all k."""

        def of_one(gradient: RetainedGradient) -> list[Tensor]:
            # What the first batch has measured holds for the others.
            gradient.batches = self._together
            products = gradient.hvps(v)
            self._together = gradient.batches
            return products

        return self._mean(of_one)

    def mixed(self, x: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor | None]:
        """``d <gradient, x> / d others``; None where no gradient depends on a tensor."""
        return self._mean(lambda gradient: gradient.mixed(x, others))

    def _mean(self, of_one: Callable[[RetainedGradient], list[Any]]) -> list[Any]:
        if self._stochastic:
            return of_one(self._build(self._draw()))
        sums: list[Any] = []

        def add(gradient: RetainedGradient) -> None:
            parts = of_one(gradient)
            sums.extend([None] * (len(parts) - len(sums)))
            for i, part in enumerate(parts):
                if part is not None:
                    sums[i] = part.clone() if sums[i] is None else sums[i].add_(part)

        count = self._each(add)
        return [None if part is None else part.div_(count) for part in sums]

    def _each(self, visit: Callable[[RetainedGradient], object], look: Callable[[Any], object] | None = None) -> int:
        """Visit the gradient of every batch, the same in every pass; the number of batches."""
        device = self.leaves[0].device
        count = 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            with _seeded(self._seeds):
                for batch in self._batches:
                    if look:
                        look(batch)
                    visit(self._build(batch))
                    count += 1
        if count == 0:
            raise ValueError("batches: expected at least one batch, got none")
        return count

    def _draw(self) -> Any:
        if isinstance(self._batches, Sequence) and len(self._batches):
            # Independent of each other: in one order, runs of as many products as there are batches would all be equal.
            return self._batches[int(torch.randint(len(self._batches), (), generator=self._chance))]
        try:
            return next(self._next)
        except StopIteration:
            self._next = iter(self._batches)
        try:
            return next(self._next)
        except StopIteration:
            raise ValueError(
                "batches: expected one more batch for every product, got an iterable that has no more; "
                "a list or a DataLoader starts again"
            ) from None


def _generators(batches: Any) -> set[torch.Generator]:
    """The generators that a ``DataLoader`` draws its order from, beside torch's own."""
    samplers = [batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)]
    samplers.append(getattr(samplers[-1], "sampler", None))
    found = (getattr(sampler, "generator", None) for sampler in samplers)
    return {generator for generator in found if isinstance(generator, torch.Generator)}


@contextmanager
def _seeded(seeds: dict[torch.Generator, int]) -> Iterator[None]:
    """Let generators draw from these seeds, and go on afterwards from where they are."""
    states = [(generator, generator.get_state()) for generator in seeds]
    for generator, seed in seeds.items():
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _length(batch: Any) -> list[int]:
    """Rows of the first tensor of a batch, if it has any, also in a dataclass or a mapping that is no dict."""
    if isinstance(batch, Mapping):
        batch = dict(batch)
    elif dataclasses.is_dataclass(batch):
        batch = vars(batch)
    leaves = pytree.tree_leaves(batch)
    return [len(t) for t in leaves if isinstance(t, Tensor) and t.dim()][:1]
