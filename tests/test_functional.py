"""The differentiable functions: derivatives of every kind, batching, compilation, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from hypergrad_ext import functional
from tests.compare import assert_close


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("k", [None, 2])
def test_derivatives(shape, k):
    logits = torch.randn(shape, dtype=torch.float64)
    weights = torch.rand(shape[:-1], dtype=torch.float64)
    u = torch.randn(*(() if k is None else (k,)), *shape, dtype=torch.float64, requires_grad=True)

    def f(u):
        return functional.softmax_hessian(logits, u, 0.7, weights)

    assert gradcheck(f, u, check_forward_ad=True)
    assert gradgradcheck(lambda u: f(u).square(), u)
    assert_close(torch.func.jacfwd(f)(u), torch.func.jacrev(f)(u), 1e-14)


def test_gauss_newton_product_through_autograd():
    x, target = torch.randn(9, 4, dtype=torch.float64), torch.randint(5, (9,))
    w, v = torch.randn(2, 5, 4, dtype=torch.float64)
    logits, u = torch.func.jvp(lambda w: x @ w.T, (w,), (v,))
    product = functional.softmax_hessian(logits, u, 1 / 9).T @ x
    _, truth = torch.autograd.functional.hvp(lambda w: F.cross_entropy(x @ w.T, target), w, v)
    assert_close(product, truth, 1e-13)


@pytest.mark.parametrize("in_dims", [(None, 0, None), (0, None, None), (0, 1, 0), (None, 0, 1), (1, 0, None)], ids=str)
@pytest.mark.parametrize("k", [None, 3])
def test_vmap(in_dims, k):
    lead = () if k is None else (k,)
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((4, 6), (*lead, 4, 6), (4,))]
    tensors = [t if d is None else torch.stack([t, -t, t + 1], d) for t, d in zip(tensors, in_dims, strict=True)]

    def f(logits, u, weights):
        return functional.softmax_hessian(logits, u, 0.7, weights)

    value = torch.func.vmap(f, in_dims)(*tensors)
    rows = [[t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)] for i in range(3)]
    assert_close(value, torch.stack([f(*row) for row in rows]), 1e-14)


def test_gradient_under_compile():
    torch._dynamo.reset()
    logits, u = torch.randn(2, 3, 6)
    u.requires_grad_()
    compiled = torch.compile(functional.softmax_hessian, fullgraph=True, backend="aot_eager")
    (value,) = torch.autograd.grad(compiled(logits, u).square().sum(), u)
    (truth,) = torch.autograd.grad(functional.softmax_hessian(logits, u).square().sum(), u)
    assert_close(value, truth, 1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(4, 3, requires_grad=True)}, ValueError, r"differentiable in u only; pass logits\."),
        ({"weights": torch.ones(4, requires_grad=True)}, ValueError, r"pass weights\.detach\(\)"),
        ({"u": torch.zeros(3)}, ValueError, r"u: expected shape \(4, 3\) or \(k, 4, 3\), got \(3,\)"),
        ({"u": torch.zeros(4, 3).double()}, TypeError, "u: expected torch.float32 like logits"),
        ({"weights": torch.zeros(3)}, ValueError, r"weights: expected shape \(4,\), got \(3,\)"),
        ({"scale": torch.tensor(2.0, requires_grad=True)}, ValueError, r"u only; pass scale\.detach\(\)"),
    ],
    ids=range(6),
)
def test_refuses(change, error, message):
    arguments = {"logits": torch.zeros(4, 3), "u": torch.zeros(4, 3)} | change
    with pytest.raises(error, match=message):
        functional.softmax_hessian(**arguments)


@pytest.mark.parametrize("argument", ["logits", "weights"])
def test_refuses_tangents_of_all_but_the_vector(argument):
    arguments = {"logits": torch.randn(4, 3), "u": torch.randn(4, 3), "weights": torch.rand(4)}
    t = arguments.pop(argument)
    with pytest.raises(ValueError, match=rf"pass {argument}\.detach\(\)"):
        torch.func.jvp(lambda t: functional.softmax_hessian(**arguments, **{argument: t}), (t,), (t,))
    u = arguments.pop("u")

    def derivative(t):  # by the vector, and then by t
        return torch.func.jvp(lambda u: functional.softmax_hessian(u=u, **arguments, **{argument: t}), (u,), (u,))[1]

    with pytest.raises(ValueError, match=f"{argument}: expected no tangent"):
        torch.func.jvp(derivative, (t,), (t,))
