"""Runs by rows: when instructions make one, and that it comes to the same on every number of threads."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import hypergrad_ext as hg
from hypergrad_ext import _native
from hypergrad_ext.engines import native, traced
from hypergrad_ext.engines.bands import bands
from hypergrad_ext.engines.layout import COPY, Instruction
from hypergrad_ext.engines.views import Root, View
from hypergrad_ext.structure import contiguous_strides
from tests.compare import assert_close, relative_error
from tests.models import Attention, Recurrent, Residual, loss_of

pytestmark = pytest.mark.skipif(_native._C is None, reason=f"native plans are C++: {_native.MISSING}")

WIDTH = 32
# What may happen to a batch of rows of that width: by rows, or across them.
BY_ROWS = {
    "layer": lambda h, w: F.linear(h, w),
    "transposed layer": lambda h, w: h @ w,
    "tanh": lambda h, w: h.tanh(),
    "square": lambda h, w: h * h,
    "softmax": lambda h, w: h.softmax(1),
    "row sum": lambda h, w: h + h.sum(1, keepdim=True).sin(),
    "two halves": lambda h, w: torch.cat([h[:, WIDTH // 2 :], h[:, : WIDTH // 2].sin()], 1),
    "pairs": lambda h, w: (h.view(len(h), 4, 8) @ h.view(len(h), 4, 8).mT).sin().view(len(h), 16).repeat(1, 2),
}
ACROSS = {
    "batch norm": lambda h, w: (h - h.mean(0)) / (1 + h.var(0)),
    "roll": lambda h, w: h.roll(1, 0),
    "column softmax": lambda h, w: h.softmax(0),
    "gram": lambda h, w: (h @ h.T / WIDTH).tanh() @ h / len(h),
    "turned": lambda h, w: h.reshape(WIDTH, len(h)).cos().T.reshape(len(h), WIDTH),
    "half of the rows": lambda h, w: torch.cat([h[len(h) // 2 :], h[: len(h) // 2].sin()]),
    "into a weight": lambda h, w: F.linear(h, w @ (h.T @ h / len(h)).sin()),
}
OPS = BY_ROWS | ACROSS


@contextlib.contextmanager
def on(threads):
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def plans(monkeypatch):
    """The instructions of every plan that is made, the last one last."""
    made: list[list[Instruction]] = []
    before = native.serialised
    traced.clear_cache()
    monkeypatch.setattr(native, "serialised", lambda i, counts: made.append(list(i)) or before(i, counts))
    yield made
    traced.clear_cache()


def assert_right(loss, params, threads, engine="native", tolerance=1e-8):
    """Replayed products with several vectors, each seen once, so that nothing is left of it in memory."""
    operator, eager = (hg.Hessian(loss, params, engine=e) for e in (engine, "eager"))
    leaves = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    with on(threads):
        for _ in range(3):
            v = {n: torch.randn_like(p) for n, p in leaves.items()}
            assert_close(operator @ v, eager @ v, tolerance)
    assert operator.engine == engine


def network(ops, rows):
    """A loss of some layers, each followed by its op, and the parameters."""
    params = {f"w{i}": torch.randn(WIDTH, WIDTH, dtype=torch.float64) / WIDTH**0.5 for i in range(len(ops))}
    x = torch.randn(rows, WIDTH, dtype=torch.float64)

    def loss(p):
        h = x
        for (_, w), op in zip(p.items(), ops, strict=True):
            h = OPS[op](torch.tanh(F.linear(h, w)), w)
        return (h * x).sin().mean()

    return loss, {n: p.requires_grad_() for n, p in params.items()}


@settings(max_examples=60, deadline=None)
@given(
    ops=st.lists(st.sampled_from(sorted(OPS)), min_size=4, max_size=7),
    rows=st.integers(40, 110),
    threads=st.integers(2, 4),
)
def test_any_network_is_right(ops, rows, threads):
    loss, params = network(ops, rows)
    # Some networks are so ill-conditioned that rounding alone moves a product by 1e-7: batch norm of batch norm.
    eager = hg.Hessian(loss, params, engine="eager")
    v, u = ({n: torch.randn_like(p) for n, p in params.items()} for _ in range(2))
    both, one = eager @ {n: v[n] + u[n] for n in v}, eager @ u
    assume(relative_error({n: both[n] - one[n] for n in v}, eager @ v) < 1e-11)
    assert_right(loss, params, threads)


@pytest.mark.parametrize("op", BY_ROWS)
def test_what_keeps_rows_is_one_run(op, plans):
    loss, params = network([op] * 5, 64)
    assert_right(loss, params, 2)
    kinds = [i.kind for i in plans[-1]]
    within = sum(len(i.parts()) for i in plans[-1] if i.kind == "bands")
    assert "bands" in kinds and len(kinds) < within / 4, kinds


MODELS = {
    "MLP": (nn.Sequential(*(f() for _ in range(9) for f in (lambda: nn.Linear(24, 24), nn.Tanh))), (61, 24)),
    "LSTM cell": (Recurrent(nn.LSTMCell, 20, 24), (37, 6, 20)),
    "transformer": (nn.Sequential(Attention(24, 3), nn.Flatten(0, 1)), (10, 9, 24)),
    "ResNet block": (Residual(8, 16), (11, 8, 9, 9)),
    "CNN": (nn.Sequential(nn.Conv2d(4, 16, 3), nn.Softplus(), nn.Conv2d(16, 8, 3), nn.Flatten()), (13, 4, 9, 9)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threads", [2, 5])
def test_models(name, threads, plans):
    torch.manual_seed(0)
    model, sizes = MODELS[name]
    x = torch.randn(*sizes, dtype=torch.float64)
    model = model.double()
    y = torch.randint(3, (len(model(x)),))
    assert_right(loss_of(model, x, y), model, threads)
    assert "bands" in [i.kind for i in plans[-1]]


def test_compiled_kernels_run_by_bands(plans):
    torch.manual_seed(0)
    model, sizes = MODELS["LSTM cell"]
    x, y = torch.randn(*sizes, dtype=torch.float64), torch.randint(3, (37,))
    assert_right(loss_of(model.double(), x, y), model, 2, "compiled")
    parts = [part.kind for i in plans[-1] if i.kind == "bands" for part in i.parts()]
    assert "compiled" in parts and "pointwise" not in parts


def test_a_solve_uses_them_and_several_vectors_do_not(plans):
    torch.manual_seed(0)
    model, sizes = MODELS["MLP"]
    model, x, y = model.double(), torch.randn(*sizes, dtype=torch.float64), torch.randint(3, (61,))
    loss = loss_of(model, x, y)
    one = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    many = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in model.named_parameters()}
    solver = hg.Neumann(steps=4, alpha=0.01)
    made = []
    with on(2):
        for v in (one, many):
            ours, theirs = (hg.solve(hg.Hessian(loss, model, engine=e), v, solver).value for e in ("native", "eager"))
            assert_close(ours, theirs, 1e-10)
            made.append([i.kind for i in plans[-1]])
    assert "bands" in made[0] and "bands" not in made[1]


def test_a_plan_keeps_no_tensors_of_the_solve_it_was_made_in():
    loss, params = network(["layer"] * 4, 61)
    assert_right(loss, params, 2)
    (x,) = (cell.cell_contents for cell in loss.__closure__ if isinstance(cell.cell_contents, torch.Tensor))
    alive = weakref.ref(x)
    del loss, params, x
    gc.collect()
    assert alive() is None


def test_the_same_result_every_time():
    loss, params = network(["layer", "softmax", "pairs", "tanh"], 96)
    v = {n: torch.randn_like(p) for n, p in params.items()}
    operator = hg.Hessian(loss, params, engine="native")
    with on(2):
        operator @ v
        first, *others = [operator @ v for _ in range(20)]
    assert all(torch.equal(first[n], other[n]) for other in others for n in first)


def view(root, *sizes, offset=0):
    return View(root, offset, sizes, contiguous_strides(sizes))


def copied(root, out):
    """An instruction that copies what is in one view to another."""
    return Instruction("pointwise", [out.sizes, [out, root], [(COPY, 0, 1, -1, -1, -1)]], [out.root])


def test_memory_is_bounded():
    """A run ends before it keeps too much, and one that would be of a single instruction is none."""
    source = Root("c", extent=64 * 100_000)
    chain, last = [], view(source, 64, 100_000)
    for _ in range(4):
        out = view(Root("arena", extent=64 * 100_000), 64, 100_000)
        chain.append(copied(last, out))
        last = out
    assert [i.kind for i in bands(chain)] == ["pointwise"] * 4
    small = [copied(view(source, 64, 100), view(Root("arena", extent=6400), 64, 100)) for _ in range(400)]
    runs = bands(small)
    assert [i.kind for i in runs] == ["bands"] * 3
    assert sum(len(i.parts()) for i in runs) == 400


def test_order_is_kept_where_it_matters():
    """Read, then overwritten across rows, then read again."""
    a, b, c, d = (Root("arena", extent=64 * 8) for _ in range(4))
    source = Root("c", extent=64 * 8)
    turned = View(b, 0, (64, 8), (1, 64))
    steps = [
        copied(view(source, 64, 8), view(a, 64, 8)),
        copied(view(a, 64, 8), turned),
        copied(view(b, 64, 8), view(c, 64, 8)),
        copied(view(source, 64, 8), view(a, 64, 8)),
        copied(view(a, 64, 8), view(d, 64, 8)),
    ]
    found = [part for i in bands(steps) for part in i.parts() or (i,)]
    assert sorted(map(steps.index, found)) == list(range(5))
    at = [found.index(step) for step in steps]
    assert at[0] < at[1] < at[2] and at[1] < at[3] < at[4]


def test_what_a_run_read_across_rows_it_does_not_overwrite():
    a, b, c, d = (Root("arena", extent=64 * 8) for _ in range(4))
    steps = [
        copied(View(a, 0, (64, 8), (1, 64)), view(b, 64, 8)),
        copied(view(b, 64, 8), view(c, 64, 8)),
        copied(view(c, 64, 8), view(a, 64, 8)),
        copied(view(a, 64, 8), view(d, 64, 8)),
    ]
    within = [[steps.index(part) for part in i.parts() or (i,)] for i in bands(steps)]
    assert within == [[0, 1], [2, 3]]


def test_tasks_do_not_overtake_each_other():
    """What a run leaves over: read across rows, written anew, added up."""
    made, source = Root("arena", extent=64 * 8), Root("c", extent=64 * 8)
    mixed, total, result = Root("arena", extent=64 * 8), Root("out", 0, 64 * 8), Root("out", 1, 64 * 8)
    run = [copied(view(source, 64, 8), view(made, 64, 8)) for _ in range(2)]
    names = [(made, mixed), (mixed, total), (made, mixed), (mixed, result)]
    left = [copied(view(a, 64, 8), View(b, 0, (64, 8), (1, 64))) for a, b in names]
    level = {part: at for at, i in enumerate(bands([*run, *left])) for part in i.parts() or (i,)}
    assert level[run[0]] == level[run[1]] < level[left[0]] < level[left[1]] < level[left[2]] < level[left[3]]


def test_bands_that_do_not_fit_are_refused():
    rows, columns = 12, 5
    x = (2, 0, (rows, columns), (columns, 1))
    out = (3, 0, (rows, columns), (columns, 1))

    def plan(count=rows, kernel=None):
        kernel = kernel or ("pointwise", [(rows, columns), [out, x], [(7, 0, 1, -1, -1, 0)]])
        instruction = ("bands", [count, [kernel]], [])
        return _native._C.Plan(True, 0, [3], [rows * columns], 1, 0, 0, [2.0], [instruction])

    data, v = torch.randn(rows, columns, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for count in (1, 4, rows):
        assert_close(plan(count).bind([data], []).product([v]), 2 * data.reshape(-1), 0)
    for count in (5, 24):
        with pytest.raises(ValueError, match=f"12 rows, not a multiple of {count}"):
            plan(count)
    with pytest.raises(ValueError, match="bands of 0 rows"):
        plan(0)
    with pytest.raises(ValueError, match="0 rows, not a multiple"):
        plan(kernel=("pointwise", [(), [(3, 0, (), ()), (2, 0, (), ())], [(0, 0, 1, -1, -1, -1)]]))
    with pytest.raises(ValueError, match="no such instruction: bands"):
        plan(kernel=("bands", [rows, []]))
