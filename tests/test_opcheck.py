"""The registered ops: schema, fake, mutation and tracing, by torch's own checker; and under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import masked_tensor
from torch.utils import _pytree as pytree

from hypergrad_ext import _native, backends, ops
from tests.compare import assert_close
from tests.steps import STEPS, arguments
from tests.test_lstm import NAMES as LSTM_NAMES
from tests.test_lstm import arguments_of


def neumann_arguments(rows=None, state=torch.float32, product=torch.float32, sizes=(5, 130, 1)):
    lead = () if rows is None else (rows,)
    v, p = ([torch.randn(*lead, n, dtype=state) for n in sizes] for _ in range(2))
    hv = [torch.randn(*lead, n).to(product) for n in sizes]
    return v, p, hv, torch.zeros(*lead, 2, dtype=torch.float64), 0.3, 0.1


def cg_arguments(rows=None, state=torch.float32, product=torch.float32, sizes=(5, 130, 1)):
    x, r, hp, _, _, _ = neumann_arguments(rows, state, product, sizes)
    p = [t.clone() for t in r]
    hp = [(2 * t).to(product) for t in p]
    scalars = torch.tensor([7.0, 1e-9, 0.0, 0.0], dtype=torch.float64)
    return x, r, p, hp, scalars if rows is None else scalars.repeat(rows, 1), 0.1


def glm_arguments(rows=None, state=torch.float32, product=torch.float32):
    k = rows or 1
    x, weights = torch.randn(20, 6).to(product), torch.randn(20, 3).to(state).softmax(1)
    return x, weights, torch.randn(k, 21).to(state), torch.rand(21).to(state), 0.05, True


def gram_arguments(rows=None, state=torch.float32, product=torch.float32):
    return torch.randn(20, 6).to(state), torch.randn(20, rows or 1).to(state)


def dense_arguments(rows=None, state=torch.float32, product=torch.float32):
    return torch.eye(9, dtype=state) + 0.1, torch.randn(rows or 1, 9, dtype=state)


def neumann_solve_arguments(model, b):
    """Those of a whole solve: the model's, the right-hand sides in place b, and the solver's."""

    def arguments(*args):
        of_model = model(*args)
        return *of_model, 0.2, 0.1, 5, torch.full((len(of_model[b]),), 1e-3, dtype=torch.float64)

    return arguments


def cg_solve_arguments(model, b):
    def arguments(*args):
        of_model = model(*args)
        squares = of_model[b].double().square().sum(1)
        return *of_model, 0.1, 5, torch.stack([squares, 1e-6 * squares, 0 * squares, 0 * squares], 1)

    return arguments


def softmax_arguments(rows=None, state=torch.float32, product=torch.float32):
    lead = () if rows is None else (rows,)
    return torch.randn(5, 37).to(product), torch.randn(*lead, 5, 37).to(product), 0.3, torch.rand(5).to(state)


def mlp_arguments(rows=None, state=torch.float32, product=torch.float32):
    sizes, n = [6, 5, 4, 3], 20
    weights = [torch.randn(o, i, dtype=state) for i, o in zip(sizes, sizes[1:], strict=False)]
    hidden, slopes, bends = ([torch.rand(n, size, dtype=state) for size in s] for s in (sizes[:3], [5, 4], [5, 4]))
    deltas, v = [torch.randn(n, size, dtype=state) for size in (4, 3)], torch.randn(rows or 1, 74, dtype=state)
    return weights, hidden, slopes, bends, deltas, torch.randn(n, 3).to(state).softmax(1), v, 0.05, True, 0.1


def lstm_arguments(name):
    def arguments(rows=None, state=torch.float32, product=torch.float32):
        return arguments_of(name, rows or 1, 7, product)

    return arguments


ARGUMENTS = {
    "neumann_step_": neumann_arguments,
    "cg_step_": cg_arguments,
    "glm_hvp": glm_arguments,
    "glm_gram": gram_arguments,
    "glm_neumann_solve": neumann_solve_arguments(glm_arguments, 2),
    "glm_cg_solve": cg_solve_arguments(glm_arguments, 2),
    "dense_neumann_solve": neumann_solve_arguments(dense_arguments, 1),
    "dense_cg_solve": cg_solve_arguments(dense_arguments, 1),
    "softmax_hessian": softmax_arguments,
    "softmax_hessian_": softmax_arguments,
    "mlp_hvp": mlp_arguments,
    "mlp_neumann_solve": neumann_solve_arguments(mlp_arguments, 6),
    "mlp_cg_solve": cg_solve_arguments(mlp_arguments, 6),
    **{name: lstm_arguments(name) for name in LSTM_NAMES},
}


def step_arguments(name):
    return lambda rows=None, state=torch.float32, product=torch.float32: arguments(
        name, [5, 130, 1], rows, (state, product)
    )


ARGUMENTS |= {name: step_arguments(name) for name in STEPS}


def test_every_op_is_checked():
    assert {op.name for op in ops.ALL} == set(ARGUMENTS)


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize(
    ("state", "product"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_opcheck(op, rows, state, product):
    results = torch.library.opcheck(op.registered, ARGUMENTS[op.name](rows, state, product))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_registered_op_equals_the_direct_call(op):
    torch.manual_seed(0)
    direct = ARGUMENTS[op.name]()
    torch.manual_seed(0)
    registered = ARGUMENTS[op.name]()
    results = op(*direct), op.registered(*registered)
    for a, b in zip((direct, results[0]), (registered, results[1]), strict=True):
        leaves = [[t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in (a, b)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*leaves, strict=True))


def neumann_loop(hv, b):
    v, p = b.clone(), b.clone()
    stats = torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        ops.neumann_step_([v], [p], [hv @ v], stats, 0.1, 0.01)
    return p, stats


def cg_loop(a, b):
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    state = torch.stack([(b @ b).double(), *torch.zeros(3, dtype=torch.float64)])
    for _ in range(3):
        ops.cg_step_([x], [r], [p], [a @ p], state, 0.01)
    return x, state


def chebyshev_loop(a, b):
    x_old, x, stats = torch.zeros_like(b), b.clone(), torch.zeros(3, dtype=torch.float64)
    for momentum in (0.3, 0.2):
        ops.chebyshev_step_([x_old], [x], [a @ x], [b], [], stats, 0.1, momentum, 0.01)
        x_old, x = x, x_old
    return x, stats


@pytest.mark.parametrize("loop", [neumann_loop, cg_loop, chebyshev_loop])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(loop, backend):
    a = torch.randn(17, 17)
    a, b = a @ a.T / 17 + torch.eye(17), torch.randn(17)
    torch._dynamo.reset()
    compiled = torch.compile(loop, fullgraph=True, backend=backend)
    for value, truth in zip(compiled(a, b), loop(a, b), strict=True):
        assert_close(value, truth, 1e-6)


def test_no_recompilation_for_other_values():
    torch._dynamo.reset()
    compiled = torch.compile(neumann_loop, fullgraph=True, backend="aot_eager")
    a = torch.eye(17)
    compiled(a, torch.randn(17))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(2 * a, torch.randn(17))


def test_make_fx_keeps_the_op_in_the_graph():
    graph = make_fx(neumann_loop)(torch.eye(5), torch.ones(5))
    calls = [str(node.target) for node in graph.graph.nodes if "hypergrad_ext" in str(node.target)]
    assert calls == ["hypergrad_ext.neumann_step_.default"] * 3
    assert_close(graph(torch.eye(5), torch.ones(5)), neumann_loop(torch.eye(5), torch.ones(5)), 1e-6)


def _fake():
    with FakeTensorMode():
        return torch.ones(4, 3)


@pytest.mark.parametrize(
    "make",
    [
        _fake,
        lambda: torch._efficientzerotensor((4, 3)),
        lambda: torch._neg_view(torch.ones(4, 3)),
        lambda: masked_tensor(torch.ones(4, 3), torch.ones(4, 3).bool()),
    ],
    ids=["fake", "zero", "negative", "masked"],
)
def test_tensors_whose_memory_is_not_their_values_are_refused(make):
    if reason := backends.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    with pytest.raises(TypeError, match="u must be in plain memory, got a"):
        ops.softmax_hessian.kernels["cpp"](torch.zeros(4, 3), make(), 1.0, None)
    with pytest.raises(TypeError, match="x must be in plain memory, got a"):
        _native._C.norms([make()], None)
