"""A narrow layer's two products with its input as one pass over it: when, and that it comes to the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import hypergrad_ext as hg
from hypergrad_ext import _native
from hypergrad_ext.engines import native, traced
from tests.compare import assert_close, assert_no_worse_than_torch

pytestmark = pytest.mark.skipif(_native._C is None, reason=f"native plans are C++: {_native.MISSING}")

LOSSES = {
    "cross entropy": lambda o: F.cross_entropy(o, torch.arange(len(o)) % o.shape[1]),
    "of two terms": lambda o: o.tanh().square().sum() + F.cross_entropy(2 * o, torch.arange(len(o)) % o.shape[1]),
    "binary": lambda o: F.binary_cross_entropy_with_logits(o, (torch.arange(o.numel()) % 2).to(o).view(o.shape)),
    "squares": lambda o: (o - 1).square().mean(),
    "Poisson": lambda o: (o.exp() - o).mean(),
}
MIXED = {
    "mean of the batch": lambda o: ((o - o.mean(0)) ** 4).sum(),
    "shifted rows": lambda o: (o * o.roll(1, 0)).tanh().sum(),
    "running sum": lambda o: o.cumsum(0).tanh().mean(),
    "other rows": lambda o: (o @ o.T).tanh().mean(),
    "turned": lambda o: o.T.softmax(1).square().sum(),
    "half of the rows": lambda o: o[: len(o) // 2].tanh().sum() + o[len(o) // 2 :].exp().mean(),
    "as other rows": lambda o: o.reshape(2, -1).softmax(1).square().sum(),
}


@pytest.fixture
def kinds(monkeypatch) -> list[str]:
    """The kinds of the instructions of plans that are made, in order."""
    seen: list[str] = []
    before = native.serialised
    traced.clear_cache()

    def noted(instructions, counts):
        seen.extend(i.kind for i in instructions)
        return before(instructions, counts)

    monkeypatch.setattr(native, "serialised", noted)
    yield seen
    traced.clear_cache()


def layer(rows, features, outputs, dtype, bias=True):
    """Inputs, and a layer's parameters."""
    x = torch.randn(rows, features, dtype=dtype)
    params = {"weight": torch.randn(outputs, features, dtype=dtype) / features**0.5}
    if bias:
        params["bias"] = torch.randn(outputs, dtype=dtype)
    return x, {name: t.requires_grad_() for name, t in params.items()}


def product(loss, x, params, v, engine):
    def of_weights(p):
        return loss(F.linear(x.to(v["weight"]), p["weight"], p.get("bias")))

    operator = hg.Hessian(of_weights, params, engine=engine)
    operator @ v  # recorded; the next one is replayed
    return operator @ v


def assert_native_is_right(loss, rows, features, outputs):
    """A replayed product against a backward pass, in float64."""
    x, params = layer(rows, features, outputs, torch.float64)
    v = {n: torch.randn_like(p) for n, p in params.items()}
    assert_close(product(loss, x, params, v, "native"), product(loss, x, params, v, "eager"), 1e-12)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(16, 200),
    features=st.integers(64, 140),
    outputs=st.integers(1, 16),
    name=st.sampled_from(sorted(LOSSES)),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    threads=st.integers(1, 3),
)
# Several blocks and ranges, the last of them short.
@example(3001, 500, 9, "cross entropy", True, torch.float32, 3)
@example(1500, 2000, 3, "binary", False, torch.float64, 2)
@example(700, 4096, 1, "squares", True, torch.float32, 2)
def test_sweeps_against_torch(rows, features, outputs, name, bias, dtype, threads):
    x, params = layer(rows, features, outputs, dtype, bias)
    v = {n: torch.randn_like(p) for n, p in params.items()}
    double = {n: p.detach().double().requires_grad_() for n, p in params.items()}
    truth = product(LOSSES[name], x, double, {n: t.double() for n, t in v.items()}, "eager")
    theirs = product(LOSSES[name], x, params, v, "eager")
    torch.set_num_threads(threads)
    try:
        ours = product(LOSSES[name], x, params, v, "native")
    finally:
        torch.set_num_threads(1)
    # Products of the Hessian may cancel: rounding of the terms stays.
    assert_no_worse_than_torch(ours, theirs, truth, 50 * torch.finfo(dtype).eps, f"{rows} {features} {outputs} {name}:")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("outputs", [1, 10])
