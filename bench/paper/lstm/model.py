"""The language model, and the ways in which it can be regularised: the hyperparameters."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hypergrad_ext import functional
from hypergrad_ext import nn as hnn

State = tuple[Tensor, Tensor]


class Regularisation(nn.Module):
    """Seven hyperparameters, or one rate per unit and recurrent weight; all unconstrained.

    The rates of dropout are logits; the two penalties go through softplus.

    | name         | what it acts on                                                     |
    | ------------ | ------------------------------------------------------------------- |
    | `embedding`  | words: all occurrences of a word in the window at once              |
    | `input`      | the embedded words, one mask for all steps (variational dropout)    |
    | `hidden`     | the outputs between layers, likewise                                |
    | `output`     | the outputs of the last layer, likewise                             |
    | `weight`     | the recurrent weights (DropConnect)                                 |
    | `activation` | penalty on the squares of the last layer's dropped outputs          |
    | `temporal`   | penalty on the squares of their changes from step to step, undropped|

    Args:
        units: Of every layer and of the embedding.
        many: One rate per unit for `input`, `hidden` and `output`, one per recurrent weight, the same for all layers,
            and one for `embedding`: 1,691,951 for 650 units.
        dropout: Rate at the start, in (0, 1).
        penalty: Both penalties at the start, > 0.
        penalties: Whether the penalties are hyperparameters, too; else they stay what they are.
    """

    def __init__(
        self, units: int, many: bool = False, dropout: float = 0.5, penalty: float = 1e-2, penalties: bool = True
    ) -> None:
        """See the class."""
        super().__init__()
        shapes = {
            "embedding": (),
            **dict.fromkeys(("input", "hidden", "output"), (units,)),
            "weight": (4 * units, units),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape if many else ())))
        for name in ("activation", "temporal"):
            if penalties:
                setattr(self, name, nn.Parameter(torch.zeros(())))
            else:
                self.register_buffer(name, torch.zeros(()))
        self.assign({name: penalty if name in PENALTIES else dropout for name in NAMES})

    @torch.no_grad()
    def assign(self, values: dict[str, float]) -> None:
        """Set hyperparameters by what a person reads: rates in (0, 1) and penalties > 0."""
        for name, value in values.items():
            raw = math.log(math.expm1(value)) if name in PENALTIES else math.log(value / (1 - value))
            getattr(self, name).fill_(raw)

    def means(self) -> dict[str, float]:
        """Every hyperparameter as a person reads it, the mean where there are many: rates and penalties."""
        values = {name: getattr(self, name) for name in NAMES}
        return {
            name: float((F.softplus if name in PENALTIES else torch.sigmoid)(t.detach()).mean())
            for name, t in values.items()
        }


PENALTIES = "activation", "temporal"
NAMES = "embedding", "input", "hidden", "output", "weight", *PENALTIES


class LanguageModel(nn.Module):
    """Embedding, two layers of LSTM, softmax with the embedding's weights: 13,280,400 for 10,000 words, 650 units.

    Args:
        words: Of the vocabulary.
        units: Of the embedding and of every layer.
        layers: Of the LSTM.
        start: How the embedding is drawn: ``"uniform"`` from -0.1 to 0.1, as the paper does, or ``"normal"`` with
            variance 1, as `torch.nn.Embedding` does, where the softmax starts sure of itself and soon overfits.
    """

    def __init__(
        self, words: int, units: int, layers: int = 2, start: Literal["uniform", "normal"] = "uniform"
    ) -> None:
        """See the class."""
        super().__init__()
        embedding = torch.empty(words, units)
        self.embedding = nn.Parameter(embedding.normal_() if start == "normal" else embedding.uniform_(-0.1, 0.1))
        self.lstm = hnn.LSTM(units, units, layers)
        self.bias = nn.Parameter(torch.zeros(words))

    def start(self, batch: int) -> State:
        """The state before the first word."""
        zeros = self.embedding.new_zeros(self.lstm.num_layers, batch, self.lstm.hidden_size)
        return zeros, zeros

    def forward(
        self, words: Tensor, following: Tensor, state: State, regularisation: Regularisation | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Run a window.

        Args:
            words: ``(steps, batch)``.
            following: The words to predict, likewise.
            state: As the last window left it.
            regularisation: None for evaluation.

        Returns:
            The mean cross entropy in nats, the penalties, and the state afterwards, without a graph.
        """
        x = F.embedding(words, self.embedding)
        r, batch, units = regularisation, words.shape[1], self.lstm.hidden_size
        masks: dict[str, Tensor | None] = {"hidden": None, "output": None, "weight": None}
        if r is not None:
            x = x * functional.concrete_mask(r.embedding, (len(self.embedding),))[words, None]
            x = x * functional.concrete_mask(r.input, (batch, units))
            shapes = {"hidden": (batch, units), "output": (batch, units), "weight": (4 * units, units)}
            masks = {name: functional.concrete_mask(getattr(r, name), shape) for name, shape in shapes.items()}
        out, state = self.lstm(x, state, output_masks=masks["hidden"], weight_hh_masks=masks["weight"])
        dropped, penalty = out, out.new_zeros(())
        if r is not None:
            dropped = out * masks["output"]
            penalty = F.softplus(r.activation) * dropped.square().mean()
            if len(out) > 1:
                penalty = penalty + F.softplus(r.temporal) * (out[1:] - out[:-1]).square().mean()
        logits = F.linear(dropped.flatten(0, 1), self.embedding, self.bias)
        return F.cross_entropy(logits, following.flatten()), penalty, (state[0].detach(), state[1].detach())


def count(module: nn.Module) -> int:
    """The number of its parameters."""
    return sum(p.numel() for p in module.parameters())
