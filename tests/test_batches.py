"""The Hessian of a mean over batches: the same matrix as that of one large batch, in every product of a solve."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import hypergrad_ext as hg

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 4, generator=GENERATOR).double(), torch.randn(12, 2, generator=GENERATOR).double()


def model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 2)).double()


def loss_of(net):
    def loss(params, batch):
        x, y = batch
        return F.mse_loss(torch.func.functional_call(net, params, (x,)), y)

    return loss


def in_batches(size, **options):
    return DataLoader(TensorDataset(X, Y), batch_size=size, **options)


def vector(net):
    return {name: torch.randn_like(p) for name, p in net.named_parameters()}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 4, 12])
def test_equals_the_hessian_of_all_at_once(size, shuffle):
    net = model()
    truth = hg.Hessian(F.mse_loss(net(X), Y), net)
    operator = hg.Hessian(loss_of(net), net, batches=in_batches(size, shuffle=shuffle))
    torch.testing.assert_close(operator.dense(), truth.dense(), rtol=1e-10, atol=1e-12)
    b = vector(net)
    ours, theirs = (hg.solve(o, b, hg.CG(tol=1e-9), damping=2.0).value for o in (operator, truth))
    for name in b:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-8)


def test_a_batch_of_vectors():
    net = model()
    operator = hg.Hessian(loss_of(net), net, batches=[(X[:6], Y[:6]), (X[6:], Y[6:])])
    vectors = {name: torch.randn(3, *p.shape).double() for name, p in net.named_parameters()}
    together = operator @ vectors
    for j in range(3):
        one = operator @ {name: t[j] for name, t in vectors.items()}
        for name in one:
            torch.testing.assert_close(together[name][j], one[name])


def test_every_product_sees_the_same_order_and_masks():
    net = model(dropout=0.5)
    # A part of the data in random order: another order is another matrix.
    operator = hg.Hessian(loss_of(net), net, batches=in_batches(5, shuffle=True, drop_last=True))
    v = vector(net)
    first, second = operator @ v, operator @ v
    assert all(torch.equal(first[name], second[name]) for name in v)
    other = hg.Hessian(loss_of(net), net, batches=in_batches(5, shuffle=True, drop_last=True)) @ v
    assert not all(torch.equal(first[name], other[name]) for name in v)


def with_generator(kind):
    """Batches in a random order from a generator of their own, a part of the data, and that generator."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(X, Y)
    if kind == "loader":
        return in_batches(5, shuffle=True, drop_last=True, generator=generator), generator
    sampler = RandomSampler(data, generator=generator)
    if kind == "sampler":
        return in_batches(5, sampler=sampler, drop_last=True), generator
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 5, drop_last=True)), generator


@pytest.mark.parametrize("kind", ["loader", "sampler", "batch_sampler"])
def test_every_product_sees_the_same_order_from_a_generator_of_the_loader(kind):
    net = model()
    loader, generator = with_generator(kind)
    operator, v = hg.Hessian(loss_of(net), net, batches=loader), vector(net)
    first = operator @ v
    state = generator.get_state()
    list(loader)  # the caller goes on with it
    second = operator @ v
    assert all(torch.equal(first[name], second[name]) for name in v)
    generator.set_state(state)
    third = operator @ v
    assert torch.equal(generator.get_state(), state)
    assert all(torch.equal(first[name], third[name]) for name in v)
    other = hg.Hessian(loss_of(net), net, batches=loader) @ v
    assert not all(torch.equal(first[name], other[name]) for name in v)
    again = hg.Hessian(loss_of(net), net, batches=with_generator(kind)[0]) @ v
    assert all(torch.equal(first[name], again[name]) for name in v)


def test_the_callers_generator_goes_on_as_if_one_number_had_been_drawn():
    net = model(dropout=0.5)
    torch.manual_seed(3)
    torch.randint(2**62, ())
    expected = torch.rand(())
    torch.manual_seed(3)
    operator = hg.Hessian(loss_of(net), net, batches=in_batches(4))
    v = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    operator @ v
    operator @ v
    assert torch.rand(()) == expected


class Token:
    pass


