"""Random small networks: whatever is recorded, simplified, lowered and replayed is the eager product, in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad_ext as hg
from hypergrad_ext import _native
from tests.compare import assert_close
from tests.models import Attention, loss_of

# From a tensor of any shape to one of the same shape.
POINTWISE = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "relu": F.relu,
    "leaky": F.leaky_relu,
    "square": lambda x: x**2,
    "negated": lambda x: -x,
    "scaled": lambda x: 0.7 * x / 1.3 - 0.1,
    "quotient": lambda x: x / (1 + x**2),
    "root": lambda x: (1 + x**2).sqrt(),
    "exp": lambda x: (-(x**2)).exp(),
    "log": lambda x: (2 + x**2).log(),
    "sine": lambda x: x.sin() * x.cos(),
    "clamped": lambda x: x.clamp(-0.5, 0.5) + x,
    "where": lambda x: torch.where(x > 0, x * x, x.sin()),
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "through float32": lambda x: x + 0.5 * x.float().double().detach(),
    "through integers": lambda x: x * torch.arange(x.numel()).view(x.shape),
    "mask": lambda x: x * (x.detach() > 0),
}
# From a tensor with at least two dimensions to another; sizes may become one, views overlap or lie apart in memory.
SHAPES = {
    "transposed": lambda x: x.transpose(0, -1),
    "flat and back": lambda x: x.reshape(-1).view(x.shape) if x.is_contiguous() else x.reshape(-1)[None],
    "every second": lambda x: x[..., ::2],
    "narrow": lambda x: x.narrow(0, 0, max(1, x.shape[0] - 1)),
    "one row": lambda x: x[:1],
    "twice": lambda x: torch.cat([x, x * 2], 0),
    "stacked": lambda x: torch.stack([x, x.sin()], 1).flatten(0, 1),
    "expanded": lambda x: x.sum(0, keepdim=True).expand(3, *x.shape[1:]) * 1.5,
    "broadcast": lambda x: x + x.mean(-1, keepdim=True) * x[:1],
    "outer": lambda x: x.sum(-1).unsqueeze(-1) * x.mean(0, keepdim=True),
    "flipped": lambda x: x.flip(0) + x.roll(1, -1),
    "split": lambda x: sum(part.sum(0, keepdim=True) for part in x.split(2, 0)) + x,
    "unbound": lambda x: x.unbind(0)[0][None] * x.unbind(0)[-1],
    "padded": lambda x: F.pad(x, (1, 2)),
    "selected": lambda x: x.index_select(0, torch.tensor([0, 0, x.shape[0] - 1])),
    "gathered": lambda x: x[torch.arange(x.shape[0]).flip(0)],
    "softmax": lambda x: x.softmax(-1),
    "softmax of columns": lambda x: x.softmax(0),
    "log softmax": lambda x: x.log_softmax(-1),
    "normalised": lambda x: F.layer_norm(x, x.shape[-1:]),
    "largest": lambda x: x + x.amax(-1, keepdim=True),
    "cumulative": lambda x: x.cumsum(-1),
    "gram": lambda x: x @ x.transpose(-1, -2) / x.shape[-1],
    "batched": lambda x: (x[None] @ x.T[None].expand(2, -1, -1)).sum(0) / x.shape[-1],
    "empty": lambda x: torch.cat([x, x[:0]], 0) + x[:0].sum(),
    "deviation": lambda x: (x - x.mean()) / (1 + x.var(correction=0)),
}


def dense(x: Tensor, weights: list[Tensor], bias: bool) -> Tensor:
    """A layer of fixed width for an input of any width: some of the weights, tied between layers."""
    w = weights[x.shape[-1] % 2][: x.shape[-1] % 5 + 1, :].expand(-1, -1)
    w = w.repeat(1, -(-x.shape[-1] // w.shape[-1]))[:, : x.shape[-1]]
    return F.linear(x, w, weights[2][: w.shape[0]] if bias else None)


operations = st.lists(st.sampled_from([*POINTWISE, *SHAPES, "dense", "dense", "dense without bias"]), max_size=7)
engines = [
    "traced",
    pytest.param("native", marks=pytest.mark.skipif(_native._C is None, reason="native plans are C++")),
]


@pytest.mark.parametrize("engine", engines)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations, st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_random_networks(engine, names, rows, columns, strided, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = random(columns, rows).T if strided else random(rows, columns)
    params = [random(4, 5).T if strided else random(5, 4), random(5, 3), random(5), random(1, columns)]

    def loss(weights: list[Tensor], x: Tensor = x) -> Tensor:
        h = x * weights[3]
        for name in names:
            if name.startswith("dense"):
                h = dense(h, weights, name == "dense")
            elif h.shape[0] * h.shape[1] > 400:
                h = h[:3, :3]
            else:
                h = (POINTWISE.get(name) or SHAPES[name])(h)
        return (h.tanh() ** 2).sum() + h.sin().mean() + (weights[0] ** 3).sum() * 0.1

    operator, truth = (hg.Hessian(loss, params, engine=e) for e in (engine, "eager"))
    vectors = [[random(*p.shape) for p in params] for _ in range(3)]
    # Where another rounding of the input moves the product, as behind a softmax of large numbers, no two ways agree.
    rounded = hg.Hessian(lambda weights: loss(weights, x * (1 + 1e-15)), params, engine="eager").matvec(vectors[0])
    exact = truth.matvec(vectors[0])
    scale = max(1.0, *(float(t.abs().max()) for t in exact))
    assume(all(float((a - b).abs().max()) <= 1e-13 * scale for a, b in zip(rounded, exact, strict=True)))
    for v in vectors:
        expected, value = truth.matvec(v), operator.matvec(v)
        scale = max(1.0, *(float(t.abs().max()) for t in expected))
        for a, b in zip(value, expected, strict=True):
            assert float((a - b).abs().max()) <= 1e-11 * scale, f"{names} {operator.engine}"
    assert operator.engine == engine
    batch = [torch.stack([v[i] for v in vectors]) for i in range(len(params))]
    assert_close(operator.matmat(batch), truth.matmat(batch), 1e-10)


@pytest.mark.skipif(_native._C is None, reason="native plans are C++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 5, 8, 11, 12, 13])
def test_products_with_few_columns(classes, dtype):
    """Some of which are made in columns and turned: weights in rows and in columns, shared (so that sums
    accumulate), a batch of matrices."""
    generator = torch.Generator().manual_seed(classes)
    x = torch.randn(60, 70, generator=generator, dtype=dtype)
    y = torch.randint(classes, (60,), generator=generator)
    params = [torch.randn(*shape, generator=generator, dtype=dtype) / 8 for shape in [(classes, 70), (70, classes)]]
    batch = torch.randn(3, 60, 70, generator=generator, dtype=dtype)

    def loss(w):
        rows, columns = w
        scores = x @ columns + F.linear(x, rows) + (2 * x).sin() @ columns
        return F.cross_entropy(scores, y) + ((batch @ columns).tanh() ** 2).mean()

    v = [torch.randn(p.shape, generator=generator, dtype=dtype) for p in params]
    eager, native = (hg.Hessian(loss, params, engine=engine) @ v for engine in ("eager", "native"))
    assert_close(native, eager, 1e-5 if dtype is torch.float32 else 1e-12)


@pytest.mark.skipif(_native._C is None, reason="native plans are C++")
@pytest.mark.parametrize("threads", [2, 3])
def test_large_instructions_are_shared_among_threads(threads):
    """Products of a transformer and of a wide layer, batches of small ones, pointwise ops, sums, softmax."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(48, 3), nn.Flatten(0, 1), nn.Linear(48, 700), nn.Tanh(), nn.Linear(700, 9)).double()
    x, y = torch.randn(13, 40, 48, dtype=torch.float64), torch.randint(9, (13 * 40,))
    native, eager = (hg.Hessian(loss_of(model, x, y), model, engine=engine) for engine in ("native", "eager"))
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    expected, alone = eager @ v, native @ v
    torch.set_num_threads(threads)
    try:
        shared = [native @ v for _ in range(3)]
    finally:
        torch.set_num_threads(1)
    assert native.engine == "native"
    for n, value in expected.items():
        assert_close(alone[n], value, 1e-10)
        for again in shared:
            assert_close(again[n], value, 1e-10)


