"""functional.lstm_cell and the layer below nn.LSTM: equal to torch's ops, differentiable to any order."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from hypergrad_ext import functional
from hypergrad_ext.lstm_layer import lstm_layer
from tests.compare import assert_close


def cell_in_torch(gates, c):
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def layer_in_torch(x, w_ih, bias, w_hh, h, c):
    steps = []
    for gates in F.linear(x, w_ih, bias):
        h, c = cell_in_torch(gates + h @ w_hh.T, c)
        steps.append((h, c))
    return tuple(torch.stack(each) for each in zip(*steps, strict=True))


def draw(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


class TestCell:
    @pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (0, 3)], ids=str)
    def test_equals_torch_ops(self, shape):
        gates, c = draw((*shape[:-1], 4 * shape[-1]), shape)
        for ours, theirs in zip(functional.lstm_cell(gates, c), cell_in_torch(gates, c), strict=True):
            assert ours.shape == theirs.shape
            assert_close(ours, theirs, 1e-14)

    def test_derivatives(self):
        inputs = draw((3, 12), (3, 3))
        assert gradcheck(functional.lstm_cell, inputs, check_forward_ad=True)
        assert gradgradcheck(functional.lstm_cell, inputs, check_fwd_over_rev=True)
        assert gradgradcheck(lambda gates, c: functional.lstm_cell(gates, c)[0], inputs)
        assert gradgradcheck(lambda gates: functional.lstm_cell(gates, inputs[1].detach())[1], inputs[:1])

    def test_third_and_fourth_order(self):
        inputs = draw((3, 12), (3, 3))
        assert_close(*(fourth(f, inputs) for f in (functional.lstm_cell, cell_in_torch)), 1e-13)

    @pytest.mark.parametrize("transform", [torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))])
    def test_under_torch_func(self, transform):
        gates, c = (t.detach() for t in draw((3, 12), (3, 3)))
        ours, theirs = (transform(lambda g: cell(g, c)[0].square().sum())(gates) for cell in CELLS)  # noqa: B023
        assert_close(ours, theirs, 1e-13)

    @pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 1)], ids=str)
    def test_vmap(self, in_dims):
        gates, c = (
            torch.randn(3, 12) if d is None else torch.randn(3, 12).expand(5, 3, 12).clone().movedim(0, d)
            for d in in_dims
        )
        c = c[..., :3]
        assert_close(*(list(torch.func.vmap(cell, in_dims)(gates, c)) for cell in CELLS), 1e-6)

    def test_gradient_under_compile(self):
        torch._dynamo.reset()
        gates, c = torch.randn(3, 12, requires_grad=True), torch.randn(3, 3)
        compiled = torch.compile(functional.lstm_cell, fullgraph=True, backend="aot_eager")
        ours, theirs = (torch.autograd.grad(f(gates, c)[0].square().sum(), gates) for f in (compiled, cell_in_torch))
        assert_close(ours, theirs, 1e-6)

    @pytest.mark.parametrize(
        ("gates", "c", "error", "message"),
        [
            (torch.zeros(3, 8), torch.zeros(3, 3), ValueError, r"gates: expected shape .*, got \(3, 8\)"),
            (torch.zeros(4), torch.zeros(()), ValueError, "gates: expected shape"),
            (torch.zeros(3, 12).double(), torch.zeros(3, 3), TypeError, "one floating dtype, got torch.float64 and"),
            (torch.zeros(12).long(), torch.zeros(3).long(), TypeError, "one floating dtype"),
        ],
        ids=range(4),
    )
    def test_refuses(self, gates, c, error, message):
        with pytest.raises(error, match=message):
            functional.lstm_cell(gates, c)


CELLS = functional.lstm_cell, cell_in_torch


def fourth(f, inputs):
    """Gradients of gradients, four deep."""
    for _ in range(4):
        values = f(*inputs)
        # Third powers, so that no order is trivial.
        total = sum((t**3).sum() for t in values)
        grads = torch.autograd.grad(total, inputs, create_graph=True)
        f = lambda *_, grads=grads: grads  # noqa: E731
    return list(grads)


class TestLayer:
    @staticmethod
    def inputs(steps=3):
        return draw((steps, 3, 4), (8, 4), (8,), (8, 2), (3, 2), (3, 2))

    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_derivatives(self, steps):
        inputs = self.inputs(steps)
        assert gradcheck(lstm_layer, inputs)
        assert gradgradcheck(lstm_layer, inputs)
        for output in (0, 1):
            assert gradgradcheck(lambda *a: lstm_layer(*a)[output][-1], inputs)  # noqa: B023

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (4,), (5,), (1, 3), (0, 5), (3, 4)], ids=str)
    def test_derivatives_by_some(self, which, bias):
        """Each of them skips what no one asks for."""
        inputs = [t.detach() for t in self.inputs()]
        if not bias:
            inputs[2] = None
            which = [i for i in which if i != 2] or [1]

        def of(*some):
            every = list(inputs)
            for i, t in zip(which, some, strict=True):
                every[i] = t
            return lstm_layer(*every)

        some = [inputs[i].clone().requires_grad_() for i in which]
        assert gradcheck(of, some)
        assert gradgradcheck(of, some)

    def test_third_and_fourth_order(self):
        inputs = self.inputs()
        assert_close(*(fourth(f, inputs) for f in (lstm_layer, layer_in_torch)), 1e-13)

    def test_third_order_without_bias_and_state(self):
        x, w_ih, _, w_hh, h0, c0 = self.inputs()
        h0, c0 = h0.detach(), c0.detach()

        def third(layer):
            of = lambda *w: (layer(x.detach(), w[0], None, w[1], h0, c0)[0] ** 3).sum()  # noqa: E731
            grads = of(w_ih, w_hh)
            for _ in range(3):
                grads = torch.autograd.grad(grads, [w_ih, w_hh], create_graph=True)
                total = sum((g**3).sum() for g in grads)
                grads, result = total, grads
            return list(result)

        assert_close(*(third(f) for f in (lstm_layer, layer_in_torch)), 1e-13)

    def test_vectors_stay_as_they_are(self):
        """Also that of the bias, where one step of one row is all there is."""
        x, w_ih, bias, w_hh, h0, c0 = draw((1, 1, 4), (8, 4), (8,), (8, 2), (1, 2), (1, 2))
        h, _ = lstm_layer(x.detach(), w_ih.detach(), bias, w_hh, h0, c0)
        grads = torch.autograd.grad(h.square().sum(), (bias, w_hh), create_graph=True)
        vectors = [torch.randn_like(g) for g in grads]
        before = [v.clone() for v in vectors]
        torch.autograd.grad(grads, (bias, w_hh), vectors)
        assert_close(vectors, before, 0.0)

    def test_under_torch_func(self):
        inputs = [t.detach() for t in self.inputs()]

        def hessian(layer):
            return torch.func.hessian(lambda w: layer(*inputs[:3], w, *inputs[4:])[0].square().sum())(inputs[3])

        assert_close(hessian(lstm_layer), hessian(layer_in_torch), 1e-13)