class Marked(torch.autograd.Function):
    """The identity; its node in the graph owns a token, which lives as long as the graph."""

    @staticmethod
    def forward(ctx, x, alive):
        ctx.token = Token()
        alive.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_only_one_graph_is_alive_at_a_time():
    net = model()
    alive = []
    most = 0

    def loss(params, batch):
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return Marked.apply(loss_of(net)(params, batch), alive)

    operator = hg.Hessian(loss, net, batches=in_batches(3))
    operator @ vector(net)
    assert len(alive) == 8
    assert most == 0


class TestOneBatchPerProduct:
    """Which batch a product takes."""

    def products(self, batches, count):
        net, seen = model(), []

        def loss(params, batch):
            seen.append(float(batch[0][0, 0]))
            return loss_of(net)(params, batch)

        operator, v = hg.Hessian(loss, net, batches=batches, stochastic=True), vector(net)
        products = [operator @ v for _ in range(count)]
        for product, first in zip(products, seen, strict=True):
            (x, y) = next((x, y) for x, y in batches if float(x[0, 0]) == first)
            truth = hg.Hessian(F.mse_loss(net(x), y), net) @ v
            for name in v:
                torch.testing.assert_close(product[name], truth[name])
        return seen

    def test_any_of_a_list_by_chance(self):
        torch.manual_seed(0)
        batches = [(X[:4], Y[:4]), (X[4:8], Y[4:8])]
        seen = self.products(batches, 20)
        counts = [seen.count(float(x[0, 0])) for x, _ in batches]
        assert sum(counts) == 20 and min(counts) >= 4
        assert seen[::2] != seen[1::2] and len(set(seen[::2])) == 2, "not in turn"
        torch.manual_seed(0)
        assert self.products(batches, 20) == seen

    def test_the_next_of_a_loader_which_starts_again(self):
        with pytest.warns(UserWarning, match="batches: expected a DataLoader with shuffle=True beside stochastic=True"):
            seen = self.products(in_batches(4), 7)
        assert seen == [float(X[i, 0]) for i in (0, 4, 8, 0, 4, 8, 0)]


def test_the_stochastic_series_comes_near_the_solution():
    torch.manual_seed(0)
    x = torch.randn(4096, 5, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x), batch_size=64, shuffle=True)
    w = torch.zeros(5, dtype=torch.float64)

    def loss(w, batch):
        return 0.5 * (batch[0] @ w).square().mean()

    operator = hg.Hessian(loss, w, batches=loader, stochastic=True)
    b = torch.ones(5, dtype=torch.float64)
    truth = torch.linalg.solve(x.T @ x / len(x), b)
    runs = [hg.solve(operator, b, hg.Neumann(100, alpha=0.1), residual=False).value for _ in range(20)]
    assert (torch.stack(runs).mean(0) - truth).norm() < 0.1 * truth.norm()


