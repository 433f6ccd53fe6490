"""Parameters as people have them: modules, shared and frozen parts, buffers, random masks."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad_ext as hg
from hypergrad_ext.buffers import buffers_kept
from tests.compare import assert_close

X, Y = torch.randn(30, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(30) % 3
CG = hg.CG(tol=1e-12)


def loss_of(model: nn.Module):
    """Loss as a function of the dict of trainable parameters, with a penalty that makes it convex enough."""

    def loss(params: dict) -> torch.Tensor:
        penalty = sum((p**2).sum() for p in params.values())
        return F.cross_entropy(functional_call(model, params, (X,)), Y) + penalty

    return loss


def loss_tensor(model: nn.Module) -> torch.Tensor:
    penalty = sum((p**2).sum() for p in model.parameters() if p.requires_grad)
    return F.cross_entropy(model(X), Y) + penalty


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def trainable(model: nn.Module) -> dict:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_like(params: dict) -> dict:
    return {name: torch.randn_like(p) for name, p in params.items()}


def test_module_dict_and_list_agree():
    model = net()
    v = random_like(trainable(model))
    by_module = hg.inverse_hvp(loss_of(model), model, v, CG)
    assert list(by_module) == list(v)
    by_tensor = hg.inverse_hvp(loss_tensor(model), model, v, CG)
    by_list = hg.inverse_hvp(loss_tensor(model), model.parameters(), list(v.values()), CG)
    by_dict = hg.inverse_hvp(loss_of(model), dict(model.named_parameters()), v, CG)
    assert isinstance(by_list, list)
    for other in (by_tensor, by_list, by_dict):
        assert_close(other, by_module, 1e-10)


def test_dicts_are_matched_by_name_not_by_order():
    model = net()
    v = random_like(trainable(model))
    shuffled = dict(reversed(v.items()))
    x, y = hg.inverse_hvp(loss_of(model), model, v, CG), hg.inverse_hvp(loss_of(model), model, shuffled, CG)
    assert list(y) == list(shuffled)
    for name in v:
        assert_close(y[name], x[name], 1e-12)


def test_gradients_are_matched_by_name_not_by_order():
    params = {name: torch.tensor([1.0, 2.0], requires_grad=True) for name in "ab"}
    loss = (params["a"] ** 2).sum() + 5 * (params["b"] ** 2).sum()
    f = dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True))
    v = {name: torch.ones(2) for name in params}
    x, y = (hg.approx_inverse_hvp(v, of, params, 2, 0.05) for of in (f, dict(reversed(f.items()))))
    for name in v:
        assert torch.equal(x[name], y[name])
    with pytest.raises(ValueError, match=r"f: expected the keys of params, got none for \['b'\]"):
        hg.approx_inverse_hvp(v, {"a": f["a"], "c": f["b"]}, params, 2, 0.05)


def test_batched_vectors_in_a_dict():
    model = net()
    v = {name: torch.randn(4, *p.shape).double() for name, p in trainable(model).items()}
    x = hg.inverse_hvp(loss_of(model), model, v, CG)
    for j in range(4):
        single = hg.inverse_hvp(loss_of(model), model, {name: t[j] for name, t in v.items()}, CG)
        assert_close({name: t[j] for name, t in x.items()}, single, 1e-10)


def test_frozen_parameters_are_left_out():
    model = net()
    model[0].weight.requires_grad_(False)
    v = random_like(trainable(model))
    assert len(v) == 3
    assert_close(hg.inverse_hvp(loss_of(model), model, v, CG), hg.inverse_hvp(loss_tensor(model), model, v, CG), 1e-10)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.shared = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.shared(torch.tanh(self.shared(self.second(torch.tanh(self.first(x)))))))


def test_tied_weights_and_shared_modules_count_once():
    model = Tied().double()
    v = random_like(trainable(model))
    assert "second.weight" not in v
    x = hg.inverse_hvp(loss_tensor(model), model, v, CG)
    assert_close(hg.inverse_hvp(loss_of(model), model, v, CG), x, 1e-10)
    operator = hg.Hessian(loss_tensor(model), model)
    assert_close(operator @ x, v, 1e-9)


class TestBatchNorm:
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()

    def test_function_leaves_the_buffers_as_they_were(self):
        model = self.model()
        before = {name: b.clone() for name, b in model.named_buffers()}
        hg.inverse_hvp(loss_of(model), model, random_like(trainable(model)), hg.CG(tol=1e-8), damping=1.0)
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())

    def test_train_and_eval_mode_are_those_of_the_model(self):
        model = self.model()
        model(X)
        v = random_like(trainable(model))
        in_train = hg.inverse_hvp(loss_of(model), model, v, CG, damping=1.0)
        model.eval()
        in_eval = hg.inverse_hvp(loss_of(model), model, v, CG, damping=1.0)
        assert_close(in_eval, hg.inverse_hvp(loss_tensor(model), model, v, CG, damping=1.0), 1e-9)
        with pytest.raises(AssertionError):
            assert_close(in_eval, in_train, 1e-3)

    def test_hypergradient_evaluates_both_losses_without_a_trace(self):
        model = self.model()
        before = {name: b.clone() for name, b in model.named_buffers()}
        lam = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        train = lambda p: loss_of(model)(p) + lam.exp() * sum((t**2).sum() for t in p.values())  # noqa: E731
        val = lambda p: F.cross_entropy(functional_call(model, p, (X + 0.1,)), Y)  # noqa: E731
        assert hg.hypergradient(val, train, model, lam).isfinite()
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())

    def test_the_users_own_tensors_are_put_back_too(self):
        model = self.model()
        own, v = dict(model.named_buffers()), random_like(trainable(model))
        before = {name: b.clone() for name, b in own.items()}
        loss = lambda p: F.cross_entropy(functional_call(model, (p, own), (X,)), Y)  # noqa: E731
        plain = lambda p: F.cross_entropy(functional_call(model, p, (X,)), Y)  # noqa: E731
        assert_close(hg.Hessian(loss, model) @ v, hg.Hessian(plain, model) @ v, 1e-12)
        assert all(torch.equal(b, before[name]) for name, b in own.items())

    @pytest.mark.parametrize("engine", ["eager", "traced", "native"])
    def test_a_checkpoint_that_runs_again_leaves_them_too(self, engine):
        model, plain = Checkpointed(self.model()), self.model()
        plain.load_state_dict(model.inner.state_dict())
        before = {name: b.clone() for name, b in model.named_buffers()}
        v = random_like(trainable(plain))
        prefixed = {f"inner.{name}": t for name, t in v.items()}
        operator = hg.Hessian(loss_of(model), model, engine=engine)
        for _ in range(3):
            product = operator @ prefixed
        truth = hg.Hessian(loss_of(plain), plain, engine="eager") @ v
        assert_close(product, {f"inner.{name}": t for name, t in truth.items()}, 1e-9)
        lam = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        train = lambda p: loss_of(model)(p) + lam.exp() * sum((t**2).sum() for t in p.values())  # noqa: E731
        assert hg.hypergradient(loss_of(model), train, model, lam, hg.Neumann(5), engine=engine).isfinite()
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())

    def test_other_kinds(self):
        """Expanded, into which nothing can be written; and one that holds NaN, and is not changed by that."""
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
        model.register_buffer("expanded", torch.ones(1).expand(4))
        model.register_buffer("unset", torch.full((2,), torch.nan))
        lam = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        train = lambda p: loss_of(model)(p) + lam.exp() * sum((t**2).sum() for t in p.values())  # noqa: E731
        by_function = hg.hypergradient(loss_of(model), train, model, lam, CG)
        own = dict(model.named_parameters())
        assert_close(hg.hypergradient(loss_of(model)(own), train(own), model, lam, CG), by_function, 1e-9)
        assert hg.Hessian(train, model).gradient.around is contextlib.nullcontext  # not taken for a checkpoint's

    def test_passes_of_several_threads(self):
        """Each lends the module copies; in the end it has its own back, whoever was the last."""
        model = self.model()
        own = dict(model.named_buffers())
        before = {name: b.clone() for name, b in own.items()}
        first, second = buffers_kept(model), buffers_kept(model)
        with contextlib.ExitStack() as stack:
            first.__enter__()
            stack.enter_context(second)
            first.__exit__(None, None, None)
        assert all(b is own[name] and torch.equal(b, before[name]) for name, b in model.named_buffers())


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


class RunningScale(nn.Module):
    """Divides by a mean that it first updates, as an observer of a quantised network does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.register_buffer("scale", torch.full((5,), 10.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        with torch.no_grad():
            self.scale.mul_(0.1).add_(0.9 * h.abs().mean(0))
        return self.last((h / self.scale).tanh())


class TestBuffersThatAreUpdatedAndUsed:
    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.model = RunningScale().double()
        self.before = self.model.scale.clone()
        self.v = random_like(trainable(self.model))

    def truth(self) -> dict:
        model = copy.deepcopy(self.model)
        w = trainable(model)
        grads = torch.autograd.grad(loss_tensor(model), list(w.values()), create_graph=True)
        return dict(zip(w, torch.autograd.grad(grads, list(w.values()), list(self.v.values())), strict=True))

    @pytest.mark.parametrize("checkpoint", [False, True])
    @pytest.mark.parametrize("engine", ["auto", "eager", "traced", "native"])
    def test_products_see_the_updated_ones(self, engine, checkpoint):
        truth, model, scale = self.truth(), self.model, self.model.scale
        v = self.v
        if checkpoint:
            model = Checkpointed(model)
            truth, v = ({f"inner.{name}": t for name, t in tree.items()} for tree in (truth, v))
        operator = hg.Hessian(loss_of(model), model, engine=engine)
        for _ in range(3):
            assert_close(operator @ v, truth, 1e-10)
        assert self.model.scale is scale and torch.equal(scale, self.before)

    def test_own_tensors_that_the_loss_hands_in_are_no_silent_error(self):
        scale = self.model.scale

        def loss(p):
            return F.cross_entropy(functional_call(self.model, {**p, "scale": scale}, (X,)), Y)

        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            hg.Hessian(loss, self.model) @ self.v
        assert torch.equal(scale, self.before)

    @pytest.mark.parametrize("kind", ["sparse", "sparse_csr", "meta"])
    def test_buffers_of_any_kind(self, kind):
        eye = torch.eye(5, dtype=torch.double)
        odd = eye.to("meta") if kind == "meta" else eye.to_sparse() if kind == "sparse" else eye.to_sparse_csr()
        truth = hg.Hessian(loss_of(self.model), self.model) @ self.v
        self.model.register_buffer("odd", odd)
        assert_close(hg.Hessian(loss_of(self.model), self.model) @ self.v, truth, 1e-12)
        assert self.model.odd is odd

    def test_a_hyperparameter_may_be_a_buffer(self):
        del self.model.scale
        self.model.register_buffer("scale", self.before.clone().requires_grad_())
        scale = self.model.scale

        def loss(p):
            h = F.linear(X, p["linear.weight"], p["linear.bias"])
            return (h / self.model.scale).square().mean() + 0 * sum(t.sum() for t in p.values())

        grads = [hg.hypergradient(loss, loss, m, scale, CG, damping=1.0) for m in (self.model, trainable(self.model))]
        assert_close(*grads, 1e-12)
        assert self.model.scale is scale and float(grads[0].norm()) > 0


@pytest.mark.parametrize("engine", ["auto", "eager", "traced", "native"])
def test_an_embedding_with_sparse_gradients(engine):
    """Its derivatives reach the solvers dense, whether a penalty made them so or not."""
    dense, sparse = (nn.Embedding(7, 3, sparse=s, dtype=torch.double) for s in (False, True))
    sparse.load_state_dict(dense.state_dict())
    lam = torch.zeros(7, 3, dtype=torch.double, requires_grad=True)

    def run(model: nn.Embedding) -> list:
        train = F.cross_entropy(model(Y) * lam[Y].exp(), Y)
        val = F.cross_entropy(model(Y[:5]) + lam[Y[:5]], Y[:5])
        w = model.weight
        (v,) = torch.autograd.grad(val, w, retain_graph=True)
        return [
            hg.inverse_hvp(train, w, v, CG, damping=0.1, engine=engine),
            hg.hypergradient(val, train, w, lam, CG, damping=0.1, engine=engine),
        ]

    assert_close(run(sparse), run(dense), 1e-10)


def test_dropout_uses_one_mask_per_solve():
    """With a new mask per product CG would see another matrix each time and could not reach 1e-12."""
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 3)).double()
    operator = hg.Hessian(loss_of(model), model)
    v = random_like(trainable(model))
    assert_close(operator @ v, operator @ v, 0.0)
    solution = hg.solve(operator, v, CG)
    assert solution.converged and solution.residual_norm < 1e-11
    other = hg.Hessian(loss_of(model), model) @ v
    with pytest.raises(AssertionError):
        assert_close(other, operator @ v, 1e-6)


