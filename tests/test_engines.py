"""Engines: a replayed product is the product, of this solve and of no other, and nothing is left behind."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hypergrad_ext as hg
from hypergrad_ext import _native
from hypergrad_ext.engines import codegen, traced
from hypergrad_ext.engines.program import Program
from hypergrad_ext.engines.record import record
from tests.cases import mlp
from tests.compare import assert_close, relative_error
from tests.models import MODELS, batch, loss_of, made, random_like

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(_native._C is None, reason=f"native plans are C++: {_native.MISSING}")
)
REPLAYS = ["traced", NATIVE]


pytestmark = pytest.mark.usefixtures("fresh_engines")


def products(operator: hg.Hessian, vectors: list[dict]) -> list[dict]:
    """Products with every vector; the first of them is the one that is recorded."""
    return [operator @ v for v in vectors]


class TestSameAsEager:
    @pytest.mark.parametrize("engine", REPLAYS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("name", MODELS)
    def test_products(self, name, dtype, engine):
        model = made(name, dtype)
        loss = loss_of(model, *batch(name, 13, dtype))
        vectors = [random_like(model) for _ in range(3)]
        torch.manual_seed(1)
        truth = products(hg.Hessian(loss, model, engine="eager"), vectors)
        torch.manual_seed(1)
        operator = hg.Hessian(loss, model, engine=engine)
        values = products(operator, vectors)
        assert operator.engine == engine and operator.products.reason == "asked for"
        for value, expected in zip(values, truth, strict=True):
            assert_close(value, expected, 1e-10 if dtype == torch.float64 else 1e-5, f"{name} {engine}")

    @pytest.mark.parametrize("engine", REPLAYS)
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_batches_of_vectors(self, engine, k):
        model = made("mlp_tanh")
        loss = loss_of(model, *batch("mlp_tanh", 9, torch.float64))
        v = random_like(model, k)
        assert_close(hg.Hessian(loss, model, engine=engine) @ v, hg.Hessian(loss, model, engine="eager") @ v, 1e-12)

    @pytest.mark.parametrize("engine", REPLAYS)
    @pytest.mark.parametrize(
        "solver", [hg.Neumann(30), hg.Neumann(400, tol=1e-3), hg.CG(tol=1e-8), hg.Direct()], ids=str
    )
    @pytest.mark.parametrize("rows", [None, 3])
    def test_solves(self, solver, engine, rows):
        model = made("mlp_tanh")
        loss = loss_of(model, *batch("mlp_tanh", 30, torch.float64))
        v = random_like(model, rows)
        ours, theirs = (hg.solve(hg.Hessian(loss, model, engine=e), v, solver, damping=0.5) for e in (engine, "eager"))
        assert_close(ours.value, theirs.value, 1e-8)
        assert (ours.status, ours.steps, ours.hvps) == (theirs.status, theirs.steps, theirs.hvps)
        assert (ours.engine, theirs.engine) == (engine, "eager")

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_tensor_losses_too(self, engine):
        problem = mlp()
        v = [torch.randn_like(p) for p in problem.params]
        by_tensor = hg.inverse_hvp(problem.train(problem.params), problem.params, v, engine=engine)
        assert_close(by_tensor, hg.inverse_hvp(problem.train, problem.params, v, engine="eager"), 1e-9)

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_hypergradient_and_implicit(self, engine):
        problem = mlp()
        args = (problem.val, problem.train, problem.params, problem.hparams)
        truth = hg.hypergradient(*args, hg.CG(tol=1e-10), engine="eager")
        assert_close(hg.hypergradient(*args, hg.CG(tol=1e-10), engine=engine), truth, 1e-8)
        w = hg.implicit(problem.train, problem.params, problem.hparams, hg.CG(tol=1e-10), engine=engine)
        problem.val(w).backward()
        assert_close([h.grad for h in problem.hparams], truth, 1e-8)

    @pytest.mark.skipif(_native._C is None, reason="native plans are C++")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        "name",
        # Two operators have two masks.
        ["mlp_tanh", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n not in ("mlp_tanh", "dropout"))],
    )
    def test_compiled(self, name, dtype):
        """Kernels for these shapes between the plan's own products, and a whole solve with them."""
        model = made(name, dtype)
        loss = loss_of(model, *batch(name, 9, dtype))
        vectors = [random_like(model) for _ in range(2)]
        operator, eager = (hg.Hessian(loss, model, engine=engine) for engine in ("compiled", "eager"))
        for value, truth in zip(products(operator, vectors), products(eager, vectors), strict=True):
            assert_close(value, truth, 1e-5 if dtype is torch.float32 else 1e-10)
        assert operator.engine == "compiled"
        ours, theirs = (hg.solve(o, vectors[0], hg.Neumann(5, alpha=1e-3), damping=0.5) for o in (operator, eager))
        assert_close(ours.value, theirs.value, 1e-5 if dtype is torch.float32 else 1e-10)

    @pytest.mark.skipif(_native._C is None, reason="native plans are C++")
    def test_compiled_without_a_compiler(self, monkeypatch, caplog):
        def fail(bodies, real):
            raise codegen.NoCompiler("none found")

        monkeypatch.setattr(codegen, "_load", fail)
        monkeypatch.setattr(traced, "_logged", set())
        model = made("mlp_tanh")
        loss, v = loss_of(model, *batch("mlp_tanh", 9, torch.float64)), random_like(model)
        with caplog.at_level("WARNING", "hypergrad_ext"):
            assert_close(
                hg.Hessian(loss, model, engine="compiled") @ v, hg.Hessian(loss, model, engine="eager") @ v, 1e-10
            )
        assert "kernels for any shape: none found" in caplog.text

    @pytest.mark.slow
    def test_compiled_by_inductor_where_there_is_no_plan(self):
        model = made("mlp_tanh", torch.bfloat16)
        loss = loss_of(model, *batch("mlp_tanh", 9, torch.bfloat16))
        v = random_like(model)
        operator = hg.Hessian(loss, model, engine="compiled")
        operator @ v
        assert_close(operator @ v, hg.Hessian(loss, model, engine="eager") @ v, 2e-2)
        assert operator.engine == "compiled"

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_low_precision(self, engine):
        """The native plan leaves bfloat16 to torch's operations."""
        model = made("mlp_tanh", torch.bfloat16)
        loss = loss_of(model, *batch("mlp_tanh", 9, torch.bfloat16))
        v = random_like(model)
        operator = hg.Hessian(loss, model, engine=engine)
        operator @ v
        assert_close(operator @ v, hg.Hessian(loss, model, engine="eager") @ v, 2e-2)
        assert operator.engine == "traced"

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_autocast(self, engine):
        """Parameters in float32, products in bfloat16: the native plan leaves them to torch's operations."""
        model = made("mlp_tanh", torch.float32)
        x, y = batch("mlp_tanh", 9, torch.float32)

        def loss(params):
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(functional_call(model, params, (x,)).float(), y)

        v = random_like(model)
        operator = hg.Hessian(loss, model, engine=engine)
        operator @ v
        assert_close(operator @ v, hg.Hessian(loss, model, engine="eager") @ v, 2e-2)

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_strided_parameters_and_vectors(self, engine):
        w = torch.randn(5, 4, dtype=torch.float64).T.requires_grad_()
        x = torch.randn(9, 8, dtype=torch.float64)[:, ::2]
        loss = lambda p: torch.tanh(x @ p).pow(3).sum()  # noqa: E731
        v = torch.randn(5, 4, dtype=torch.float64).T
        operator = hg.Hessian(loss, w, engine=engine)
        operator @ v
        assert_close(operator @ v, hg.Hessian(loss, w, engine="eager") @ v, 1e-12)
        direct = operator.matvec([v])
        assert_close(direct[0], hg.Hessian(loss, w, engine="eager") @ v, 1e-12)


