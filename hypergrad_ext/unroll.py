"""Differentiable training steps: the hypergradient of what was done, not of the optimum."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hypergrad_ext.bilevel import check_hparams, reach, unused_error
from hypergrad_ext.buffers import buffers_kept
from hypergrad_ext.compilation import never_compiled, refuse_transforms
from hypergrad_ext.engines.checkpoints import rerun_in
from hypergrad_ext.engines.forward import raise_explained
from hypergrad_ext.losses import evaluate
from hypergrad_ext.norms import finite
from hypergrad_ext.solvers.base import check_count, check_number
from hypergrad_ext.structure import Leaves, Space, Tree, take_apart, versions
from hypergrad_ext.surroundings import Surroundings, without_autocast


@never_compiled
def unroll(
    train_loss: Callable[..., Tensor],
    params: Tree,
    hparams: Tree,
    *,
    steps: int,
    lr: float | Tensor,
    optimizer: Literal["sgd", "adam"] = "sgd",
    momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    last: int | None = None,
    batches: Iterable[Any] | None = None,
    checkpoint: bool = False,
) -> Tree:
    r"""Train for some steps and stay differentiable: the weights as a function of the hyperparameters.

    .. math::

        w_{t+1} = w_t - \eta_t \frac{\partial L_T}{\partial w}(w_t, \lambda) \quad \text{(SGD; or momentum, Adam)}

    Any loss computed from the result can be called ``backward`` on: that adds to the gradients of ``hparams``, and of
    ``lr`` if it requires grad. Unlike `hypergrad_ext.implicit` it needs no optimum, and it sees learning rates; but
    it keeps every step's graph: memory grows with ``steps``, or ``last``. At an optimum, i steps of SGD have the
    hypergradient of ``Neumann(steps=i - 1, alpha=lr)``, to rounding.

    Args:
        train_loss: :math:`L_T`, a function of the parameters (and of a batch, if there are ``batches``) that closes
            over ``hparams``; for an ``nn.Module`` it gets the dict of trainable parameters, and the module's buffers
            are put back as they were.
        params: The weights to start from: tensor, list, tuple, dict or ``nn.Module``. They are not changed, and the
            result does not depend on them as far as autograd is concerned.
        hparams: The hyperparameters; they must require grad.
        steps: Training steps.
        lr: Learning rate: a number, a scalar tensor, or a tensor with one rate per step, shape ``(steps,)``.
        optimizer: ``"sgd"`` or ``"adam"``, equal to torch's, from their initial state.
        momentum: Of SGD, without dampening.
        betas: Of Adam.
        eps: Of Adam.
        last: Keep the graph of the last so many steps only (truncated unrolling); None keeps all.
        batches: An iterable of what ``train_loss`` takes as second argument; every step takes the next one, from the
            start again after the last.
        checkpoint: Keep the weights of every step only, and run it again in the backward pass, with the same random
            numbers, autocast and, for an ``nn.Module``, training modes. Then only ``hparams`` and ``lr`` get
            gradients, and only once.

    Returns:
        The trained weights with their graph, in the structure of ``params``; for an ``nn.Module`` the dict for
        ``functional_call``.

    Raises:
        NotImplementedError: If this is called inside of a transform of ``torch.func``.
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value, or the trained weights depend neither on ``hparams``
            nor on an ``lr`` that requires grad (which is not looked at with ``checkpoint``); the message names it.
        FloatingPointError: If the trained weights are not finite.
        RuntimeError: In the backward pass, if a step with ``checkpoint`` comes out otherwise when it runs again.

    Cost: a training gradient per step; in the backward pass a Hessian-vector product and a product with the mixed
    derivative for every step that is kept, and with ``checkpoint`` one more gradient.

    References:
        Maclaurin, Duvenaud, Adams, "Gradient-based Hyperparameter Optimization through Reversible Learning", ICML 2015.
        Shaban, Cheng, Hatch, Boots, "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019.

    Example:
        >>> w, lam = torch.tensor(0.0), torch.tensor(1.0, requires_grad=True)
        >>> best = hg.unroll(lambda w: (w - 3) ** 2 + lam * w**2, w, lam, steps=50, lr=0.2)
        >>> (best**2).backward()
        >>> lam.grad  # of (3 / (1 + lam))^2
        tensor(-2.2500)
    """
    if not callable(train_loss):
        raise TypeError(f"train_loss: expected a function of the parameters, got {type(train_loss).__name__}")
    refuse_transforms("train_loss")
    check_count("steps", steps, 1)
    if last is not None:
        check_count("last", last, 0)
    weights, outer = take_apart("params", params), take_apart("hparams", hparams)
    space = Space(weights)
    check_hparams(outer, weights)
    rates = _rates(lr, steps, space.device)
    rule = _rule(optimizer, momentum, betas, eps, space)
    module = params if isinstance(params, nn.Module) else None
    kept = steps if last is None else min(last, steps)
    state = [t.detach() for t in weights.tensors] + rule.start([t.detach() for t in weights.tensors])
    drawn = _endless(batches)
    for step, rate in enumerate(rates):
        loss = _OnBatch(train_loss, next(drawn)) if batches is not None else train_loss
        advance = _Step(loss, weights, rule, step, module)
        graph = step >= steps - kept
        if graph and checkpoint:
            state = list(_Checkpointed.apply(advance, len(state), *state, rate, *outer.tensors))
        else:
            state = advance(state, rate, graph=graph)
    trained = state[: len(weights.tensors)]
    if not finite(trained):
        raise FloatingPointError(f"training diverged within {steps} steps: lower lr, or look at train_loss")
    learned = [lr] if isinstance(lr, Tensor) and lr.requires_grad else []
    if kept and not reach(trained, [*outer.tensors, *learned]):
        raise unused_error(outer.names)
    return weights.rebuild(trained)


class _Rule(NamedTuple):
    """How an optimiser goes from weights, its state and a gradient to the next weights and state."""

    start: Callable[[list[Tensor]], list[Tensor]]
    step: Callable[[list[Tensor], list[Tensor], Tensor, int], list[Tensor]]


def _rule(name: str, momentum: float, betas: tuple[float, float], eps: float, space: Space) -> _Rule:
    check_number("momentum", momentum, positive=False)
    check_number("eps", eps, positive=True)
    n = len(space.shapes)

    def descend(state: list[Tensor], grads: list[Tensor], lr: Tensor, step: int) -> list[Tensor]:
        w = state[:n]
        if momentum == 0:
            return [p - lr.to(p.dtype) * g for p, g in zip(w, grads, strict=True)]
        v = [momentum * m + g for m, g in zip(state[n:], grads, strict=True)]
        return [p - lr.to(p.dtype) * m for p, m in zip(w, v, strict=True)] + v

    if name == "sgd":
        return _Rule(lambda w: [torch.zeros_like(t) for t in w] if momentum else [], descend)
    if name != "adam":
        raise ValueError(f"optimizer: expected 'sgd' or 'adam', got {name!r}")
    if momentum:
        raise ValueError(f"momentum: expected none beside optimizer='adam', which has betas, got {momentum}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
    beta1, beta2 = betas

    def adam(state: list[Tensor], grads: list[Tensor], lr: Tensor, step: int) -> list[Tensor]:
        first = [torch.lerp(m, g, 1 - beta1) for m, g in zip(state[n : 2 * n], grads, strict=True)]
        second = [beta2 * s + (1 - beta2) * g * g for s, g in zip(state[2 * n :], grads, strict=True)]
        bias1, bias2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        w = [
            p - lr.to(p.dtype) / bias1 * m / (_root(s) / bias2**0.5 + eps)
            for p, m, s in zip(state[:n], first, second, strict=True)
        ]
        return w + first + second

    return _Rule(lambda w: [torch.zeros_like(t) for t in (*w, *w)], adam)


def _root(squares: Tensor) -> Tensor:
    """The square root, with the derivative zero at zero: weights that have had no gradient are no NaN."""
    positive = squares > 0
    return torch.where(positive, squares, 1).sqrt() * positive


def _rates(lr: float | Tensor, steps: int, device: torch.device) -> list[Tensor]:
    """One learning rate per step, as scalar tensors that lead back to ``lr``."""
    if not isinstance(lr, Tensor):
        check_number("lr", lr, positive=True)
        return [torch.tensor(float(lr), dtype=torch.float64, device=device)] * steps
    if not lr.is_floating_point():
        raise TypeError(f"lr: expected a real floating point tensor, got {lr.dtype}")
    if lr.shape not in ((), (steps,)):
        raise ValueError(f"lr: expected shape () or ({steps},), one rate per step, got {tuple(lr.shape)}")
    return [lr] * steps if lr.dim() == 0 else list(lr.unbind())


def _endless(batches: Iterable[Any] | None) -> Iterator[Any]:
    """The batches, from the start again after the last."""
    while batches is not None:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches: expected a batch for every step, got an iterable that has no more")


class _OnBatch:
    """A loss of parameters and batch, at a batch."""

    def __init__(self, loss: Callable[[Tree, Any], Tensor], batch: Any) -> None:
        self._loss, self._batch = loss, batch

    def __call__(self, params: Tree) -> Tensor:
        return self._loss(params, self._batch)


class _Step:
    """One step of training, from tensors (weights, then the optimiser's state) to tensors.

    Attributes:
        module: Whose parameters are trained, if they are one's.
        count: How many weights there are.
    """

    def __init__(
        self, loss: Callable[[Tree], Tensor], params: Leaves, rule: _Rule, step: int, module: nn.Module | None
    ) -> None:
        self._loss, self._params, self._rule, self._step, self.module = loss, params, rule, step, module
        self.count = len(params.tensors)

    def __call__(self, state: Sequence[Tensor], rate: Tensor, *, graph: bool) -> list[Tensor]:
        state = list(state)
        n = self.count
        with torch.enable_grad():
            w = [t if graph and t.requires_grad else t.detach().requires_grad_() for t in state[:n]]
            kept = functools.partial(buffers_kept, self.module)
            # A checkpoint runs a part of the model again, here and in the caller's backward pass.
            with kept(), rerun_in(kept):
                loss = evaluate("train_loss", self._loss, self._params, w)
            try:
                with without_autocast(loss.device):
                    grads = torch.autograd.grad(loss, w, create_graph=graph, allow_unused=True)
            except RuntimeError as error:
                raise_explained(error)
            if all(g is None for g in grads):
                raise ValueError(
                    "train_loss: expected a loss that depends on params, got one that depends on none of them"
                )
            found = [torch.zeros_like(t) if g is None else g for t, g in zip(w, grads, strict=True)]
        with torch.set_grad_enabled(graph):
            if not graph:
                w = [t.detach() for t in w]
            return self._rule.step([*w, *state[n:]], found, rate if graph else rate.detach(), self._step)


class _RandomState:
    """The random numbers that a step draws, to be drawn again."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class _Checkpointed(torch.autograd.Function):
    """A step that keeps what it started from, and runs again when its derivative is asked for."""

    @staticmethod
    def forward(ctx: Any, advance: _Step, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.advance, ctx.count = advance, count
        ctx.save_for_backward(*tensors)
        ctx.random = _RandomState(tensors[0].device)
        ctx.then = Surroundings(advance.module, tensors[0].device)
        state, rate = tensors[:count], tensors[count]
        after = advance(state, rate, graph=False)
        # Not the weights of Adam: in its steps a gradient of nothing but rounding is as large as any.
        ctx.after = [t.detach() for t in after[-advance.count :]]
        ctx.versions = versions(ctx.after)
        return tuple(after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_state: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        state = [t.detach().requires_grad_() for t in tensors[: ctx.count]]
        rate = tensors[ctx.count].detach().requires_grad_()
        inputs = [*state, rate, *tensors[ctx.count + 1 :]]
        with ctx.random.again(), ctx.then.again(), torch.enable_grad():
            after = ctx.advance(state, rate, graph=True)
        # Who trains on may write into the weights of the last step, which are the caller's.
        if versions(ctx.after) == ctx.versions:
            n = ctx.advance.count
            _check_same(tensors[: ctx.count][-n:], ctx.after, [t.detach() for t in after[-n:]])
        # The graph is kept: hyperparameters may have been computed, once for all steps.
        return None, None, *torch.autograd.grad(after, inputs, grad_state, retain_graph=True, allow_unused=True)


def _check_same(before: Sequence[Tensor], after: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    """Refuse a step that comes out otherwise when it runs again, but for the rounding of kernels that vary."""

    def norm(tensors: Sequence[Tensor]) -> float:
        return float(torch.nn.utils.get_total_norm(list(tensors)))

    far = norm([a - b for a, b in zip(after, before, strict=True)])
    off = norm([a - b for a, b in zip(again, after, strict=True)])
    if not off <= 0.01 * far + 16 * max(torch.finfo(t.dtype).eps for t in after) * norm(after):
        raise RuntimeError(
            f"train_loss: expected the step of the forward pass again, got one that ends {off / (far or 1):.2g} of its "
            "length away; the loss is to be the same function in the backward pass, its modules in the same modes "
            "(those of params are put back), its random numbers torch's"
        )