class TestUnusedParameters:
    def setup_method(self) -> None:
        self.w = torch.ones(3, requires_grad=True)
        self.idle = torch.ones(2, requires_grad=True)
        self.params = {"w": self.w, "idle": self.idle}
        self.v = {"w": torch.ones(3), "idle": torch.ones(2)}

    @pytest.mark.parametrize("solver", ["auto", hg.CG(), hg.Neumann(100), hg.Direct(), hg.Identity(0.5)], ids=str)
    def test_give_zeros(self, solver):
        x = hg.inverse_hvp((self.w**2).sum(), self.params, self.v, solver)
        assert_close(x["w"], torch.full((3,), 0.5), 1e-5)
        assert torch.equal(x["idle"], torch.zeros(2))
        warm = hg.inverse_hvp((self.w**2).sum(), self.params, self.v, solver, x0=self.v)
        assert torch.equal(warm["idle"], torch.zeros(2))

    def test_with_damping_give_the_exact_solution(self):
        x = hg.inverse_hvp((self.w**2).sum(), self.params, self.v, hg.CG(tol=1e-6), damping=2.0)
        assert_close(x["idle"], torch.full((2,), 0.5), 1e-5)

    def test_can_be_named(self):
        with pytest.raises(ValueError, match=r"unused params\['idle'\]"):
            hg.inverse_hvp((self.w**2).sum(), self.params, self.v, unused="error")

    def test_product_is_zero_there(self):
        product = hg.Hessian((self.w**2).sum(), self.params) @ self.v
        assert torch.equal(product["idle"], torch.zeros(2))

    def test_linear_part_has_zero_curvature_but_is_used(self):
        loss = (self.w**2).sum() + self.idle.sum()
        operator = hg.Hessian(loss, self.params, unused="error")
        assert torch.equal((operator @ self.v)["idle"], torch.zeros(2))
        assert hg.solve(operator, self.v, hg.Direct()).status == "singular"

    def test_wholly_linear_loss_is_singular(self):
        assert hg.solve(hg.Hessian(self.w.sum(), self.w), torch.ones(3), hg.Neumann()).status == "singular"


def test_nested_structures():
    params = {"layers": [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]}
    v = {"layers": [torch.ones(2), torch.ones(3)]}
    x = hg.inverse_hvp(lambda p: sum((t**2).sum() for t in p["layers"]), params, v)
    assert_close(x, {"layers": [torch.full((2,), 0.5), torch.full((3,), 0.5)]}, 1e-4)


def test_mixed_dtypes_use_the_higher_state():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = (a.double() ** 2).sum() + (b**2).sum() + (a.double() * b).sum()
    x = hg.inverse_hvp(loss, [a, b], [torch.ones(2), torch.ones(2, dtype=torch.float64)], hg.CG(tol=1e-6))
    assert [t.dtype for t in x] == [torch.float32, torch.float64]
    assert_close(x, [torch.full((2,), 1 / 3)] * 2, 1e-6)