class TestNothingStale:
    """A new solve sees what is true now, whatever was recorded before."""

    def check(self, model: nn.Module, loss, engine: str, seed: int = 1) -> None:
        vectors = [random_like(model) for _ in range(2)]
        torch.manual_seed(seed)
        ours = products(hg.Hessian(loss, model, engine=engine), vectors)
        torch.manual_seed(seed)
        truth = products(hg.Hessian(loss, model, engine="eager"), vectors)
        for value, expected in zip(ours, truth, strict=True):
            assert_close(value, expected, 1e-10)

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_tensors_in_closures(self, engine):
        """The same function object with new contents of its cells."""
        model = made("mlp_tanh")
        x, y = batch("mlp_tanh", 9, torch.float64)

        def loss(params):
            return F.cross_entropy(functional_call(model, params, (x,)), y)

        for _ in range(3):
            self.check(model, loss, engine)
            x, y = batch("mlp_tanh", 9, torch.float64)
        x.mul_(3.0)
        self.check(model, loss, engine)
        assert traced.counts.compiled == 1

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_numbers_in_closures_attributes_and_globals(self, engine):
        model = made("mlp_tanh")
        x, y = batch("mlp_tanh", 9, torch.float64)

        class Settings:
            temperature = 1.0

        weight, power, table = 0.1, 2, {"smoothing": 0.0}

        def loss(params):
            logits = functional_call(model, params, (x,)) / Settings.temperature
            penalty = sum((p**power).sum() for p in params.values())
            return F.cross_entropy(logits, y, label_smoothing=table["smoothing"]) + weight * penalty

        self.check(model, loss, engine)
        weight = 0.7
        self.check(model, loss, engine)
        Settings.temperature = 2.5
        self.check(model, loss, engine)
        power = 4
        self.check(model, loss, engine)
        table["smoothing"] = 0.2
        self.check(model, loss, engine)

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_data_dependent_branches(self, engine):
        model = made("mlp_tanh")
        x, y = batch("mlp_tanh", 9, torch.float64)

        def loss(params):
            logits = functional_call(model, params, (x,))
            if x.sum() > 0:
                logits = torch.sin(logits)
            if logits.max().item() > 0.1:
                logits = logits * 2
            return F.cross_entropy(logits, y)

        for sign in (1, -1, 1):
            x = x.abs() * sign
            self.check(model, loss, engine)

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_training_mode(self, engine):
        model = made("cnn_train")
        loss = loss_of(model, *batch("cnn_train", 9, torch.float64))
        for mode in (True, False, True):
            model.train(mode)
            self.check(model, loss, engine)
        assert traced.counts.compiled == 2

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_one_mask_per_solve_and_a_new_one_for_the_next(self, engine):
        model = made("dropout")
        loss = loss_of(model, *batch("dropout", 9, torch.float64))
        v = random_like(model)
        operator, other = (hg.Hessian(loss, model, engine=engine) for _ in range(2))
        first = operator @ v
        assert_close(operator @ v, first, 1e-12)
        assert relative_error(other @ v, first) > 1e-2
        for seed in (1, 2):
            self.check(model, loss, engine, seed)

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_parameters_changed_between_solves(self, engine):
        model = made("mlp_relu")
        loss = loss_of(model, *batch("mlp_relu", 9, torch.float64))
        for _ in range(3):
            self.check(model, loss, engine)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p))

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_parameters_changed_within_a_solve_raise_as_they_do_in_torch(self, engine):
        model = made("mlp_tanh")
        operator = hg.Hessian(loss_of(model, *batch("mlp_tanh", 9, torch.float64)), model, engine=engine)
        v = random_like(model)
        products(operator, [v, v])
        with torch.no_grad():
            model[2].weight.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            operator @ v

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_two_operators_in_turn(self, engine):
        """They share a program, not its memory."""
        model = made("mlp_tanh")
        losses = [loss_of(model, *batch("mlp_tanh", 9, torch.float64)) for _ in range(2)]
        ours = [hg.Hessian(loss, model, engine=engine) for loss in losses]
        theirs = [hg.Hessian(loss, model, engine="eager") for loss in losses]
        for _ in range(3):
            v = random_like(model)
            for a, b in zip(ours, theirs, strict=True):
                assert_close(a @ v, b @ v, 1e-12)
        assert traced.counts.compiled == 1

    def test_results_are_not_overwritten_by_the_next_product(self):
        model = made("mlp_tanh")
        operator = hg.Hessian(loss_of(model, *batch("mlp_tanh", 9, torch.float64)), model, engine="native")
        vectors = [[torch.randn_like(p) for p in model.parameters()] for _ in range(3)]
        kept = [operator.matvec(v) for v in vectors]
        for v, product in zip(vectors, kept, strict=True):
            assert_close(product, operator.matvec(v), 1e-13)


