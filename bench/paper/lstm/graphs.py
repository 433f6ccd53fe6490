"""Steps as CUDA graphs: captured once, replayed with new words and states in the same memory. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hypergrad_ext as hg
from bench.paper.lstm.model import State
from bench.paper.lstm.training import Run

Window = tuple[Tensor, Tensor, State]


class Replayed:
    """Work on tensors that stay where they are, as one launch.

    On the CPU it is simply done again, which is how the code around it is tested.

    Args:
        work: Does something, and gives tensors that every `replay` fills anew.
        device: Where.
    """

    def __init__(self, work: Callable[[], Any], device: torch.device) -> None:
        """Capture it."""
        self.work, self.graph = work, None
        if device.type != "cuda":
            return
        random = torch.cuda.get_rng_state(device)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = work()
        torch.cuda.set_rng_state(random, device)

    def replay(self) -> Any:
        """Do it."""
        if self.graph is None:
            return self.work()
        self.graph.replay()
        return self.result


class Graphed(Run):
    """A `Run` whose gradients and hypergradients are replayed, in windows of full length; others run as they are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `Run`."""
        super().__init__(*args, **kwargs)
        setting = self.setting
        self.full = (setting.bptt, setting.batch)
        self.inner: Replayed | None = None
        self.outer_part: Replayed | None = None
        device = self.train.words.device

        def memory() -> Window:
            words = torch.zeros(self.full, dtype=torch.int64, device=device)
            return words, words.clone(), tuple(t.clone() for t in self.model.start(setting.batch))  # type: ignore[return-value]

        self.train_memory, self.valid_memory = memory(), memory()

    def inner_step(self, window: Window) -> None:
        """See `Run`."""
        if window[0].shape != self.full:
            return super().inner_step(window)
        _fill(self.train_memory, window)
        if self.inner is None:
            self.inner = Replayed(self._gradients, window[0].device)
        loss, grads, state = self.inner.replay()
        self.descend(list(self.model.parameters()), [grad.clone() for grad in grads])
        self.note(loss)
        self.train.state = _copy(state)

    def hyper_step(self, window: Window) -> None:
        """See `Run`."""
        valid = self.valid.take()
        if window[0].shape != self.full or valid[0].shape != self.full:
            self.valid.taken -= 1
            return super().hyper_step(window)
        assert self.hyper is not None
        _fill(self.train_memory, window)
        _fill(self.valid_memory, valid)
        if self.outer_part is None:
            self.outer_part = Replayed(self._hypergradient, window[0].device)
        grads, state = self.outer_part.replay()
        for p, grad in zip(self.hyper.parameters(), grads, strict=True):
            p.grad = -grad
        self.outer.step()
        self.valid.state = _copy(state)

    def _gradients(self) -> tuple[Tensor, tuple[Tensor, ...], State]:
        loss, penalty, state = self.loss(*self.train_memory, self.hyper)
        return loss.detach(), torch.autograd.grad(loss + penalty, list(self.model.parameters())), state

    def _hypergradient(self) -> tuple[tuple[Tensor, ...], State]:
        """What `hypergradient` does, but for its checks, which wait for the device."""
        assert self.hyper is not None
        weights, hparams = list(self.model.parameters()), list(self.hyper.parameters())
        loss, penalty, _ = self.loss(*self.train_memory, self.hyper)
        validation, _, state = self.loss(*self.valid_memory, None)
        v = torch.autograd.grad(validation, weights)
        gradient = torch.autograd.grad(loss + penalty, weights, create_graph=True)
        x = hg.approx_inverse_hvp(list(v), gradient, weights, self.setting.neumann_steps, self.setting.alpha)
        return torch.autograd.grad(gradient, hparams, x), state


def _fill(memory: Window, window: Window) -> None:
    for to, value in zip((*memory[:2], *memory[2]), (*window[:2], *window[2]), strict=True):
        to.copy_(value)


def _copy(state: State) -> State:
    return state[0].clone(), state[1].clone()
