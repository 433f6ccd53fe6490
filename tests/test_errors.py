"""Bad input: the message names the argument, what was expected and what came; nothing is half-written."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hypergrad_ext as hg

W = torch.ones(3, requires_grad=True)
V = torch.ones(3)


def quadratic(w):
    return (w**2).sum()


class Losses:
    """Methods as losses."""

    def of_params(self, w):
        return quadratic(w)

    def of_more(self, w, penalty=2.0, *, offset=0.0):
        return penalty * quadratic(w) + offset

    def of_nothing(self):
        return quadratic(W)

    def of_two(self, w, penalty):
        return penalty * quadratic(w)


LOSS_CASES = {
    "not scalar": (lambda: W**2, ValueError, r"loss: expected a scalar, got shape \(3,\)"),
    "no graph": (lambda: (W.detach() ** 2).sum(), ValueError, "loss: expected a loss with a graph"),
    "integer": (lambda: torch.tensor(3), TypeError, "loss: expected a real floating point scalar, got torch.int64"),
    "complex": (lambda: (W * 1j).sum(), TypeError, "loss: .* got torch.complex64"),
    "a float": (lambda: 3.0, TypeError, "loss: expected a scalar tensor or a function of the parameters, got float"),
    "function of nothing": (lambda: lambda w: torch.ones(()), ValueError, "loss: expected a loss with a graph"),
    "function of no argument": (lambda: lambda: W, TypeError, "loss: expected a function of the parameters, got one"),
    "method of no argument": (lambda: Losses().of_nothing, TypeError, "loss: expected a function of the parameters"),
    "method of two": (lambda: Losses().of_two, TypeError, "loss: expected a function of the parameters, got one"),
    "function that returns a float": (lambda: lambda w: 1.0, TypeError, "loss: expected a function that returns"),
    "function that returns a vector": (lambda: lambda w: w, ValueError, r"loss: expected a scalar, got shape \(3,\)"),
    "independent of params": (lambda: (torch.ones(2, requires_grad=True) ** 2).sum(), ValueError, "depends on none"),
}

PARAMS_CASES = {
    "integer": (
        torch.ones(3, dtype=torch.int64),
        TypeError,
        "params: expected a real floating point tensor, got torch.int64",
    ),
    "complex": (torch.ones(3, dtype=torch.complex64), TypeError, "params: .* got torch.complex64"),
    "sparse": (
        torch.eye(3).to_sparse(),
        TypeError,
        "params: expected a dense tensor, got one of layout torch.sparse_coo",
    ),
    "empty list": ([], ValueError, "params: expected at least one tensor, got an empty list"),
    "no elements": (torch.ones(0, requires_grad=True), ValueError, "params: expected at least one element"),
    "not a tensor": ([W, 1.0], TypeError, r"params\[1\]: expected a tensor, got float"),
    "two devices": (
        [W, torch.ones(3, device="meta")],
        ValueError,
        r"params\[1\]: expected all tensors on cpu.*got meta",
    ),
    "twice": (
        {"a": W, "b": W},
        ValueError,
        r"params\['b'\]: expected every tensor once, got the same tensor as params\['a'\]",
    ),
    "frozen": ([W, torch.ones(3)], ValueError, r"params\[1\]: expected a parameter that requires grad"),
    "frozen module": (nn.ReLU(), ValueError, "params: expected a module with parameters that require grad"),
    "a string": ("weights", TypeError, "params: expected a tensor, list, tuple, dict or nn.Module, got str"),
}

VECTOR_CASES = {
    "shape": (torch.ones(4), ValueError, r"v: expected shape \(3,\), or that with one leading batch.* got \(4,\)"),
    "two leading dimensions": (torch.ones(2, 2, 3), ValueError, r"v: expected shape \(3,\), or"),
    "empty batch": (torch.ones(0, 3), ValueError, "v: expected at least one vector in the batch, got 0"),
    "count": ([V, V], ValueError, "v: expected 1 tensors.*got 2; a batch of vectors is one more"),
    "integer": (torch.ones(3, dtype=torch.int64), TypeError, "v: expected torch.float32.*got torch.int64"),
    "another float": (V.double(), TypeError, "v: expected torch.float32.*got torch.float64"),
    "device": (torch.ones(3, device="meta"), ValueError, "v: expected device cpu, got meta"),
    "none": (None, TypeError, "v: expected a tensor"),
}


def cases(table):
    return pytest.mark.parametrize(("value", "error", "message"), table.values(), ids=table.keys())


@cases(LOSS_CASES)
def test_loss(value, error, message):
    with pytest.raises(error, match=message):
        hg.inverse_hvp(value(), W, V)


@pytest.mark.parametrize("loss", [Losses().of_params, Losses().of_more], ids=["of params", "with defaults"])
def test_methods_are_losses(loss):
    assert torch.equal(hg.Hessian(loss, W) @ V, hg.Hessian(loss(W), W) @ V)


def test_losses_that_use_the_parameters_themselves():
    """What a function does not compute from its argument counted as a constant: half of the Hessian was missing."""
    net, x, lam = nn.Linear(3, 2), torch.randn(5, 3), torch.tensor(0.5, requires_grad=True)

    def good(params):
        # What is detached is meant to be constant.
        near = sum(((p - q.detach()) ** 2).sum() for p, q in zip(params.values(), net.parameters(), strict=True))
        return torch.func.functional_call(net, params, (x,)).square().mean() + lam.exp() * near

    def forgot_the_call(params):
        return net(x).square().mean() + lam * sum((p**2).sum() for p in params.values())

    def forgot_the_penalty(params):
        return torch.func.functional_call(net, params, (x,)).square().mean() + lam * net.weight.square().sum()

    params = dict(net.named_parameters())
    hg.hypergradient(good, good, net, lam, damping=1.0)
    for bad, more in ((forgot_the_call, " and 1 more"), (forgot_the_penalty, "")):
        message = rf"expected a function of its argument, got one that uses params\['weight'\]{more} itself"
        for run in (
            lambda bad=bad: hg.hypergradient(good, bad, net, lam, damping=1.0),
            lambda bad=bad: hg.hypergradient(bad, good, net, lam, damping=1.0),
            lambda bad=bad: hg.unroll(bad, net, lam, steps=2, lr=0.1),
            lambda bad=bad: hg.implicit(bad, net, lam, damping=1.0)["weight"].sum().backward(),
            lambda bad=bad: hg.GaussNewton(lambda p, _: bad(p), F.mse_loss, x, x, params=params),
        ):
            with pytest.raises(ValueError, match=message):
                run()


@cases(PARAMS_CASES)
def test_params(value, error, message):
    with pytest.raises(error, match=message):
        hg.inverse_hvp((W**2).sum(), value, V)


@cases(VECTOR_CASES)
def test_vector(value, error, message):
    with pytest.raises(error, match=message):
        hg.inverse_hvp(quadratic, W, value)


def test_vmap_is_referred_to_batches():
    with pytest.raises(
        TypeError, match=r"v: expected a plain tensor.*in the place of vmap give it a leading dimension"
    ):
        torch.func.vmap(lambda v: hg.inverse_hvp(quadratic, W, v))(torch.ones(2, 3))


def test_transforms_are_referred_to_loops():
    """torch said something of `requires_grad_` and `setup_context`."""
    lam = torch.tensor(1.0, requires_grad=True)
    near = lambda t: lambda w: ((w - t) ** 2).sum() + lam * (w**2).sum()  # noqa: E731
    for run in (
        lambda t: hg.inverse_hvp(near(t), W, V),
        lambda t: hg.hypergradient(near(t), near(t), W, lam),
        lambda t: hg.hypergradient(near(t), (W**2).sum() * lam, W, lam),
        lambda t: hg.implicit(near(t), W, lam),
        lambda t: hg.unroll(near(t), W, lam, steps=2, lr=0.1),
    ):
        with pytest.raises(NotImplementedError, match=r"_?loss: expected to be differentiated outside of torch.func's"):
            torch.func.vmap(run)(torch.ones(2, 3))


def test_batched_backward_passes_are_referred_to_loops():
    lam = torch.ones(3, requires_grad=True)
    best = hg.implicit(lambda w: (lam * (w - 1) ** 2).sum(), W, lam)
    with pytest.raises(TypeError, match="one of a backward pass with is_grads_batched.*call backward once for every"):
        torch.autograd.grad(best, lam, torch.eye(3), is_grads_batched=True)


def test_members_of_a_batch_must_agree():
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    loss = lambda p: quadratic(p[0]) + quadratic(p[1])  # noqa: E731
    with pytest.raises(ValueError, match=r"v\[1\]: expected shape \(4, 3\), got \(5, 3\)"):
        hg.inverse_hvp(loss, params, [torch.ones(4, 2), torch.ones(5, 3)])
    with pytest.raises(ValueError, match=r"v\[1\]: expected shape \(4, 3\), got \(3,\)"):
        hg.inverse_hvp(loss, params, [torch.ones(4, 2), torch.ones(3)])


def test_names_of_a_dict_must_agree():
    with pytest.raises(ValueError, match=r"v: expected the keys of params, got none for \['a'\]"):
        hg.inverse_hvp(lambda p: quadratic(p["a"]), {"a": W}, {"b": V})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"damping": -1.0}, ValueError, "damping: expected a finite number >= 0, got -1.0"),
        ({"damping": float("nan")}, ValueError, "damping: expected a finite number >= 0, got nan"),
        ({"damping": float("inf")}, ValueError, "damping: expected a finite number >= 0, got inf"),
        ({"damping": "much"}, ValueError, "damping: expected a number or 'auto', got 'much'"),
        ({"solver": "cg"}, TypeError, "solver: expected 'auto' or a solver such as Neumann.* got 'cg'"),
        ({"solver": hg.CG}, TypeError, "solver: expected 'auto' or a solver"),
        ({"unused": "ignore"}, ValueError, "unused: expected 'zeros' or 'error', got 'ignore'"),
        ({"x0": torch.ones(4)}, ValueError, r"x0: expected shape \(3,\), got \(4,\)"),
        ({"x0": torch.ones(2, 3)}, ValueError, r"x0: expected shape \(3,\), got \(2, 3\)"),
        ({"backend": "fast"}, ValueError, "backend must be one of .* got 'fast'"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' was asked for and cannot run"),
    ],
    ids=str,
)
def test_options(changes, error, message):
    with pytest.raises(error, match=message):
        hg.inverse_hvp(quadratic, W, V, **changes)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hg.Neumann(steps=-1), ValueError, "steps: expected at least 0, got -1"),
        (lambda: hg.Neumann(steps=2.5), TypeError, "steps: expected an integer, got 2.5"),
        (lambda: hg.Neumann(alpha=0.0), ValueError, "alpha: expected a finite number > 0, got 0.0"),
        (lambda: hg.Neumann(alpha=torch.ones(())), TypeError, "alpha: expected a number"),
        (lambda: hg.Neumann(tol=-1e-3), ValueError, "tol: expected a finite number > 0"),
        (lambda: hg.CG(tol=0.0), ValueError, "tol: expected a finite number > 0, got 0.0"),
        (lambda: hg.CG(max_steps=0), ValueError, "max_steps: expected at least 1, got 0"),
        (lambda: hg.CG(max_steps=True), TypeError, "max_steps: expected an integer, got True"),
        (lambda: hg.Neumann(steps="3"), TypeError, "steps: expected an integer, got '3'"),
        (lambda: hg.Chebyshev(steps=-1), ValueError, "steps: expected at least 0, got -1"),
        (lambda: hg.Chebyshev(tol=0.0), ValueError, "tol: expected a finite number > 0, got 0.0"),
        (lambda: hg.Chebyshev(bounds=(0.0, 1.0)), ValueError, "bounds: expected a finite number > 0, got 0.0"),
        (lambda: hg.Chebyshev(bounds=(2.0, 1.0)), ValueError, r"bounds: expected lower <= upper, got \(2.0, 1.0\)"),
        (lambda: hg.Chebyshev(bounds=1.0), TypeError, r"bounds: expected a pair \(lower, upper\), got 1.0"),
        (lambda: hg.MINRES(tol=-1.0), ValueError, "tol: expected a finite number > 0, got -1.0"),
        (lambda: hg.MINRES(max_steps=0), ValueError, "max_steps: expected at least 1, got 0"),
        *(
            (lambda make=make: make(20), ValueError, "tol: expected a number below 1, .* got 20; steps are max_steps=")
            for make in (hg.CG, hg.MINRES, hg.BlockCG, hg.Auto)
        ),
        *(
            (
                lambda make=make: make(tol=1.0),
                ValueError,
                "tol: expected a number below 1, .* got 1.0; steps are steps=",
            )
            for make in (hg.Neumann, hg.Chebyshev)
        ),
        (lambda: hg.Identity(alpha=-1.0), ValueError, "alpha: expected a finite number > 0"),
        (lambda: hg.Direct(max_size=0), ValueError, "max_size: expected at least 1, got 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_solver_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("preconditioner", "error", "message"),
    [
        (torch.ones(4), ValueError, r"preconditioner: expected shape \(3,\).* got \(4,\)"),
        (torch.ones(2, 3), ValueError, "preconditioner: expected one diagonal for all right-hand sides"),
        (
            torch.tensor([1.0, 0.0, 2.0]),
            ValueError,
            "preconditioner: expected positive entries .* got values from 0 to 2",
        ),
        (torch.tensor([1.0, -1.0, 2.0]), ValueError, "preconditioner: expected positive entries .* from -1 to 2"),
        (torch.tensor([1.0, float("nan"), 2.0]), ValueError, "preconditioner: expected positive entries"),
        (torch.tensor([1.0, float("inf"), 2.0]), ValueError, "preconditioner: expected positive entries"),
        (torch.tensor([1, 2, 3]), TypeError, "preconditioner: expected torch.float32.* got torch.int64"),
        ("jacobi", TypeError, "preconditioner: expected a tensor, list, .* got str"),
        (lambda v: v[:2], ValueError, r"preconditioner\(v\): expected the shapes of v"),
        (lambda v: -v, ValueError, "preconditioner: expected a positive definite one, got v.M v = -0.75"),
        (lambda v: v * float("nan"), ValueError, "preconditioner: expected a positive definite one, got v.M v = nan"),
        (hg.DenseMatrix(torch.eye(2)), ValueError, "preconditioner: expected an operator on the shapes"),
    ],
)
@pytest.mark.parametrize("make", [hg.CG, hg.Chebyshev, hg.Neumann])
def test_preconditioner(make, preconditioner, error, message):
    bounds = {"bounds": (1.0, 3.0)} if make is hg.Chebyshev else {}
    bounds |= {"alpha": 0.3} if make is hg.Neumann else {}
    with pytest.raises(error, match=message):
        hg.inverse_hvp(quadratic, W, V, make(preconditioner=preconditioner, **bounds))


@pytest.mark.parametrize("make", [hg.CG, hg.Chebyshev, hg.Neumann])
def test_preconditioner_that_is_found_to_be_indefinite_on_the_way(make):
    a, b = torch.arange(1.0, 7, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    indefinite = make(preconditioner=lambda v: torch.cat([v[:5], -v[5:] / 10]))
    with pytest.raises(ValueError, match=r"preconditioner: expected a positive definite one, got v.M v = -\d"):
        hg.solve(hg.Callable(lambda v: a * v, b), b, indefinite)


def test_direct_refuses_systems_that_do_not_fit():
    w = torch.ones(11, requires_grad=True)
    with pytest.raises(ValueError, match="max_size: expected at most 10 unknowns for Direct, got 11"):
        hg.inverse_hvp(quadratic, w, torch.ones(11), hg.Direct(max_size=10))


def test_freed_graph():
    loss = quadratic(torch.sin(W))
    loss.backward()
    W.grad = None
    with pytest.raises(ValueError, match="loss: expected a loss that still has its graph"):
        hg.inverse_hvp(loss, W, V)


@pytest.mark.parametrize("engine", ["auto", "eager", "native"])
def test_losses_from_before_an_optimisers_step(engine):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    lam = torch.ones((), requires_grad=True)
    step = torch.optim.SGD(net.parameters(), lr=0.1).step
    losses = lambda: (quadratic(net(torch.ones(2, 3))), quadratic(net(V)) + lam * quadratic(net[0].weight))  # noqa: E731
    message = "expected a loss of what params and hparams are now, .* before one of its tensors was changed"
    for _ in range(4):  # a graph of a known kind is not differentiated
        hg.hypergradient(*losses(), net, lam, damping=1.0, engine=engine)
    val, train = losses()
    train.backward(retain_graph=True)
    step()
    with pytest.raises(ValueError, match=f"val_loss: {message}"):
        hg.hypergradient(val, losses()[1], net, lam, damping=1.0, engine=engine)
    with pytest.raises(ValueError, match=f"train_loss: {message}"):
        hg.hypergradient(losses()[0], train, net, lam, damping=1.0, engine=engine)
    with pytest.raises(ValueError, match=f"^loss: {message}"):
        hg.inverse_hvp(train, net, {name: torch.ones_like(p) for name, p in net.named_parameters()}, engine=engine)


def test_losses_of_batches():
    lam = torch.ones((), requires_grad=True)
    of_two = lambda w, batch: lam * quadratic(w)  # noqa: E731
    with pytest.raises(
        TypeError, match="train_loss: .* does not take one; one of the parameters and a batch needs bat"
    ):
        hg.hypergradient(quadratic, of_two, W, lam)
    with pytest.raises(TypeError, match="val_loss: .* does not take one$"):
        hg.hypergradient(of_two, of_two, W, lam)
    for loss in (lambda w: lam * quadratic(w), lambda w, x, y: lam * quadratic(w)):
        with pytest.raises(TypeError, match="train_loss: expected a function of the parameters and a batch"):
            hg.hypergradient(quadratic, loss, W, lam, batches=[1, 2])


def test_solve_wants_an_operator():
    with pytest.raises(TypeError, match="operator: expected a LinearOperator"):
        hg.solve(torch.eye(3), V)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(2, 3), ValueError, r"matrix: expected shape \(n, n\), got \(2, 3\)"),
        (torch.ones(3), ValueError, r"matrix: expected shape \(n, n\), got \(3,\)"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "matrix: expected a real floating point tensor"),
        (torch.ones(0, 0), ValueError, "matrix: expected at least one element"),
        ([[1.0]], TypeError, "matrix"),
    ],
    ids=str,
)
def test_dense_matrix(matrix, error, message):
    with pytest.raises(error, match=message):
        hg.DenseMatrix(matrix)


class TestHypergradient:
    lam = torch.zeros(3, requires_grad=True)

    def train(self, w):
        return ((w - 1) ** 2 + self.lam.exp() * w**2).sum()

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"hparams": torch.zeros(3)}, ValueError, "hparams: expected a hyperparameter that requires grad"),
            ({"hparams": []}, ValueError, "hparams: expected at least one tensor"),
            ({"hparams": [W]}, ValueError, r"hparams\[0\]: expected a tensor that is not among params, got params"),
            ({"hparams": "lam"}, TypeError, "hparams: expected a tensor, list, tuple, dict or nn.Module, got str"),
            ({"val_loss": lambda w: w}, ValueError, r"val_loss: expected a scalar, got shape \(3,\)"),
            ({"val_loss": 1.0}, TypeError, "val_loss: expected a scalar tensor or a function"),
            ({"val_loss": quadratic(lam)}, ValueError, "val_loss: expected a loss that depends on params"),
            ({"train_loss": lambda w: w}, ValueError, r"train_loss: expected a scalar, got shape \(3,\)"),
            ({"damping": -1}, ValueError, "damping: expected a finite number >= 0, got -1"),
        ],
        ids=lambda x: None,
    )
    def test_refuses(self, changes, error, message):
        arguments = {"val_loss": quadratic, "train_loss": self.train, "params": W, "hparams": self.lam} | changes
        with pytest.raises(error, match=message):
            hg.hypergradient(**arguments)
        assert self.lam.grad is None and W.grad is None

    @pytest.mark.parametrize("loss_scale", [1.0, 2.0])
    def test_a_training_loss_is_looked_at_before_it_runs(self, loss_scale):
        for loss, message in (
            (
                lambda: self.train(W),
                "train_loss: expected a function of the parameters, got one that does not take one",
            ),
            (3, "train_loss: expected a scalar tensor or a function of the parameters, got int"),
            (lambda w: None, "train_loss: expected a function that returns a scalar tensor, got NoneType"),
        ):
            with pytest.raises(TypeError, match=message):
                hg.hypergradient(quadratic, loss, W, self.lam, loss_scale=loss_scale)

    @pytest.mark.parametrize("loss_scale", [1.0, 2.0])
    def test_a_wrapper_may_take_less_than_what_it_wraps(self, loss_scale):
        def with_data(function):
            return functools.wraps(function)(lambda *arguments: function(*arguments, self.lam))

        train = with_data(lambda w, lam: ((w - 1) ** 2 + lam.exp() * w**2).sum())
        grads = [hg.hypergradient(quadratic, f, W, self.lam, loss_scale=loss_scale) for f in (train, self.train)]
        assert torch.equal(*grads)

    def test_a_validation_tensor_wants_parameters_that_require_grad(self):
        w = torch.ones(3)
        with pytest.raises(ValueError, match="params: expected a parameter that requires grad"):
            hg.hypergradient((w * self.lam).sum(), lambda w: (w**2 * self.lam).sum(), w, self.lam)

    def test_implicit_checks_before_the_backward_pass(self):
        with pytest.raises(ValueError, match="hparams: expected a hyperparameter that requires grad"):
            hg.implicit(self.train, W, torch.zeros(3))
        with pytest.raises(TypeError, match="train_loss: expected a scalar tensor or a function"):
            hg.implicit(None, W, self.lam)


class TestApproxInverseHvp:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"f": [torch.ones(3)]}, ValueError, "f: expected a gradient with its graph"),
            ({"f": [2 * W, 2 * W]}, ValueError, "f: expected 1 tensors, one for each parameter, got 2"),
            ({"f": [2 * W[:2]]}, ValueError, "f: expected the shapes of params"),
            ({"v": [torch.ones(4)]}, ValueError, r"v\[0\]: expected shape"),
            ({"iterations": -1}, ValueError, "iterations: expected at least 0, got -1"),
            ({"alpha": 0}, ValueError, "alpha: expected a finite number > 0, got 0"),
        ],
        ids=str,
    )
    def test_refuses(self, changes, error, message):
        arguments = {"v": [V], "f": [2 * W], "params": [W]} | changes
        with pytest.raises(error, match=message):
            hg.approx_inverse_hvp(**arguments)
