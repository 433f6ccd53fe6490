"""Modules whose Hessian-vector products torch has not, or has only slowly.

There is no GRU. Torch's own has a second derivative (operators keep it off cuDNN), and ``engine="native"`` replays it:
a product of two layers of 200 units, batch 20, 35 steps takes 69 ms where a backward pass takes 106 (one thread). The
ops of the LSTM would not carry it: the reset gate multiplies the recurrent product of one gate only, so that products
and gates have different gradients, and every op would need a second one on every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from hypergrad_ext.lstm_layer import lstm_layer

Masks = Tensor | Sequence[Tensor] | None
"""One mask for all, one for each, or none."""


class LSTM(torch.nn.LSTM):
    r"""`torch.nn.LSTM`, with fast Hessian-vector products.

    The same module: arguments, parameters and their names, state dict, shapes of inputs and outputs, results. What
    differs is what runs: the inputs of all steps go through one matrix product, and the recurrence of a layer is one
    op in each of the three passes, forward, backward and the backward of the backward (`hypergrad_ext.lstm_layer`).
    cuDNN's and oneDNN's LSTMs, which `torch.nn.LSTM` uses where it can, have no backward of the backward.

    Between the passes every layer keeps, per step and unit, the four activations, the memory and the output, and while
    there is a graph of the gradient, the gradients by all of these.

    On the CPU in float32 and float64 the recurrence is C++, shared by the threads by rows of the batch. On a GPU it
    is a loop of matrix products and fused cells (not yet run on one). Under ``torch.func``, in forward mode and in half
    precision on the CPU it is such a loop, too. ``is_grads_batched=True`` raises: take several vectors one by one.

    Args:
        *args: As for `torch.nn.LSTM`.
        **kwargs: As for `torch.nn.LSTM`: ``input_size``, ``hidden_size``, ``num_layers``, ``bias``, ``batch_first``,
            ``dropout``, ``bidirectional``, ``device``, ``dtype``.

    Raises:
        ValueError: If ``proj_size`` is given: projections are not supported.

    Cost: a Hessian-vector product is about one and a half training gradients.

    Example:
        >>> import hypergrad_ext as hg
        >>> from hypergrad_ext import nn
        >>> lstm = nn.LSTM(input_size=3, hidden_size=5)
        >>> lstm.load_state_dict(torch.nn.LSTM(3, 5).state_dict())
        <All keys matched successfully>
        >>> params = dict(lstm.named_parameters())
        >>> loss = lstm(torch.randn(7, 2, 3))[0].square().mean()
        >>> x = hg.inverse_hvp(loss, params, params, damping=1.0)
        >>> x["weight_hh_l0"].shape
        torch.Size([20, 5])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See the class."""
        super().__init__(*args, **kwargs)
        if self.proj_size:
            raise ValueError(f"proj_size: expected 0, got {self.proj_size}: projections are not supported")

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        output_masks: Masks = None,
        weight_hh_masks: Masks = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the layers.

        Args:
            input: ``(steps, batch, input_size)``, with ``batch_first`` ``(batch, steps, input_size)``, or ``(steps,
                input_size)`` without a batch.
            hx: ``h_0`` and ``c_0``, ``(num_layers * directions, batch, hidden_size)``; zeros if None.
            output_masks: Multiplied with what a layer hands to the next, ``(steps, batch, directions * hidden_size)``
                or what broadcasts to it: ``(batch, ...)`` is the same for all steps, variational dropout. One tensor
                for all layers but the last, or a sequence with one for each of them.
            weight_hh_masks: Multiplied with the recurrent weights, ``(4 * hidden_size, hidden_size)`` or what
                broadcasts to it: DropConnect. One tensor for all, or a sequence of ``num_layers * directions``.
                `functional.concrete_mask` draws masks that are differentiable in their rates.

        Returns:
            The outputs of the last layer, and ``h_n`` and ``c_n``.

        Raises:
            ValueError: If shapes do not go together, or there is no step.
            TypeError: If ``input`` is a ``PackedSequence``.
        """
        if isinstance(input, PackedSequence):
            raise TypeError(
                "input: expected a tensor, got a PackedSequence: pad it (pad_packed_sequence) and mask the loss"
            )
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            expected = f"(steps, batch, {self.input_size}) or (steps, {self.input_size})"
            raise ValueError(f"input: expected shape {expected}, got {tuple(input.shape)}")
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
        if len(x) == 0:
            raise ValueError(f"input: expected at least one step, got shape {tuple(input.shape)}")
        h_0, c_0 = self._initial_state(x, hx, single)
        directions = 2 if self.bidirectional else 1
        of_outputs = _one_each("output_masks", output_masks, self.num_layers - 1)
        of_weights = _one_each("weight_hh_masks", weight_hh_masks, self.num_layers * directions)

        states = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                i = layer * directions + direction
                backwards = direction == 1
                name = f"l{layer}" + "_reverse" * backwards
                h, c = self._run(x.flip(0) if backwards else x, name, of_weights[i], h_0[i], c_0[i])
                states.append((h[-1], c[-1]))
                outputs.append(h.flip(0) if backwards else h)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if layer + 1 < self.num_layers:
                mask = of_outputs[layer]
                x = x if mask is None else x * mask
                if self.dropout:
                    x = F.dropout(x, self.dropout, self.training)
        h_n, c_n = (torch.stack(state) for state in zip(*states, strict=True))
        if single:
            return x.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return x.transpose(0, 1) if self.batch_first else x, (h_n, c_n)

    def _run(self, x: Tensor, name: str, mask: Tensor | None, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor]:
        w_ih, w_hh = (getattr(self, f"weight_{kind}_{name}") for kind in ("ih", "hh"))
        bias = getattr(self, f"bias_ih_{name}") + getattr(self, f"bias_hh_{name}") if self.bias else None
        if mask is not None:
            w_hh = w_hh * mask
        tensors: tuple[Any, ...] = x, w_ih, bias, w_hh, h0, c0
        if _autocast(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = tuple(None if t is None else t.to(dtype) for t in tensors)
        return lstm_layer(*tensors)

    def _initial_state(self, x: Tensor, hx: tuple[Tensor, Tensor] | None, single: bool) -> tuple[Tensor, Tensor]:
        shape = (self.num_layers * (2 if self.bidirectional else 1), x.shape[1], self.hidden_size)
        if hx is None:
            zeros = x.new_zeros(shape)
            return zeros, zeros
        expected = (shape[0], shape[2]) if single else shape
        if len(hx) != 2:
            raise ValueError(f"hx: expected a pair h_0 and c_0, got {len(hx)} tensors")
        for name, t in zip(("h_0", "c_0"), hx, strict=True):
            if t.shape != expected:
                raise ValueError(f"hx: expected {name} of shape {expected}, got {tuple(t.shape)}")
            if t.dtype != x.dtype and not _autocast(x):
                raise TypeError(f"hx: expected {name} of {x.dtype}, the dtype of input, got {t.dtype}")
        h_0, c_0 = (t.unsqueeze(1) if single else t for t in hx)
        return h_0, c_0


def _autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _one_each(name: str, masks: Masks, count: int) -> Sequence[Tensor | None]:
    if masks is None or isinstance(masks, Tensor):
        return [masks] * count
    if len(masks) != count:
        raise ValueError(f"{name}: expected a tensor or a sequence of {count}, got {len(masks)}")
    return masks
