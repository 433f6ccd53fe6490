"""nn.LSTM and its masks: equal to torch's, differentiable to any order, and what they refuse."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import hypergrad_ext as hg
from hypergrad_ext import functional, nn
from tests.compare import assert_close, assert_no_worse_than_torch


def draw(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


OPTIONS = [
    {},
    {"num_layers": 2},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
]


def both(dtype=torch.float64, size=3, units=5, **options):
    """torch's module and ours with the same parameters."""
    theirs = torch.nn.LSTM(size, units, dtype=dtype, **options)
    ours = nn.LSTM(size, units, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def flat(result):
    y, (h, c) = result
    return [y, h, c]


class TestModule:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize(("steps", "batch"), [(7, 4), (1, 4), (7, 1), (1, 1)])
    @pytest.mark.parametrize("state", [False, True])
    def test_equals_torch(self, options, steps, batch, state):
        ours, theirs = both(**options)
        shape = (batch, steps, 3) if options.get("batch_first") else (steps, batch, 3)
        count = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        x, h, c = draw(shape, (count, batch, 5), (count, batch, 5))
        hx = (h, c) if state else None
        values, truths = flat(ours(x, hx)), flat(theirs(x, hx))
        assert [t.shape for t in values] == [t.shape for t in truths]
        assert_close(values, truths, 1e-12)
        inputs = [x, *((h, c) if state else ())]
        grads = [torch.randn_like(t) for t in truths]
        assert_close(
            list(torch.autograd.grad(values, [*inputs, *ours.parameters()], grads)),
            list(torch.autograd.grad(truths, [*inputs, *theirs.parameters()], grads)),
            1e-12,
        )

    def test_without_a_batch(self):
        ours, theirs = both(num_layers=2, bidirectional=True)
        x, h, c = draw((7, 3), (4, 5), (4, 5))
        for arguments in ((x,), (x, (h, c))):
            values, truths = flat(ours(*arguments)), flat(theirs(*arguments))
            assert [t.shape for t in values] == [t.shape for t in truths]
            assert_close(values, truths, 1e-12)

    def test_batch_of_none(self):
        y, (h, c) = nn.LSTM(3, 5)(torch.zeros(4, 0, 3))
        assert y.shape == (4, 0, 5) and h.shape == c.shape == (1, 0, 5)

    @pytest.mark.parametrize("units", [5, 33, 200])
    def test_float32_is_no_less_accurate_than_torch(self, units):
        ours, theirs = both(torch.float32, units, units, num_layers=2)
        exact = copy.deepcopy(theirs).double()
        x = torch.randn(20, 6, units)

        def results(module, x):
            y, _ = module(x)
            return [y, *torch.autograd.grad(y.square().mean(), list(module.parameters()))]

        for value, by_torch, truth in zip(
            *(results(m, x) for m in (ours, theirs)), results(exact, x.double()), strict=True
        ):
            assert_no_worse_than_torch(value, by_torch, truth, 2e-7)

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_hessian_product(self, options):
        """Against torch's double backward through its own cells, which float64 takes."""
        ours, theirs = both(**options)
        x = torch.randn(5, 4, 3, dtype=torch.float64)
        v = [torch.randn_like(p) for p in theirs.parameters()]

        def product(module):
            params = list(module.parameters())
            y, (h, c) = module(x)
            return hg.Hessian(y.square().sum() + (h * c).sum(), params).matvec(v)

        assert_close(list(product(ours)), list(product(theirs)), 1e-12)

    def test_batch_of_vectors(self):
        ours, theirs = both()
        x = torch.randn(5, 4, 3, dtype=torch.float64)
        v = [torch.randn(3, *p.shape, dtype=torch.float64) for p in theirs.parameters()]

        def products(module):
            return hg.Hessian(module(x)[0].square().sum(), list(module.parameters())).matmat(v)

        assert_close(list(products(ours)), list(products(theirs)), 1e-12)

    def test_batched_backward_raises(self):
        module = nn.LSTM(3, 5)
        params = list(module.parameters())
        loss = module(torch.randn(2, 4, 3))[0].square().sum()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        v = [torch.randn(2, *p.shape) for p in params]
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grads, params, v, is_grads_batched=True)

    def test_autocast(self):
        module, x = nn.LSTM(3, 5), torch.randn(6, 4, 3)
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = module(x)
            loss = y.float().square().mean()
        assert_close(loss, module(x)[0].square().mean(), 2e-2)
        grads = [
            torch.autograd.grad(value, list(module.parameters())) for value in (loss, module(x)[0].square().mean())
        ]
        assert all(g.dtype == torch.float32 for g in grads[0])
        assert_close(*map(list, grads), 5e-2)

    def test_gradgradcheck(self):
        module = nn.LSTM(2, 3, num_layers=2, dtype=torch.float64)
        names = [name for name, _ in module.named_parameters()]

        def run(x, *params):
            return torch.func.functional_call(module, dict(zip(names, params, strict=True)), (x,))[0]

        assert gradgradcheck(run, (*draw((3, 2, 2)), *module.parameters()))

    def test_dropout_between_layers(self):
        module = nn.LSTM(3, 50, num_layers=2, dropout=0.5)
        x = torch.randn(4, 2, 3)
        torch.manual_seed(0)
        y = module(x)[0]
        torch.manual_seed(0)
        first, second = nn.LSTM(3, 50), nn.LSTM(50, 50)
        for layer, single in enumerate((first, second)):
            single.load_state_dict({k[:-1] + "0": t for k, t in module.state_dict().items() if k[-1] == str(layer)})
        torch.manual_seed(0)
        assert_close(y, second(F.dropout(first(x)[0], 0.5))[0], 1e-7)
        module.eval()
        assert_close(module(x)[0], second(first(x)[0])[0], 1e-7)

    @pytest.mark.parametrize("options", [{"num_layers": 2}, {"num_layers": 3, "bidirectional": True}], ids=str)
    def test_masks(self, options):
        """On a module whose weights were multiplied by hand, layer by layer."""
        ours, theirs = both(**options)
        layers, directions = options["num_layers"], 1 + options.get("bidirectional", False)
        x, *of_outputs = draw((6, 4, 3), *[(4, 5 * directions)] * (layers - 1))
        of_weights = draw(*[(20, 5)] * (layers * directions))
        values, state = ours(x, output_masks=of_outputs, weight_hh_masks=of_weights)

        y = x
        for layer in range(layers):
            single = torch.nn.LSTM(y.shape[-1], 5, bidirectional=directions == 2).double()
            names = [name for name in theirs.state_dict() if f"_l{layer}" in name]
            weights = {name.replace(f"_l{layer}", "_l0"): theirs.state_dict()[name] for name in names}
            for d, suffix in enumerate(("", "_reverse")[:directions]):
                weights[f"weight_hh_l0{suffix}"] = weights[f"weight_hh_l0{suffix}"] * of_weights[layer * directions + d]
            y, _ = torch.func.functional_call(single, weights, (y,))
            y = y * of_outputs[layer] if layer + 1 < layers else y
        assert_close(values, y.detach(), 1e-12)
        masks = [*of_outputs, *of_weights]
        ours_grads, theirs_grads = (torch.autograd.grad(t.square().sum(), masks) for t in (values, y))
        assert_close(list(ours_grads), list(theirs_grads), 1e-11)

    def test_one_mask_for_all(self):
        ours, _ = both(num_layers=3)
        x, of_outputs, of_weights = draw((6, 4, 3), (4, 5), (20, 5))
        every = ours(x, output_masks=[of_outputs] * 2, weight_hh_masks=[of_weights] * 3)[0]
        assert torch.equal(ours(x, output_masks=of_outputs, weight_hh_masks=of_weights)[0], every)

    def test_derivatives_by_rates_of_dropout(self):
        """Variational dropout and DropConnect with rates that are hyperparameters, to second order."""
        module = nn.LSTM(2, 3, num_layers=2, dtype=torch.float64)
        x, logit_h, logit_w, weight = draw((4, 2, 2), (), (12, 3), (12, 3))

        def run(logit_h, logit_w, weight):
            generator = torch.Generator().manual_seed(0)
            # A high temperature, so that finite differences see the slope.
            masks = [
                functional.concrete_mask(logit, shape, temperature=2.0, generator=generator)
                for logit, shape in ((logit_h, (2, 3)), (logit_w, (12, 3)))
            ]
            options = {"output_masks": masks[0], "weight_hh_masks": masks[1]}
            weights = {**dict(module.named_parameters()), "weight_hh_l0": weight}
            return torch.func.functional_call(module, weights, (x.detach(),), options)[0]

        assert gradcheck(run, (logit_h, logit_w, weight))
        assert gradgradcheck(run, (logit_h, logit_w, weight))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        ours, theirs = both(torch.float32, num_layers=2)
        x = torch.randn(6, 4, 3)
        truth = flat(theirs(x))
        assert_close([t.float() for t in flat(ours.to(dtype)(x.to(dtype)))], truth, 2e-2)

    def test_state_dict_round_trip(self):
        ours, theirs = both(num_layers=2, bidirectional=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert isinstance(ours, torch.nn.LSTM)
        assert_close(
            flat(copy.deepcopy(ours)(torch.ones(2, 1, 3).double())), flat(ours(torch.ones(2, 1, 3).double())), 0
        )

    def test_hypergradient_of_its_inputs_weights(self):
        """One weight per sequence of the training data, against the same with torch's module."""
        x, y = torch.randn(4, 6, 3).double(), torch.randn(6, 5).double()

        def gradient(module):
            weights = torch.zeros(6, dtype=torch.float64, requires_grad=True)
            errors = (module(x)[0][-1] - y).square().sum(1)
            penalty = sum(p.square().sum() for p in module.parameters())
            train = (weights.sigmoid() * errors).mean() + penalty
            val = (module(x.flip(1))[0][-1] - y).square().mean()
            return hg.hypergradient(val, train, module, weights, hg.CG(tol=1e-12))

        assert_close(*(gradient(module) for module in both()), 1e-9)

    def test_checkpoint(self):
        module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
        recomputed = functools.partial(checkpoint, module, use_reentrant=False)
        gradients = [torch.autograd.grad(run(x)[0].square().sum(), x) for run in (recomputed, module)]
        assert_close(*gradients, 0.0)

    def test_third_derivative_of_an_empty_batch(self):
        module, x = nn.LSTM(3, 4).double(), torch.randn(5, 0, 3, dtype=torch.float64)
        params = list(module.parameters())
        value = module(x)[0].square().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, params, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        assert not any(g.any() for g in grads)

    def test_on_no_device(self):
        out, _ = nn.LSTM(3, 4, device="meta")(torch.zeros(5, 2, 3, device="meta"))
        assert out.shape == (5, 2, 4)

    def test_forward_mode(self):
        ours, theirs = both()
        x, t = torch.randn(2, 4, 2, 3, dtype=torch.float64)
        _, tangent = torch.func.jvp(lambda x: ours(x)[0], (x,), (t,))
        assert_close(tangent, torch.autograd.functional.jvp(lambda x: theirs(x)[0], x, t)[1], 1e-12)

    @pytest.mark.parametrize(
        ("options", "input", "hx", "error", "message"),
        [
            ({"proj_size": 2}, None, None, ValueError, "proj_size: expected 0, got 2"),
            (
                {},
                torch.zeros(2, 4, 4),
                None,
                ValueError,
                r"expected shape \(steps, batch, 3\) .*got \(2, 4, 4\)",
            ),
            ({}, torch.zeros(3), None, ValueError, "input: expected shape"),
            ({}, torch.zeros(0, 4, 3), None, ValueError, "input: expected at least one step"),
            ({}, torch.zeros(2, 4, 3), (torch.zeros(4, 5),) * 2, ValueError, r"h_0 of shape \(1, 4, 5\), got \(4, 5\)"),
            ({}, torch.zeros(2, 3), (torch.zeros(1, 1, 5),) * 2, ValueError, r"h_0 of shape \(1, 5\), got"),
            ({}, pack_sequence([torch.zeros(2, 3)]), None, TypeError, "got a PackedSequence: pad it"),
            ({}, torch.zeros(2, 3), (torch.zeros(1, 5),), ValueError, "hx: expected a pair h_0 and c_0, got 1"),
            ({}, torch.zeros(2, 3), (torch.zeros(1, 5).double(),) * 2, TypeError, "hx: expected h_0 of torch.float32"),
        ],
        ids=range(9),
    )
    def test_refuses(self, options, input, hx, error, message):
        with pytest.raises(error, match=message):
            nn.LSTM(3, 5, **options)(input, hx)

    @pytest.mark.parametrize("name", ["output_masks", "weight_hh_masks"])
    def test_refuses_masks(self, name):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor or a sequence of [23], got 1"):
            nn.LSTM(3, 5, num_layers=3)(torch.zeros(2, 4, 3), **{name: [torch.ones(5)]})


class TestConcreteMask:
    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
    def test_is_dropout(self, rate):
        torch.manual_seed(0)
        logit = torch.logit(torch.tensor(rate, dtype=torch.float64))
        kept = functional.concrete_mask(logit, (200_000,), temperature=0.01) * (1 - rate)
        assert ((kept < 0.01) | (kept > 0.99)).double().mean() > 0.95
        assert_close(kept.mean(), torch.tensor(1 - rate).double(), 0.01)
        assert_close(
            (functional.concrete_mask(logit, (200_000,)) * (1 - rate)).mean(), torch.tensor(1 - rate).double(), 0.05
        )

    def test_formula_and_derivative(self):
        logits = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)

        def mask(logits):
            return functional.concrete_mask(logits, (4, 7), temperature=0.7, generator=torch.Generator().manual_seed(1))

        u = torch.rand(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        p = logits.sigmoid()
        z = torch.sigmoid((p.log() - (1 - p).log() + u.log() - (1 - u).log()) / 0.7)
        assert_close(mask(logits), ((1 - z) / (1 - p)).detach(), 1e-12)
        assert gradcheck(mask, logits)
        assert gradgradcheck(mask, logits)

    @pytest.mark.parametrize("logit", [-200.0, -20.0, 0.0, 20.0, 200.0])
    def test_stays_finite(self, logit):
        logit = torch.tensor(logit, requires_grad=True)
        mask = functional.concrete_mask(logit, (1000,))
        (grad,) = torch.autograd.grad(mask.sum(), logit)
        assert mask.isfinite().all() and grad.isfinite()

    @pytest.mark.parametrize(
        ("logit", "shape", "options", "error", "message"),
        [
            (0.5, (2,), {}, TypeError, "logit: expected a floating point tensor, got float"),
            (torch.zeros(2).long(), (2,), {}, TypeError, "got torch.int64"),
            (torch.zeros(3), (2,), {}, ValueError, r"broadcasts to \(2,\), got \(3,\)"),
            (torch.zeros(3, 2), (2,), {}, ValueError, r"broadcasts to \(2,\), got \(3, 2\)"),
            (
                torch.zeros(2),
                (2,),
                {"temperature": 0.0},
                ValueError,
                "temperature: expected a positive number, got 0.0",
            ),
        ],
        ids=range(5),
    )
    def test_refuses(self, logit, shape, options, error, message):
        with pytest.raises(error, match=message):
            functional.concrete_mask(logit, shape, **options)
