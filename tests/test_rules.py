"""The registered ops, in graphs of torch.compile and torch.export: differentiated and batched as the functions are."""

from __future__ import annotations

import pytest
import torch

import hypergrad_ext as hg
from hypergrad_ext import functional, nn, ops
from tests.compare import assert_close
from tests.test_functional_models import glm
from tests.test_opcheck import ARGUMENTS

NAMES = ["glm_hvp", "softmax_hessian", "mlp_hvp", "lstm_cell"]


def linear_or_smooth(name):
    """A function, and where to differentiate it."""
    x, weights, v, _ = glm(intercept=False)
    operator = hg.MLPHessian(x, [torch.ones(1, 3, dtype=torch.float64)], x[:, :1], loss="squared")
    rows = torch.randn(2, 4, dtype=torch.float64)
    lstm = nn.LSTM(4, 2, dtype=torch.float64)
    return {
        "glm_hvp": (lambda v: functional.glm_hvp(x, weights, v), v),
        "softmax_hessian": (lambda u: functional.softmax_hessian(rows, u), rows + 1),
        "mlp_hvp": (lambda v: functional.mlp_hvp(operator, [v])[0], v[None]),
        "lstm_cell": (lambda gates: functional.lstm_cell(gates, rows[:, :1])[0], rows + 1),
        "LSTM": (lstm, rows + 1),
    }[name]


class Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, v):
        result = self.f(v)
        return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in [*NAMES, "LSTM"]), ("glm_hvp", True), ("LSTM", True)], ids=str
)
def test_exported_graphs_are_differentiable(name, strict):
    f, v = linear_or_smooth(name)
    f = Module(f)
    v.requires_grad_()
    exported = torch.export.export(f, (v,), strict=strict).module()
    assert any("hypergrad_ext" in str(node.target) for node in exported.graph.nodes)
    ours, theirs = (torch.autograd.grad(g(v).pow(3).sum(), v, create_graph=True)[0] for g in (exported, f))
    assert_close(ours, theirs, 1e-13)
    assert_close(*(torch.autograd.grad(g.square().sum(), v)[0] for g in (ours, theirs)), 1e-13)
    v = v.detach()
    assert_close(*(torch.func.hessian(lambda v: g(v).square().sum())(v) for g in (exported, f)), 1e-13)  # noqa: B023


@pytest.mark.parametrize(
    ("name", "transform"),
    [*((name, "jvp") for name in NAMES), ("lstm_cell", "hessian"), ("glm_hvp", "vmap"), ("mlp_hvp", "vmap")],
)
def test_transforms_inside_of_one_compiled_graph(name, transform):
    f, v = linear_or_smooth(name)
    transformed = {
        "jvp": lambda v: torch.func.jvp(f, (v,), (v,))[1],
        "hessian": torch.func.hessian(lambda v: f(v).pow(3).sum()),
        "vmap": torch.func.vmap(f),
    }[transform]
    v = torch.stack([v, 2 * v]) if transform == "vmap" else v
    torch._dynamo.reset()
    assert_close(torch.compile(transformed, backend="aot_eager", fullgraph=True)(v), transformed(v), 1e-13)


@pytest.mark.parametrize(("name", "only"), [("glm_hvp", 2), ("softmax_hessian", 1), ("mlp_hvp", 6)])
def test_registered_op_is_differentiable_in_the_vector_only(name, only):
    op, arguments = getattr(torch.ops.hypergrad_ext, name), list(ARGUMENTS[name](2, torch.float64, torch.float64))
    arguments[only].requires_grad_()
    assert set(torch.library.opcheck(op.default, tuple(arguments)).values()) == {"SUCCESS"}
    other = arguments[0][0] if name == "mlp_hvp" else arguments[0]
    other.requires_grad_()
    with pytest.raises(ValueError, match="expected a tensor that does not require grad"):
        op(*arguments)
    with torch.no_grad():
        assert not op(*arguments).requires_grad


@pytest.mark.parametrize("name", ["lstm_cell", "lstm_cell_backward"])
def test_registered_cell_is_differentiable_in_everything(name):
    arguments = [t.clone().requires_grad_() for t in ARGUMENTS[name](2, torch.float64, torch.float64)]
    results = torch.library.opcheck(getattr(torch.ops.hypergrad_ext, name).default, tuple(arguments))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("bias", [True, False])
def test_registered_layer_is_differentiable_in_everything(bias):
    shapes = (3, 2, 4), (8, 4), (8,), (8, 2), (2, 2), (2, 2)
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    arguments[2] = arguments[2] if bias else None
    results = torch.library.opcheck(torch.ops.hypergrad_ext.lstm_layer_from_inputs.default, tuple(arguments))
    assert set(results.values()) == {"SUCCESS"}


def test_defaults_reach_the_rule():
    logits, u = torch.randn(2, 1, 3, 5, dtype=torch.float64)
    u.requires_grad_()
    ours = torch.ops.hypergrad_ext.softmax_hessian(logits[0], u, 1.0)
    (gradient,) = torch.autograd.grad(ours.square().sum(), u)
    assert_close(gradient, 2 * ops.softmax_hessian(logits[0], ours.detach(), 1.0), 1e-14)