@pytest.mark.skipif(_native._C is None, reason="native plans are C++")
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("strided", [False, True])
def test_whole_products_are_shared_among_threads(threads, strided):
    """Every thread has a memory of its own, also for what ATen allocates (here by batch normalisation)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 40),
        nn.Tanh(),
        nn.Linear(40, 9),
    ).double()
    x, y = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.randint(9, (20,))
    native, eager = (hg.Hessian(loss_of(model, x, y), model, engine=engine) for engine in ("native", "eager"))
    for k in (1, 2, 7, 9):
        v = {n: torch.randn(*p.shape, k, dtype=p.dtype).movedim(-1, 0) for n, p in model.named_parameters()}
        v = v if strided else {n: t.contiguous() for n, t in v.items()}
        alone = native @ v
        torch.set_num_threads(threads)
        try:
            shared = [native @ v for _ in range(3)]
            solved = hg.solve(native, v, hg.Neumann(3, alpha=0.01), damping=1.0).value
        finally:
            torch.set_num_threads(1)
        assert native.engine == "native"
        truth, solution = eager @ v, hg.solve(eager, v, hg.Neumann(3, alpha=0.01), damping=1.0).value
        for n, value in truth.items():
            assert_close(alone[n], value, 1e-10)
            assert_close(solved[n], solution[n], 1e-10)
            for again in shared:
                assert_close(again[n], value, 1e-10)


@pytest.mark.skipif(_native._C is None, reason="native plans are C++")
def test_threads_of_the_caller_share_an_operator():
    """Products and whole solves at the same time, without Python's lock, on one memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 3)).double()
    operator = hg.Hessian(
        loss_of(model, torch.randn(300, 40).double(), torch.randint(3, (300,))), model, engine="native"
    )

    def work(v):
        return operator @ v, hg.solve(operator, v, hg.CG(max_steps=20), damping=1.0).value

    vectors = [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(12)]
    work(vectors[0])  # the first product is a backward pass
    alone = list(map(work, vectors))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, vectors))
    assert operator.engine == "native"
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(a[n], b[n]) for a, b in zip(ours, theirs, strict=True) for n in a)


