"""The Hessian of a training loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hypergrad_ext.buffers import Buffers, buffers_kept
from hypergrad_ext.compilation import refuse_transforms
from hypergrad_ext.engines import (
    ENGINES,
    BatchedGradient,
    Gradient,
    Products,
    RetainedGradient,
    cuda_graph,
    expects_replay,
    native,
    recall,
)
from hypergrad_ext.losses import check_loss, check_tracked, evaluate, stale_graphs_named, takes
from hypergrad_ext.operators.base import LinearOperator
from hypergrad_ext.structure import Space, Tree, take_apart
from hypergrad_ext.surroundings import Surroundings, without_autocast

Loss = Tensor | Callable[..., Tensor]
"""A scalar tensor that still has its graph, or a function from the parameters to one."""

Engine = Literal["auto", "eager", "traced", "native", "cuda_graph", "compiled"]
"""How products are run: see `Hessian`."""


class Hessian(LinearOperator):
    r"""The Hessian :math:`H = \partial^2 L / \partial w^2` of a scalar loss.

    The gradient's graph is built on first use and kept: a product costs one backward pass through
    it (about two training gradients), and all products of a solve see one dropout mask and one
    update of the buffers. The part of that pass that depends on the vector can be recorded during one
    product and replayed for the others:

    ================ =================================================================================
    ``engine``       a product is
    ================ =================================================================================
    ``"eager"``      a backward pass
    ``"traced"``     the recorded torch operations, without autograd, without those that never change
    ``"native"``     the same as a flat plan that the compiled module runs (CPU; float32 or float64)
    ``"cuda_graph"`` the same as a CUDA graph, for `Neumann` and `CG` with the solver's step in it
    ``"compiled"``   that plan, with all but matrix products and convolutions compiled for these shapes, which takes
                     seconds; by ``torch.compile`` where there is no plan (GPU, other dtypes): up to minutes
    ``"auto"``       a native plan on the CPU, a CUDA graph on a GPU, if it is measured to be faster than
                     a backward pass, else that
    ================ =================================================================================

    The function itself runs in every solve, so new batches, other branches, other modes and new random masks are
    seen. Every solve is recorded anew, and programs are found again by what was recorded and compiled once; on the CPU
    the third and later solves whose losses have graphs of one kind are not recorded, but find what was recorded in
    their graphs, and build no graph of the gradient as long as nothing else needs it, the mixed derivative of a
    hypergradient included (not with Python's autograd functions or hooks, whose doings a graph does not show).
    Recording costs one to four products, which no count shows, and none of it has been run on a GPU yet. Called inside
    of ``torch.compile``, all of this breaks the graph and runs as it is. Peak memory, as a multiple of that of a
    training step (seven models from MLP to LSTM; bench/results): backward passes 2.3 to 6.4, ``"traced"`` 2.8 to 7.4,
    ``"native"`` 4.1 to 8.8; a CUDA graph keeps a copy of what its program saved, and its intermediates, for the next
    solve. Where that is too much, give the batch in parts (``batches``): no more than one part's graph is held.

    With ``batches``, H is the Hessian of the mean loss over them, without ever holding the graph of more than one:
    a product then costs a gradient and a backward pass for every batch, and all products of an operator see the same
    order and the same random masks. With ``stochastic`` every product takes one batch instead, any of a list, by
    chance, or the next of a loader, which has to come in random order: an unbiased estimate, for `LiSSA` (what
    ``"auto"`` is then), `Neumann` and `Identity`. All other solvers want one and the same matrix in every step, and
    refuse it; there is no residual, which would be one batch's.

    Args:
        loss: Scalar tensor that still has its graph, or a function of the parameters (and of a batch, if there
            are ``batches``) that returns one. A function is called once (for every batch of every product), with
            tensors that share the parameters' memory; for an ``nn.Module`` it gets the dict of trainable parameters
            (use ``torch.func.functional_call``), and the module's buffers are put back as they were. What it calls
            has a second derivative: attention takes the math kernel, recurrent layers leave cuDNN, compiled
            modules run as they were before.
        params: Tensor, list, tuple, dict or ``nn.Module`` (its parameters that require grad).
        batches: An iterable of what ``loss`` takes as second argument; a list or a ``DataLoader``. Every batch counts
            the same, and batches of different lengths bring a warning: use ``drop_last=True``, or a loss that returns
            the batch's sum times ``len(loader) / len(dataset)``.
        stochastic: Use one batch for every product, not all of them.
        unused: What to do with parameters that the loss does not depend on: ``"zeros"`` gives them
            zero rows, ``"error"`` raises and names them.
        engine: One of the above. What cannot be replayed is run by backward passes, and the log
            (``logging.getLogger("hypergrad_ext")``) says why, once.
        name: What the caller calls the loss, for messages.

    Raises:
        TypeError: If ``loss`` is neither, or complex; if a parameter is not real floating point.
        ValueError: If ``loss`` is not a scalar or has no graph, if parameters are empty, on several
            devices, given twice, do not require grad, or are unused and ``unused="error"``; if ``engine`` is unknown.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hg.Hessian((w**3).sum(), w) @ torch.ones(2)
        tensor([ 6., 12.])
    """

    surely_symmetric = True

    def __init__(  # noqa: D107 (documented in the class)
        self,
        loss: Loss,
        params: Tree,
        *,
        batches: Iterable[Any] | None = None,
        stochastic: bool = False,
        unused: Literal["zeros", "error"] = "zeros",
        engine: Engine = "auto",
        name: str = "loss",
    ) -> None:
        if unused not in ("zeros", "error"):
            raise ValueError(f"unused: expected 'zeros' or 'error', got {unused!r}")
        if engine not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
        self.params = take_apart("params", params)
        self.space = Space(self.params)
        self._unused = unused
        self.module = params if isinstance(params, nn.Module) else None
        self._gradient: Gradient | None = None
        self._products: Products | None = None
        self._hparams: list[Tensor] = []
        self._engine = engine
        if isinstance(loss, Tensor):
            check_loss(name, loss)
            check_tracked(self.params)
        elif not callable(loss):
            raise TypeError(
                f"{name}: expected a scalar tensor or a function of the parameters, got {type(loss).__name__}"
            )
        if batches is None and stochastic:
            raise ValueError("stochastic: expected batches to draw from, got none")
        if batches is not None and (isinstance(loss, Tensor) or isinstance(batches, Tensor)):
            what = "a function of the parameters and a batch" if isinstance(loss, Tensor) else "a list or DataLoader"
            raise TypeError(f"{name if isinstance(loss, Tensor) else 'batches'}: expected {what}, got a tensor")
        if batches is not None and engine not in ("auto", "eager"):
            raise ValueError(
                f"engine: expected 'auto' or 'eager' beside batches, whose graphs do not stay, got {engine!r}"
            )
        self._loss = loss
        self._name = name
        self._batches = batches
        self._then = Surroundings(None, self.space.device)  # functions run in the autocast of this call
        self.stochastic = stochastic

    @classmethod
    def of_gradient(cls, gradient: Tree, params: Tree) -> Hessian:
        """The Hessian from a gradient that was built with ``create_graph=True``.

        Args:
            gradient: One tensor per parameter; a dict is matched by its keys if ``params`` is a dict or a module.
            params: The parameters it was taken by.

        Returns:
            The operator.

        Raises:
            TypeError: If a parameter is not real floating point.
            ValueError: If number, names or shapes do not match, or no part of the gradient has a graph.
        """
        self = cls.__new__(cls)
        self.params = take_apart("params", params)
        self.space = Space(self.params)
        leaves = take_apart("f", gradient)
        grads = [leaves.tensors[i] for i in self.space.order("f", leaves)]
        if [g.shape for g in grads] != self.space.shapes:
            raise ValueError(
                f"f: expected the shapes of params, {[tuple(s) for s in self.space.shapes]}, "
                f"got {[tuple(g.shape) for g in grads]}"
            )
        if not any(g.requires_grad for g in grads):
            raise ValueError("f: expected a gradient with its graph, got one without; use create_graph=True")
        self._gradient = RetainedGradient(grads, self.params.tensors)
        self._products = Products(self._gradient, "eager", None)
        return self

    @property
    def gradient(self) -> Gradient:
        """The gradient of the loss with its graph, built on first use."""
        if self._gradient is None:
            with without_autocast(self.space.device):
                self._gradient = self._differentiate()
            unused = [name for name, used in zip(self.space.names, self._gradient.used, strict=True) if not used]
            if self._unused == "error" and unused:
                raise ValueError(f"params: expected every parameter in the loss, got unused {', '.join(unused)}")
            if not any(self._gradient.used):
                raise ValueError(
                    f"{self._name}: expected a loss that depends on params, got one that depends on none of them"
                )
        return self._gradient

    @property
    def used(self) -> list[bool]:
        """For every parameter, whether the loss depends on it."""
        return self.gradient.used

    @property
    def engine(self) -> str:
        """The engine that runs the products at this time."""
        return "eager" if self._products is None else self._products.engine

    @property
    def products(self) -> Products:
        """What runs the products."""
        if self._products is None:
            engine = "eager" if self._batches is not None else self._engine
            self._products = Products(self.gradient, engine, self._key())
        return self._products

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``: one backward pass through the gradient's graph, or a replay of one."""
        return self.products.hvp(v)

    def matmat(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` for a batch: by replay, a product on every thread, or one batched pass where that is faster."""
        return self.products.hvps(v)

    def prepare(self, products: int, rows: int) -> Hessian:
        """The operator itself; its engine takes note."""
        self.products.expect(products, rows)
        return self

    def neumann_series(
        self, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor] | None:
        """The whole series in one call where products run on a native plan or as a CUDA graph."""
        bound = self._bound(b, backend)
        whole = None if bound is None else bound.neumann_series(b, alpha, damping, steps, stop)
        if whole is None:
            return None
        x, history = whole
        self.products.made(len(b) * int((history[:, 0, 0] != -1).sum()))
        return x, history

    def conjugate_gradients(
        self, b: Tensor, damping: float, steps: int, state: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The whole solve in one call where products run on a native plan or as a CUDA graph."""
        bound = self._bound(b, backend)
        whole = None if bound is None else bound.conjugate_gradients(b, damping, steps, state)
        if whole is None:
            return None
        x, state, taken = whole
        self.products.made(len(b) * int(taken))
        return x, state, taken

    def _bound(self, b: Tensor, backend: str | None) -> native.Bound | cuda_graph.Bound | None:
        return self.products.bound(lambda: self.space.views(b), backend) if self.space.exact else None

    def _key(self) -> Hashable:
        """Which function this is, as far as speed is concerned."""
        loss = self._loss
        name = type(loss.grad_fn) if isinstance(loss, Tensor) else getattr(loss, "__code__", type(loss))
        return name, self._engine, self.space.device, tuple(self.space.shapes), tuple(self.space.dtypes)

    def mixed(self, x: Sequence[Tensor], hparams: Sequence[Tensor]) -> list[Tensor | None]:
        r""":math:`x^\top \partial^2 L / \partial w\, \partial \lambda`; None for a tensor that the gradient ignores."""
        return (self.gradient if self._products is None else self._products).mixed(x, hparams)

    def expect_mixed(self, hparams: Sequence[Tensor]) -> None:
        """Take note, before the first product, that `mixed` by these will follow: they are recorded together."""
        self._hparams = list(hparams)

    def _gradient_of(self, loss: Tensor, leaves: Sequence[Tensor], buffers: Buffers) -> RetainedGradient:
        """The gradient with its graph; not built yet if replayed products are expected to need none."""
        if self._batches is None and expects_replay(self._key(), self._engine):
            gradient = RetainedGradient(None, leaves, loss, self._hparams)
            if recall(gradient):
                return gradient
        gradient = RetainedGradient.of(loss, leaves, self._hparams)
        if buffers.changed():
            # A checkpoint ran a part of the model again, and will in every pass.
            buffers.put_back()
            gradient.around = functools.partial(buffers_kept, self.module)
            gradient = gradient.fresh()
        return gradient

    def _differentiate(self) -> Gradient:
        if isinstance(self._loss, Tensor):
            with stale_graphs_named(self._name):
                return self._gradient_of(self._loss, self.params.tensors, Buffers(self.module))
        refuse_transforms(self._name)
        leaves = [t.detach().requires_grad_() for t in self.params.tensors]

        def build(loss: Callable[[Tree], Tensor]) -> RetainedGradient:
            with torch.enable_grad(), buffers_kept(self.module) as buffers, self._then.again():
                value = evaluate(self._name, loss, self.params, leaves)
            return self._gradient_of(value, leaves, buffers)

        if self._batches is None:
            return build(self._loss)
        of_batch: Callable[[Tree, Any], Tensor] = self._loss
        if not takes(2, of_batch):
            raise TypeError(
                f"{self._name}: expected a function of the parameters and a batch beside batches=, got one that does "
                "not take these two; what a loader yields comes as it is, as one argument"
            )
        return BatchedGradient(
            lambda batch: build(lambda params: of_batch(params, batch)),
            self._batches,
            leaves,
            stochastic=self.stochastic,
        )