class Rounded(torch.autograd.Function):
    """Its backward pass looks at the values of what comes in."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad * (1.0 if float(grad.sum()) > -1e30 else 2.0)


class Hidden(torch.autograd.Function):
    """Its backward pass goes where no operation is seen."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return Hidden2.apply(grad)


class Hidden2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.detach().numpy() * 2)


class Overlapping(torch.autograd.Function):
    """Its backward pass writes the vector to one part of a buffer, and then to one that overlaps it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        buffer = torch.ones(len(grad) + 1, dtype=grad.dtype)
        buffer[:-1].mul_(grad)
        second = buffer[1:]
        second.add_(grad)
        return second


class Transient(torch.autograd.Function):
    """Notes the memory of what its backward pass computes on the way."""

    seen: list[StorageWeakRef] = []

    @staticmethod
    def forward(ctx, x):
        return 6 * x

    @staticmethod
    def backward(ctx, grad):
        half = grad * 2
        Transient.seen.append(StorageWeakRef(half.untyped_storage()))
        return half * 3


class TestRefusals:
    @pytest.mark.parametrize("engine", REPLAYS)
    @pytest.mark.parametrize("function", [Rounded, Hidden])
    def test_fall_back_with_one_logged_reason(self, function, engine, caplog):
        w = torch.randn(5, dtype=torch.float64, requires_grad=True)
        loss = lambda w: function.apply(torch.sin(w)).pow(2).sum()  # noqa: E731
        with caplog.at_level(logging.WARNING, "hypergrad_ext"):
            for _ in range(2):
                operator = hg.Hessian(loss, w, engine=engine)
                for _ in range(3):
                    v = torch.randn_like(w)
                    assert_close(operator @ v, hg.Hessian(loss, w, engine="eager") @ v, 1e-12)
                assert operator.engine == "eager"
        assert len([r for r in caplog.records if "by backward passes" in r.message]) == 1

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_writes_that_overlap(self, engine, caplog):
        """What the second write finds depends on the vector, though nothing that is alive says so."""
        w = torch.randn(5, dtype=torch.float64, requires_grad=True)
        loss = lambda w: Overlapping.apply(w).pow(2).sum()  # noqa: E731
        operator = hg.Hessian(loss, w, engine=engine)
        with caplog.at_level(logging.WARNING, "hypergrad_ext"):
            for v in torch.randn(3, 5, dtype=torch.float64):
                truth = hg.Hessian(loss, w, engine="eager") @ v
                assert_close(operator @ v, truth, 1e-12)
        assert "memory that has several views" in caplog.text

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_checkpointed_models(self, engine):
        model = made("mlp_tanh")
        x, y = batch("mlp_tanh", 9, torch.float64)
        loss = lambda p: F.cross_entropy(  # noqa: E731
            checkpoint(lambda x: functional_call(model, p, (x,)), x, use_reentrant=False), y
        )
        v = random_like(model)
        operator = hg.Hessian(loss, model, engine=engine)
        for _ in range(2):
            assert_close(operator @ v, hg.Hessian(loss_of(model, x, y), model, engine="eager") @ v, 1e-12)

    def test_unknown_engine(self):
        with pytest.raises(
            ValueError, match="engine: expected one of auto, eager, traced, native, cuda_graph, compiled, got 'fast'"
        ):
            hg.Hessian(lambda w: w.sum(), torch.ones(2), engine="fast")

    @pytest.mark.parametrize("engine", REPLAYS)
    def test_non_finite_product(self, engine):
        w = torch.zeros(3, requires_grad=True)
        assert hg.solve(hg.Hessian(lambda w: w.abs().sqrt().sum(), w, engine=engine), torch.ones(3)).status == (
            "non_finite_operator"
        )


@pytest.mark.skipif(_native._C is None, reason=f"only the C++ recorder lets go: {_native.MISSING}")
def test_results_die_while_they_are_recorded():
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    gradient = hg.Hessian(lambda w: Transient.apply(w).pow(3).sum(), w).gradient
    Transient.seen.clear()
    recording, product = record(gradient.hvp, [torch.ones_like(w)])
    assert Transient.seen and all(storage.expired() for storage in Transient.seen)
    run = Program(recording).run
    v = [torch.randn_like(w)]
    assert_close(run(v, recording.constants, recording.scalars), gradient.hvp(v), 1e-12)
    assert_close(product, gradient.hvp([torch.ones_like(w)]), 1e-12)
