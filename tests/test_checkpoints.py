"""Checkpoints inside of a model: everything comes out as without them, whatever the passes that run them again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hypergrad_ext as hg
from tests.compare import assert_close

X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(6) % 3
KINDS = pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "nested"])


class Attention(nn.Module):
    """One layer of attention, whose kernel for one derivative saves other tensors than the one for two."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.project, self.last = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.kind = kind
        self.double()

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attend = self.attend
        if self.kind == "nested":
            attend = lambda x: checkpoint(self.attend, x, use_reentrant=True)  # noqa: E731
        x = self.first(x)
        return self.last(
            (checkpoint(attend, x, use_reentrant=self.kind == "reentrant") if self.kind else attend(x))[:, 0]
        )


def loss_of(model: nn.Module):
    return lambda w: F.cross_entropy(functional_call(model, w, (X,)), Y)


def weights_of(model: nn.Module) -> dict:
    return {name: p.detach() for name, p in model.named_parameters()}


@KINDS
def test_hypergradient(kind):
    lam = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def grad(model: nn.Module) -> torch.Tensor:
        val = loss_of(model)
        train = lambda w: val(w) + lam * sum((t**2).sum() for t in w.values())  # noqa: E731
        return hg.hypergradient(val, train, model, lam, hg.CG(tol=1e-10), damping=3.0)

    assert_close(grad(Attention(kind)), grad(Attention()), 1e-9)


@KINDS
def test_weights_other_than_the_modules_own(kind):
    """What runs again is to run on these, not on what the module holds by then."""
    model, plain = Attention(kind), Attention()
    w = {name: t + 0.3 * torch.randn_like(t) for name, t in weights_of(model).items()}
    v = {name: torch.randn_like(t) for name, t in w.items()}
    plain.load_state_dict(w)
    assert_close(hg.Hessian(loss_of(model), w) @ v, hg.Hessian(loss_of(plain), plain) @ v, 1e-12)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpoint=True"])
@KINDS
def test_unroll(kind, again):
    def trained(model: nn.Module) -> tuple[dict, torch.Tensor]:
        lam = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        loss = lambda w: loss_of(model)(w) + lam * sum((t**2).sum() for t in w.values())  # noqa: E731
        w = hg.unroll(loss, model, lam, steps=3, lr=0.5, checkpoint=again)
        sum((t**2).sum() for t in w.values()).backward()
        return {name: t.detach() for name, t in w.items()}, lam.grad

    for got, expected in zip(trained(Attention(kind)), trained(Attention()), strict=True):
        assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpoint=True"])
def test_unroll_leaves_buffers(again):
    """In the caller's backward pass, too."""
    body, last = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5)), nn.Linear(8, 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = body, last

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(checkpoint(self.body, x, use_reentrant=False)[:, 0])

    model, lam = Model().double(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    own = {name: (b, b.clone()) for name, b in model.named_buffers()}
    w = hg.unroll(lambda w: lam * loss_of(model)(w), model, lam, steps=2, lr=0.1, checkpoint=again)
    sum((t**2).sum() for t in w.values()).backward()
    assert all(b is own[name][0] and torch.equal(b, own[name][1]) for name, b in model.named_buffers())