@pytest.mark.parametrize(
    "solver",
    [hg.CG(), hg.BlockCG(), hg.MINRES(), hg.Chebyshev(), hg.Nystrom(3), hg.Direct(), hg.Auto()],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_solvers_that_need_one_matrix_refuse_stochastic_products(solver, scale):
    w, lam = torch.ones(4, dtype=torch.float64), torch.ones((), dtype=torch.float64, requires_grad=True)
    train = lambda w, batch: ((batch[0] @ w) ** 2).mean() + lam * (w**2).sum()  # noqa: E731
    options = {"batches": in_batches(3), "stochastic": True, "loss_scale": scale}
    with pytest.raises(ValueError, match=f"expected LiSSA, Neumann or Identity .* got {type(solver).__name__}"):
        hg.hypergradient(lambda w: w.sum(), train, w, lam, solver, **options)


def test_auto_is_the_stochastic_series_where_products_are_stochastic():
    torch.manual_seed(0)
    x = torch.randn(512, 5, dtype=torch.float64)
    w, lam = torch.ones(5, dtype=torch.float64), torch.ones((), dtype=torch.float64, requires_grad=True)
    train = lambda w, rows: ((rows @ w) ** 2).mean() + lam * (w**2).sum()  # noqa: E731
    truth = hg.hypergradient(lambda w: w.sum(), lambda w: train(w, x), w, lam, hg.Direct())
    options = {"batches": list(x.split(64)), "stochastic": True}
    for engine in ("auto", "eager"):
        result, solution = hg.hypergradient(
            lambda w: w.sum(), train, w, lam, return_solution=True, engine=engine, **options
        )
        assert isinstance(solution.solver, hg.LiSSA) and solution.residual_norm is None
        torch.testing.assert_close(result, truth, rtol=0.05, atol=0)
    lam.grad = None
    step = hg.HyperOptimizer(torch.optim.SGD([lam], lr=0.0), w, residual=True).step(lambda w: w.sum(), train, **options)
    assert isinstance(step.solution.solver, hg.LiSSA)
    torch.testing.assert_close(lam.grad, truth, rtol=0.05, atol=0)


def test_neumann_does_not_start_from_the_residual_of_one_batch():
    x, w, b = torch.randn(8, 3).double(), torch.ones(3).double(), torch.ones(3).double()
    loss, state = lambda w, rows: ((rows @ w) ** 2).mean() / 2, hg.SolverState()  # noqa: E731
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        operator = hg.Hessian(loss, w, batches=list(x.split(2)), stochastic=True)
        values.append(hg.solve(operator, b, hg.Neumann(4, alpha=0.05), state=state).value)
    assert torch.equal(*values)


def test_batches_of_different_lengths_bring_one_warning():
    net = model()
    with pytest.warns(UserWarning, match="batches: expected batches of one length, got 2 to 5 rows.*drop_last") as seen:
        operator = hg.Hessian(loss_of(net), net, batches=in_batches(5))
        for _ in range(2):
            operator @ vector(net)
    assert len(seen) == 1
    # What the message says is what makes them the mean over the data.
    weighted = lambda params, batch: loss_of(net)(params, batch) * len(batch[0]) * 3 / 12  # noqa: E731
    with pytest.warns(UserWarning, match="batches"):
        ours = hg.Hessian(weighted, net, batches=in_batches(5)).dense()
    torch.testing.assert_close(ours, hg.Hessian(F.mse_loss(net(X), Y), net).dense())


@dataclass
class Rows:
    x: torch.Tensor
    y: torch.Tensor
    note: str | None = None


@pytest.mark.parametrize("kind", [Rows, lambda x, y: UserDict(note=None, x=x, y=y)], ids=["dataclass", "mapping"])
def test_lengths_are_seen_whatever_holds_a_batch(kind):
    net, batches = model(), [kind(x, y) for x, y in in_batches(5)]
    with pytest.warns(UserWarning, match="batches: expected batches of one length, got 2 to 5 rows"):
        hg.Hessian(lambda params, rows: params["0.weight"].square().sum(), net, batches=batches) @ vector(net)


@pytest.mark.parametrize(
    "size, options, stochastic",
    [(5, {"drop_last": True}, False), (5, {"shuffle": True}, True), (len(X), {}, True)],
    ids=["equal lengths", "random order", "one batch"],
)
def test_no_warning_where_every_batch_counts_as_it_should(size, options, stochastic):
    net = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hg.Hessian(loss_of(net), net, batches=in_batches(size, **options), stochastic=stochastic) @ vector(net)


def test_a_parameter_of_some_batches_only_is_used():
    params = [torch.ones(2), torch.ones(3)]

    def loss(params, i):
        return (params[i] ** 4).sum()

    operator = hg.Hessian(loss, params, batches=[0, 1])
    assert operator.used == [True, True]
    product = operator @ [torch.ones(2), torch.ones(3)]
    torch.testing.assert_close(torch.cat(product), torch.full((5,), 6.0))


def test_bad_input_is_named():
    w = torch.ones(2, requires_grad=True)

    def loss(w, batch):
        return (w**2).sum()

    with pytest.raises(ValueError, match="batches: expected an iterable that can be gone through"):
        hg.Hessian(loss, w, batches=iter([1])) @ w
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        hg.Hessian(loss, w, batches=[]) @ w
    with pytest.raises(ValueError, match="batches: expected one more batch"):
        operator = hg.Hessian(loss, w, batches=iter([1]), stochastic=True)
        operator @ w
        operator @ w
    with pytest.raises(ValueError, match="stochastic: expected batches"):
        hg.Hessian(lambda w: (w**2).sum(), w, stochastic=True)
    with pytest.raises(TypeError, match="loss: expected a function of the parameters and a batch"):
        hg.Hessian((w**2).sum(), w, batches=[1])
    with pytest.raises(TypeError, match="batches: expected a list or DataLoader"):
        hg.Hessian(loss, w, batches=torch.ones(3))
