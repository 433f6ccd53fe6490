"""Products of later solves without a recorded pass: the right ones, or recorded after all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hypergrad_ext as hg
from hypergrad_ext import _native
from hypergrad_ext.engines import RetainedGradient, linked, traced
from tests.compare import assert_close
from tests.models import MODELS, batch, loss_of, made, random_like

pytestmark = [
    pytest.mark.usefixtures("fresh_engines"),
    pytest.mark.skipif(_native._C is None, reason=f"links are C++: {_native.MISSING}"),
]
D = torch.float64


def agree(loss, params, v, engine: str = "native") -> None:
    """One product as in a solve of its own, against a backward pass with the same random numbers."""
    state = torch.get_rng_state()
    truth = hg.Hessian(loss, params, engine="eager") @ v
    torch.set_rng_state(state)
    assert_close(hg.Hessian(loss, params, engine=engine) @ v, truth, 1e-10)


def of_weight(loss, n: int = 4, shape: tuple[int, ...] = (4, 3), engine: str = "native") -> int:
    """Products of so many solves with a loss of a matrix and of the solve's number; how many were linked."""
    for i in range(n):
        w = torch.randn(shape, dtype=D)
        agree(lambda w, i=i: loss(w, i), w, torch.randn(shape, dtype=D), engine)
    return traced.counts.linked


class TestLinked:
    @pytest.mark.parametrize("engine", ["native", "traced"])
    @pytest.mark.parametrize("name", MODELS)
    def test_from_the_third_solve_on(self, name, engine):
        """Other parameters, batches and masks in every solve, over modules that are not the same object."""
        for _ in range(4):
            model = made(name)
            agree(loss_of(model, *batch(name, 9, D)), model, random_like(model), engine)
        # What the user's own function does is for it to know.
        assert traced.counts.linked == (0 if name == "custom" else 2)
        assert traced.counts.recorded == (4 if name == "custom" else 2) and traced.counts.compiled == 1

    def test_no_gradient_is_built_where_none_is_needed(self, monkeypatch):
        """But for the mixed derivative, which goes through it."""
        built = []
        fresh = RetainedGradient.fresh
        monkeypatch.setattr(RetainedGradient, "fresh", lambda *args: built.append(1) or fresh(*args))
        penalty = torch.tensor(0.3, dtype=D, requires_grad=True)
        for i in range(4):
            model = made("mlp_tanh")
            data_loss = loss_of(model, *batch("mlp_tanh", 9, D))

            def loss(p, data_loss=data_loss):
                return data_loss(p) + penalty.exp() * sum(t.square().sum() for t in p.values())

            v = random_like(model)
            truth = hg.Hessian(loss, model, engine="eager") @ v
            built.clear()
            operator = hg.Hessian(loss, model, engine="native")
            assert_close(operator @ v, truth, 1e-10)
            assert len(built) == (2 if i < 2 else 0)
            assert all(operator.used) and len(built) == (2 if i < 2 else 0)
        (mixed,) = operator.mixed(list(v.values()), [penalty])
        dot = sum((v[n] * p).sum() for n, p in model.named_parameters())
        assert_close(mixed, 2 * penalty.exp() * dot, 1e-10)
        assert len(built) == 1

    def test_one_solve_does_not_confirm_itself(self):
        model = made("mlp_tanh")
        loss, v = loss_of(model, *batch("mlp_tanh", 9, D)), random_like(model)
        gradient = hg.Hessian(loss, model).gradient
        for _ in range(3):
            traced.TracedGradient(gradient, "native").start(list(v.values()))
        assert traced.counts.linked == 0

    def test_shapes_and_modes_have_links_of_their_own(self):
        model = made("dropout")
        for _ in range(3):
            for n in (5, 6):
                for training in (True, False):
                    agree(loss_of(model.train(training), *batch("dropout", n, D)), model, random_like(model))
        assert traced.counts.linked == 4

    def test_whole_solves(self):
        for i in range(4):
            model = made("mlp_tanh")
            loss, v = loss_of(model, *batch("mlp_tanh", 30, D)), random_like(model)
            for solver in (hg.Neumann(30, alpha=1e-2), hg.CG(tol=1e-8)):
                ours, truth = (
                    hg.inverse_hvp(loss, model, v, solver, damping=5.0, engine=e) for e in ("native", "eager")
                )
                assert_close(ours, truth, 1e-8, f"{i} {solver}")
        assert traced.counts.linked == 6

    def test_a_change_in_place_is_noticed(self):
        for _ in range(3):
            u, w = torch.randn(2, 3, 3, dtype=D).unbind()
            params = [u.requires_grad_(), w.clone().requires_grad_()]
            operator = hg.Hessian((torch.tanh(u) @ params[1]).square().sum(), params, engine="native")
            operator @ [torch.ones_like(u), torch.ones_like(u)]
        assert traced.counts.linked == 1
        with torch.no_grad():
            params[1].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            operator @ [torch.ones_like(u), torch.ones_like(u)]

    def test_a_change_in_place_before_the_first_product_is_noticed(self):
        """By when the gradient, had it been built, would have been that of another point."""
        for i in range(4):
            params = [torch.randn(3, 3, dtype=D, requires_grad=True) for _ in range(2)]
            operator = hg.Hessian((torch.tanh(params[0]) @ params[1]).square().sum(), params, engine="native")
            assert operator.used == [True, True]
            v = [torch.ones_like(p) for p in params]
            if i < 3:
                operator @ v
                continue
            with torch.no_grad():
                params[1].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                operator @ v
        assert traced.counts.linked == 1