def test_what_is_done_by_rows_is_swept(name, outputs, kinds):
    assert_native_is_right(LOSSES[name], 200, 80, outputs)
    assert kinds.count("sweep") == 1 and "gemm" not in kinds


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("outputs", [2, 10])
def test_what_mixes_rows_is_not(name, outputs, kinds):
    assert_native_is_right(MIXED[name], 200, 80, outputs)
    assert "sweep" not in kinds


@pytest.mark.parametrize(
    ("rows", "features", "outputs"), [(200, 80, 17), (15, 80, 3), (200, 60, 3), (100, 5000, 3)], ids=str
)
def test_other_shapes_are_not(rows, features, outputs, kinds):
    assert_native_is_right(LOSSES["squares"], rows, features, outputs)
    assert "sweep" not in kinds


def test_inputs_with_gaps_several_vectors_and_a_penalty(kinds):
    wide = torch.randn(300, 200, dtype=torch.float64)
    x, (_, params) = wide[:, 7:107], layer(300, 100, 5, torch.float64)
    v = {n: torch.randn(6, *p.shape, dtype=p.dtype) for n, p in params.items()}

    def loss(p):
        return F.cross_entropy(F.linear(x, p["weight"], p["bias"]), torch.arange(300) % 5) + p["weight"].pow(4).sum()

    def products(engine):
        return hg.solve(hg.Hessian(loss, params, engine=engine), v, hg.Neumann(steps=3, alpha=0.01)).value

    ours = products("native")
    assert "sweep" in kinds
    assert_close(ours, products("eager"), 1e-12)


def test_a_sweep_that_does_not_fit_is_refused():
    rows, features, outputs = 100, 80, 3
    x = (2, 0, (1, rows, features), (0, features, 1))
    into, back = (1, 0, (1, features, outputs), (0, 1, features)), (3, 0, (1, outputs, features), (0, features, 1))
    made = (0, 0, (1, rows, outputs), (0, outputs, 1))
    turned = (0, 0, (1, outputs, rows), (0, 1, outputs))
    flat = (0, 0, (rows * outputs,), (1,))
    half = (0, 0, (rows * outputs // 2,), (1,))

    def plan(first=(x, into, made, False), between=(), last=(turned, x, back, False)):
        instruction = ("sweep", [list(first), list(between), list(last)], [])
        n = features * outputs
        return _native._C.Plan(True, rows * outputs, [n], [n], 1, 0, 0, [2.0], [instruction])

    def scaled(at):
        return "pointwise", [at[2], [at], [(7, 0, 0, -1, -1, 0)]]

    v, data = torch.randn(features * outputs, dtype=torch.float64), torch.randn(rows, features, dtype=torch.float64)
    value = plan(between=[scaled(flat)]).bind([data], []).product([v])
    assert_close(value, 2 * (data.T @ (data @ v.view(outputs, features).T)).T.reshape(-1), 1e-14)
    other = (2, 1, (1, rows - 1, features), (0, features, 1))
    wide = (2, 0, (1, 40, 200), (0, 200, 1))
    with pytest.raises(ValueError, match="two matrices"):
        plan(last=((0, 0, (1, outputs, rows - 1), (0, 1, outputs)), other, back, False))
    with pytest.raises(ValueError, match="do not fit"):
        plan(first=(wide, into, made, False))
    with pytest.raises(ValueError, match="narrow"):
        plan(first=(x, into, made, True))
    with pytest.raises(ValueError, match="other rows"):
        plan(between=[scaled((0, 0, (rows * outputs - 1,), (1,)))])
    with pytest.raises(ValueError, match="other rows"):
        plan(between=[("softmax", [True, rows // 2, 2 * outputs, half, half, half])])
