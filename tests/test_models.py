"""Models that torch does not differentiate twice by itself: attention, recurrence, compiled modules, checkpoints."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hypergrad_ext as hg
from hypergrad_ext import _native

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


class Recurrent(nn.Module):
    def __init__(self, layer, **options):
        super().__init__()
        self.layer, self.out = layer(16, 6, num_layers=2, batch_first=True, **options), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.layer(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.out, self.reentrant = nn.Sequential(nn.Linear(16, 8), nn.Tanh()), nn.Linear(8, 3), reentrant

    def forward(self, x):
        run = self.body if self.reentrant is None else lambda x: checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.out(run(x)).mean(1)


def head(layer):
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(80, 3))


MODELS = {
    "attention": Attention,
    "multihead, training": lambda: head(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)),
    "multihead, eval": lambda: head(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval(),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
}


def loss_of(model, x=X):
    def loss(params):
        return F.cross_entropy(torch.func.functional_call(model, params, (x.to(params_dtype(params)),)), Y)

    return loss


def params_dtype(params):
    return next(iter(params.values())).dtype


def vector(model):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()
    }


def product_by_differences(model, v, step=1e-6):
    """``H v`` from gradients alone, which need no second derivative: central differences, in float64."""
    grads = []
    for sign in (1, -1):
        params = {name: (p.detach() + sign * step * v[name]).requires_grad_() for name, p in model.named_parameters()}
        grads.append(torch.autograd.grad(loss_of(model)(params), list(params.values())))
    return {name: (a - b) / (2 * step) for name, a, b in zip(v, *grads, strict=True)}


NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(_native._C is None, reason=f"native plans are C++: {_native.MISSING}")
)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("engine", ["auto", "traced", NATIVE])
@pytest.mark.parametrize("name", MODELS)
def test_product_equals_differences_of_gradients(name, engine):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    v = vector(model)
    operator = hg.Hessian(loss_of(model), model, engine=engine)
    plain = model
    if isinstance(model, Checkpointed):
        # What is computed again, is so with the module's own parameters: differences would not see the others.
        plain = Checkpointed(None).double()
        plain.load_state_dict(model.state_dict())
    truth = product_by_differences(plain, v)
    for product in (operator @ v, operator @ v):  # a checkpoint is computed again in every one
        for key in v:
            torch.testing.assert_close(product[key], truth[key], rtol=1e-6, atol=1e-8)
    assert operator.engine == engine or engine == "auto"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ["attention", "lstm", "reentrant checkpoint"])
def test_gauss_newton_takes_the_same_way(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    operator = hg.GaussNewton(model, F.cross_entropy, X.double(), Y)
    v = vector(model)
    quadratic = sum(float((a * b).sum()) for a, b in zip(v.values(), (operator @ v).values(), strict=True))
    # v^T G v = |sqrt(S) J v|^2, and J v from differences.
    outputs = [
        torch.func.functional_call(
            model, {key: p.detach() + sign * 1e-5 * v[key] for key, p in model.named_parameters()}, (X.double(),)
        )
        for sign in (1, -1)
    ]
    jv = (outputs[0] - outputs[1]) / 2e-5
    p = model(X.double()).softmax(-1)
    truth = ((p * jv**2).sum(-1) - (p * jv).sum(-1) ** 2).mean()
    assert quadratic == pytest.approx(float(truth.detach()), rel=1e-5)


@pytest.mark.parametrize("engine", ["auto", "traced", NATIVE])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_module(backend, engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)).double()
    compiled = torch.compile(model, backend=backend)
    compiled(X.double())  # already compiled when we come
    v = vector(model)
    truth = hg.Hessian(loss_of(model), model, engine="eager") @ v
    operator = hg.Hessian(loss_of(compiled), compiled, engine=engine)
    for _ in range(2):
        product = operator @ {f"_orig_mod.{key}": t for key, t in v.items()}
        for key in v:
            torch.testing.assert_close(product[f"_orig_mod.{key}"], truth[key], rtol=1e-12, atol=1e-14)
    assert operator.engine == engine or engine == "auto"


def test_a_validation_loss_of_a_compiled_module():
    """What the compiler made lets nobody go through its graph more than once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)).double()
    compiled, lam = torch.compile(model, backend="aot_eager"), torch.ones((), dtype=torch.float64, requires_grad=True)
    F.cross_entropy(compiled(X.double()), Y).backward()
    train = lam * sum(p.square().sum() for p in model.parameters())

    def val(params):
        return F.cross_entropy(torch.func.functional_call(compiled, params, (X.double(),)), Y)

    expected = hg.hypergradient(F.cross_entropy(model(X.double()), Y), train, model, lam)
    torch.testing.assert_close(hg.hypergradient(val, train, compiled, lam), expected)
    with pytest.raises(ValueError, match="loss: expected a loss whose graph can be kept, got one computed by"):
        hg.inverse_hvp(F.cross_entropy(compiled(X.double()), Y), model, list(model.parameters()), damping=1.0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_of_a_compiled_function(backend):
    """Every function of ours breaks the graph, runs as it is, and says so where it must not be broken."""
    x = torch.randn(8, 3, dtype=torch.float64)

    def train(w):
        return F.softplus(x @ w).sum() + w.square().sum()

    def step(w):
        solution = hg.inverse_hvp(train, 2 * w, torch.ones_like(w), hg.CG(tol=1e-10))
        product = hg.Hessian(train, w) @ (2 * solution)
        return 3 * product + hg.hypergradient(train, lambda w: train(w) + (h * w**2).sum(), w, h)

    w, h = torch.randn(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(Exception, match="hypergrad_ext takes second derivatives"):
        torch.compile(step, backend=backend, fullgraph=True)(w)
    torch.testing.assert_close(torch.compile(step, backend=backend)(w), step(w))


def test_the_compiler_is_not_imported_where_nobody_compiles():
    """It takes as long to import as torch does."""
    lines = (
        "import sys, torch, hypergrad_ext as hg",
        "hg.inverse_hvp(lambda w: (w**4).sum(), torch.ones(3), torch.ones(3))",
        "assert 'torch._dynamo' not in sys.modules",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_autocast():
    torch.manual_seed(0)
    model = Attention()

    def loss(params):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model)(params)

    v = {key: t.float() for key, t in vector(model).items()}
    product = torch.cat([t.flatten() for t in (hg.Hessian(loss, model) @ v).values()])
    truth = torch.cat([t.flatten() for t in (hg.Hessian(loss_of(model), model) @ v).values()])
    # bfloat16 has 8 bits; the products pass through some ten operations.
    assert 1e-4 < float((product - truth).norm() / truth.norm()) < 10 * 2**-8


def test_nothing_is_left_switched_over():
    before = torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled()
    checkpoint_function = torch.utils.checkpoint.CheckpointFunction
    model = Attention()
    with pytest.raises(ZeroDivisionError):
        hg.Hessian(lambda params: 1 / 0, model) @ {key: t.float() for key, t in vector(model).items()}
    assert before == (torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled())
    assert torch.utils.checkpoint.CheckpointFunction is checkpoint_function


def test_threads_that_overlap_leave_nothing_switched_over():
    """The first one in is the first one out."""
    before = torch.backends.cuda.flash_sdp_enabled(), torch.utils.checkpoint.CheckpointFunction
    inside, outside = threading.Event(), threading.Event()
    w = torch.ones(3, dtype=torch.float64)
    seen = []

    def first(p):
        assert inside.wait(60)
        return (p**3).sum()

    def second(p):
        inside.set()
        assert outside.wait(60)
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return (p**3).sum()

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(lambda: hg.Hessian(first, w) @ w)
        one.add_done_callback(lambda _: outside.set())
        two = pool.submit(lambda: hg.Hessian(second, w) @ w)
        assert torch.equal(one.result(), two.result())
    assert seen == [False]
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.utils.checkpoint.CheckpointFunction)


def test_a_loss_that_was_computed_by_a_kernel_without_second_derivative_is_explained():
    model = Attention()
    v = {key: t.float() for key, t in vector(model).items()}
    with pytest.raises(ValueError, match="computed by aten::_scaled_dot_product.*pass the loss as a function"):
        hg.Hessian(F.cross_entropy(model(X), Y), model) @ v
    compiled = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(80, 3), nn.Tanh()), backend="aot_eager")
    with pytest.raises(ValueError, match="compiled by torch.compile.*pass the loss as a function"):
        hg.inverse_hvp(F.cross_entropy(compiled(X), Y), compiled, dict(compiled.named_parameters()))