class TestRecordedAfterAll:
    """Cases in which what was right in two solves is not in the third."""

    def test_tensors_that_were_one(self):
        """The same batch at two places, then two batches."""
        batches = [torch.randn(5, 4, dtype=D) for _ in range(6)]

        def loss(w: Tensor, i: int) -> Tensor:
            x, z = batches[i], batches[5 if i == 2 else i]
            return (torch.tanh(x @ w) * torch.sin(z @ w)).sum()

        assert of_weight(loss, 5) == 2

    def test_other_strides(self):
        x = torch.randn(4, 4, dtype=D)
        assert of_weight(lambda w, i: torch.tanh((x.t() if i == 2 else x) @ w).sum(), 5) == 2

    def test_other_numbers(self):
        assert of_weight(lambda w, i: F.softplus(w, 2.0 + (i == 2)).pow(3).sum(), 5) == 2

    def test_other_numbers_that_torch_keeps_as_tensors(self):
        assert of_weight(lambda w, i: (torch.tanh(w) * (2.0 + (i == 2))).pow(3).sum(), 5) == 3

    def test_other_connections(self):
        """The same nodes on the same leaves, but for who is whose input."""

        def loss(w: Tensor, i: int) -> Tensor:
            a, b = w.sin(), w.exp()
            return ((a if i == 2 else b) * a.cos() * b).sum()

        assert of_weight(loss, 5) == 2

    def test_parameters_that_change_places(self):
        for i in range(5):
            u, w = (torch.randn(3, dtype=D) for _ in range(2))
            order = (lambda p: p[::-1]) if i == 2 else (lambda p: p)

            def loss(p, order=order):
                a, b = order(p)
                return (a.sin() * b.exp() * b).sum()

            agree(loss, [u, w], [torch.randn(3, dtype=D) for _ in range(2)])
        assert traced.counts.linked == 2

    def test_numbers_that_decide(self):
        """The derivative of a product looks for zeros."""
        with_zero = torch.ones(4, 3, dtype=D)
        with_zero[1, 2] = 0

        def loss(w: Tensor, i: int) -> Tensor:
            return (w.sin() * (with_zero if i == 2 else 1 + with_zero)).prod().exp() + w.pow(4).sum()

        of_weight(loss, 5)

    def test_shapes_that_numbers_decide(self):
        x = torch.randn(4, 3, dtype=D)
        of_weight(lambda w, i: (w[x > 0].tanh() * w[x > 0]).sum() + w.masked_select(x + i > 1).pow(3).sum(), 5)

    def test_hooks(self):
        def loss(w: Tensor, i: int) -> Tensor:
            h = w.tanh()
            h.register_hook(lambda g: g * (2 + i))
            return (h**3).sum()

        assert of_weight(loss) == 0

    def test_saved_tensor_hooks(self):
        def loss(w: Tensor, i: int) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                return w.tanh().pow(3).sum()

        assert of_weight(loss) == 0
        assert of_weight(lambda w, i: checkpoint(lambda w: w.tanh().pow(3), w, use_reentrant=False).sum()) == 0

    def test_functions_of_the_users_own(self):
        class Scale(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, factor):
                ctx.factor = factor
                return x * factor

            @staticmethod
            def backward(ctx, grad):
                return grad * ctx.factor, None

        assert of_weight(lambda w, i: Scale.apply(w.tanh(), 2.0 + i).pow(3).sum()) == 0

    def test_a_link_that_gives_other_constants_is_not_used(self, monkeypatch, caplog):
        monkeypatch.setattr(linked._native._C.Link, "agrees", lambda *_: False)
        with caplog.at_level("DEBUG", "hypergrad_ext"):
            assert of_weight(lambda w, i: w.tanh().pow(3).sum()) == 0
        assert "other constants" in caplog.text and traced.counts.recorded == 4


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(seed):
    """Losses of random ops, some of whose inputs change their nature from solve to solve."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    unary = [torch.tanh, torch.sigmoid, torch.sin, F.softplus, F.gelu, lambda t: t.softmax(-1), lambda t: t.cumsum(0)]
    unary += [lambda t: t.t().contiguous().t(), lambda t: t - t.mean(0), lambda t: F.layer_norm(t, (3,)), torch.abs]
    binary = [torch.mul, torch.add, torch.sub, torch.minimum, lambda a, b: a @ b.t() @ a, torch.hypot]
    steps = [(draw(2), draw(len(unary)), draw(len(binary)), draw(64), draw(64)) for _ in range(8)]
    odd = draw(8)

    def loss(w: Tensor, i: int) -> Tensor:
        x = torch.randn(3, 3, dtype=D)
        values = [w, x, w @ x, x if i != 2 else torch.randn(3, 3, dtype=D).t()]
        for at, (one, f, g, a, b) in enumerate(steps):
            p, q = values[a % len(values)], values[b % len(values)]
            q = p if i == 3 and at == odd else q
            values.append(unary[f](p) if one else binary[g](p, q))
        return sum(value.square().mean() for value in values)

    assert of_weight(loss, 6, (3, 3)) > 0 or traced.counts.refused == 6


def test_nothing_is_kept_alive():
    model = made("mlp_tanh")
    for _ in range(3):
        agree(loss_of(model, *batch("mlp_tanh", 9, D)), model, random_like(model))
    assert traced.counts.linked == 1
    link = next(iter(linked._known._values.values()))
    assert link.first() is None and not any(isinstance(x, (Tensor, nn.Module)) for x in vars(link).values())