@pytest.mark.parametrize("engine", engines)
@pytest.mark.parametrize("activation", [F.relu, F.relu6, F.threshold], ids=lambda f: f.__name__)
def test_an_inactive_unit_is_zero_whatever_comes_back_to_it(activation, engine):
    """The norm of a row of zeros has infinite derivatives, which torch hides and a factor of zero does not."""
    arguments = (0.0, 0.0) if activation is F.threshold else ()
    w, v = torch.eye(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    alive = torch.tensor([[1, 2, 3], [2, 1, -1], [3, 1, 0]], dtype=torch.float64)
    dying = torch.cat([alive[:2], -alive[2:]])

    def loss(x):
        return lambda w: activation(x @ w, *arguments).norm(dim=1).sum() + w.square().sum()

    def results(engine, x):
        operator = hg.Hessian(loss(x), w, engine=engine)
        product, solution = operator @ v, hg.solve(operator, v, hg.Neumann(20, alpha=0.1)).value
        assert operator.engine == engine
        return product, solution

    results(engine, alive)
    for ours, theirs in zip(results(engine, dying), results("eager", dying), strict=True):
        assert torch.isfinite(theirs).all()
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("engine", engines)
def test_nothing_and_a_single_number(engine):
    """Differences along a sequence of length one; softmax of a number; plans hold no tensors without elements."""
    x = torch.randn(2, 1, 4, dtype=torch.float64)

    def smooth(w):
        y = (x * w).tanh()
        return (y[:, 1:] - y[:, :-1]).sin().square().sum() + y.square().sum()

    losses = {
        "empty": smooth,
        "empty, by an op of torch": lambda w: (x @ w)[:, 1:].sin().prod() + (x @ w).square().sum(),
        "logarithm": lambda w: w.sum().sin().log_softmax(0) + (w**3).sum(),
        "softmax": lambda w: (w.prod().softmax(0) * w).pow(3).sum(),
        "sum": lambda w: (w.prod().sin().sum(()) * w).pow(3).sum(),
    }
    w, v = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    for loss in losses.values():
        ours, theirs = (hg.Hessian(loss, w, engine=e) @ v for e in (engine, "eager"))
        assert_close(ours, theirs, 1e-12)


@pytest.mark.skipif(_native._C is None, reason=f"torch's own sums lose more: {_native.MISSING}")
@pytest.mark.parametrize(("shape", "weight"), [((300_000, 3), (3,)), ((2_000_000,), ()), ((50_000, 4, 2), (4, 1))])
def test_long_sums_keep_their_digits(shape, weight):
    """What a batch adds up is not one chain of additions in single precision."""
    torch.manual_seed(0)
    x, w, v = torch.rand(shape), torch.ones(weight), torch.rand(weight)
    operator = hg.Hessian(lambda w: (x * w).exp().sum(), w, engine="native")
    truth = ((x.double() ** 2 * x.double().exp()).sum_to_size(weight) * v).float()
    operator @ v  # the first product is recorded
    assert_close(operator @ v, truth, 3e-7)
