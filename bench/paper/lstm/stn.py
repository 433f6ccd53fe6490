"""Self-tuning networks (MacKay et al., ICLR 2019): the best response of the weights, learnt beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.paper.lstm import text
from bench.paper.lstm.model import State
from bench.paper.lstm.training import Run, Setting

# The released code's: two steps on the weights, then one on the hyperparameters; the noise of their logits.
INNER, OUTER, SCALE, RATE = 2, 1, 1.0, 1e-2


class BestResponse(nn.Module):
    r"""The weights as a function of the hyperparameters: affine, with a scale per row.

    .. math:: \hat w(\lambda) = w + (U \lambda) \odot w'

    Args:
        weights: w at the start, by name.
        hparams: The number of hyperparameters.
    """

    def __init__(self, weights: dict[str, Tensor], hparams: int) -> None:
        """See the class."""
        super().__init__()
        self.names = list(weights)
        self.constant = nn.ParameterList(t.detach().clone() for t in weights.values())
        self.response = nn.ParameterList(t.detach().clone() for t in weights.values())
        self.scale = nn.ParameterList(t.new_zeros(len(t), hparams) for t in weights.values())

    def forward(self, hparams: Tensor) -> dict[str, Tensor]:
        """The weights for hyperparameters ``(number,)``."""
        rows = [(u @ hparams).view(-1, *[1] * (w.dim() - 1)) for u, w in zip(self.scale, self.response, strict=True)]
        triples = zip(self.names, self.constant, self.response, rows, strict=True)
        return {name: constant + row * response for name, constant, response, row in triples}


class SelfTuning(Run):
    """Tunes the seven hyperparameters by a learnt best response.

    The weights learn under hyperparameters with Gaussian noise on what is unconstrained of them, one draw per window
    (the released code draws one per column, and the noise's scale is learnt there, too). The hyperparameters then
    follow the gradient of the validation loss through the best response. No second derivatives.
    """

    def __init__(self, corpus: text.Corpus, setting: Setting, method: str = "stn", seed: int = 0) -> None:
        """See `Run`."""
        super().__init__(corpus, setting, method, seed)
        assert self.hyper is not None
        self.names = [name for name, _ in self.hyper.named_parameters()]
        self.response = BestResponse(dict(self.model.named_parameters()), len(self.names)).to(setting.device)
        self.optimiser = self.inner_optimiser(self.response)
        self.outer = torch.optim.Adam(self.hyper.parameters(), lr=RATE)

    def near(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The hyperparameters with noise, as a vector and by name."""
        assert self.hyper is not None
        centre = torch.stack(list(self.hyper.parameters()))
        noisy = centre + SCALE * torch.randn_like(centre)
        return noisy, dict(zip(self.names, noisy.unbind(), strict=True))

    def loss_at(self, window: tuple[Tensor, Tensor, State], weights: dict[str, Tensor], hyper: Any) -> Any:
        """The model's loss with other weights and hyperparameters."""
        with self.autocast():
            return torch.func.functional_call(self.model, weights, (*window, hyper))

    def inner_step(self, window: tuple[Tensor, Tensor, State]) -> None:
        """Learn the weights and how they respond; every third step also tunes, after the first epoch."""
        with torch.no_grad():
            vector, values = self.near()
        loss, penalty, self.train.state = self.loss_at(window, self.response(vector), _At(values))
        learnt = list(self.response.parameters())
        self.descend(learnt, torch.autograd.grad(loss + penalty, learnt))
        self.note(loss)
        if self.step > self.setting.hyper_after and self.step % INNER == 0:
            for _ in range(OUTER):
                self.hyper_step(window)

    def hyper_step(self, window: tuple[Tensor, Tensor, State]) -> None:
        """Descend the validation loss through the best response."""
        assert self.hyper is not None
        hparams = list(self.hyper.parameters())
        loss, _, self.valid.state = self.loss_at(self.valid.take(), self.response(self.near()[0]), None)
        for p, grad in zip(hparams, torch.autograd.grad(loss, hparams), strict=True):
            p.grad = grad
        self.outer.step()

    @torch.no_grad()
    def evaluation_weights(self) -> dict[str, Tensor]:
        """The best response to the hyperparameters as they are."""
        assert self.hyper is not None
        return {k: t.detach() for k, t in self.response(torch.stack(list(self.hyper.parameters()))).items()}

    def modules(self) -> Any:
        """See `Run`."""
        yield from super().modules()
        yield "response", self.response


class _At:
    """Hyperparameters by name, for the model."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.__dict__.update(values)
