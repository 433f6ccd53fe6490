"""Between what people pass (tensor, list, dict, module) and one flat vector."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad_ext import _native

Tree = Any
"""A tensor, or a list, tuple or dict (nested if you like) of tensors."""


@dataclass(frozen=True)
class Leaves:
    """A tree taken apart: its tensors, a readable name for each, and the way back."""

    tensors: list[Tensor]
    names: list[str]
    keys: list[str]
    keyed: bool
    rebuild: Callable[[Sequence[Any]], Tree]


def take_apart(argument: str, tree: Tree) -> Leaves:
    """Flatten ``tree``; a module stands for the dict of its trainable parameters.

    Args:
        argument: Name of the argument, for messages.
        tree: Tensor, list, tuple, dict or ``nn.Module``.

    Returns:
        The leaves in order.

    Raises:
        TypeError: If a leaf is not a tensor.
        ValueError: If there are no leaves.
    """
    if isinstance(tree, nn.Module):
        tree = {name: p for name, p in tree.named_parameters() if p.requires_grad}
        if not tree:
            raise ValueError(f"{argument}: expected a module with parameters that require grad, got none")
    elif not isinstance(tree, (Tensor, list, tuple, dict, str, set, frozenset)) and isinstance(tree, Iterable):
        tree = list(tree)  # model.parameters()
    tensors: list[Tensor] = []
    keys: list[str] = []
    keyed = _walk(argument, tree, "", tensors, keys)
    if not tensors:
        raise ValueError(f"{argument}: expected at least one tensor, got an empty {type(tree).__name__}")
    return Leaves(
        tensors,
        [argument + key for key in keys],
        keys,
        keyed,
        lambda leaves: _rebuild(tree, iter(leaves)),
    )


def held(tree: Tree) -> Tree:
    """The tree, an iterator (``model.parameters()``) as a list, so that it can be taken apart again."""
    return list(tree) if isinstance(tree, Iterator) else tree


def _walk(argument: str, tree: Tree, key: str, tensors: list[Tensor], keys: list[str]) -> bool:
    """Collect tensors and keys; whether there is a dict among what holds them."""
    keyed = isinstance(tree, dict)
    if isinstance(tree, Tensor):
        tensors.append(tree)
        keys.append(key)
    elif isinstance(tree, dict):
        for name, part in tree.items():
            _walk(argument, part, f"{key}[{name!r}]", tensors, keys)
    elif isinstance(tree, (list, tuple)):
        for i, part in enumerate(tree):
            keyed |= _walk(argument, part, f"{key}[{i}]", tensors, keys)
    else:
        expected = "a tensor" if key else "a tensor, list, tuple, dict or nn.Module"
        raise TypeError(f"{argument}{key}: expected {expected}, got {type(tree).__name__}")
    return keyed


def _rebuild(tree: Tree, leaves: Iterator[Any]) -> Tree:
    if isinstance(tree, Tensor):
        return next(leaves)
    if isinstance(tree, dict):
        return {name: _rebuild(part, leaves) for name, part in tree.items()}
    parts = [_rebuild(part, leaves) for part in tree]
    if isinstance(tree, list):
        return parts
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def check_real(leaves: Leaves) -> None:
    """Refuse integer, complex and sparse tensors.

    Raises:
        TypeError: Naming the first such tensor.
    """
    for name, t in zip(leaves.names, leaves.tensors, strict=True):
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a real floating point tensor, got {t.dtype}")
        if t.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got one of layout {t.layout}")


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """What changes when somebody writes into one of the tensors; nothing in inference mode, which does not count."""
    return [t._version for t in tensors if not t.is_inference()]


def contiguous_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def views(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Parts of a flat tensor ``(n,)`` or ``(k, n)``, one after another, in these shapes; no copy."""
    plain = (
        not torch.compiler.is_compiling()
        and type(flat) is Tensor
        and not flat.requires_grad
        and not torch._C._functorch.is_functorch_wrapped_tensor(flat)
    )
    if _native._C is not None and plain:
        # A list of dozens takes as long in Python as a product of a small network.
        return _native._C.views(flat, shapes)
    parts = flat.split([shape.numel() for shape in shapes], dim=-1)
    return [part.view((*flat.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)]


def dense(t: Tensor) -> Tensor:
    """A derivative as the solvers take it: that of ``nn.Embedding(sparse=True)`` is sparse."""
    return t.to_dense() if t.is_sparse else t


@dataclass(frozen=True)
class Packed:
    """Vectors of a `Space` in one buffer of shape ``(n,)``, or ``(k, n)`` for a batch of k."""

    flat: Tensor
    restore: Callable[[Tensor], Tree]

    @property
    def rows(self) -> int | None:
        """The batch size k, or None for a single vector."""
        return self.flat.shape[0] if self.flat.dim() == 2 else None


class Space:
    """The vector space of some parameters: shapes, dtypes, device, and their order in a flat buffer.

    Solver state is float32 for parameters of any lower precision (bfloat16 state loses the Neumann
    series), float64 for float64.
    """

    def __init__(self, leaves: Leaves) -> None:
        """Describe the space of ``leaves``.

        Args:
            leaves: The parameters.

        Raises:
            TypeError: If a parameter is not a real floating point tensor.
            ValueError: If parameters are on several devices, or one occurs twice.
        """
        check_real(leaves)
        self.leaves = leaves
        self.device = leaves.tensors[0].device
        seen: dict[int, str] = {}
        for name, t in zip(leaves.names, leaves.tensors, strict=True):
            if t.device != self.device:
                raise ValueError(
                    f"{name}: expected all tensors on {self.device}, the device of {leaves.names[0]}, got {t.device}"
                )
            if id(t) in seen:
                raise ValueError(f"{name}: expected every tensor once, got the same tensor as {seen[id(t)]}")
            seen[id(t)] = name
        self.names = leaves.names
        self.shapes = [t.shape for t in leaves.tensors]
        self.dtypes = [t.dtype for t in leaves.tensors]
        self.sizes = [t.numel() for t in leaves.tensors]
        self.numel = sum(self.sizes)
        self._starts = [0, *itertools.accumulate(self.sizes)][:-1]
        if self.numel == 0:
            raise ValueError(
                f"{leaves.names[0]}: expected at least one element in all, got shape {tuple(self.shapes[0])}"
            )
        self.dtype = torch.float64 if torch.float64 in self.dtypes else torch.float32
        self.uniform = len(set(self.dtypes)) == 1
        self.exact = self.uniform and self.dtypes[0] == self.dtype

    @functools.cached_property
    def _strides(self) -> list[tuple[int, ...]]:
        return list(map(contiguous_strides, self.shapes))

    def pack(self, argument: str, tree: Tree, *, rows: int | None = None, graph: bool = False) -> Packed:
        """Copy a vector, or a batch of vectors, of this space into a new flat buffer.

        Args:
            argument: Name of the argument, for messages.
            tree: Leaves of the parameters' shapes, or with one more leading dimension k on every leaf.
            rows: Expected batch size; by default whatever the leaves have.
            graph: Whether autograd is to see the copy.

        Returns:
            The buffer, in the state's dtype, and the way back to the structure and dtypes of ``tree``.

        Raises:
            TypeError: If a leaf has another dtype than its parameter or the solver state.
            ValueError: If number, names, shapes or device do not match the parameters.
        """
        leaves = take_apart(argument, tree)
        order = self.order(argument, leaves)
        tensors = [dense(leaves.tensors[i]) for i in order]
        batch = self._batch(argument, leaves, order) if rows is None else rows or None
        for i, t, shape, dtype in zip(order, tensors, self.shapes, self.dtypes, strict=True):
            expected = shape if batch is None else (batch, *shape)
            if t.shape != expected:
                raise ValueError(f"{leaves.names[i]}: expected shape {tuple(expected)}, got {tuple(t.shape)}")
            if t.dtype not in (dtype, self.dtype):
                wanted = " or ".join(dict.fromkeys([str(dtype), str(self.dtype)]))
                raise TypeError(f"{leaves.names[i]}: expected {wanted}, got {t.dtype}")
            if t.device != self.device:
                raise ValueError(f"{leaves.names[i]}: expected device {self.device}, got {t.device}")
            if not graph and torch._C._functorch.is_functorch_wrapped_tensor(t):
                raise TypeError(
                    f"{leaves.names[i]}: expected a plain tensor, got one inside a transform of torch.func; "
                    "in the place of vmap give it a leading dimension"
                )
            if torch._C._functorch.is_legacy_batchedtensor(t):
                raise TypeError(
                    f"{leaves.names[i]}: expected a plain tensor, got one of a backward pass with is_grads_batched or "
                    "vectorize; call backward once for every output, with retain_graph=True"
                )
        lead = () if batch is None else (batch,)
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            flat = torch.cat([t.reshape(*lead, -1).to(self.dtype) for t in tensors], dim=-1)
        dtypes = [t.dtype for t in tensors]

        def restore(x: Tensor) -> Tree:
            ordered: list[Tensor] = [x] * len(order)
            for i, view, dtype in zip(order, self.views(x), dtypes, strict=True):
                ordered[i] = view if view.dtype is dtype and batch is None else view.to(dtype).contiguous()
            return leaves.rebuild(ordered)

        return Packed(flat, restore)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' views of a flat buffer ``(n,)`` or ``(k, n)``; no copy."""
        return views(flat, self.shapes)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """``(n,)`` or ``(k, n)``, of parts of one dtype: the buffer itself where they are its `views`, else a copy."""
        lead = parts[0].shape[: parts[0].dim() - len(self.shapes[0])]
        buffer = parts[0]._base
        if buffer is not None and buffer.shape == (*lead, self.numel) and buffer.is_contiguous():
            rows, start = (self.numel,) if lead else (), buffer.storage_offset()
            if all(
                part._base is buffer and part.storage_offset() == start + at and part.stride() == (*rows, *strides)
                for part, at, strides in zip(parts, self._starts, self._strides, strict=True)
            ):
                return buffer
        return torch.cat([part.reshape(*lead, -1) for part in parts], dim=-1)

    def order(self, argument: str, leaves: Leaves) -> list[int]:
        """Position in ``leaves`` of every parameter: by key where both have dicts (or are a module), else by place.

        Returns:
            One index per parameter.

        Raises:
            ValueError: If number or keys do not match the parameters.
        """
        mine, theirs = self.leaves.keys, leaves.keys
        if len(theirs) != len(mine):
            many = len(theirs) > len(mine) and len(theirs) % len(mine) == 0
            raise ValueError(
                f"{argument}: expected {len(mine)} tensors, one for each parameter, got {len(theirs)}"
                + ("; a batch of vectors is one more leading dimension on every tensor" if many else "")
            )
        if mine == theirs or not (self.leaves.keyed and leaves.keyed):
            return list(range(len(mine)))
        position = {key: i for i, key in enumerate(theirs)}
        for key in mine:
            if key not in position:
                raise ValueError(f"{argument}: expected the keys of params, got none for {key}")
        return [position[key] for key in mine]

    def _batch(self, argument: str, leaves: Leaves, order: list[int]) -> int | None:
        """Batch size of the leaves, from the first that is not empty of information."""
        first = leaves.tensors[order[0]]
        if first.shape == self.shapes[0]:
            return None
        if first.dim() == len(self.shapes[0]) + 1 and first.shape[1:] == self.shapes[0]:
            if first.shape[0] == 0:
                raise ValueError(f"{argument}: expected at least one vector in the batch, got 0")
            return first.shape[0]
        raise ValueError(
            f"{leaves.names[order[0]]}: expected shape {tuple(self.shapes[0])}, or that with one leading batch "
            f"dimension, got {tuple(first.shape)}"
        )
