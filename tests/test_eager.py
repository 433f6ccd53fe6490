"""The retained gradient graph: batches of vectors, whichever way they go through it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hypergrad_ext.engines import RetainedGradient


def problem():
    torch.manual_seed(0)
    x, w, bias = torch.randn(5, 3), torch.randn(3, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    idle, linear = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    leaves = [idle, w, linear, bias]
    loss = F.softplus(x @ w + bias).square().mean() + linear.sum()
    vectors = [torch.randn(4, *t.shape) for t in leaves]
    return RetainedGradient.of(loss, leaves), vectors


@pytest.mark.parametrize("batches", [None, True, False])
def test_a_batch_equals_its_vectors(batches):
    gradient, vectors = problem()
    gradient.batches = batches
    products = gradient.hvps(vectors)
    for j in range(4):
        for one, many in zip(gradient.hvp([t[j] for t in vectors]), products, strict=True):
            torch.testing.assert_close(many[j], one)
    assert gradient.batches in ({True, False} if batches is None else {batches})


def test_an_operation_without_a_batching_rule_goes_one_by_one():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            # A number taken out of a tensor is what no batching rule allows.
            return 3 * x**2 * grad * (1.0 if float(grad.sum()) > -1e9 else 0.0)

    w = torch.arange(1.0, 4.0, requires_grad=True)
    gradient = RetainedGradient.of(Cube.apply(w).sum() + (w**4).sum(), [w])
    v = torch.eye(3)
    torch.testing.assert_close(gradient.hvps([v])[0], torch.diag(6 * w.detach() + 12 * w.detach() ** 2))


def test_deterministic_algorithms_leave_nothing_to_the_clock():
    gradient, vectors = problem()
    torch.use_deterministic_algorithms(True)
    try:
        gradient.hvps(vectors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert gradient.batches is None
